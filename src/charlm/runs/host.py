"""The host's side of a run: what happens between two dispatches of steps.

The host records, evaluates, samples and saves. A limit, a signal or a loss that is not finite ends the run. The training loop
(`loop.training_loop`) decides when each of these happens. The state stays on the device; the host asks for it when necessary.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from charlm.config.rules import LARGEST_SEED
from charlm.inference.prompt import make_prompt
from charlm.inference.sampler import Sampler, sample_text
from charlm.inference.scorer import Scorer, min_text_length
from charlm.nn.model import CharLM, num_params
from charlm.parallel import mesh as meshes
from charlm.parallel import processes
from charlm.runs import outcome, tracking, workdir
from charlm.runs.checkpoint import Checkpoints, read_on_all_processes
from charlm.runs.flat_state import FlatState, eval_params, name_leaves, sha256, state_shapes
from charlm.runs.signals import Signals
from charlm.runs.start import Prepared
from charlm.system.errors import Exit, RunFailed, WorkdirError
from charlm.system.progress import ProgressLine
from charlm.training.chunk import MAX_STEPS_PER_DISPATCH
from charlm.training.metrics import TARGET_METRICS
from charlm.training.optimizers import make_schedule
from charlm.training.state import TrainState

# A dispatch takes about this long, so signals are noticed and the progress line moves.
_DISPATCH_SECONDS = 1.0

# A function that fetches the state of the run from the device.
GetState = Callable[[], TrainState]
# A function that receives each line of metrics.jsonl.
Callback = Callable[[dict[str, Any]], object]


class _Interrupted(Exception):
    """A signal arrived while a text was scored."""


class Host:
    """One run between its dispatches. A context manager, which closes its files.

    Args:
        path: the run's folder.
        prepared: its config, text, layout and length.
        end: the step to stop at.
        signals: entered, and watched.
        model: its model.
        score: the scorer of this model (`make_scorer`); runs with the same model share it.
        sampler: the sampler of this model (`make_sampler`); runs with the same model share it.
        mesh: the devices that share a batch.
        shardings: of the state; None without a mesh.
        silent: show no progress.
        callback: called with each line of metrics. KeyboardInterrupt from it stops the run as SIGINT does.

    Attributes:
        at: number of steps done.
        progress: what is remembered of them.
    """

    def __init__(
        self,
        path: Path,
        prepared: Prepared,
        end: int,
        signals: Signals,
        model: CharLM,
        score: Scorer,
        sampler: Sampler,
        mesh: Mesh | None = None,
        shardings: TrainState | None = None,
        silent: bool = False,
        callback: Callback | None = None,
    ):
        self._start = time.monotonic()
        self._path, (self._config, self._corpus, self._layout, self._num_steps, *_) = path, prepared
        self._end, self._signals, self._mesh, self._shardings = end, signals, mesh, shardings
        self._model, self._score, self._sampler = model, score, sampler
        self._silent = silent or not processes.is_primary()
        self._callback = callback
        self._learning_rate = jax.jit(make_schedule(self._config.optimizer, self._num_steps))
        self._chars_per_step = outcome.chars_per_step(self._config)
        self._min_length = min_text_length(self._config.batching)
        self._skips = bool(self._config.optimizer.skip_not_finite)
        self._chunk = 1
        self.at = self._saved = 0
        self._identity = workdir.identity(path)
        self.progress = outcome.Progress()
        sharded = name_leaves(shardings) if shardings and self._config.mesh.shard_params else None
        self.checkpoints = Checkpoints(path, lambda: state_shapes(self._config, self._corpus.vocab.size), sharded)
        self._open = contextlib.ExitStack()
        self._open.callback(self.checkpoints.close)

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def restore(self, find: Callable[[Checkpoints], tuple[FlatState, dict] | None]) -> FlatState | None:
        """Continue from the checkpoint that `find` returns; return its flat state, or None if there is none."""
        found = read_on_all_processes(self.checkpoints, lambda: find(self.checkpoints))
        if found is None:
            self.progress, self.at, self._saved = outcome.Progress(), 0, 0
            return None
        flat, meta = found
        self.progress = outcome.Progress.from_saved(meta["progress"])
        self.at = self._saved = meta["step"]
        return flat

    def open_records(self, params: Any, num_runs: int = 1) -> None:
        """Open the records, cut back to the step from which the run continues. `params` holds `num_runs` runs."""
        self._num_params, self._earlier = num_params(params) // num_runs, self.progress.elapsed
        tracks = processes.is_primary()
        self._tracker = tracking.Tracker(self._path, self.at, self._config) if tracks else tracking.NoTracker()
        self._open.callback(self._tracker.close)
        self._bar = ProgressLine(self._end, self.at, self._silent)
        self._open.callback(self._bar.close)
        corpus = self._corpus
        where = f"{jax.devices()[0].device_kind}, {meshes.num_devices(self._mesh)} of {len(jax.devices())} device(s)"
        where += f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
        text = f"{len(corpus.train):,} bytes"
        if corpus.vocab.kind == "chars":
            text = f"{len(corpus.train):,} characters of {corpus.vocab.size} symbols"
        where += f"; from step {self.at}" if self.at else ""
        layers = f"{self._config.model.num_layers} x " if self._config.model.num_layers > 1 else ""
        model = f"{layers}{self._config.model.cell.upper()} {self._config.model.hidden_size}, {self._num_params:,} parameters"
        self._bar.say(f"{self._path}: {model}; {corpus.name}, {text}; {self._num_steps} steps on {where}")
        if len(corpus.val) < self._min_length:
            self._bar.say(f"no validation: data.split leaves {len(corpus.val)} characters, fewer than {self._min_length}")

    @property
    def must_evaluate_again(self) -> bool:
        """Whether a signal interrupted the evaluation of this step."""
        return self.progress.interrupted

    def is_over(self) -> bool:
        """Return whether all steps are done or a limit is reached."""
        return self.at >= self._end or bool(outcome.limit_reached(self._config, self.progress))

    def is_due(self, what: str) -> bool:
        """Return whether it is time to `log`, `eval`, `sample` or `checkpoint`: by its cadence, or because the run is over."""
        if what == "sample" and not self._config.train.sample_every:
            return False
        return self._at_cadence(what) or self.is_over() or (what == "eval" and self.must_evaluate_again)

    def _at_cadence(self, what: str) -> bool:
        every = self._config.train[f"{what}_every"]
        return bool(every) and self.at % every == 0

    def steps_to_take(self) -> int:
        """Return the number of steps of the next dispatch: it ends where something is due, and takes about a second."""
        train = self._config.train
        cadences = (train.log_every, train.eval_every, train.checkpoint_every, train.sample_every)
        due = min((every - self.at % every for every in cadences if every), default=MAX_STEPS_PER_DISPATCH)
        return min(self._chunk, due, self._end - self.at)

    def add_steps(self, metrics: Mapping[str, Sequence[float]], finite: bool, seconds: float) -> None:
        """Add a dispatch of steps to the progress. Raises RunFailed if a loss or the parameters are not finite."""
        losses = metrics["loss"]
        n = len(losses)
        if not self._skips and not all(map(math.isfinite, losses)):
            self.at += 1 + next(k for k, loss in enumerate(losses) if not math.isfinite(loss))
            raise self._diverged("the loss is")
        self.at += n
        if not finite:
            raise self._diverged("the parameters are")
        self.progress.add_steps(metrics, seconds, only_finite=self._skips)
        in_time = int(min(_DISPATCH_SECONDS, self._seconds_left()) * n / seconds)
        self._chunk = max(1, min(self._config.train.steps_per_dispatch, 2 * self._chunk, in_time))
        shown = {"loss": losses[-1] * self._corpus.symbols_per_char}
        shown |= {name: values[-1] for name, values in metrics.items() if name in TARGET_METRICS}
        self._bar.update(self.at, shown, n * self._chars_per_step / seconds, seconds / n)

    def record(self, state: GetState) -> None:
        """Write a line of metrics: the means over the training steps since the last line."""
        self._check_in_place()
        progress = self.progress
        if means := progress.means():
            loss = means.pop("loss")
            skipped = {"skipped_updates": int(state().opt_state.total_notfinite)} if self._skips else {}
            self._write_line(
                "train",
                loss * self._corpus.symbols_per_char,
                loss,
                learning_rate=float(self._learning_rate(self.at - 1 - skipped.get("skipped_updates", 0))),
                grad_norm=means.pop("grad_norm"),
                chars_per_second=progress.steps * self._chars_per_step / progress.seconds,
                **skipped,
                **means,
            )
        progress.start_line()

    def evaluate(self, state: GetState) -> bool:
        """Score the validation text; return whether this is the best evaluation so far.

        Raises:
            Exit: a signal came; everything is saved, and the evaluation is repeated after a restart.
            RunFailed: the validation loss is not finite.
        """
        self._check_in_place()
        config, progress, value, per_symbol = self._config, self.progress, None, None
        progress.interrupted = False
        if len(self._corpus.val) >= self._min_length:
            try:
                found = self._score(state().eval_params, self._corpus.val, config.eval, self._watch)
            except _Interrupted:
                progress.interrupted = True
                raise self._stop(state) from None
            value, per_symbol = found.nats_per_char, found.nats_per_symbol
            if not math.isfinite(value):
                raise self._diverged("the validation loss is")
            self._write_line("val", value, per_symbol, **found.metrics)
        loss = value
        if config.train.best_by == "train":
            loss = progress.eval_sum / progress.eval_steps if progress.eval_steps else None
        self._tracker.draw()
        return loss is not None and progress.add_evaluation(self.at, loss, value, self._at_cadence("eval"), per_symbol)

    def draw_sample(self, state: GetState) -> None:
        """Draw the samples that `config.sample` describes, and record them."""
        self._check_in_place()
        config, corpus = self._config, self._corpus
        seed = (config.seed + self.at) % (LARGEST_SEED + 1)
        _, prompt_ids = make_prompt(config, corpus.vocab, corpus.train, seed)
        params = meshes.gather_locally(self._mesh, state().eval_params)
        stops = () if corpus.boundary is None else (corpus.vocab.symbols[corpus.boundary],)
        texts = sample_text(self._sampler, params, corpus.vocab, config.sample, seed, prompt_ids, stops)
        self._tracker.sample(self.at, texts)
        self._bar.say(f"step {self.at}  a sample:\n{texts[0]}")

    def save(self, state: GetState) -> None:
        """Save a checkpoint. Raises RunFailed if it cannot be written."""
        self._check_in_place()
        self.progress.elapsed = self._elapsed()
        self.checkpoints.save(self.at, state(), dataclasses.asdict(self.progress), self.progress.best_step)
        self._saved = self.at

    def stop_if_signalled(self, state: GetState) -> None:
        """Raise Exit if a signal came and the run is not over; everything is saved then."""
        self._signals.synchronize()
        if self._signals.caught and not self.is_over():
            raise self._stop(state)

    def finish(self, state: GetState) -> None:
        """Score the test text with the best parameters and write result.json."""
        self.checkpoints.wait()
        self._tracker.draw(force=True)
        config, progress, stopped_early = self._config, self.progress, self.at < self._num_steps
        status = "stopped_early" if stopped_early else "completed"
        result = outcome.make_result(status, self.at, config, progress, self._num_params)
        if self._skips:
            result["skipped_updates"] = int(state().opt_state.total_notfinite)
        result["stopped_by"] = outcome.limit_reached(config, progress) if stopped_early else None
        result["params_sha256"] = sha256(name_leaves(state().params))
        if len(self._corpus.test) >= self._min_length:
            try:
                params = self._best_params(state)
                found = self._score(params, self._corpus.test, config.eval, self._watch)
                result["test_nats_per_char"] = found.nats_per_char
                if self._corpus.vocab.kind == "bytes":
                    result["test_bits_per_byte"] = found.nats_per_symbol / math.log(2)
            except _Interrupted:
                raise self._stop(state) from None
            except WorkdirError as error:
                self._bar.say(f"no test loss: {error}")
        self._write_result(result)
        self._bar.say(outcome.summary_line(result, self._path))

    def _check_in_place(self) -> None:
        """Raise FolderLost if the folder was moved or deleted. Otherwise a part of a run would appear at its old place."""
        if lost := workdir.folder_lost(self._path, self._identity):
            raise lost

    def cause_of(self, error: RunFailed) -> RunFailed:
        """Return why the run failed: its folder was moved or deleted after `_check_in_place`, or `error` itself."""
        return workdir.folder_lost(self._path, self._identity) or error

    def _best_params(self, state: GetState) -> Any:
        """Return the parameters of the best evaluation. Raises WorkdirError if their checkpoint is damaged."""
        best = self.progress.best_step
        if best in (None, self.at):
            return state().eval_params
        flat, _ = read_on_all_processes(self.checkpoints, lambda: self.checkpoints.find(str(best), self._bar.say))
        return meshes.put_tree(self._mesh, eval_params(flat, self._model), self._shardings and self._shardings.params)

    def _stop(self, state: GetState) -> Exit:
        """Save everything after a signal; return the exception to raise."""
        if self._saved != self.at:
            self.save(state)
        self.checkpoints.wait()
        self._tracker.draw(force=True)
        name = signal.Signals(self._signals.caught).name
        self._bar.say(f"stopped by {name} at step {self.at}; everything is saved, and the same command continues from here")
        return Exit(128 + self._signals.caught)

    def _diverged(self, what: str) -> RunFailed:
        """Write result.json after something was not finite; return the exception to raise."""
        self.checkpoints.wait()
        self._write_result(outcome.make_result("diverged", self.at, self._config, self.progress, self._num_params))
        self._tracker.draw(force=True)
        kept = f"the last checkpoint is that of step {self._saved}" if self._saved else "there is no checkpoint yet"
        hint = "try a lower optimizer.learning_rate, optimizer.clip_norm or optimizer.skip_not_finite, in another --workdir"
        return RunFailed(f"{what} not finite at step {self.at}; {kept}; {hint}")

    def _watch(self, done: float) -> None:
        """Raise _Interrupted if a signal came while a text is scored."""
        del done
        self._signals.synchronize()
        if self._signals.caught:
            raise _Interrupted

    def _write_line(self, split: str, nats_per_char: float, nats_per_symbol: float, **metrics: float) -> None:
        self.progress.elapsed = self._elapsed()
        line = {"step": self.at, "epoch": self.at / self._layout.steps_per_epoch, "chars": self.at * self._chars_per_step}
        line |= {"seconds": self.progress.elapsed, "split": split}
        line |= {"nats_per_char": nats_per_char, "bits_per_char": nats_per_char / math.log(2), **metrics}
        if self._corpus.vocab.kind == "bytes":
            line |= {"nats_per_byte": nats_per_symbol, "bits_per_byte": nats_per_symbol / math.log(2)}
        self._bar.record(line, {name: value for name, value in metrics.items() if name in TARGET_METRICS})
        self._tracker.record(line)
        if self._callback:
            try:
                self._callback(dict(line))
            except KeyboardInterrupt:
                self._signals.stop()

    def _write_result(self, result: dict[str, Any]) -> None:
        self._tracker.end(result)
        if processes.is_primary():
            workdir.write_result(self._path, result)

    def _elapsed(self) -> float:
        return self._earlier + time.monotonic() - self._start

    def _seconds_left(self) -> float:
        """Return the training time that `train.seconds` leaves."""
        return (self._config.train.seconds or math.inf) - self.progress.train_seconds
