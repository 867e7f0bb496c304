"""Several processes that train one run: how they meet, what they agree on, and what becomes of them when one is lost.

Each runs the same program, on its own devices and its own rows of every batch (`mesh`). All must take part in the same
collectives in the same order, so that process 0 decides for all what depends on a clock, a signal or a file. It alone
writes files and speaks.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from charlm.errors import ConfigError, Exit, RunFailed, UserError

_LOST = "another process of the job was lost; started again, the job goes on from the last checkpoint"
# Without a sign of life for so long a process counts as lost. (JAX would wait for 100, and 300 at the end.)
_LOST_SECONDS = 30
# Process 0 goes last when all leave for the same reason, as the others are cut off without it.
_LAST_SECONDS = 1.0


def leads() -> bool:
    """Whether this is process 0, or the only one."""
    return jax.process_index() == 0


def told(*numbers: float) -> np.ndarray:
    """What each process has to say, a row each, float64."""
    row = np.array(numbers, np.float64)
    if jax.process_count() == 1:
        return row[None]
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(row.view(np.int32)).view(np.float64)  # JAX would round them to float32.


def decided(what: Callable[[], int]) -> int:
    """The number that process 0 finds, for all.

    Raises:
        UserError: process 0 raises one; the message says what only there.
        RunFailed: process 0 raises anything else.
    """
    found, error = 0, None
    if leads():
        try:
            found = what()
        except Exception as raised:
            error = raised
    kind, found = told(0 if error is None else 1 if isinstance(error, UserError) else 2, found)[0].tolist()
    if error:
        raise error
    if kind:
        raise (UserError if kind == 1 else RunFailed)("process 0 could not go on; its own message says why")
    return int(found)


def check_same(things: Mapping[str, str]) -> None:
    """Raises UserError unless all processes have the same things: {what: value}."""
    for what, value in things.items():
        rows = told(*np.frombuffer(hashlib.sha256(value.encode()).digest(), np.int32).tolist())
        if (others := np.flatnonzero((rows != rows[0]).any(axis=1))).size:
            raise UserError(f"process {others[0]} was started with another {what} than process 0; all need the same")


@contextlib.contextmanager
def joined(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[None]:
    """Meet the other processes of a job, before JAX first looks for its devices; and what becomes of this one without them.

    Args:
        coordinator: HOST:PORT of process 0; `auto`: what SLURM, Kubernetes, Open MPI or a TPU pod says; None: there are none.
        num_processes, process_id: how many there are, and which this is; only where they are not found by themselves.

    Raises:
        ConfigError: it is not said, or not found, who the others are.
        RunFailed: they do not come, or one of them is lost.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise ConfigError("--num_processes and --process_id need --coordinator=HOST:PORT, that of process 0")
        yield
        return
    _join(coordinator, num_processes, process_id)
    try:
        yield
    except (UserError, RunFailed, Exit):
        raise
    except Exception as error:
        # Gloo's and NCCL's errors come as one of two kinds, with their name in the text.
        if isinstance(error, (ValueError, jax.errors.JaxRuntimeError)) and re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise RunFailed(_LOST) from None
        traceback.print_exc()
        raise RunFailed(f"process {jax.process_index()} of the job failed: {type(error).__name__}") from None


def _join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    explicit = coordinator != "auto"
    if explicit and not re.fullmatch(r".+:\d+", coordinator):
        raise ConfigError(f"--coordinator is {coordinator!r}; it must be auto, or HOST:PORT of process 0")
    if explicit and not (num_processes and process_id is not None and 0 <= process_id < num_processes):
        found = f"--num_processes is {num_processes} and --process_id is {process_id}"
        raise ConfigError(f"{found}; --coordinator={coordinator} needs both, the second from 0 and below the first")
    ctypes.CDLL(None).signal(signal.SIGABRT, _told_of_loss)
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
def _told_of_loss(signal_number: int) -> None:
    """Called instead of the system's default when JAX ends a process by abort(), from whatever thread.

    That is what its client does when process 0 is gone or does not answer, and there is no other way to have a say in it.
    """
    del signal_number
    os.write(2, b"\ncharlm: " + _LOST.encode() + b"\n")
    os._exit(1)


def leave(code: int) -> None:
    """End this process of a job without the others, which are told of the loss; nothing where it is the only one."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        if leads():
            time.sleep(_LAST_SECONDS)
        os._exit(code)
