"""What a command shows while it works, on stderr: a live line in a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any

# Work that is done sooner shows no progress.
_QUIET_SECONDS = 1.0
# Seconds between two plain lines.
_LINE_SECONDS = 10.0


def say(text: str) -> None:
    """A line on stderr. That nobody reads it any more must not end a run."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class ProgressLine:
    """A live line with loss, speed and time left in a terminal; one plain line a record elsewhere. On stderr.

    `silent` ones show nothing.
    """

    def __init__(self, num_steps: int, step: int, silent: bool = False):
        self._num_steps = num_steps
        self._silent = silent
        self._bar = self._task = None
        self._seconds_per_step = 0.0
        if sys.stderr.isatty() and not silent:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[metrics]}"),
                TextColumn("{task.fields[speed]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), expand=True)
            self._task = self._bar.add_task("train", total=num_steps, completed=step, metrics="", speed="", left="compiling")
            self._bar.start()

    def say(self, text: str) -> None:
        """A line above the live one."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._silent:
            say(text)

    def update(self, step: int, metrics: Mapping[str, float], chars_per_second: float, seconds_per_step: float) -> None:
        """Show the metrics of the latest step."""
        self._seconds_per_step = seconds_per_step
        if self._bar:
            self._bar.update(
                self._task,
                completed=step,
                metrics="  ".join(f"{name} {value:.3f}" for name, value in metrics.items()),
                speed=f"{chars_per_second:,.0f} chars/s",
                left=f"{self.left(step)} left",
            )

    def left(self, step: int) -> str:
        """Training time to go, evaluations and saving not counted."""
        seconds = round((self._num_steps - step) * self._seconds_per_step)
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    def record(self, line: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Print a line of metrics.jsonl: of validation always, of training where there is no live line.

        Args:
            line: as in the file.
            metrics: the selected metrics among its keys.
        """
        more = "".join(f"  {name} {value:.4f}" for name, value in metrics.items())
        if line["split"] == "val":
            self.say(f"step {line['step']}  validation loss {line['nats_per_char']:.4f} nats per character{more}")
        elif not self._bar:
            self.say(
                f"step {line['step']}/{self._num_steps}  loss {line['nats_per_char']:.4f}{more}  "
                f"{line['chars_per_second']:,.0f} chars/s  {self.left(line['step'])} left"
            )

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


class ByteProgress:
    """How much of some bytes is done, how fast it goes and how long it takes yet; a context manager.

    Args:
        what: `encoding FILE`, say.
        total: bytes in all; None if nobody knows.
        done: bytes that were there before.
    """

    def __init__(self, what: str, total: int | None, done: int = 0):
        self._what, self._total, self._done = what, total, done
        self._first = done
        self._bar = self._task = None

    def __enter__(self) -> "ByteProgress":
        self._began = time.monotonic()
        self._shown = self._began + _QUIET_SECONDS - _LINE_SECONDS
        return self

    def __exit__(self, *error) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, size: float) -> None:
        """`size` more bytes are done."""
        self.reach(self._done + size)

    def reach(self, done: float) -> None:
        """So many bytes are done by now."""
        self._done = done
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif sys.stderr.isatty() and now - self._began > _QUIET_SECONDS:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self._what, total=self._total, completed=self._done)
            self._bar.start()
        elif now - self._shown > _LINE_SECONDS:
            self._shown = now
            rate = (self._done - self._first) / (now - self._began)
            of = f" of {_megabytes(self._total)}" if self._total else ""
            left = f", {(self._total - self._done) / rate:.0f} s left" if self._total and rate else ""
            say(f"{self._what}: {_megabytes(self._done)}{of} MB at {_megabytes(rate)} MB/s{left}")


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.3g}"
