"""What kind of host this is."""

import contextlib
import os
import platform
from pathlib import Path


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def request_determinism() -> None:
    """Have XLA leave out, on a GPU, what comes out otherwise each time. Only before JAX first looks for its devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    if (flag := "--xla_gpu_deterministic_ops=true") not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
