"""What charlm needs of Orbax: its manager of checkpoints, and how a checkpoint is read."""

import contextlib
import itertools
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

# `StateOnDisk` reads this many bytes of arrays at once, or one larger array. Every read takes at least some milliseconds.
_FEW_BYTES = 1 << 28


def single_process_options() -> Any:
    """Return Orbax's options for a process that reads or writes alone: every process has the state, and process 0 writes."""
    from orbax.checkpoint.options import MultiprocessingOptions

    return MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})


@contextlib.contextmanager
def open_items(
    folder: Path, check: Callable[[dict[str, tuple[Any, ...]]], None]
) -> Iterator[tuple["StateOnDisk", dict[str, Any]]]:
    """Open the items `state` and `meta` of a checkpoint. Raises an exception of any type if it is damaged.

    No process waits for another.

    Args:
        folder: the folder of the checkpoint.
        check: called with the shapes that the checkpoint declares, before any array is read.
    """
    import orbax.checkpoint as ocp

    options = {"multiprocessing_options": single_process_options()}
    with ocp.Checkpointer(ocp.JsonCheckpointHandler(**options), **options) as reader:
        meta = dict(reader.restore(folder / "meta"))
    with _without_warnings(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options), **options) as reader:
        check(shapes := shapes_of(reader.metadata(folder / "state")))
        yield StateOnDisk(reader, folder / "state", shapes), meta


class StateOnDisk(Mapping[str, np.ndarray]):
    """The state of a checkpoint that is open: dotted path -> array, sorted. A few arrays at a time are in memory."""

    def __init__(self, reader: Any, folder: Path, shapes: Mapping[str, tuple[Any, ...]]):
        self._reader, self._folder = reader, folder
        self._sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in sorted(shapes.items())}
        self._few: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._few:
            self._few.clear()
            names, size = list[str](), 0
            for each in itertools.dropwhile(lambda each: each != name, self):
                size += self._sizes[each]
                if names and size > _FEW_BYTES:
                    break
                names.append(each)
            self._few = self._read(names)
        return self._few[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def read(self, shardings: Mapping[str, Sharding] | None = None) -> dict[str, Any]:
        """Return all arrays at once.

        Args:
            shardings: dotted path -> sharding of the array; this process reads only the shards of its own devices. None: the
                arrays are complete NumPy arrays.
        """
        return self._read(list(self), shardings)

    def _read(self, names: Sequence[str], shardings: Mapping[str, Sharding] | None = None) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        # Each array is placed as asked for here, so the devices that wrote the checkpoint do not matter.
        whole = ocp.RestoreArgs(restore_type=np.ndarray)
        how = {name: ocp.ArrayRestoreArgs(sharding=shardings[name]) if shardings else whole for name in names}
        some = ocp.args.PyTreeRestore(item=dict.fromkeys(names, 0), restore_args=how, partial_restore=True)
        return self._reader.restore(self._folder, args=some)


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
        # If Orbax cannot create a folder in the background, threads of it wait five minutes for this folder, and the process
        # does not end before them.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
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
