"""How far a run has come and how it ended: what is remembered between starts, limits, result.json."""

import dataclasses
import math
import traceback
from collections.abc import Callable
from pathlib import Path

from ml_collections import config_dict

from charlm.errors import Exit, RunFailed, UserError
from charlm.progress import say


@dataclasses.dataclass
class Progress:
    """What the host has to remember besides the device's state; saved with every checkpoint.

    Attributes:
        best_step, best_loss: the evaluation with the lowest loss so far, as `train.best_by` says.
        best_val: the validation loss there.
        patience_loss, bad_evals: the lowest loss at the cadence of evaluations, and how many have passed since. That at
            the end of a run does not count, so that a run that is extended stops where a whole one does.
        eval_sum, eval_steps: the training loss over the steps since the last evaluation.
        loss_sum, norm_sum, steps, seconds: over the training steps since the last line of metrics.
        left_out: how many of these steps are not in the sums, as their loss or gradient was not finite.
        train_seconds: of training steps, without compilation, evaluation, saving and sampling.
        elapsed: of everything.
        interrupted: a signal came while the step was being evaluated, so that this is yet to be done.
    """

    best_step: int | None = None
    best_loss: float | None = None
    best_val: float | None = None
    patience_loss: float | None = None
    bad_evals: int = 0
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    steps: int = 0
    eval_sum: float = 0.0
    eval_steps: int = 0
    left_out: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    elapsed: float = 0.0
    interrupted: bool = False

    def stepped(self, losses: list[float], norms: list[float], seconds: float, only_finite: bool) -> None:
        """Take note of some steps, one by one and in order, so that the sums do not depend on how many there are at once."""
        for loss, norm in zip(losses, norms):
            if only_finite and not (math.isfinite(loss) and math.isfinite(norm)):
                self.left_out += 1
                continue
            self.loss_sum += loss
            self.norm_sum += norm
            self.eval_sum += loss
            self.eval_steps += 1
        self.steps += len(losses)
        self.seconds += seconds
        self.train_seconds += seconds

    def recorded(self) -> None:
        """A line of metrics was written."""
        self.loss_sum = self.norm_sum = self.seconds = 0.0
        self.steps = self.left_out = 0

    def evaluated(self, step: int, loss: float, val: float | None, at_cadence: bool) -> bool:
        """Take note of an evaluation; whether it is the best so far."""
        self.eval_sum, self.eval_steps = 0.0, 0
        improved = self.best_loss is None or loss < self.best_loss
        if improved:
            self.best_step, self.best_loss, self.best_val = step, loss, val
        if at_cadence:
            better = self.patience_loss is None or loss < self.patience_loss
            self.patience_loss = loss if better else self.patience_loss
            self.bad_evals = 0 if better else self.bad_evals + 1
        return improved


def chars_per_step(config: config_dict.ConfigDict) -> int:
    """Characters (bytes for the byte vocabulary) that a step reads."""
    return config.batching.batch_size * config.batching.seq_len


def limit_reached(config: config_dict.ConfigDict, progress: Progress) -> str | None:
    """The key of the limit that a run has reached, if it has."""
    if config.train.patience is not None and progress.bad_evals >= config.train.patience:
        return "train.patience"
    if config.train.seconds is not None and progress.train_seconds >= config.train.seconds:
        return "train.seconds"
    return None


def result_of(status: str, steps: int, config: config_dict.ConfigDict, progress: Progress, size: int | None = None) -> dict:
    """What result.json says of a run that ended after so many steps, but for what only a finished one has."""
    chars, value = steps * chars_per_step(config), progress.best_val
    return {
        "status": status,
        "steps": steps,
        "chars": chars,
        "num_params": size,
        "stopped_by": None,
        "best_step": progress.best_step,
        "val_nats_per_char": value,
        "val_bits_per_char": None if value is None else value / math.log(2),
        "test_nats_per_char": None,
        "train_seconds": progress.train_seconds,
        "chars_per_second": chars / progress.train_seconds if progress.train_seconds else None,
        "params_sha256": None,
    }


def is_over(path: Path, result: dict, config: config_dict.ConfigDict, num_steps: int) -> bool:
    """Whether there is nothing left to do; says so. Raises RunFailed if the run diverged, as it would again."""
    steps, status = result["steps"], result["status"]
    if status == "diverged":
        raise RunFailed(f"the run in {path} diverged after step {steps}; change the config and choose another --workdir")
    if status == "stopped_early":
        more_time = config.train.seconds is None or config.train.seconds > result["train_seconds"]
        over = not (result.get("stopped_by") == "train.seconds" and more_time)
        status += f" by {result.get('stopped_by')}"
    else:
        over = status == "completed" and steps == num_steps
    if over:
        value = result["val_nats_per_char"]
        scored = "" if value is None else f", validation loss {value:.4f} nats per character at step {result['best_step']}"
        say(f"the run in {path} is finished: {status.replace('_', ' ')} after {steps} steps{scored}")
    return over


def why_failed(what: Callable[[], None]) -> str | None:
    """Why something failed, in one line, or None; a traceback is shown where nobody thought of the error.

    Raises:
        Exit: a signal came.
    """
    try:
        what()
    except Exit:
        raise
    except (UserError, RunFailed) as error:
        return str(error)
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return "out of memory"
        traceback.print_exc()
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


def summary_line(result: dict, path: Path) -> str:
    """A result in one line, and what to do with it."""
    parts = [f"{result['status'].replace('_', ' ')} after {result['steps']} steps"]
    if result["val_nats_per_char"] is not None:
        parts.append(f"validation loss {result['val_nats_per_char']:.4f} nats per character (step {result['best_step']})")
    if result["test_nats_per_char"] is not None:
        parts.append(f"test {result['test_nats_per_char']:.4f}")
    if result["chars_per_second"]:
        parts.append(f"{result['chars_per_second']:,.0f} chars/s")
    return f"{'; '.join(parts)}. Text from it: python -m charlm.sample --workdir {path}"
