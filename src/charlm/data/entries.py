"""Entries of the cache: encoded texts. An entry is written atomically and verified when it is opened.

An entry is a folder with two files. `ids.bin` holds the ids of the three parts, one part after another. `meta.json` holds
`{"content": ..., "sha256": the hash of the content}`, and the content holds the hash of `ids.bin`.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from charlm.data.text import file_sha256
from charlm.data.vocab import Vocab
from charlm.system.cache import cache_dir
from charlm.system.errors import CorpusError
from charlm.system.files import flush_folder_to_disk, read_json, read_text, text_sha256, write_text
from charlm.system.locks import exclusive_lock
from charlm.system.progress import ByteProgress, say

# Ids up to this size are hashed at every start, which takes about 0.02 s. The hash of larger ids is remembered while their file
# is unchanged.
_ALWAYS_HASHED_BYTES = 1 << 24
# Two changes of a file within this time may leave the same timestamps.
_TIMESTAMP_RESOLUTION_NS = 2 * 10**9


class Meta(NamedTuple):
    """What an entry says of its ids.

    Attributes:
        vocab: the vocabulary of the ids.
        lengths: the numbers of ids in the training, validation and test parts.
        sha256: the value of `Corpus.sha256`.
        symbols_per_char: the value of `Corpus.symbols_per_char`.
    """

    vocab: Vocab
    lengths: tuple[int, int, int]
    sha256: str
    symbols_per_char: float


class _Damaged(Exception):
    """An entry is not what was written. The message says why."""


def open_or_create(entry: Path, name: str, write: Callable[[Path], Meta]) -> tuple[Meta, np.ndarray]:
    """Return (meta, memory map of the ids) of an entry, verified. Create the entry if it does not exist.

    A damaged entry is put aside, with a message, and created again. If another process is creating the entry, wait for it.

    Args:
        entry: the folder of the entry.
        name: the name of the text, for messages.
        write: writes `ids.bin` into a new folder and returns its meta data.

    Raises:
        CorpusError: the entry cannot be written, or `write` raises it.
    """
    with contextlib.suppress(_Damaged):
        if found := _open(entry):
            return found
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(entry.with_name(entry.name + ".lock"), f"encoding {name}"):
            try:
                if found := _open(entry):
                    return found
            except _Damaged as damage:
                aside = entry.with_name(entry.name + ".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                entry.rename(aside)
                say(f"the cache entry {entry} of {name} is damaged: {damage}; moved to {aside}, and the text is encoded again")
            _create(entry, write)
            found = _open(entry)
            assert found is not None
            return found
    except _Damaged as damage:
        raise CorpusError(f"the new cache entry {entry} is damaged: {damage}; set CHARLM_CACHE to another disk") from None
    except OSError as error:
        raise CorpusError(
            f"cannot write the encoded corpus to {entry.parent}: {error.strerror}; set CHARLM_CACHE to another folder"
        ) from None


def _create(entry: Path, write: Callable[[Path], Meta]) -> None:
    """Create an entry under another name, and rename it when it is complete."""
    partial = entry.with_name(entry.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        meta = write(partial)
        content = {"entry": entry.name, **meta._asdict(), "vocab": meta.vocab.to_json()}
        content["ids_sha256"] = file_sha256(partial / "ids.bin")
        write_text(partial / "meta.json", json.dumps({"content": content, "sha256": _content_sha256(content)}))
        partial.rename(entry)
        flush_folder_to_disk(entry.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _content_sha256(content: Any) -> str:
    return text_sha256(json.dumps(content, sort_keys=True))


def _open(entry: Path) -> tuple[Meta, np.ndarray] | None:
    """Return (meta, ids) of an entry; None if there is none. Raises _Damaged if it is not what was written."""
    if not entry.exists() and not entry.is_symlink():
        return None
    path = entry / "ids.bin"
    try:
        loaded = read_json(entry / "meta.json", CorpusError)
        content = loaded["content"]
        if loaded["sha256"] != _content_sha256(content) or content["entry"] != entry.name:
            raise _Damaged("the hash of meta.json does not match")
        vocab = Vocab.from_json(content["vocab"])
        meta = Meta(vocab, tuple(content["lengths"]), content["sha256"], content["symbols_per_char"])
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size != sum(meta.lengths) * vocab.dtype.itemsize:
            raise _Damaged("ids.bin has another size")
        small = found.st_size <= _ALWAYS_HASHED_BYTES
        ids_sha256 = _hash_ids(path) if small else remember_sha256([path], "", lambda: _hash_ids(path))
        if ids_sha256 != content["ids_sha256"]:
            raise _Damaged("the hash of ids.bin does not match")
        return meta, np.memmap(path, vocab.dtype, "r")
    except (OSError, CorpusError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Damaged(f"it cannot be read ({' '.join(str(error).split())[:200] or type(error).__name__})") from None


def _hash_ids(path: Path) -> str:
    with ByteProgress(f"checking {path}", path.stat().st_size) as progress:
        return file_sha256(path, progress.advance)


def remember_sha256(paths: Sequence[Path], separator: str, compute: Callable[[], str]) -> str:
    """Return the hash of some files, from the cache if the files are unchanged.

    Without this cache, reading gigabytes would dominate the start of every run. A changed file is recognised by its size, its
    timestamps or its inode number. Timestamps have a limited resolution, so the hash of a file that changed a moment ago is
    not remembered.

    Args:
        paths: the files.
        separator: a text on which the hash also depends.
        compute: reads the files and returns their hash, 64 hexadecimal digits.
    """
    before = _stamp(paths)
    cached = _remembered(separator, before)
    with contextlib.suppress(CorpusError, ValueError):
        digest, check = read_text(cached, CorpusError).split()
        # A damaged file, or one that belongs to other files, is ignored.
        if before and check == text_sha256(cached.name + digest):
            return digest
    digest = compute()
    if before and _stamp(paths) == before and _age_ns(before) > _TIMESTAMP_RESOLUTION_NS:
        with contextlib.suppress(OSError):  # Without the remembered hash, the next start reads the files again.
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_text(cached, f"{digest} {text_sha256(cached.name + digest)}\n")
    return digest


def _age_ns(stamp: list) -> int:
    """Return the time since the last change of some files, in nanoseconds."""
    return time.time_ns() - max(max(each[2:4]) for each in stamp)


def forget_sha256(paths: Sequence[Path], separator: str) -> None:
    """Delete the remembered hash of some files."""
    with contextlib.suppress(OSError):
        _remembered(separator, _stamp(paths)).unlink()


def _remembered(separator: str, stamp: list | None) -> Path:
    """Return the path of the file that remembers a hash."""
    return cache_dir() / "fingerprints" / hashlib.sha256(json.dumps([separator, stamp]).encode()).hexdigest()


def _stamp(paths: Sequence[Path]) -> list | None:
    """Return what changes whenever a file changes; None if a file cannot be found."""
    try:
        found = [(os.fspath(path.resolve()), path.stat()) for path in paths]
    except OSError:
        return None
    return [[name, each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino] for name, each in found]
