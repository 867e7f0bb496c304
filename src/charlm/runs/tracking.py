"""What a run leaves on record: metrics.jsonl, TensorBoard, samples.txt, curves.png; and Weights & Biases, if asked to."""

import contextlib
import importlib.util
import json
import re
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from charlm.config import flatten
from charlm.runs.curves import draw_curves
from charlm.runs.workdir import read_text, write_text
from charlm.system.errors import ConfigError, RunFailed

_DRAW_SECONDS = 20


class Tracker:
    """Writes a run's records. After a restart it first cuts them back to the step that the run goes on from."""

    def __init__(self, workdir: Path, step: int, config: config_dict.ConfigDict):
        self._workdir = workdir
        self._wandb = _begin_wandb(workdir, config) if config.train.wandb_project else None
        self._drawn = time.monotonic()
        self._lines = _cut_back_metrics(workdir / "metrics.jsonl", step)
        _cut_back_samples(workdir / "samples.txt", step)
        (workdir / "samples.txt").touch()
        self._metrics = open(workdir / "metrics.jsonl", "a", encoding="utf-8")
        self._events = _summary_writer()(str(workdir), purge_step=step + 1 if step else None)
        self._hparams = _hparams(config) if config.train.tensorboard_hparams else None

    def record(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and its numbers to the event file."""
        self._lines.append(line)
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        numbers = {f"{line['split']}/{key}": value for key, value in line.items() if isinstance(value, float)}
        for name, value in numbers.items():
            self._events.add_scalar(name, value, line["step"])
        if self._wandb:
            self._wandb.log(numbers, step=line["step"])

    def sample(self, step: int, texts: list[str]) -> None:
        with open(self._workdir / "samples.txt", "a", encoding="utf-8") as file:
            for text in texts:
                file.write(f"=== step {step} ===\n{text}\n")
        self._events.add_text("sample", "\n\n".join(f"```\n{text}\n```" for text in texts), step)

    def draw(self, force: bool = False) -> None:
        """Draw curves.png, unless that was done just now."""
        if force or time.monotonic() - self._drawn > _DRAW_SECONDS:
            draw_curves(self._lines, self._workdir / "curves.png")
            self._drawn = time.monotonic()

    def end(self, result: dict[str, Any]) -> None:
        """The run has ended, as its result says."""
        if self._wandb:
            self._wandb.summary.update({f"result/{key}": value for key, value in result.items()})
        if self._hparams:
            for summary in self._hparams:
                self._events.file_writer.add_summary(summary)

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish()


class NoTracker:
    """In the place of a `Tracker` where nothing is to be written."""

    def record(self, line: dict[str, Any]) -> None:
        pass

    def sample(self, step: int, texts: list[str]) -> None:
        pass

    def draw(self, force: bool = False) -> None:
        pass

    def end(self, result: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def _summary_writer() -> type:
    """TensorBoard's writer, imported when it is needed, as matplotlib below: only training needs them.

    tensorboardX imports PyTorch wherever it is installed, for tensors that are never written here: 1.5 seconds and 120
    MB. While it is imported, PyTorch is hidden from it.
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


def _hparams(config: config_dict.ConfigDict) -> tuple:
    """What TensorBoard's HParams page needs of a run: the keys, a begin and an end; what it shows beside them are losses."""
    from tensorboardX.summary import hparams

    values = {key: str(value) if isinstance(value, list) else value for key, value in flatten(config) if value is not None}
    return hparams(values, {"val/nats_per_char": None, "train/nats_per_char": None})


def check_trackers(config: config_dict.ConfigDict) -> None:
    """Raises ConfigError if a tracker that the config asks for is not installed."""
    if config.train.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError("train.wandb_project needs Weights & Biases, which is not installed: pip install 'charlm[wandb]'")


def _begin_wandb(workdir: Path, config: config_dict.ConfigDict) -> Any:
    """A run of Weights & Biases, or the one that this workdir began with. Raises RunFailed if it cannot be reached."""
    import wandb

    name = workdir / "wandb_id.txt"
    if not name.exists():
        write_text(name, secrets.token_hex(4))
    try:
        return wandb.init(
            project=config.train.wandb_project,
            id=read_text(name).strip(),
            name=workdir.absolute().name,
            group=workdir.absolute().parent.name,  # The sweep, of a run in one.
            dir=str(workdir),
            config=dict(flatten(config)),
            resume="allow",
            reinit="create_new",  # Runs of a sweep may stand beside each other in one process.
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise RunFailed(
            f"train.wandb_project: Weights & Biases cannot be reached: {error}; WANDB_MODE=offline needs no network"
        ) from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut short is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text)
                if isinstance(line, dict) and {"step", "split", "nats_per_char"} <= line.keys():
                    lines.append(line)
    return lines


def _cut_back_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    lines = [line for line in read_metrics(path) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _cut_back_samples(path: Path, step: int) -> None:
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        for header in re.finditer(r"^=== step (\d+) ===$", text, re.MULTILINE):
            if int(header[1]) > step:
                write_text(path, text[: header.start()])
                break
