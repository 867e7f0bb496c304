"""Orbax checkpoints of a run: save, verify and restore them, and find the best and the latest one.

`checkpoints/<step>/` holds two items: `state`, a flat dict from dotted path to array, and `meta`, JSON with the progress of the
run and a sha256 of state and progress. Orbax does not detect flipped bits; the sha256 does.
"""

import contextlib
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from charlm.nn.model import CharLM
from charlm.parallel import processes
from charlm.parallel.mesh import fetch
from charlm.system.errors import RunFailed, WorkdirError
from charlm.system.progress import say

# Dotted path -> array.
FlatState = dict[str, np.ndarray]


class DamagedCheckpoint(WorkdirError):
    """A checkpoint cannot be read, or differs from what was saved."""


def flatten_state(tree: Any) -> FlatState:
    """Return {dotted path: array} of a tree, copied to the host. All processes of a job must call it."""
    leaves = jax.tree_util.tree_leaves_with_path(fetch(tree))
    # Copies, because on a CPU a NumPy view shares its memory with the array, and a donated array is soon overwritten.
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.array(leaf) for path, leaf in leaves}


def unflatten_state(like: Any, flat: FlatState) -> Any:
    """Return the tree that `flatten_state` flattened.

    Args:
        like: a tree with the structure, shapes and dtypes of the result.
        flat: the flat state. Arrays that `like` does not name are ignored.

    Raises:
        WorkdirError: an array is missing, or has another shape or dtype, because another model wrote the flat state.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    values = []
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name not in flat or flat[name].shape != leaf.shape or flat[name].dtype != leaf.dtype:
            found = f"{flat[name].dtype}{list(flat[name].shape)}" if name in flat else "nothing"
            raise WorkdirError(
                f"the checkpoint does not fit the config: {name} should be {leaf.dtype}{list(leaf.shape)}, found {found}"
            )
        values.append(flat[name])
    return jax.tree_util.tree_unflatten(treedef, values)


def eval_params(flat: FlatState, model: CharLM) -> Any:
    """Return the parameters for scoring and sampling (`TrainState.eval_params`) of a flat state, on the device.

    Raises:
        WorkdirError: the flat state does not hold parameters of this model.
    """
    name = "ema" if any(path.startswith("ema.") for path in flat) else "params"
    like = {name: jax.eval_shape(model.initial_params, jax.random.key(0))}
    return jax.device_put(unflatten_state(like, flat)[name])


def sha256(flat: FlatState, meta: Mapping[str, Any] | None = None) -> str:
    """Return the sha256 of the paths, dtypes, shapes and bytes, sorted by path, and of JSON metadata if given."""
    digest = hashlib.sha256()
    for name in sorted(flat):
        value = np.ascontiguousarray(flat[name])
        digest.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        digest.update(value.tobytes())
    if meta is not None:
        digest.update(json.dumps(meta, sort_keys=True).encode())
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one workdir. They are written in the background. The two latest and the best are kept."""

    def __init__(self, workdir: Path):
        self._root = workdir / "checkpoints"
        self._keep = _KeepLatestAndBest()

    @functools.cached_property
    def _manager(self) -> Any:
        """Return Orbax's manager. It is created at the first save, because its import takes a fifth of the start of a run."""
        try:
            return _make_manager(self._root, self._keep)
        except Exception:
            # The manager reads a file of every checkpoint, so a damaged old checkpoint would prevent new ones.
            for step in self.steps():
                if not _can_be_listed(self._root / str(step)):
                    say(f"the checkpoint {self._root / str(step)} is damaged; moved into {self._root.parent / 'damaged'}")
                    self._move_to_damaged(step)
            return _make_manager(self._root, self._keep)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in ascending order. An incomplete checkpoint still has another name."""
        if not self._root.is_dir():
            return []
        return sorted(int(path.name) for path in self._root.iterdir() if path.name.isdecimal() and path.is_dir())

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
        import orbax.checkpoint as ocp

        folder = self._root / str(step)
        try:
            options = {"multiprocessing_options": _single_process_options()}
            with ocp.Checkpointer(ocp.StandardCheckpointHandler(**options), **options) as reader:
                state = reader.restore((folder / "state").absolute())
            with ocp.Checkpointer(ocp.JsonCheckpointHandler(**options), **options) as reader:
                meta = dict(reader.restore((folder / "meta").absolute()))
            flat = {name: np.asarray(value) for name, value in state.items()}
            expected = meta.pop("sha256", None)
        except MemoryError:
            raise
        except Exception as error:  # Orbax raises many types of exceptions for truncated and altered files.
            raise DamagedCheckpoint(f"the checkpoint {folder} cannot be read ({type(error).__name__})") from None
        if sha256(flat, meta) != expected or meta.get("step") != step:
            raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: its sha256 does not match")
        self._keep.best_step = meta["best_step"]
        return flat, meta

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
        steps = self.steps()
        if not steps:
            raise WorkdirError(f"{self._root} holds no checkpoint yet; train the run first")
        if which == "latest":
            return self.restore(steps[-1])
        if which == "best":
            return self._find_best(steps, say)
        if not which.isdecimal() or int(which) not in steps:
            raise WorkdirError(f"--checkpoint is {which!r}; it must be best, latest or one of {', '.join(map(str, steps))}")
        return self.restore(int(which))

    def _find_best(self, steps: list[int], say: Callable[[str], None]) -> tuple[FlatState, dict[str, Any]]:
        """Return the checkpoint that the latest undamaged checkpoint names as the best.

        If the run has not been evaluated, return the latest undamaged checkpoint.
        """
        for step in reversed(steps):
            try:
                flat, meta = self.restore(step)
            except DamagedCheckpoint as error:
                if step == steps[0]:
                    raise
                say(f"{error}; using the best of the checkpoints before it")
                continue
            best = step if meta["best_step"] is None else meta["best_step"]
            if best == step:
                return flat, meta
            if best in steps:
                return self.restore(best)
            raise WorkdirError(f"{self._root} no longer holds the best checkpoint, step {best}; try --checkpoint latest")
        raise AssertionError("there is at least one step")

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

    @contextlib.contextmanager
    def _errors_as_run_failed(self) -> Iterator[None]:
        """Turn any exception into RunFailed. Orbax raises many types when a disk is full, some of them one save late."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[-200:]
            hint = "there is none yet, so the same command starts again"
            if steps := self.steps():
                hint = f"the last one is that of step {steps[-1]}, and the same command continues from it"
            raise RunFailed(f"a checkpoint could not be written to {self._root}: {reason}; {hint}") from None


