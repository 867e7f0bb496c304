"""Corpora: texts as ids in memory maps. A text is encoded once and cached by its content.

The cache folder is `$CHARLM_CACHE`, else `$XDG_CACHE_HOME/charlm`, else `~/.cache/charlm`. Its folder `corpora/` contains one
entry for each text and set of options (`entries`). Its folder `downloads/` contains the files that were downloaded, and
`fingerprints/` the hashes of unchanged files. The cache can be deleted at any time; charlm then encodes and downloads again.
"""

import codecs
import contextlib
import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from charlm.data import entries
from charlm.data import text as texts
from charlm.data.archives import split_member
from charlm.data.corpora import find_source
from charlm.data.documents import Documents
from charlm.data.sources import Source, counts_symbols, part_lengths
from charlm.data.vocab import NUM_CODE_POINTS, Vocab, count_code_points
from charlm.system.cache import cache_dir
from charlm.system.errors import CorpusError
from charlm.system.files import flush_to_disk
from charlm.system.progress import ByteProgress, say

# The version of the encoding. It must be increased when the same text and options give different ids.
_FORMAT = 3


class Corpus(NamedTuple):
    """An encoded text: three memory maps of ids, shape (symbols,), in the dtype of the vocabulary.

    Attributes:
        name: the name of a built-in corpus, or the path or URL from the config.
        sha256: the hash of the text if it is known (`sources.Source.sha256`), or of the files (`sources.Source.fingerprint`).
        vocab: the map between symbols and ids.
        train: the ids of the training text.
        val: the ids of the validation text, possibly none.
        test: the ids of the test text, possibly none.
        symbols_per_char: the mean number of symbols for each character of the training text: 1 for chars, 1 to 4 for bytes.
        boundary: the id of the symbol between documents (`documents`); None for a text without documents.
    """

    name: str
    sha256: str
    vocab: Vocab
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    symbols_per_char: float
    boundary: int | None = None

    def split(self, name: str) -> np.ndarray:
        """Return the ids of `train`, `val` or `test`."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]


def load_corpus(data: ConfigDict, base: Vocab | None = None) -> Corpus:
    """Return the corpus of `config.data`, from the cache if it is encoded already.

    Args:
        data: `config.data`.
        base: a vocabulary to start from. With `data.vocab_from` it is kept; otherwise the symbols of the text are added.

    Raises:
        CorpusError: the text is missing, empty, damaged or not UTF-8, its download fails, the package of the built-in corpus is
            missing, the text changes during reading, or the cache cannot be written.
        ConfigError: the corpus does not exist, or does not fit other keys.
    """
    source = find_source(data)
    if source.files:
        fingerprint = entries.remember_sha256(source.files, source.identity(), source.fingerprint)
    else:
        fingerprint = source.fingerprint()
    options = [_FORMAT, fingerprint, data.vocab, data.max_symbols, data.unknown, data.lowercase, list(source.split)]
    if data.documents:
        options += ["documents", data.documents]
    if base is not None:
        options += [base.to_json(), data.vocab_from is not None]
    key = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:32]
    meta, ids = entries.open_or_create(
        cache_dir() / "corpora" / key, source.name, lambda folder: _encode(source, fingerprint, data, base, folder)
    )
    for key, length in (("val_path", meta.lengths[1]), ("test_path", meta.lengths[2])):
        if data[key] is not None and not length:
            raise CorpusError(f"data.{key} {data[key]} is empty; it must contain text")
    train_end, val_end, end = itertools.accumulate(meta.lengths)
    parts = ids[:train_end], ids[train_end:val_end], ids[val_end:end]
    documents = Documents.from_config(data)
    boundary = None if documents is None else documents.boundary_id(meta.vocab)
    return Corpus(source.name, meta.sha256, meta.vocab, *parts, meta.symbols_per_char, boundary)


def _encode(source: Source, fingerprint: str, data: ConfigDict, base: Vocab | None, folder: Path) -> entries.Meta:
    """Write the ids of a text into a folder, in constant memory; return their meta data.

    The source is read once, because expanding an archive and splitting documents take long. A copy of the text waits on the
    disk until the vocabulary is known. The copy has no name, so nothing is left of it, even if the process is killed.
    """
    # Numbers of bytes may end a part inside a character, so bytes are cut and not text.
    cut_bytes = data.vocab == "bytes" and counts_symbols(source.split)
    counts, totals = np.zeros(NUM_CODE_POINTS, np.int64), [0, 0, 0]
    with contextlib.ExitStack() as stack:
        copies = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(3)]
        with ByteProgress(f"reading {source.name}", source.num_bytes()) as progress:
            for i, piece in source.read(progress.advance):
                copied = piece.encode("utf-8", "surrogateescape")
                copies[i].write(copied)
                totals[i] += len(copied) if cut_bytes else len(piece)
                if data.vocab == "chars":
                    found = count_code_points(piece)
                    counts[: len(found)] += found
        if not totals[0]:
            raise CorpusError(f"the corpus {source.name} is empty; it must contain text to train on")
        if data.documents:  # The boundary is in the vocabulary, however rare it is.
            counts[ord(Documents.from_config(data).boundary)] = np.iinfo(np.int64).max
        vocab = _vocab(data, base, counts)
        lengths = [[totals[i] if part == i else 0 for part in range(3)] for i in range(3)]
        if source.documents is None:  # Documents are in their parts already.
            lengths[0] = part_lengths(totals[0], source.split, source.name)
        if sum(lengths[0]) < totals[0]:
            say(f"data.split uses the first {sum(lengths[0]):,} of {totals[0]:,} symbols of {source.name}")
        written, train_chars, encode = [0, 0, 0], 0, vocab.encoder()
        with (
            open(folder / "ids.bin", "wb") as file,
            ByteProgress(f"encoding {source.name}", sum(copy.tell() for copy in copies)) as progress,
        ):
            for copy, ends in zip(copies, lengths):
                for part, piece in _cut_into_parts(_pieces(copy, cut_bytes, progress.advance), ends):
                    ids = piece if cut_bytes else encode(piece)
                    file.write(ids)
                    written[part] += len(ids)
                    train_chars += vocab.num_chars(ids) if part == 0 else 0
            flush_to_disk(file)
    if source.fingerprint() != fingerprint:
        # Either the text has changed, or the remembered hash was wrong. The next start reads the text again.
        entries.forget_sha256(source.files, source.identity())
        raise CorpusError(f"the corpus {source.name} changed while it was read; start again when the file is complete")
    return entries.Meta(vocab, tuple(written), source.sha256 or fingerprint, written[0] / max(train_chars, 1))


def _vocab(data: ConfigDict, base: Vocab | None, counts: np.ndarray) -> Vocab:
    """Return the vocabulary of a text with these numbers of occurrences, shape (NUM_CODE_POINTS,)."""
    if data.vocab == "bytes":
        return Vocab.all_bytes()
    if base is not None and data.vocab_from is not None:
        return base
    own = Vocab.from_counts(counts, data.max_symbols, data.unknown)
    return own if base is None else Vocab.from_chars(own.symbols + base.symbols, own.unknown or base.unknown)


def _pieces(copy: IO[bytes], as_bytes: bool, advance: Callable[[int], None]) -> Iterator[str | np.ndarray]:
    """Yield the text of a file from its beginning, or its bytes, shape (n,). `advance` gets the number of bytes of a read."""
    copy.seek(0)

    def blocks() -> Iterator[bytes]:
        while block := copy.read(texts.PIECE_BYTES):
            advance(len(block))
            yield block

    yield from (np.frombuffer(block, np.uint8) for block in blocks()) if as_bytes else codecs.iterdecode(blocks(), "utf-8")


def _cut_into_parts(pieces: Iterable[str | np.ndarray], lengths: Sequence[int]) -> Iterator[tuple[int, str | np.ndarray]]:
    """Yield (index of the part, piece) for the pieces of a text. A piece that spans several parts is cut.

    Args:
        pieces: the text, or its bytes, shape (n,).
        lengths: the lengths of the three parts. What follows them belongs to no part.
    """
    part, left = 0, lengths[0]
    for piece in pieces:
        while len(piece):
            while not left:
                part += 1
                if part == len(lengths):
                    return
                left = lengths[part]
            head, piece = piece[:left], piece[left:]
            left -= len(head)
            yield part, head


def encode_file(path: Path, vocab: Vocab, lowercase: bool, documents: Documents | None = None) -> np.ndarray:
    """Return a text file as ids of a vocabulary, shape (symbols,).

    Args:
        path: a UTF-8 file, or an archive of such files.
        vocab: the vocabulary.
        lowercase: whether to lower-case the text.
        documents: how to split the text into documents; None: it is not split.

    Raises:
        CorpusError: the file is unreadable or not UTF-8, or a symbol is not in the vocabulary. The message names the position.
    """
    parts, encode = [np.zeros(0, vocab.dtype)], vocab.encoder()
    file, member = split_member(str(path))
    files, advance = [Path(file)], lambda size: None
    if documents is None:
        pieces = texts.read_files(files, "\n", lowercase, advance, member)
    else:
        each = texts.read_each(files, lowercase, advance, member)
        pieces = (piece for _, piece in documents.split_into_parts(each, (1.0, 0.0, 0.0)))
    for piece in pieces:
        try:
            parts.append(encode(piece))
        except CorpusError as error:
            hint = "a model trained with data.unknown or data.vocab=bytes can score any text"
            raise CorpusError(f"{path}: {error}; {hint}") from None
    return np.concatenate(parts)
