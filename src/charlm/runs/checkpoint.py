"""Orbax checkpoints of a run: save, verify, restore, find the best and the latest.

`checkpoints/<step>/` holds two items: `state`, a flat dict from dotted path to array, and `meta`, JSON with the run's
progress and a sha256 of everything. Orbax returns flipped bits without a word; the sha256 does not.
"""

import contextlib
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from charlm.nn.model import CharLM
from charlm.parallel import processes
from charlm.parallel.mesh import fetch
from charlm.system.errors import RunFailed, WorkdirError
from charlm.system.progress import say

Flat = dict[str, np.ndarray]


class DamagedCheckpoint(WorkdirError):
    """A checkpoint that cannot be read, or is not what was saved."""


def flatten_state(tree: Any) -> Flat:
    """{dotted path: array} of a tree, copied to the host; all processes have to ask for it."""
    leaves = jax.tree_util.tree_leaves_with_path(fetch(tree))
    # A copy: on a CPU the host's view of an array is the array, and a donated one is soon overwritten.
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.array(leaf) for path, leaf in leaves}


def unflatten_state(like: Any, flat: Flat) -> Any:
    """The tree of the shape of `like` whose leaves `flatten_state` wrote.

    Raises:
        WorkdirError: another model wrote them.
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


def params_of(flat: Flat, model: CharLM) -> Any:
    """The parameters in a flat state to score and to sample with (`TrainState.eval_params`), on the device.

    Raises:
        WorkdirError: they are not those of the model.
    """
    name = "ema" if any(path.startswith("ema.") for path in flat) else "params"
    like = {name: jax.eval_shape(model.initial_params, jax.random.key(0))}
    return jax.device_put(unflatten_state(like, flat)[name])


def sha256(flat: Flat, meta: Mapping[str, Any] | None = None) -> str:
    """sha256 over sorted paths, dtypes, shapes and bytes; and over JSON meta data if given."""
    digest = hashlib.sha256()
    for name in sorted(flat):
        value = np.ascontiguousarray(flat[name])
        digest.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        digest.update(value.tobytes())
    if meta is not None:
        digest.update(json.dumps(meta, sort_keys=True).encode())
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one workdir. Writes in the background; keeps the two latest and the best."""

    def __init__(self, workdir: Path):
        self._root = workdir / "checkpoints"
        self._keep = _KeepLatestAndBest()

    @functools.cached_property
    def _manager(self):
        """Orbax's, for writing. Made at its first use, since importing Orbax takes as long as a fifth of a start."""
        try:
            return _make_manager(self._root, self._keep)
        except Exception:
            # It reads a file of every checkpoint there is, so that a damaged one bars the way to a new one.
            for step in self.steps():
                if not _can_be_listed(self._root / str(step)):
                    say(f"the checkpoint {self._root / str(step)} is damaged; put aside, into {self._root.parent / 'damaged'}")
                    self._put_aside(step)
            return _make_manager(self._root, self._keep)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order. One that is not complete has another name yet."""
        if not self._root.is_dir():
            return []
        return sorted(int(path.name) for path in self._root.iterdir() if path.name.isdecimal() and path.is_dir())

    def save(self, step: int, state: Any, progress: Mapping[str, Any], best_step: int | None) -> None:
        """Start saving; the arrays are copied before this returns. A checkpoint of the same step is replaced.

        All processes of a job have to call this; process 0 writes.

        Raises:
            RunFailed: this or the save before it could not be written.
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

    def restore(self, step: int) -> tuple[Flat, dict]:
        """The state and meta data of one checkpoint, verified.

        Raises:
            DamagedCheckpoint: unreadable, or not what was saved.
        """
        import orbax.checkpoint as ocp

        folder = self._root / str(step)
        try:
            alone = {"multiprocessing_options": _single_process_options()}
            with ocp.Checkpointer(ocp.StandardCheckpointHandler(**alone), **alone) as reader:
                state = reader.restore((folder / "state").absolute())
            with ocp.Checkpointer(ocp.JsonCheckpointHandler(**alone), **alone) as reader:
                meta = dict(reader.restore((folder / "meta").absolute()))
            flat = {name: np.asarray(value) for name, value in state.items()}
            expected = meta.pop("sha256", None)
        except MemoryError:
            raise
        except Exception as error:  # Orbax raises many kinds for files that are cut short or altered.
            raise DamagedCheckpoint(f"the checkpoint {folder} cannot be read ({type(error).__name__})") from None
        if sha256(flat, meta) != expected or meta.get("step") != step:
            raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: its sha256 does not match")
        self._keep.best_step = meta["best_step"]
        return flat, meta

    def restore_latest(self, say: Callable[[str], None]) -> tuple[Flat, dict] | None:
        """The latest checkpoint that is whole, or None if there is none at all.

        Damaged ones are named and put aside, into `damaged/` beside `checkpoints/`.

        Raises:
            DamagedCheckpoint: there are checkpoints, and none of them is whole.
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
                say(f"{error}; going on from step {step}, the one before")
                self._put_aside(bad_step)
            return flat, meta
        if damaged:
            raise DamagedCheckpoint(f"{damaged[0][1]}, and there is no whole one before it; start again in another --workdir")
        return None

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self._root / str(later))

    def _put_aside(self, step: int) -> None:
        """Into `damaged/` beside `checkpoints/`."""
        aside = self._root.parent / "damaged"
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / str(step), ignore_errors=True)
        (self._root / str(step)).rename(aside / str(step))

    def find(self, which: str, say: Callable[[str], None]) -> tuple[Flat, dict]:
        """The checkpoint `best`, `latest`, or of a step, verified; `say` is told of damaged ones that were passed over.

        Raises:
            WorkdirError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise WorkdirError(f"{self._root} holds no checkpoint yet; the run has to be trained first")
        if which == "latest":
            return self.restore(steps[-1])
        if which == "best":
            return self._find_best(steps, say)
        if not which.isdecimal() or int(which) not in steps:
            raise WorkdirError(f"--checkpoint is {which!r}; it must be best, latest or one of {', '.join(map(str, steps))}")
        return self.restore(int(which))

    def _find_best(self, steps: list[int], say: Callable[[str], None]) -> tuple[Flat, dict]:
        """The step that the latest whole checkpoint calls the best; itself, if nothing was evaluated."""
        for step in reversed(steps):
            try:
                flat, meta = self.restore(step)
            except DamagedCheckpoint as error:
                if step == steps[0]:
                    raise
                say(f"{error}; taking the best of those before it")
                continue
            best = step if meta["best_step"] is None else meta["best_step"]
            if best == step:
                return flat, meta
            if best in steps:
                return self.restore(best)
            raise WorkdirError(f"{self._root} no longer holds the best checkpoint, step {best}; try --checkpoint latest")
        raise AssertionError("there is at least one step")

    def wait(self) -> None:
        """Until everything is on disk. Raises RunFailed if it cannot be."""
        if "_manager" in vars(self):
            with self._errors_as_run_failed():
                self._manager.wait_until_finished()

    def close(self) -> None:
        if "_manager" in vars(self):
            with contextlib.suppress(Exception):  # What could not be written was told of by `wait`.
                self._manager.close()

    @contextlib.contextmanager
    def _errors_as_run_failed(self) -> Iterator[None]:
        """Orbax raises errors of many kinds when a disk is full, for this save or the one before it; here of one."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[-200:]
            kept = f"the last one is that of step {self.steps()[-1]}" if self.steps() else "there is none yet"
            raise RunFailed(
                f"a checkpoint could not be written to {self._root}: {reason}; {kept}, and the same command goes on from it"
            ) from None


def _single_process_options():
    """Orbax's options for a process of a job that reads or writes by itself: the whole state is in each, and 0 writes it."""
    from orbax.checkpoint.options import MultiprocessingOptions

    return MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})


