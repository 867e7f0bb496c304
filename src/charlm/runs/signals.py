"""Handle SIGINT and SIGTERM during training: record them, share them between processes, and act on them at a safe point."""

import signal
import threading
from types import FrameType

from charlm.parallel import processes


class Signals:
    """A context manager that records SIGINT and SIGTERM instead of ending the process. A second SIGINT ends the process.

    In a thread other than the main one it records nothing: Python delivers signals to the main thread only.

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

        here = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM) if here}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop(self) -> None:
        """Ask the run to stop, as SIGINT does."""
        self._here.append(signal.SIGINT)

    def synchronize(self, seconds: float = 0.0) -> float:
        """Exchange caught signals between all processes of a job; return the seconds that process 0 measured."""
        rows = processes.all_gather(seconds, *(self._here[:1] or [0]))
        self.caught = self.caught or int(rows[:, 1].max())
        return float(rows[0, 0])
