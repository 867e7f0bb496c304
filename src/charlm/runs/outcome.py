"""The progress of a run, its limits, and its result (result.json)."""

import dataclasses
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from charlm.system.errors import Exit, RunFailed, UserError, WorkdirError, is_out_of_memory
from charlm.system.files import is_number
from charlm.system.progress import say


@dataclasses.dataclass
class Progress:
    """What the host keeps of a run besides the device's state. It is saved with every checkpoint.

    Attributes:
        best_step, best_loss: the evaluation with the lowest loss so far, by `train.best_by`.
        best_val, best_val_per_symbol: the validation loss at that evaluation, in nats per character and per symbol.
        patience_loss, bad_evals: the lowest loss at the cadence of evaluations, and the number of evaluations since then. An
            evaluation at the end of a run, off the cadence, does not count, so that an extended run stops where an
            uninterrupted run does.
        eval_sum, eval_steps: the training loss, summed over the steps since the last evaluation.
        sums, counts: each training metric, summed over the training steps since the last line of metrics, and the number of
            steps in the sum.
        steps, seconds: the number of training steps since the last line of metrics, and their duration in seconds.
        train_seconds: the duration of all training steps, without compilation, evaluation, saving and sampling.
        elapsed: the duration of everything, in seconds, over all starts.
        interrupted: whether a signal arrived during the evaluation of this step. The evaluation must then be repeated.
    """

    best_step: int | None = None
    best_loss: float | None = None
    best_val: float | None = None
    best_val_per_symbol: float | None = None
    patience_loss: float | None = None
    bad_evals: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    steps: int = 0
    eval_sum: float = 0.0
    eval_steps: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    elapsed: float = 0.0
    interrupted: bool = False

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> "Progress":
        """Return the progress that a checkpoint holds. Another version of charlm may have written it.

        A missing field gets its default. A field that this version does not know is ignored.

        Raises:
            WorkdirError: a field has the wrong type.
        """
        saved = dict(saved)
        if "norm_sum" in saved:  # Versions before the dict of metrics saved two sums.
            counted = saved.get("steps", 0) - saved.get("left_out", 0)
            saved["sums"] = {"loss": saved.get("loss_sum", 0.0), "grad_norm": saved["norm_sum"]}
            saved["counts"] = dict.fromkeys(saved["sums"], counted)
        progress = cls()
        for field in dataclasses.fields(cls):
            default = getattr(progress, field.name)
            value = saved.get(field.name, default)
            # A sum or a number of seconds may be saved as an integer, and a best loss as null.
            kind = int | float if isinstance(default, float) else int | float | None if default is None else type(default)
            numbers = value.values() if isinstance(value, dict) else ()
            if not isinstance(value, kind) or not all(map(is_number, numbers)):
                raise WorkdirError(f"a checkpoint holds a progress whose {field.name} is {value!r:.100}, which no run saves")
            setattr(progress, field.name, value)
        return progress

    def add_steps(self, metrics: Mapping[str, Sequence[float]], seconds: float, only_finite: bool) -> None:
        """Add the metrics of some steps, step by step, so the sums do not depend on the size of a chunk.

        Args:
            metrics: name -> one value for each step.
            seconds: the duration of the steps.
            only_finite: leave out the steps whose loss or gradient is not finite.
        """
        for values in zip(*metrics.values()):
            step = dict(zip(metrics, values))
            if only_finite and not (math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"])):
                continue
            for name, value in step.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1
            self.eval_sum += step["loss"]
            self.eval_steps += 1
        self.steps += len(metrics["loss"])
        self.seconds += seconds
        self.train_seconds += seconds

    def means(self) -> dict[str, float]:
        """Return the mean of each training metric over the steps since the last line of metrics; {} if there are none."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def start_line(self) -> None:
        """Reset the sums for the next line of metrics, after a line was written."""
        self.sums, self.counts = {}, {}
        self.steps, self.seconds = 0, 0.0

    def add_evaluation(
        self, step: int, loss: float, val: float | None, at_cadence: bool, val_per_symbol: float | None = None
    ) -> bool:
        """Add an evaluation; return whether it is the best so far.

        Args:
            step: the number of steps done.
            loss: the loss that `train.best_by` selects.
            val: the validation loss in nats per character; None without validation text.
            at_cadence: whether the evaluation counts for `train.patience`.
            val_per_symbol: the validation loss in nats per symbol: per byte for the byte vocabulary.
        """
        self.eval_sum, self.eval_steps = 0.0, 0
        improved = self.best_loss is None or loss < self.best_loss
        if improved:
            self.best_step, self.best_loss, self.best_val, self.best_val_per_symbol = step, loss, val, val_per_symbol
        if at_cadence:
            better = self.patience_loss is None or loss < self.patience_loss
            self.patience_loss = loss if better else self.patience_loss
            self.bad_evals = 0 if better else self.bad_evals + 1
        return improved


def chars_per_step(config: ConfigDict) -> int:
    """Return the number of characters (bytes for the byte vocabulary) that a step reads."""
    return config.batching.batch_size * config.batching.seq_len


def limit_reached(config: ConfigDict, progress: Progress) -> str | None:
    """Return the key of the limit that a run has reached; None if it has reached none."""
    if config.train.patience is not None and progress.bad_evals >= config.train.patience:
        return "train.patience"
    if config.train.seconds is not None and progress.train_seconds >= config.train.seconds:
        return "train.seconds"
    return None


def make_result(status: str, steps: int, config: ConfigDict, progress: Progress, size: int | None = None) -> dict:
    """Return the content of result.json, without what only a finished run has: those values are None.

    Args:
        status: `completed`, `stopped_early`, `diverged` or `failed`.
        steps: the number of steps done.
        config: the run's config.
        progress: the run's progress.
        size: the number of parameters; None if it is unknown.
    """
    chars, value, per_symbol = steps * chars_per_step(config), progress.best_val, progress.best_val_per_symbol
    result = {
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
    if config.data.vocab == "bytes":
        bits = None if per_symbol is None else per_symbol / math.log(2)
        result |= {"val_bits_per_byte": bits, "test_bits_per_byte": None}
    return result


def is_over(path: Path, result: dict, config: ConfigDict, num_steps: int) -> bool:
    """Return whether a run is finished, and print a message if it is.

    Args:
        path: the run's folder.
        result: the content of its result.json.
        config: the config to train, whose limits may be higher than those of the run.
        num_steps: the length to train, in steps.

    Raises:
        RunFailed: the run diverged. It would diverge again.
    """
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


def failure_reason(function: Callable[[], None]) -> str | None:
    """Call a function; return the reason in one line if it fails, else None. An unexpected error also prints its traceback.

    Raises:
        Exit: a signal came.
    """
    try:
        function()
    except Exit:
        raise
    except (UserError, RunFailed) as error:
        return str(error)
    except Exception as error:
        if is_out_of_memory(error):
            return "out of memory"
        traceback.print_exc()
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


def summary_line(result: dict, path: Path) -> str:
    """Return a result in one line, with the command that draws text from the run."""
    parts = [f"{result['status'].replace('_', ' ')} after {result['steps']} steps"]
    if result["val_nats_per_char"] is not None:
        parts.append(f"validation loss {result['val_nats_per_char']:.4f} nats per character (step {result['best_step']})")
    if result.get("val_bits_per_byte") is not None:
        parts.append(f"{result['val_bits_per_byte']:.4f} bits per byte")
    if result["test_nats_per_char"] is not None:
        parts.append(f"test {result['test_nats_per_char']:.4f}")
    if result["chars_per_second"]:
        parts.append(f"{result['chars_per_second']:,.0f} chars/s")
    return f"{'; '.join(parts)}. To draw text: python -m charlm.sample --workdir {path}"
