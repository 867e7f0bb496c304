"""Where charlm keeps what it need not make twice: encoded corpora, downloads, compiled programs."""

import contextlib
import os
import time
from pathlib import Path

import jax

from charlm.system.machine import num_cores

# A compiled program that was made so many seconds ago is made anew, so that the folder does not grow for ever.
_OLDEST = 30 * 24 * 3600


def cache_dir() -> Path:
    """The folder, named by the environment or the user's own."""
    if chosen := os.environ.get("CHARLM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "charlm"


def keep_compiled_programs() -> None:
    """Have JAX keep what it compiles, in this process from now on, unless the user has told it where.

    The same program comes back as it was compiled, so this changes no result. JAX's keys hold the program, its options,
    the versions and the kind of device, but not the number of cores that a program for a CPU is cut up for; the folder
    does.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = cache_dir() / "compiled" / f"{num_cores()}_cores"
    with contextlib.suppress(OSError):  # What cannot be kept is compiled each time.
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # Another process was faster.
                if time.time() - entry.stat().st_mtime > _OLDEST:
                    entry.unlink()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # The many small programs of a start take as long as the few large ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
