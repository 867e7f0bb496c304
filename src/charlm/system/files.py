"""Read and write small files: only regular files are read, and a file appears only when it is complete."""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from charlm.system.errors import UserError, WorkdirError
from charlm.system.progress import say


def read_text(path: Path, error: type[UserError] = WorkdirError, errors: str = "strict") -> str:
    """Return the text of a UTF-8 file. A folder, a device or a pipe is not opened, because reading it could wait forever.

    Args:
        path: the file.
        error: the type of the error if the file cannot be read.
        errors: what happens to bytes that are not UTF-8, as in `open`.

    Raises:
        UserError: of the type `error`. The message names the file.
    """
    try:
        # Opening a named pipe would wait for its other end.
        with open(path, encoding="utf-8", errors=errors, newline="", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(f"cannot read {path}: it is not a regular file")
            return file.read()
    except UnicodeDecodeError as problem:
        raise error(f"cannot read {path}: it is not UTF-8 ({problem.reason} at byte offset {problem.start})") from None
    except (OSError, ValueError) as problem:  # A path with a null byte is a ValueError.
        raise error(f"cannot read {path}: {getattr(problem, 'strerror', None) or problem}") from None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_json(path: Path, error: type[UserError] = WorkdirError) -> Any:
    """Return the JSON value in a file. Raises an error of the type `error` as `read_text` does, or if the file is not JSON."""
    try:
        return json.loads(read_text(path, error))
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not JSON: {' '.join(str(problem).split())[:200]}") from None


def read_json_lines(path: Path, is_sound: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Return the objects in a file of one JSON object a line, without the lines that are damaged; [] if there is no file.

    A message says how many lines are damaged. An incomplete last line is left out without a message, because a process that is
    killed while it writes leaves one.

    Args:
        path: the file.
        is_sound: whether an object has the fields that a line must have.

    Raises:
        WorkdirError: the file cannot be read.
    """
    if not os.path.lexists(path):
        return []
    *lines, last = read_text(path, errors="replace").split("\n")
    found = [_parse_line(line, is_sound) for line in lines if line.strip()]
    if damaged := found.count(None):
        say(f"{path}: {damaged} of {len(found)} lines are damaged and left out")
    return [each for each in [*found, _parse_line(last, is_sound)] if each is not None]


def _parse_line(line: str, is_sound: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """Return the object in a line; None if the line is damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(line)
        return value if isinstance(value, dict) and is_sound(value) else None
    return None


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 1 << 63


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: after a crash the file has either its old or its new content.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    # A lone surrogate, which JSON can contain, is not UTF-8.
    try:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
            flush_to_disk(file)
        partial.replace(path)
    except OSError:  # The disk is full, or a folder has the name.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    flush_folder_to_disk(path.parent)


def flush_to_disk(file: IO[Any]) -> None:
    """Write everything that was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder_to_disk(folder: Path) -> None:
    """Write the names of the files in a folder to the disk, so that a new or renamed file survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_sha256(text: str) -> str:
    """Return the sha256 of a text in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