def _make_manager(root: Path, keep: Any):
    import orbax.checkpoint as ocp

    root.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        create=False,
        cleanup_tmp_directories=True,
        preservation_policy=keep,
        enable_async_checkpointing=True,
        multiprocessing_options=_single_process_options(),
    )
    alone = {"multiprocessing_options": _single_process_options()}
    handlers = {"state": ocp.StandardCheckpointHandler(**alone), "meta": ocp.JsonCheckpointHandler(**alone)}
    return ocp.CheckpointManager(root.absolute(), options=options, item_handlers=handlers)


def _can_be_listed(folder: Path) -> bool:
    """Whether Orbax can make a manager of a checkpoint alone."""
    with tempfile.TemporaryDirectory() as alone:
        Path(alone, folder.name).symlink_to(folder.absolute())
        try:
            _make_manager(Path(alone), _KeepLatestAndBest()).close()
        except Exception:
            return False
        return True


class _KeepLatestAndBest:
    """Orbax's PreservationPolicy that keeps the two latest, so that there is one to go back to if the latest is damaged, and
    the best.
    """

    best_step: int | None = None

    def should_preserve(self, checkpoints, *, context):
        del context
        return [i >= len(checkpoints) - 2 or c.step == self.best_step for i, c in enumerate(checkpoints)]
