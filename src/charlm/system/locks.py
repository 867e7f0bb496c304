"""Locks between processes."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from charlm.system.progress import say


@contextlib.contextmanager
def exclusive_lock(path: Path, activity: str) -> Iterator[None]:
    """Hold an exclusive lock on a file. The system releases the lock when the process ends.

    If another process holds the lock, print a line and wait.

    Args:
        path: the lock file. It is created if it does not exist.
        activity: what the process does while it holds the lock, for that line: "downloading URL".
    """
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that is {activity}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