def _single_process_options() -> Any:
    """Return Orbax's options for a process that reads or writes alone: every process has the state, and process 0 writes."""
    from orbax.checkpoint.options import MultiprocessingOptions

    return MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})


def _make_manager(root: Path, keep: "_KeepLatestAndBest") -> Any:
    """Return Orbax's manager of the checkpoints in a folder. Raises an exception of any type if one of them is damaged."""
    import orbax.checkpoint as ocp

    root.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        create=False,
        cleanup_tmp_directories=True,
        preservation_policy=keep,
        enable_async_checkpointing=True,
        multiprocessing_options=_single_process_options(),
    )
    single = {"multiprocessing_options": _single_process_options()}
    handlers = {"state": ocp.StandardCheckpointHandler(**single), "meta": ocp.JsonCheckpointHandler(**single)}
    return ocp.CheckpointManager(root.absolute(), options=options, item_handlers=handlers)


def _can_be_listed(folder: Path) -> bool:
    """Return whether Orbax can create a manager of a folder that holds only this checkpoint."""
    with tempfile.TemporaryDirectory() as root:
        Path(root, folder.name).symlink_to(folder.absolute())
        try:
            _make_manager(Path(root), _KeepLatestAndBest()).close()
        except Exception:
            return False
        return True


class _KeepLatestAndBest:
    """A preservation policy of Orbax: keep the two latest checkpoints and the best.

    If the latest is damaged, the run continues from the one before it.
    """

    best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        return [i >= len(checkpoints) - 2 or c.step == self.best_step for i, c in enumerate(checkpoints)]
