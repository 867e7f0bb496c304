"""Orbax checkpoints of a run: save, verify and restore them.

`checkpoints/<step>/` holds two items: `state`, a flat dict from dotted path to array, and `meta`, JSON with the progress of the
run and a sha256 of state and progress. Orbax does not detect flipped bits; the sha256 does.
"""

import contextlib
import errno
import functools
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from charlm.parallel import processes
from charlm.runs.flat_state import FlatShapes, FlatState, flatten_state, name_leaves, sha256
from charlm.runs.orbax_files import KeepLatestAndBest, StateOnDisk, can_be_listed, make_manager, open_items, shapes_of
from charlm.system.errors import RunFailed, WorkdirError, is_out_of_memory
from charlm.system.progress import say


class DamagedCheckpoint(WorkdirError):
    """A checkpoint cannot be read, or differs from what was saved."""


class CheckpointStore:
    """The checkpoints of one workdir. They are written in the background. The two latest and the best are kept.

    Args:
        workdir: the run's folder.
        shapes: returns the shapes and dtypes of the run's state (`flat_state.state_shapes`). A checkpoint that declares other
            arrays is refused before any of them is read, so a small file cannot claim all memory. None: whatever was saved is
            read.
        shardings: dotted path -> sharding of the array, for a state that is too large for the memory of one host. Each process
            then writes and reads only the shards of its own devices, and all processes of the job must call every method.
            None: process 0 writes the complete arrays, and a process that reads gets complete NumPy arrays.

    Attributes:
        together: whether there are shardings.
    """

    def __init__(
        self,
        workdir: Path,
        shapes: Callable[[], FlatShapes] | None = None,
        shardings: Mapping[str, Sharding] | None = None,
    ):
        self._root = workdir / "checkpoints"
        self._open = contextlib.ExitStack()
        weakref.finalize(self, self._open.close)
        self._shapes, self._shardings, self.together = shapes, shardings, shardings is not None
        self._keep = KeepLatestAndBest()

    @functools.cached_property
    def _orbax_root(self) -> Path:
        """Return the path of the folder of checkpoints for Orbax.

        Orbax takes some characters of a path for a pattern or a URL. On Linux, the path of the open folder in /proc has none of
        them. If the folder of the run is moved, this path leads to its new place, so nothing appears at the old one.
        """
        if not Path("/proc/self/fd").is_dir():
            return self._root.absolute()
        descriptor = os.open(self._root.parent, os.O_RDONLY)
        self._open.callback(os.close, descriptor)
        return Path(f"/proc/self/fd/{descriptor}") / self._root.name

    @functools.cached_property
    def _manager(self) -> Any:
        """Return Orbax's manager. It is created at the first save, because its import takes a fifth of the start of a run."""
        if self.together:
            self._decide(self._make_listable)
            return make_manager(self._orbax_root, self._keep, together=True)
        self._root.mkdir(parents=True, exist_ok=True)
        try:
            return make_manager(self._orbax_root, self._keep)
        except Exception:
            self._make_listable()
            return make_manager(self._orbax_root, self._keep)

    def _make_listable(self) -> None:
        """Create the folder. Move damaged checkpoints that would prevent new ones, as the manager reads a file of each."""
        self._root.mkdir(parents=True, exist_ok=True)
        for step in self._steps_on_disk():
            if not can_be_listed(self._root / str(step)):
                say(f"the checkpoint {self._root / str(step)} is damaged; moved into {self._root.parent / 'damaged'}")
                self._move_to_damaged(step)

    def _decide(self, compute: Callable[[], Any]) -> Any:
        """Return a JSON value that depends on files. If the processes work together, process 0 computes it for all of them."""
        return processes.broadcast_json_from_primary(compute) if self.together else compute()

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in ascending order. An incomplete checkpoint still has another name."""
        return self._decide(self._steps_on_disk)

    def _steps_on_disk(self) -> list[int]:
        if not self._root.is_dir():
            return []
        return sorted(
            int(path.name) for path in self._root.iterdir() if re.fullmatch("[0-9]{1,10}", path.name) and path.is_dir()
        )

    def save(self, step: int, state: Any, progress: Mapping[str, Any], best_step: int | None) -> None:
        """Start saving a checkpoint. The arrays are copied before this returns. A checkpoint of the same step is replaced.

        All processes of a job must call it.

        Args:
            step: number of steps done.
            state: the state to save, a tree of arrays.
            progress: JSON values that are restored with the state.
            best_step: the step of the best checkpoint, which is kept; None if there is none yet.

        Raises:
            RunFailed: this checkpoint or the one before it could not be written.
        """
        from orbax.checkpoint import args as items

        if self.together:
            flat = name_leaves(state)
        else:
            flat = flatten_state(state)
            if not processes.is_primary():
                return
        meta = {"step": step, "best_step": best_step, "progress": dict(progress)}
        meta["sha256"] = sha256(flat, meta)
        if self.together and jax.default_backend() == "cpu":
            # Orbax copies arrays from another device to the host, but shares the memory of a CPU device, as NumPy does.
            flat = jax.tree.map(jnp.copy, flat)
        self._keep.best_step = best_step
        args = items.Composite(state=items.StandardSave(flat), meta=items.JsonSave(meta))
        with self._errors_as_run_failed():
            if step in self.steps():
                self._manager.wait_until_finished()
                self._manager.delete(step)
            self._manager.save(step, args=args, force=True)

    def restore(self, step: int) -> tuple[FlatState, dict[str, Any]]:
        """Return the flat state and the metadata of one checkpoint, after their sha256 was verified.

        If the processes work together, the arrays are on the devices, as the shardings say.

        Raises:
            DamagedCheckpoint: the checkpoint cannot be read, or differs from what was saved.
        """
        folder, error = self._root / str(step), None
        try:
            with self._opened(folder) as (on_disk, meta):
                state = on_disk.read(self._shardings)
        except WorkdirError as raised:
            error = raised
        self._raise_together(folder, error)
        expected = meta.pop("sha256", None)
        found = sha256(state, meta)
        meta = self._decide(lambda: meta if found == expected and _is_meta(meta, step) else None)
        _check_sha256(folder, meta is not None)
        self._keep.best_step = meta["best_step"]
        return state, meta

    def check(self, step: int) -> None:
        """Raise DamagedCheckpoint if a checkpoint is damaged. This process reads all of it, a few arrays at a time."""
        folder = self._root / str(step)
        with self._opened(folder) as (state, meta):
            expected = meta.pop("sha256", None)
            _check_sha256(folder, sha256(state, meta) == expected and _is_meta(meta, step))

    @contextlib.contextmanager
    def _opened(self, folder: Path) -> Iterator[tuple[StateOnDisk, dict[str, Any]]]:
        """Open a checkpoint. An error while it is open becomes a WorkdirError."""
        try:
            with open_items(self._orbax_root / folder.name, functools.partial(self._check_shapes, folder)) as items:
                yield items
        except DamagedCheckpoint:
            raise
        except Exception as error:  # Orbax raises many types of exceptions for truncated and altered files.
            if is_out_of_memory(error):
                raise
            raise _unreadable(folder, error) from None

    def _raise_together(self, folder: Path, error: WorkdirError | None) -> None:
        """Raise the error. If the processes work together, all of them raise an error if one of them has found one."""
        if self.together:
            kinds = processes.all_gather(0 if error is None else 1 if isinstance(error, DamagedCheckpoint) else 2)[:, 0]
            kind = DamagedCheckpoint if kinds.max() == 1 else WorkdirError
            if kinds.any() and type(error) is not kind:
                error = kind(f"process {kinds.argmax()} of the job cannot read the checkpoint {folder}")
        if error is not None:
            raise error

    @functools.cached_property
    def _expected(self) -> dict[str, tuple[Any, ...]] | None:
        """Return {dotted path: (shape, dtype)} of the state; None if any state is read."""
        return None if self._shapes is None else shapes_of(self._shapes())

    def _check_shapes(self, folder: Path, found: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise DamagedCheckpoint if a checkpoint declares other arrays than the state has."""
        for name in sorted({*found, *(self._expected or found)}):
            should, has = (self._expected or found).get(name), found.get(name)
            if should != has:
                raise DamagedCheckpoint(
                    f"the checkpoint {folder} does not fit config.json: the array {name} should be {_describe(should)}, "
                    f"found {_describe(has)}"
                )

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self._root / str(later))

    def _move_to_damaged(self, step: int) -> None:
        """Move a checkpoint into `damaged/` beside `checkpoints/`."""
        damaged = self._root.parent / "damaged"
        damaged.mkdir(exist_ok=True)
        shutil.rmtree(damaged / str(step), ignore_errors=True)
        (self._root / str(step)).rename(damaged / str(step))

    def wait(self) -> None:
        """Wait until all checkpoints are on disk. Raises RunFailed if one of them could not be written."""
        if "_manager" in vars(self):
            with self._errors_as_run_failed():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Close Orbax's manager if there is one."""
        if "_manager" in vars(self):
            with contextlib.suppress(Exception):  # `wait` has reported what could not be written.
                self._manager.close()
        self._open.close()

    @contextlib.contextmanager
    def _errors_as_run_failed(self) -> Iterator[None]:
        """Turn any exception into RunFailed. Orbax raises many types when a disk is full, some of them one save late."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).replace(str(self._orbax_root), str(self._root)).split())[-200:]
            hint = "there is none yet, so the same command starts again"
            if steps := self._steps_on_disk():
                hint = f"the last one is that of step {steps[-1]}, and the same command continues from it"
            raise RunFailed(f"a checkpoint could not be written to {self._root}: {reason}; {hint}") from None


def _describe(array: tuple[Any, ...] | None) -> str:
    """Return (shape, dtype) of an array as text."""
    return f"{array[1]}{list(array[0])}" if array else "absent"


def _unreadable(folder: Path, error: Exception) -> WorkdirError:
    """Return the error for a checkpoint that cannot be read: it is damaged, or the system refuses to read it."""
    with contextlib.suppress(FileNotFoundError):  # Training may delete the checkpoint meanwhile.
        for path in (folder, *sorted(folder.rglob("*"))):
            if not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK) and path.exists():
                return WorkdirError(f"the checkpoint {folder} cannot be read: {path} is not readable; check its permissions")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE):
        return WorkdirError(f"the checkpoint {folder} cannot be read: {error.strerror}")
    return DamagedCheckpoint(f"the checkpoint {folder} cannot be read ({type(error).__name__})")


def _check_sha256(folder: Path, matches: bool) -> None:
    """Raise DamagedCheckpoint unless the sha256 of a checkpoint matches."""
    if not matches:
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: its sha256 does not match")


def _is_meta(meta: Mapping[str, Any], step: int) -> bool:
    """Return whether the metadata of a checkpoint has the fields that `save` writes."""
    best = meta.get("best_step")
    return meta.get("step") == step and isinstance(best, int | None) and isinstance(meta.get("progress"), dict)
