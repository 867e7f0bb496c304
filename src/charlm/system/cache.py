"""The cache folder: encoded corpora, downloads and compiled programs."""

import contextlib
import os
import time
from pathlib import Path

import jax

from charlm.system.machine import num_cores

# Older compiled programs are deleted, so the folder does not grow without limit.
_MAX_AGE_SECONDS = 30 * 24 * 3600


def cache_dir() -> Path:
    """Return the cache folder: `$CHARLM_CACHE`, else `$XDG_CACHE_HOME/charlm`, else `~/.cache/charlm`."""
    if chosen := os.environ.get("CHARLM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "charlm"


def enable_compilation_cache() -> None:
    """Make JAX cache compiled programs on disk from now on, unless the user has already chosen a folder for them.

    A cached program is identical to the compiled one, so no result changes. JAX's cache key contains the program, its options,
    the versions and the kind of device. It does not contain the number of CPU cores, for which a program is compiled. The name
    of the folder therefore contains this number.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = cache_dir() / "compiled" / f"{num_cores()}_cores"
    with contextlib.suppress(OSError):  # Without the folder, every start compiles again.
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # Another process may delete the same entry.
                if time.time() - entry.stat().st_mtime > _MAX_AGE_SECONDS:
                    entry.unlink()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # The start of a run compiles many small programs, which together take as long as the few large ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
