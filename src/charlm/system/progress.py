"""Progress on stderr while a command works: a live line in a terminal, and plain lines elsewhere."""

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

# Shorter work shows no progress.
_QUIET_SECONDS = 1.0
# The time between two plain lines.
_LINE_SECONDS = 10.0
# The time between two updates of a notebook's live line.
_NOTEBOOK_SECONDS = 0.2


# Whether this thread prints nothing (`quiet`).
_IS_QUIET = contextvars.ContextVar("charlm_is_quiet", default=False)


@contextlib.contextmanager
def quiet(yes: bool = True) -> Iterator[None]:
    """Print no progress and no message in this thread within the context. If `yes` is False, do nothing."""
    token = _IS_QUIET.set(yes or _IS_QUIET.get())
    try:
        yield
    finally:
        _IS_QUIET.reset(token)


def say(text: str) -> None:
    """Print a line on stderr. A closed or full stderr must not end a run, so errors are ignored."""
    if not _IS_QUIET.get():
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


class _TerminalLine:
    """A live line in a terminal, drawn by rich."""

    def __init__(self, num_steps: int, step: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[metrics]}"),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), expand=True)
        self._task = self._bar.add_task("train", total=num_steps, completed=step, metrics="", speed="", left="compiling")
        self._bar.start()

    def print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # The terminal may have gone away.
            self._bar.console.print(text, markup=False, highlight=False)

    def update(self, step: int, metrics: str, speed: str, left: str) -> None:
        self._bar.update(self._task, completed=step, metrics=metrics, speed=speed, left=left)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._bar.stop()


class _NotebookLine:
    """A live line below a notebook's cell, which IPython replaces."""

    def __init__(self, num_steps: int, step: int):
        from IPython.display import display

        self._num_steps, self._shown = num_steps, 0.0
        self._line = self._bundle(step, "", "", "compiling")
        self._handle = display(self._line, raw=True, display_id=True)

    def _bundle(self, step: int, *fields: str) -> dict[str, str]:
        """Return the line as what IPython displays: {MIME type: content}."""
        return {"text/plain": "  ".join([f"step {step}/{self._num_steps}", *filter(None, fields)])}

    def print(self, text: str) -> None:
        print(text)

    def update(self, step: int, metrics: str, speed: str, left: str) -> None:
        self._line = self._bundle(step, metrics, speed, left)
        if time.monotonic() - self._shown > _NOTEBOOK_SECONDS:
            self._shown = time.monotonic()
            self._handle.update(self._line, raw=True)

    def close(self) -> None:
        self._handle.update(self._line, raw=True)


def _live_line(num_steps: int, step: int) -> _TerminalLine | _NotebookLine | None:
    """Return the live line that stderr can show; None if it is neither a terminal nor a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel"):
        return _NotebookLine(num_steps, step)
    return _TerminalLine(num_steps, step) if sys.stderr.isatty() else None


class ProgressLine:
    """The progress of training: metrics, speed and time left.

    In a terminal and in a notebook it is a live line. Elsewhere it is a plain line for each record.

    Args:
        num_steps: the number of steps of the run.
        step: the number of steps done already.
        silent: whether to show nothing.
    """

    def __init__(self, num_steps: int, step: int, silent: bool = False):
        self._num_steps = num_steps
        self._silent = silent or _IS_QUIET.get()
        self._live = None if self._silent else _live_line(num_steps, step)
        self._seconds_per_step = 0.0

    def say(self, text: str) -> None:
        """Print a line, above the live line if there is one."""
        if self._live:
            self._live.print(text)
        elif not self._silent:
            say(text)

    def update(self, step: int, metrics: Mapping[str, float], chars_per_second: float, seconds_per_step: float) -> None:
        """Show the metrics, {name: value}, and the speed after `step` steps."""
        self._seconds_per_step = seconds_per_step
        if self._live:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            self._live.update(step, shown, f"{chars_per_second:,.0f} chars/s", f"{self.time_left(step)} left")

    def time_left(self, step: int) -> str:
        """Return the remaining training time after `step` steps, without evaluations and saving: `h:mm:ss` or `m:ss`."""
        seconds = round((self._num_steps - step) * self._seconds_per_step)
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    def record(self, line: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Print a line of metrics.jsonl. With a live line, print only validation.

        Args:
            line: the line as in the file.
            metrics: those of its values that `train.metrics` or `eval.metrics` selected.
        """
        more = "".join(f"  {name} {value:.4f}" for name, value in metrics.items())
        if line["split"] == "val":
            self.say(f"step {line['step']}  validation loss {line['nats_per_char']:.4f} nats per character{more}")
        elif not self._live:
            self.say(
                f"step {line['step']}/{self._num_steps}  loss {line['nats_per_char']:.4f}{more}  "
                f"{line['chars_per_second']:,.0f} chars/s  {self.time_left(line['step'])} left"
            )

    def close(self) -> None:
        """Remove the live line of a terminal. That of a notebook stays."""
        if self._live:
            self._live.close()


class ByteProgress:
    """A context manager that shows how many bytes are processed, the speed and the time left.

    Args:
        activity: what happens to the bytes, for example "encoding FILE".
        total: the number of bytes; None if it is unknown.
        done: the number of bytes that were processed earlier.
    """

    def __init__(self, activity: str, total: int | None, done: int = 0):
        self._activity, self._total, self._done = activity, total, done
        self._first = done
        self._bar = self._task = None

    def __enter__(self) -> "ByteProgress":
        self._started = time.monotonic()
        self._shown = self._started + _QUIET_SECONDS - _LINE_SECONDS
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, size: float) -> None:
        """Add `size` bytes to those that are processed, and show the progress."""
        self.set_done(self._done + size)

    def set_done(self, done: float) -> None:
        """Set the number of processed bytes, and show the progress."""
        self._done = done
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif sys.stderr.isatty() and now - self._started > _QUIET_SECONDS and not _IS_QUIET.get():
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
            self._task = self._bar.add_task(self._activity, total=self._total, completed=self._done)
            self._bar.start()
        elif now - self._shown > _LINE_SECONDS and done > self._first:
            self._shown = now
            rate = (self._done - self._first) / (now - self._started)
            of = f" of {_megabytes(self._total)}" if self._total else ""
            left = f", {(self._total - self._done) / rate:.0f} s left" if self._total and rate else ""
            say(f"{self._activity}: {_megabytes(self._done)}{of} MB at {_megabytes(rate)} MB/s{left}")


def _megabytes(size: float) -> str:
    """Return a number of bytes in megabytes, with three significant digits or more."""
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.3g}"
