"""Archives: zip, gzip and bzip2. Their members are read as streams, and nothing is written under a name from an archive.

An archive may be hostile. It may not hold names that lead out of it, links, or members that expand without limit.
"""

import bz2
import contextlib
import fnmatch
import glob
import gzip
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from charlm.system.errors import CorpusError

# An archive that expands to more than 200 times its size is refused, unless it expands to at most 64 MiB. Compression rarely
# makes text smaller than a tenth, so an ordinary archive stays far below these limits.
_MAX_RATIO, _ALWAYS_ALLOWED_BYTES = 200, 1 << 26
_SUFFIXES = {".zip": "zip", ".gz": "gzip", ".bz2": "bzip2"}
_HINT = "extract the text from it, and name the text"
_READ_BYTES = 1 << 16


class File(NamedTuple):
    """A file that holds text, or one text in an archive.

    Attributes:
        path: the file on the disk.
        kind: `zip`, `gzip` or `bzip2`; None: the file is the text.
        member: the name of the text in a zip archive.
    """

    path: Path
    kind: str | None = None
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}#{self.member}"


def split_member(path: str) -> tuple[str, str | None]:
    """Return (path, pattern of members) for a path such as `texts.zip#*.txt`; the pattern is None if there is none.

    A `#` that belongs to the name of an existing file separates nothing.
    """
    for at in (match.start() for match in re.finditer("#", path) if not _names_files(path)):
        if _names_files(path[:at]):
            return path[:at], path[at + 1 :]
    return path, None


def _names_files(path: str) -> bool:
    """Return whether a path or a pattern names something that exists."""
    return bool(path) and (os.path.exists(path := os.path.expanduser(path)) or any(glob.iglob(path, recursive=True)))


def find_texts(path: Path, pattern: str | None = None) -> list[File]:
    """Return the texts in a file: the file itself, or the members of an archive in the order of their names.

    Args:
        path: a file. Its first bytes say whether it is an archive.
        pattern: the name of a member of a zip archive, or a pattern with `*`, `?` or `[...]`, which also match `/`. None: all
            members. A name with a part that begins with a dot must be given in full.

    Raises:
        CorpusError: the archive is damaged or hostile, or no member matches.
    """
    kind = _kind(path)
    if kind == "zip":
        return _zip_members(path, pattern)
    if pattern is not None:
        raise CorpusError(f"{path} is not a zip file, so it has no member {pattern!r}; name the file without #{pattern}")
    return [File(path, kind)]


@contextlib.contextmanager
def open_text(file: File, advance: Callable[[int], None]) -> Iterator[IO[bytes]]:
    """Open a text for reading. `advance` is called with the number of bytes of every read from the disk.

    Raises:
        CorpusError: the text is a device. A read raises it if the archive is damaged or expands too far.
        OSError: the file cannot be read.
    """
    with open(file.path, "rb") as raw:
        mode = os.fstat(raw.fileno()).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise CorpusError(f"{file} is a device, not a text; name a UTF-8 file")
        counted = _Counted(raw, advance)
        if file.kind is None:
            yield counted
            return
        limit, size = _max_bytes(file.path), None
        if file.kind == "zip":
            with _damage(file), zipfile.ZipFile(counted) as archive:
                info = archive.getinfo(file.member)
                opened, limit, size = archive.open(info), info.file_size, info.file_size
        else:
            opened = gzip.GzipFile(fileobj=counted) if file.kind == "gzip" else _Bzip2(counted)
        with ThreadPoolExecutor(1) as thread:
            yield _Ahead(_Expanded(file, opened, limit, size), thread)


def _kind(path: Path) -> str | None:
    """Return the kind of an archive; None if the file is none. Raises CorpusError if its name says that it is one."""
    if not path.is_file():  # Reading from a pipe would take its first bytes away.
        return None
    with open(path, "rb") as file:
        start = file.read(10)
    kinds = {"zip": rb"PK(\x03\x04|\x05\x06)", "gzip": rb"\x1f\x8b", "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"}
    found = next((kind for kind, magic in kinds.items() if re.match(magic, start)), None)
    named = _SUFFIXES.get(path.suffix.lower())
    if named and found != named:
        raise CorpusError(f"{path} is not a {named} file, although its name says so; it may be damaged or incomplete")
    return found


def _max_bytes(path: Path) -> int:
    """Return the number of bytes to which an archive may expand."""
    return max(_ALWAYS_ALLOWED_BYTES, _MAX_RATIO * path.stat().st_size)


