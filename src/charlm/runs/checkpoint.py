"""Orbax checkpoints of a run: save, verify and restore them, and find the best and the latest one.

`checkpoints/<step>/` holds two items: `state`, a flat dict from dotted path to array, and `meta`, JSON with the progress of the
run and a sha256 of state and progress. Orbax does not detect flipped bits; the sha256 does.
"""

import contextlib
import errno
import functools
import os
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from charlm.parallel import processes
from charlm.runs.flat_state import FlatShapes, FlatState, flatten_state, sha256
from charlm.runs.orbax_files import KeepLatestAndBest, can_be_listed, make_manager, read_items, shapes_of
from charlm.system.errors import RunFailed, WorkdirError, is_out_of_memory
from charlm.system.progress import say

# How often a checkpoint is chosen again, after training has deleted the one that was chosen, and how long a deletion may take.
_ATTEMPTS, _DELETION_SECONDS = 20, 0.1


class DamagedCheckpoint(WorkdirError):
    """A checkpoint cannot be read, or differs from what was saved."""


class Checkpoints:
    """The checkpoints of one workdir. They are written in the background. The two latest and the best are kept.

    Args:
        workdir: the run's folder.
        shapes: returns the shapes and dtypes of the run's state (`flat_state.state_shapes`). A checkpoint that declares other
            arrays is refused before any of them is read, so a small file cannot claim all memory. None: whatever was saved is
            read.
    """

    def __init__(self, workdir: Path, shapes: Callable[[], FlatShapes] | None = None):
        self._root = workdir / "checkpoints"
        self._open = contextlib.ExitStack()
        weakref.finalize(self, self._open.close)
        self._shapes = shapes
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
        self._root.mkdir(parents=True, exist_ok=True)
        try:
            return make_manager(self._orbax_root, self._keep)
        except Exception:
            # The manager reads a file of every checkpoint, so a damaged old checkpoint would prevent new ones.
            for step in self.steps():
                if not can_be_listed(self._root / str(step)):
                    say(f"the checkpoint {self._root / str(step)} is damaged; moved into {self._root.parent / 'damaged'}")
                    self._move_to_damaged(step)
            return make_manager(self._orbax_root, self._keep)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in ascending order. An incomplete checkpoint still has another name."""
        if not self._root.is_dir():
            return []
        return sorted(
            int(path.name) for path in self._root.iterdir() if re.fullmatch("[0-9]{1,10}", path.name) and path.is_dir()
        )

    def save(self, step: int, state: Any, progress: Mapping[str, Any], best_step: int | None) -> None:
        """Start saving a checkpoint. The arrays are copied before this returns. A checkpoint of the same step is replaced.

        All processes of a job must call it; process 0 writes.

        Args:
            step: number of steps done.
            state: the state to save, a tree of arrays.
            progress: JSON values that are restored with the state.
            best_step: the step of the best checkpoint, which is kept; None if there is none yet.

        Raises:
            RunFailed: this checkpoint or the one before it could not be written.
        """
        from orbax.checkpoint import args as items

        flat = flatten_state(state)
        if not processes.is_primary():
            return
        meta = {"step": step, "best_step": best_step, "progress": dict(progress)}
        meta["sha256"] = sha256(flat, meta)
        self._keep.best_step = best_step
        args = items.Composite(state=items.StandardSave(flat), meta=items.JsonSave(meta))
        with self._errors_as_run_failed():
            if step in self.steps():
                self._manager.wait_until_finished()
                self._manager.delete(step)
            self._manager.save(step, args=args, force=True)

    def restore(self, step: int) -> tuple[FlatState, dict[str, Any]]:
        """Return the flat state and the metadata of one checkpoint, after their sha256 was verified.

        Raises:
            DamagedCheckpoint: the checkpoint cannot be read, or differs from what was saved.
        """
        folder = self._root / str(step)
        try:
            state, meta = read_items(self._orbax_root / str(step), lambda found: self._check_shapes(folder, found))
            flat = {name: np.asarray(value) for name, value in state.items()}
            expected = meta.pop("sha256", None)
        except DamagedCheckpoint:
            raise
        except Exception as error:  # Orbax raises many types of exceptions for truncated and altered files.
            if is_out_of_memory(error):
                raise
            raise _unreadable(folder, error) from None
        if sha256(flat, meta) != expected or not _is_meta(meta, step):
            raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: its sha256 does not match")
        self._keep.best_step = meta["best_step"]
        return flat, meta

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

    def restore_latest(self, say: Callable[[str], None]) -> tuple[FlatState, dict[str, Any]] | None:
        """Return the flat state and the metadata of the latest undamaged checkpoint; None if there is no checkpoint.

        Damaged later checkpoints are moved into `damaged/` beside `checkpoints/`.

        Args:
            say: called with a message for each damaged checkpoint.

        Raises:
            DamagedCheckpoint: there are checkpoints, and all of them are damaged.
        """
        steps = self.steps()
        damaged = []
        for step in reversed(steps):
            try:
                flat, meta = self.restore(step)
            except DamagedCheckpoint as error:
                damaged.append((step, error))
                continue
            for bad_step, error in damaged:
                say(f"{error}; continuing from step {step}, the last undamaged checkpoint")
                self._move_to_damaged(bad_step)
            return flat, meta
        if damaged:
            raise DamagedCheckpoint(f"{damaged[0][1]}, and no undamaged one precedes it; start again in another --workdir")
        return None

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

    def find(self, which: str, say: Callable[[str], None]) -> tuple[FlatState, dict[str, Any]]:
        """Return the flat state and the metadata of a checkpoint, verified.

        Args:
            which: `best`, `latest` or a step.
            say: called with a message for each damaged checkpoint that is skipped.

        Raises:
            WorkdirError: there is no such checkpoint.
            DamagedCheckpoint: the checkpoint is damaged.
        """
        for _ in range(_ATTEMPTS):
            steps, skipped = self.steps(), list[str]()
            if not steps:
                raise WorkdirError(f"{self._root} holds no checkpoint yet; train the run first")
            try:
                found = self._find(which, steps, skipped)
            except _Deleted:
                continue
            for line in skipped:
                say(line)
            return found
        raise WorkdirError(f"{self._root}: checkpoints were deleted while they were read; try again")

    def _find(self, which: str, steps: list[int], skipped: list[str]) -> tuple[FlatState, dict[str, Any]]:
        """Return the checkpoint that `which` names. Append a message to `skipped` for each one that had to be skipped."""
        if which not in ("best", "latest"):
            if which not in map(str, steps):
                given = which if len(which) <= 20 else f"{which[:20]}..."
                raise WorkdirError(f"--checkpoint is {given!r}; it must be best, latest or one of {', '.join(map(str, steps))}")
            return self.restore(int(which))
        whole: dict[int, tuple[FlatState, dict[str, Any]]] = {}
        errors: dict[int, DamagedCheckpoint] = {}

        def read(step: int) -> tuple[FlatState, dict[str, Any]] | None:
            if step not in whole and step not in errors:
                try:
                    whole[step] = self.restore(step)
                except DamagedCheckpoint as error:
                    self._check_still_there(steps)
                    errors[step] = error
            return whole.get(step)

        for step in reversed(steps):
            if (latest := read(step)) is None:
                continue
            if which == "latest" or latest[1]["best_step"] in (None, step):
                skipped += [f"{error}; using the {which} of the others, step {step}" for error in errors.values()]
                return latest
            if (best := latest[1]["best_step"]) not in steps:
                self._check_still_there(steps)
                errors[best] = DamagedCheckpoint(f"{self._root} no longer holds the best checkpoint, step {best}")
            elif found := read(best):
                skipped += [f"{error}; using step {best}, the best of the others" for error in errors.values()]
                return found
        if not whole:
            raise errors[steps[-1]]
        skipped += [f"{error}; using step {max(whole)}, the latest of the others" for error in errors.values()]
        return whole[max(whole)]

    def _check_still_there(self, steps: list[int]) -> None:
        """Raise _Deleted if another process has saved or deleted checkpoints since these steps were listed."""
        time.sleep(_DELETION_SECONDS)
        if self.steps() != steps:
            raise _Deleted

    def latest_is_damaged(self) -> bool:
        """Return whether there are checkpoints and the latest is damaged.

        Raises:
            DamagedCheckpoint: all of them are damaged.
        """
        for step in reversed(self.steps()):
            try:
                self.restore(step)
            except DamagedCheckpoint:
                if step == self.steps()[0]:
                    raise
            else:
                return step != self.steps()[-1]
        return False

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
            if steps := self.steps():
                hint = f"the last one is that of step {steps[-1]}, and the same command continues from it"
            raise RunFailed(f"a checkpoint could not be written to {self._root}: {reason}; {hint}") from None


def read_on_all_processes(
    checkpoints: Checkpoints, find: Callable[[], tuple[FlatState, dict] | None]
) -> tuple[FlatState, dict] | None:
    """Return, in all processes, the checkpoint that process 0 finds."""
    found = None

    def step_found() -> int:
        nonlocal found
        found = find()
        return found[1]["step"] if found else -1

    at = processes.broadcast_from_primary(step_found)
    return found if processes.is_primary() or at < 0 else checkpoints.restore(at)


class _Deleted(Exception):
    """Another process has deleted a checkpoint while it was read: training keeps only the latest and the best."""


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


def _is_meta(meta: Mapping[str, Any], step: int) -> bool:
    """Return whether the metadata of a checkpoint has the fields that `save` writes."""
    best = meta.get("best_step")
    return meta.get("step") == step and isinstance(best, int | None) and isinstance(meta.get("progress"), dict)
