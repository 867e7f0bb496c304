"""What charlm needs of Orbax: its manager of checkpoints, and how a checkpoint is read."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding


def single_process_options() -> Any:
    """Return Orbax's options for a process that reads or writes alone: every process has the state, and process 0 writes."""
    from orbax.checkpoint.options import MultiprocessingOptions

    return MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})


def read_items(
    folder: Path, check: Callable[[dict[str, tuple[Any, ...]]], None], shardings: Mapping[str, Sharding] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the items `state` and `meta` of a checkpoint. Raises an exception of any type if it is damaged.

    No process waits for another.

    Args:
        folder: the folder of the checkpoint.
        check: called with the shapes that the checkpoint declares, before any array is read.
        shardings: dotted path -> sharding of the array; each process reads only the shards of its own devices. None: the arrays
            are complete NumPy arrays.
    """
    import orbax.checkpoint as ocp

    options = {"multiprocessing_options": single_process_options()}
    with _without_warnings(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options), **options) as reader:
        check(shapes := shapes_of(reader.metadata(folder / "state")))
        # The number of devices that wrote the checkpoint does not matter, because no array is placed as it was then.
        how = {
            name: ocp.RestoreArgs(restore_type=np.ndarray)
            if shardings is None
            else ocp.ArrayRestoreArgs(sharding=shardings[name])
            for name in shapes
        }
        state = reader.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=how))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler(**options), **options) as reader:
        return state, dict(reader.restore(folder / "meta"))


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep Orbax from logging what is intended: charlm writes no metadata of Orbax's own, and checks its own sha256."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(max(before, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(before)


def make_manager(root: Path, keep: "KeepLatestAndBest", together: bool = False) -> Any:
    """Return Orbax's manager of the checkpoints in a folder. Raises an exception of any type if one of them is damaged.

    Args:
        root: the folder.
        keep: says which checkpoints are kept.
        together: whether all processes of a job write each checkpoint together. Then all of them must call this.
    """
    import orbax.checkpoint as ocp

    shared = {} if together else {"multiprocessing_options": single_process_options()}
    options = ocp.CheckpointManagerOptions(
        create=False,
        cleanup_tmp_directories=True,
        preservation_policy=keep,
        enable_async_checkpointing=True,
        **shared,
    )
    handlers = {"state": ocp.StandardCheckpointHandler(**shared), "meta": ocp.JsonCheckpointHandler(**shared)}
    return ocp.CheckpointManager(root, options=options, item_handlers=handlers)


def can_be_listed(folder: Path) -> bool:
    """Return whether Orbax can create a manager of a folder that holds only this checkpoint."""
    with tempfile.TemporaryDirectory() as root:
        Path(root, folder.name).symlink_to(folder.absolute())
        try:
            make_manager(Path(root), KeepLatestAndBest()).close()
        except Exception:
            return False
        return True


class KeepLatestAndBest:
    """A preservation policy of Orbax: keep the two latest checkpoints and the best.

    If the latest is damaged, the run continues from the one before it.
    """

    best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        return [i >= len(checkpoints) - 2 or c.step == self.best_step for i, c in enumerate(checkpoints)]


def shapes_of(tree: Any) -> dict[str, tuple[Any, ...]]:
    """Return {dotted path: (shape, dtype)} of a flat dict, or of Orbax's metadata of one."""
    flat = getattr(tree, "item_metadata", tree)
    return {name: (tuple(each.shape), np.dtype(each.dtype)) for name, each in dict(getattr(flat, "tree", flat)).items()}
