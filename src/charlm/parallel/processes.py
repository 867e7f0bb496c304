"""Several processes that train one run: initialisation, collectives between processes, and the loss of a process.

Each process runs the same program on its own devices and its own rows of every batch (`mesh`). All processes must take part in
the same collectives in the same order. Process 0, the primary, therefore decides what depends on a clock, a signal or a file,
and broadcasts the decision. Only the primary writes files and messages.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from charlm.system.errors import ConfigError, Exit, RunFailed, UserError

_LOST = "another process of the job was lost; started again, the job continues from the last checkpoint"
# A process that is silent for this long counts as lost. (JAX's own limits are 100 seconds, and 300 at the end.)
_LOST_SECONDS = 30
# When all processes fail for the same reason, process 0 exits last, because the others are cut off without it.
_PRIMARY_DELAY_SECONDS = 1.0


def is_primary() -> bool:
    """Return whether this is process 0, or the only process."""
    return jax.process_index() == 0


def all_gather(*numbers: float) -> np.ndarray:
    """Return the numbers of every process, one row for each process, float64. All processes must call it."""
    row = np.array(numbers, np.float64)
    if jax.process_count() == 1:
        return row[None]
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(row.view(np.int32)).view(np.float64)  # As int32, because JAX would round to float32.


def broadcast_from_primary(compute: Callable[[], int]) -> int:
    """Return the number that process 0 computes, in all processes. All processes must call it.

    Raises:
        UserError: process 0 raises one. Only process 0 raises it with its message.
        RunFailed: process 0 raises anything else.
    """
    found, error = 0, None
    if is_primary():
        try:
            found = compute()
        except Exception as raised:
            error = raised
    kind = 0 if error is None else 1 if isinstance(error, UserError) else 2
    kind, found = all_gather(kind, found)[0].tolist()
    if error:
        raise error
    if kind:
        raise (UserError if kind == 1 else RunFailed)("process 0 failed; its own message says why")
    return int(found)


def broadcast_json_from_primary(compute: Callable[[], Any]) -> Any:
    """Return the JSON value that process 0 computes, in all processes. Raises what `broadcast_from_primary` raises."""
    if jax.process_count() == 1:
        return compute()
    text = b""

    def length() -> int:
        nonlocal text
        text = json.dumps(compute()).encode()
        return len(text)

    size = broadcast_from_primary(length)
    # A multiple of 1,024 bytes, because each length of the array is compiled.
    padded = text.ljust(-(-size // 1024) * 1024)
    return json.loads(all_gather(*padded)[0, :size].astype(np.uint8).tobytes())


def check_same(values: Mapping[str, str]) -> None:
    """Compare {name: value} between the processes. Raises UserError if a process has another value."""
    for name, value in values.items():
        rows = all_gather(*np.frombuffer(hashlib.sha256(value.encode(errors="surrogateescape")).digest(), np.int32).tolist())
        if (others := np.flatnonzero((rows != rows[0]).any(axis=1))).size:
            raise UserError(f"process {others[0]} was started with another {name} than process 0; all need the same")


@contextlib.contextmanager
def initialized(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[None]:
    """Initialise the processes of a job before JAX looks for its devices, and turn the loss of a process into RunFailed.

    Args:
        coordinator: HOST:PORT of process 0; `auto`: as SLURM, Kubernetes, Open MPI or a TPU pod says; None: a single process.
        num_processes: the number of processes, unless `auto`.
        process_id: the index of this process, unless `auto`.

    Raises:
        ConfigError: the other processes are not named or not found.
        RunFailed: the other processes do not come, or one of them is lost.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise ConfigError("--num_processes and --process_id need --coordinator=HOST:PORT, that of process 0")
        yield
        return
    _initialize(coordinator, num_processes, process_id)
    try:
        yield
    except (UserError, RunFailed, Exit):
        raise
    except Exception as error:
        # Errors of Gloo and NCCL have one of these two types, with the name in the text.
        if isinstance(error, (ValueError, jax.errors.JaxRuntimeError)) and re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise RunFailed(_LOST) from None
        traceback.print_exc()
        raise RunFailed(f"process {jax.process_index()} of the job failed: {type(error).__name__}") from None


def _initialize(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    explicit = coordinator != "auto"
    if explicit and not re.fullmatch(r".+:\d+", coordinator):
        raise ConfigError(f"--coordinator is {coordinator!r}; it must be auto, or HOST:PORT of process 0")
    if explicit and not (num_processes and process_id is not None and 0 <= process_id < num_processes):
        found = f"--num_processes is {num_processes} and --process_id is {process_id}"
        raise ConfigError(f"{found}; --coordinator={coordinator} needs both, the second from 0 and below the first")
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
    try:
        jax.distributed.initialize(
            coordinator if explicit else None,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_LOST_SECONDS,
            shutdown_timeout_seconds=_LOST_SECONDS,
        )
    except ValueError as error:
        hint = "give --coordinator=HOST:PORT, --num_processes and --process_id"
        raise ConfigError(f"--coordinator is {coordinator}; JAX finds no other processes ({error}): {hint}") from None
    except RuntimeError as error:
        raise RunFailed(f"the other processes of the job did not come: {error}") from None


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(signal_number: int) -> None:
    """Handle SIGABRT: JAX's client calls abort(), from any thread, when process 0 is gone or does not answer.

    A handler in C is the only way to print a message and to choose the exit code in that case.
    """
    del signal_number
    os.write(2, b"\ncharlm: " + _LOST.encode() + b"\n")
    os._exit(1)


def exit_job(code: int) -> None:
    """End this process of a job without waiting for the others, which detect the loss. Does nothing for a single process."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        if is_primary():
            time.sleep(_PRIMARY_DELAY_SECONDS)
        os._exit(code)
