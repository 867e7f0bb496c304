"""Handle SIGINT and SIGTERM during training: record them, share them between processes, and act on them at a safe point."""

import signal
from types import FrameType

from charlm.parallel import processes


class Signals:
    """A context manager that records SIGINT and SIGTERM instead of ending the process. A second SIGINT ends the process.

    Attributes:
        caught: the signal that a process of the job had caught at the last `synchronize`; 0: none.
    """

    def __init__(self):
        self.caught = 0
        self._here: list[int] = []

    def __enter__(self) -> "Signals":
        def catch(number: int, frame: FrameType | None) -> None:
            del frame
            if self._here and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._here.append(number)

        self._before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def synchronize(self, seconds: float = 0.0) -> float:
        """Exchange caught signals between all processes of a job; return the seconds that process 0 measured."""
        rows = processes.all_gather(seconds, *(self._here[:1] or [0]))
        self.caught = self.caught or int(rows[:, 1].max())
        return float(rows[0, 0])
