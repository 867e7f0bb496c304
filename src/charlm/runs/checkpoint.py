"""Choose among the checkpoints of a run: the best, the latest, and the latest undamaged one."""

import time
from collections.abc import Callable
from typing import Any

from charlm.parallel import processes
from charlm.runs.checkpoint_store import CheckpointStore, DamagedCheckpoint
from charlm.runs.flat_state import FlatState
from charlm.system.errors import WorkdirError

# How often a checkpoint is chosen again, after training has deleted the one that was chosen, and how long a deletion may take.
_ATTEMPTS, _DELETION_SECONDS = 20, 0.1


class Checkpoints(CheckpointStore):
    """The checkpoints of one workdir, and the choice of one of them."""

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
            for bad_step, error in damaged if processes.is_primary() else ():
                say(f"{error}; continuing from step {step}, the last undamaged checkpoint")
                self._move_to_damaged(bad_step)
            return flat, meta
        if damaged:
            raise DamagedCheckpoint(f"{damaged[0][1]}, and no undamaged one precedes it; start again in another --workdir")
        return None

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
                self.check(step)
            except DamagedCheckpoint:
                if step == self.steps()[0]:
                    raise
            else:
                return step != self.steps()[-1]
        return False


def read_on_all_processes(
    checkpoints: Checkpoints, find: Callable[[], tuple[FlatState, dict] | None]
) -> tuple[FlatState, dict] | None:
    """Return, in all processes, the checkpoint that process 0 finds, or that all of them find together."""
    if checkpoints.together:
        return find()
    found = None

    def step_found() -> int:
        nonlocal found
        found = find()
        return found[1]["step"] if found else -1

    at = processes.broadcast_from_primary(step_found)
    return found if processes.is_primary() or at < 0 else checkpoints.restore(at)


class _Deleted(Exception):
    """Another process has deleted a checkpoint while it was read: training keeps only the latest and the best."""