def _zip_members(path: Path, pattern: str | None) -> list[File]:
    """Return the members of a zip archive that match a pattern, in the order of their names. Raises CorpusError."""
    with open(path, "rb") as raw, _damage(path), zipfile.ZipFile(raw) as archive:
        infos = archive.infolist()
    for info in infos:
        parts = re.split(r"[/\\]", info.orig_filename)
        if ".." in parts or not parts[0] or re.match("[A-Za-z]:", parts[0]) or "\0" in info.orig_filename:
            raise CorpusError(f"{path} has the member {info.orig_filename[:100]!r}, which leads out of the archive; {_HINT}")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise CorpusError(f"{path} has the member {info.filename[:100]!r}, a link or a device; {_HINT}")
    infos = [info for info in infos if not info.is_dir()]
    chosen = {info.filename: info for info in infos if _matches(info.filename, pattern)}
    if not chosen:
        wanted = "no file" if pattern is None else f"no member {pattern[:100]!r}"
        some = ", ".join(info.filename[:100] for info in infos[:5])
        raise CorpusError(f"{path} has {wanted}" + (f"; it has {some}{', ...' if len(infos) > 5 else ''}" if infos else ""))
    for name, info in chosen.items():
        if sum(other.filename == name for other in infos) > 1:
            raise CorpusError(f"{path} has the member {name[:100]!r} twice; {_HINT}")
        if info.flag_bits & 1:
            raise CorpusError(f"{path}: the member {name[:100]!r} is encrypted; {_HINT}")
        # The library expands other methods without a limit on memory.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            method = zipfile.compressor_names.get(info.compress_type, info.compress_type)
            raise CorpusError(f"{path}: the member {name[:100]!r} is compressed by {method}, not by deflate; {_HINT}")
    if sum(info.file_size for info in chosen.values()) > _max_bytes(path):
        raise _expands(path)
    return [File(path, "zip", name) for name in sorted(chosen, key=lambda name: PurePosixPath(name).parts)]


def _matches(name: str, pattern: str | None) -> bool:
    """Return whether the name of a member matches a pattern."""
    hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
    return name == pattern or (not hidden and (pattern is None or fnmatch.fnmatchcase(name, pattern)))


def _expands(file: File | Path) -> CorpusError:
    return CorpusError(f"{file} expands to more than {_MAX_RATIO} times its size; if this is intended, {_HINT}")


@contextlib.contextmanager
def _damage(file: File | Path) -> Iterator[None]:
    """Turn what a library raises for a damaged archive into a CorpusError. An error of the disk stays an OSError."""
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:  # The libraries raise errors of a dozen types for damaged archives.
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CorpusError(f"{file} is a damaged or incomplete archive: {reason}") from None


class _Counted:
    """A file that says how many bytes are read from it."""

    def __init__(self, raw: IO[bytes], advance: Callable[[int], None]):
        self._raw, self._advance = raw, advance
        self.seek, self.tell, self.seekable, self.close = raw.seek, raw.tell, raw.seekable, raw.close

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        self._advance(len(data))
        return data


class _Expanded:
    """The expanded bytes of an archive or of a member, up to a limit.

    Args:
        file: the name for messages.
        opened: what expands the bytes.
        limit: the most bytes.
        size: the exact number of bytes; None if it is unknown.
    """

    def __init__(self, file: File, opened: Any, limit: int, size: int | None = None):
        self._file, self._opened, self._limit, self._size, self._done = file, opened, limit, size, 0

    def read(self, size: int) -> bytes:
        with _damage(self._file):
            data = self._opened.read(size)
        self._done += len(data)
        if self._done > self._limit:
            raise _expands(self._file)
        if not data and self._size not in (None, self._done):
            raise CorpusError(f"{self._file} is a damaged archive: it has {self._done:,} bytes, not {self._size:,}")
        return data


class _Ahead:
    """A text that is read ahead: a thread expands the next block while the last one is used. All blocks have the same size."""

    def __init__(self, opened: _Expanded, thread: Executor):
        self._opened, self._thread, self._next = opened, thread, None

    def read(self, size: int) -> bytes:
        data = (self._next or self._thread.submit(self._opened.read, size)).result()
        self._next = self._thread.submit(self._opened.read, size)
        return data


class _Bzip2:
    """The bytes of a bzip2 file. Unlike `bz2.open`, it refuses what follows the last stream, which may be a damaged one."""

    def __init__(self, raw: _Counted):
        self._raw, self._decompressor = raw, bz2.BZ2Decompressor()

    def read(self, size: int) -> bytes:
        pieces = []
        while size:
            if self._decompressor.eof:
                rest = self._decompressor.unused_data or self._raw.read(_READ_BYTES)
                if not rest:
                    break
                self._decompressor = bz2.BZ2Decompressor()
            else:
                rest = self._raw.read(_READ_BYTES) if self._decompressor.needs_input else b""
                if not rest and self._decompressor.needs_input:
                    raise EOFError("it ends before the end of its data")
            pieces.append(self._decompressor.decompress(rest, size))
            size -= len(pieces[-1])
        return b"".join(pieces)
