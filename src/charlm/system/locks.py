"""A lock between processes for what only one of them should make."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from charlm.system.progress import say


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; waits for another process that holds it, and says so. It goes with the process."""
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that is {what}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
