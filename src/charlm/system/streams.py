"""The standard streams of a command. They may be closed, full, or unable to encode a character."""

import atexit
import contextlib
import io
import os
import sys
from typing import TextIO

from charlm.system.errors import RunFailed


class _ClosedOutput(io.TextIOWrapper):
    """Stands for a stdout that is closed. What libraries print is discarded; `write_output` refuses to write."""


def prepare_streams() -> None:
    """Make stdin, stdout and stderr usable, even if the command was started without them.

    Without this, the next file that is opened gets the number of a closed stream, and messages would be written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # It gets the lowest free number, which is that of the closed stream.
    if sys.stdout is None:
        sys.stdout = _ClosedOutput(open(1, "wb", closefd=False), encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        # A message that names a file must not fail because the terminal cannot show a character.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    atexit.unregister(_end_messages)
    atexit.register(_end_messages)


def write_output(text: str) -> None:
    """Write a text to stdout at once.

    Raises:
        BrokenPipeError: the reader of stdout (head, less) has gone away.
        RunFailed: stdout is closed or full.
    """
    if isinstance(sys.stdout, _ClosedOutput):
        raise RunFailed("the output cannot be written to stdout: it is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        raise
    except OSError as error:
        discard_output()
        raise RunFailed(f"the output cannot be written to stdout: {error.strerror}") from None


def discard_output() -> None:
    """Discard what is still to be written to stdout. Without this, Python reports an error when it ends."""
    _discard(sys.stdout)


def _end_messages() -> None:
    """Discard the messages that a full stderr did not take. Without this, Python would end with 120."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Discard what is still to be written to a stream."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.flush()
