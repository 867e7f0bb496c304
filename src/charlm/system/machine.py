"""Facts about the machine, and requests that JAX must get before it initialises its devices."""

import contextlib
import os
import platform
import subprocess
from pathlib import Path

import jax
from jax._src import xla_bridge  # JAX has no public function for this (github.com/jax-ml/jax/issues/23320).

from charlm.system.errors import ConfigError

_DETERMINISM_FLAG = "--xla_gpu_deterministic_ops=true"
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def request_cores_as_devices() -> None:
    """Make JAX treat each core of a CPU as a device.

    This has no effect if JAX has already initialised its devices, or if XLA_FLAGS gives their number.
    """
    if not xla_bridge.backends_are_initialized() and _DEVICE_COUNT_FLAG not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", num_cores())


def cpu_model() -> str:
    """Return the model name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Return the git commit of the current folder, with `-dirty` if files differ from the commit."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
        if found.returncode == 0:
            return found.stdout.strip()
    return None


def request_determinism() -> None:
    """Make XLA use only deterministic operations on a GPU. On a CPU all operations are deterministic.

    The request is a flag in the environment variable XLA_FLAGS. XLA reads this variable only once, when JAX initialises its
    devices.

    Raises:
        ConfigError: JAX has already initialised a GPU without the flag, so the request would have no effect.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _DETERMINISM_FLAG in flags:
        return
    if xla_bridge.backends_are_initialized() and jax.default_backend() == "gpu":
        raise ConfigError(
            "train.deterministic is True, but JAX already uses the GPU without deterministic operations; restart Python with "
            f"XLA_FLAGS={_DETERMINISM_FLAG} in its environment"
        )
    os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISM_FLAG}".strip()
