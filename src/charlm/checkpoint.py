"""Orbax checkpoints of a run: save, verify, restore, find the best and the latest.

`checkpoints/<step>/` holds two items: `state`, a flat dict from dotted path to array, and `meta`, JSON with the run's
progress and a sha256 of everything. Orbax returns flipped bits without a word; the sha256 does not.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from charlm.errors import WorkdirError

Flat = dict[str, np.ndarray]


class DamagedCheckpoint(WorkdirError):
    """A checkpoint that cannot be read, or is not what was saved."""


def flatten_state(tree: Any) -> Flat:
    """{dotted path: array} of a tree, copied to the host."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
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


def subtree(flat: Flat, name: str) -> dict:
    """The nested dict below one name, `params` say."""
    tree: dict = {}
    for path, value in flat.items():
        if path.startswith(name + "."):
            *groups, last = path.split(".")[1:]
            node = tree
            for group in groups:
                node = node.setdefault(group, {})
            node[last] = value
    return tree


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

    def __init__(self, workdir: Path, writable: bool = False):
        self._root = workdir / "checkpoints"
        self._keep = _KeepLatestAndBest()
        self._manager = None
        if writable or self._root.is_dir():
            self._manager = ocp.CheckpointManager(
                self._root.absolute(),
                options=ocp.CheckpointManagerOptions(
                    create=writable,
                    read_only=not writable,
                    cleanup_tmp_directories=writable,
                    preservation_policy=self._keep,
                    enable_async_checkpointing=True,
                ),
                item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
            )

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def save(self, step: int, state: Any, progress: Mapping[str, Any], best_step: int | None) -> None:
        """Start saving; the arrays are copied before this returns."""
        flat = flatten_state(state)
        meta = {"step": step, "best_step": best_step, "progress": dict(progress)}
        meta["sha256"] = sha256(flat, meta)
        self._keep.best_step = best_step
        args = ocp.args.Composite(state=ocp.args.StandardSave(flat), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=args, force=True)

    def restore(self, step: int) -> tuple[Flat, dict]:
        """The state and meta data of one checkpoint, verified.

        Raises:
            DamagedCheckpoint: unreadable, or not what was saved.
        """
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
            )
            flat = {name: np.asarray(value) for name, value in restored["state"].items()}
            meta = dict(restored["meta"])
            expected = meta.pop("sha256", None)
        except Exception as error:  # Orbax raises many kinds for files that are cut short or altered.
            raise DamagedCheckpoint(
                f"the checkpoint {self._root / str(step)} cannot be read ({type(error).__name__})"
            ) from None
        if sha256(flat, meta) != expected or meta.get("step") != step:
            raise DamagedCheckpoint(f"the checkpoint {self._root / str(step)} is damaged: its sha256 does not match")
        self._keep.best_step = meta["best_step"]
        return flat, meta

    def restore_latest(self, say: Callable[[str], None]) -> tuple[Flat, dict] | None:
        """The latest checkpoint that is whole, or None if there is none at all; damaged ones are named and removed.

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
                self._manager.delete(bad_step)
            return flat, meta
        if damaged:
            raise DamagedCheckpoint(f"{damaged[0][1]}, and there is no whole one before it; start again in another --workdir")
        return None

    def find(self, which: str) -> tuple[Flat, dict]:
        """The checkpoint `best`, `latest`, or of a step, verified.

        Raises:
            WorkdirError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise WorkdirError(f"{self._root} holds no checkpoint yet; the run has to be trained first")
        if which == "latest":
            return self.restore(steps[-1])
        if which == "best":
            flat, meta = self.restore(steps[-1])
            best = meta["best_step"]
            return (flat, meta) if best is None or best == steps[-1] else self.restore(best)
        if not which.isdigit() or int(which) not in steps:
            raise WorkdirError(f"--checkpoint is {which!r}; it must be best, latest or one of {', '.join(map(str, steps))}")
        return self.restore(int(which))

    def wait(self) -> None:
        """Until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        if self._manager:
            self._manager.close()


class _KeepLatestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the two latest, so that there is one to go back to if the latest is damaged, and the best."""

    best_step: int | None = None

    def should_preserve(self, checkpoints, *, context):
        del context
        return [i >= len(checkpoints) - 2 or c.step == self.best_step for i, c in enumerate(checkpoints)]
