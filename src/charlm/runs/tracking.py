"""The records of a run: metrics.jsonl, samples, curves.png, TensorBoard events, and optionally Weights & Biases."""

import functools
import importlib.util
import json
import math
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from charlm.config import flatten
from charlm.runs.curves import draw_curves
from charlm.runs.samples import append_samples, cut_back_samples
from charlm.system.errors import ConfigError, RunFailed
from charlm.system.files import is_number, read_json_lines, read_text, write_text

# Seconds between two drawings of curves.png, except at the end.
_DRAW_SECONDS = 20


class Tracker:
    """Writes the records of a run.

    When a run is resumed, the records are first cut back to the step of the checkpoint, so no step is recorded twice.

    Args:
        workdir: the run's folder.
        step: the step from which the run continues; 0 for a new run.
        config: the run's config.

    Raises:
        RunFailed: Weights & Biases is selected and cannot be reached.
    """

    def __init__(self, workdir: Path, step: int, config: ConfigDict):
        self._workdir, self._step, self._config = workdir, step, config
        self._wandb = _start_wandb(workdir, config) if config.train.wandb_project else None
        self._drawn = time.monotonic()
        self._lines = _cut_back_metrics(workdir / "metrics.jsonl", step)
        cut_back_samples(workdir, step)
        self._metrics = open(workdir / "metrics.jsonl", "a", encoding="utf-8")

    @functools.cached_property
    def _events(self) -> Any:
        """The TensorBoard events. They are opened at the first record, so the first step does not wait for the import."""
        return _summary_writer()(str(self._workdir), purge_step=self._step + 1 if self._step else None)

    def record(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and send its numbers to TensorBoard and Weights & Biases."""
        self._lines.append(line)
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        numbers = {f"{line['split']}/{key}": value for key, value in line.items() if isinstance(value, float)}
        for name, value in numbers.items():
            self._events.add_scalar(name, value, line["step"])
        if self._wandb:
            self._wandb.log(numbers, step=line["step"])

    def sample(self, step: int, texts: list[str]) -> None:
        """Append samples to samples.jsonl, to samples.txt and to the TensorBoard events."""
        append_samples(self._workdir, step, texts)
        self._events.add_text("sample", "\n\n".join(f"```\n{text}\n```" for text in texts), step)

    def draw(self, force: bool = False) -> None:
        """Draw curves.png, unless it was drawn less than 20 seconds ago and `force` is False."""
        if force or time.monotonic() - self._drawn > _DRAW_SECONDS:
            draw_curves(self._lines, self._workdir / "curves.png")
            self._drawn = time.monotonic()

    def end(self, result: dict[str, Any]) -> None:
        """Record the result of a run that has ended."""
        if self._wandb:
            self._wandb.summary.update({f"result/{key}": value for key, value in result.items()})
        if self._config.train.tensorboard_hparams:
            writer = self._events.file_writer
            for summary in _hparams(self._config):
                writer.add_summary(summary)

    def close(self) -> None:
        """Close all files and the connection to Weights & Biases."""
        self._metrics.close()
        if "_events" in vars(self):
            self._events.close()
        if self._wandb:
            self._wandb.finish()


class NoTracker:
    """A `Tracker` that writes nothing, for the processes of a job other than process 0."""

    def record(self, line: dict[str, Any]) -> None:
        """Do nothing."""

    def sample(self, step: int, texts: list[str]) -> None:
        """Do nothing."""

    def draw(self, force: bool = False) -> None:
        """Do nothing."""

    def end(self, result: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _summary_writer() -> type:
    """Return tensorboardX's SummaryWriter. It is imported here, because only training needs it.

    tensorboardX imports PyTorch if it is installed, to write PyTorch tensors. charlm writes none, and the import costs 1.5
    seconds and 120 MB. PyTorch is therefore hidden during the import of tensorboardX.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


def _hparams(config: ConfigDict) -> tuple[Any, ...]:
    """Return the summaries of a run for TensorBoard's HParams page, which shows the config beside the losses."""
    from tensorboardX.summary import hparams

    values = {key: str(value) if isinstance(value, list) else value for key, value in flatten(config) if value is not None}
    return hparams(values, {"val/nats_per_char": None, "train/nats_per_char": None})


def check_trackers(config: ConfigDict) -> None:
    """Raise ConfigError if the config selects a tracker that is not installed."""
    if config.train.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError("train.wandb_project needs Weights & Biases, which is not installed: pip install 'charlm[wandb]'")


def _start_wandb(workdir: Path, config: ConfigDict) -> Any:
    """Start a run of Weights & Biases, or resume the one whose id the workdir holds.

    Raises:
        RunFailed: Weights & Biases cannot be reached.
    """
    import wandb

    id_file = workdir / "wandb_id.txt"
    if not id_file.exists():
        write_text(id_file, secrets.token_hex(4))
    try:
        return wandb.init(
            project=config.train.wandb_project,
            id=read_text(id_file).strip(),
            name=workdir.absolute().name,
            group=workdir.absolute().parent.name,  # The name of the sweep if the run belongs to one.
            dir=str(workdir),
            config=dict(flatten(config)),
            resume="allow",
            reinit="create_new",  # The executor `vmap` trains several runs in one process.
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise RunFailed(
            f"train.wandb_project: Weights & Biases cannot be reached: {error}; WANDB_MODE=offline needs no network"
        ) from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, without those that are damaged, with a message; [] if the file does not exist.

    Raises:
        WorkdirError: the file cannot be read.
    """
    return read_json_lines(path, _is_line)


def _is_line(line: dict[str, Any]) -> bool:
    """Return whether a line has all fields that every line has, and no value of another type than in a line."""
    numbers = [value for key, value in line.items() if key != "split" and value is not None]
    if not all(map(is_number, numbers)) or not isinstance(line.get("step"), int):
        return False
    loss = line.get("nats_per_char")
    return line.get("split") in ("train", "val") and is_number(line.get("chars")) and is_number(loss) and math.isfinite(loss)


def _cut_back_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines of later steps from metrics.jsonl; return the others."""
    lines = [line for line in read_metrics(path) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines
