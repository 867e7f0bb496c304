"""The host's side of a run: what happens between dispatches of steps.

What is due is logged, evaluated, sampled and saved; a limit, a signal or a loss that is no number ends the run. The device's
side, the state and the steps, belongs to whoever dispatches them: `charlm.train` for one run, `charlm.together` for several.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from charlm import checkpoint, optim, outcome, processes, sample, tracking, workdir
from charlm import mesh as meshes
from charlm.batching import Layout
from charlm.corpus import Corpus
from charlm.errors import Exit, RunFailed, WorkdirError
from charlm.evaluate import shortest_text
from charlm.model import CharLM
from charlm.progress import ProgressLine
from charlm.rules import LARGEST_SEED
from charlm.step import MAX_STEPS_PER_DISPATCH, TrainState

# A dispatch is sized to take about this long, so that signals and the progress line are never far away.
_DISPATCH_SECONDS = 1.0


class _Interrupted(Exception):
    """A signal came while a text was scored."""


class Signals:
    """Takes note of SIGINT and SIGTERM, in place of ending the process, while it is entered; a second SIGINT ends it.

    Attributes:
        caught: the signal that any of a job's processes caught, as far as they have told each other; 0: none.
    """

    def __init__(self):
        self.caught = 0
        self._here: list[int] = []

    def __enter__(self) -> "Signals":
        def catch(number, frame):
            del frame
            if self._here and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._here.append(number)

        self._before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, seconds: float = 0.0) -> float:
        """Have all processes of a job tell each other; returns the seconds that process 0 measured."""
        rows = processes.told(seconds, *(self._here[:1] or [0]))
        self.caught = self.caught or int(rows[:, 1].max())
        return float(rows[0, 0])


class Host:
    """One run between its dispatches. A context manager, which closes its files.

    Args:
        config, path, corpus, layout: of the run.
        num_steps: its length, for the schedule and for what it is called in the end.
        end: the step to stop at.
        signals: entered, and watched.
        score, sampler: of the run's model (`make_scorer`, `make_sampler`), which runs of one model share.
        mesh: the devices that share a batch.
        silent: show nothing.

    Attributes:
        at: steps done.
        progress: what is remembered of them.
    """

    def __init__(
        self,
        config: config_dict.ConfigDict,
        path: Path,
        corpus: Corpus,
        layout: Layout,
        num_steps: int,
        end: int,
        signals: Signals,
        score: Callable,
        sampler: sample.Sampler,
        mesh: Mesh | None = None,
        silent: bool = False,
    ):
        self._began = time.monotonic()
        self._config, self._path, self._corpus, self._layout = config, path, corpus, layout
        self._num_steps, self._end, self._signals, self._mesh = num_steps, end, signals, mesh
        self._score, self._sampler = score, sampler
        self._silent = silent or not processes.leads()
        self._learning_rate = jax.jit(optim.make_schedule(config.optimizer, num_steps))
        self._chars_per_step = outcome.chars_per_step(config)
        self._shortest = shortest_text(config.batching)
        self._skipping = bool(config.optimizer.skip_not_finite)
        self._chunk = 1
        self.at = self._saved = 0
        self.progress = outcome.Progress()
        self.checkpoints = checkpoint.Checkpoints(path)
        self._open = contextlib.ExitStack()
        self._open.callback(self.checkpoints.close)

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def restored(self, find: Callable[[checkpoint.Checkpoints], tuple[checkpoint.Flat, dict] | None]) -> checkpoint.Flat | None:
        """The flat state of a checkpoint to go on from, or None."""
        found = _read(self.checkpoints, lambda: find(self.checkpoints))
        if found is None:
            self.progress, self.at, self._saved = outcome.Progress(), 0, 0
            return None
        flat, meta = found
        self.progress = outcome.Progress(**meta["progress"])
        self.at = self._saved = meta["step"]
        return flat

    def begin(self, size: int) -> None:
        """Open the records, cut back to where the run goes on; `size` is the number of its parameters."""
        self._size, self._earlier = size, self.progress.elapsed
        self._tracker = tracking.Tracker(self._path, self.at, self._config) if processes.leads() else tracking.NoTracker()
        self._open.callback(self._tracker.close)
        self._bar = ProgressLine(self._end, self.at, self._silent)
        self._open.callback(self._bar.close)
        corpus = self._corpus
        where = f"{jax.devices()[0].device_kind}, {meshes.size(self._mesh)} of {len(jax.devices())} device(s)"
        where += f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
        text = f"{len(corpus.train):,} bytes"
        if corpus.vocab.kind == "chars":
            text = f"{len(corpus.train):,} characters of {corpus.vocab.size} symbols"
        where += f"; from step {self.at}" if self.at else ""
        model = f"{_model_name(self._config)}, {size:,} parameters"
        self._bar.say(f"{self._path}: {model}; {corpus.name}, {text}; {self._num_steps} steps on {where}")
        if len(corpus.val) < self._shortest:
            self._bar.say(f"no validation: data.split leaves {len(corpus.val)} characters for it, fewer than {self._shortest}")

    def is_over(self) -> bool:
        """Whether all steps are done or a limit is reached."""
        return self.at >= self._end or bool(outcome.limit_reached(self._config, self.progress))

    def steps_to_take(self) -> int:
        """How many steps the next dispatch is to have, so that nothing that is due is passed over."""
        train = self._config.train
        cadences = (train.log_every, train.eval_every, train.checkpoint_every, train.sample_every)
        due = min((every - self.at % every for every in cadences if every), default=MAX_STEPS_PER_DISPATCH)
        return min(self._chunk, due, self._end - self.at)

    def stepped(self, losses: list[float], norms: list[float], finite: bool, seconds: float) -> None:
        """Take note of a dispatch. Raises RunFailed if what came out is not finite."""
        n = len(losses)
        if not self._skipping and not all(map(math.isfinite, losses)):
            self.at += 1 + next(k for k, loss in enumerate(losses) if not math.isfinite(loss))
            raise self._diverged("the loss is")
        self.at += n
        if not finite:
            raise self._diverged("the parameters are")
        self.progress.stepped(losses, norms, seconds, only_finite=self._skipping)
        in_time = int(min(_DISPATCH_SECONDS, self._seconds_left()) * n / seconds)
        self._chunk = max(1, min(self._config.train.steps_per_dispatch, 2 * self._chunk, in_time))
        self._bar.update(self.at, losses[-1] * self._corpus.symbols_per_char, n * self._chars_per_step / seconds, seconds / n)

    def attend(self, state: Callable[[], TrainState]) -> None:
        """Do what is due after the steps done so far; `state` fetches the state where it is needed.

        Raises:
            Exit: a signal came; everything is saved.
            RunFailed: the validation loss is not finite, or a checkpoint cannot be written.
        """
        train, progress = self._config.train, self.progress
        progress.interrupted = False
        last = self.at == self._end or self._seconds_left() <= 0
        if self._is_due(train.log_every) or last:
            self._log(state)
        improved = (self._is_due(train.eval_every) or last) and self._evaluate(state)
        ending = last or self.is_over()
        if self._is_due(train.sample_every) or (ending and train.sample_every):
            self._draw_sample(state)
        if improved or self._is_due(train.checkpoint_every) or ending:
            self._save(state)
        self._signals.agreed()
        if self._signals.caught and not ending:
            raise self._stopped(state)

    def finish(self, state: Callable[[], TrainState], model: CharLM, shardings: TrainState | None = None) -> dict:
        """Score the test text at the best step, and write result.json, which it returns."""
        self.checkpoints.wait()
        self._tracker.draw(force=True)
        config, progress, stopped_early = self._config, self.progress, self.at < self._num_steps
        result = outcome.result_of("stopped_early" if stopped_early else "completed", self.at, config, progress, self._size)
        if self._skipping:
            result["skipped_updates"] = int(state().opt_state.total_notfinite)
        result["stopped_by"] = outcome.limit_reached(config, progress) if stopped_early else None
        result["params_sha256"] = checkpoint.sha256(checkpoint.flatten_state(state().params))
        if len(self._corpus.test) >= self._shortest:
            try:
                params, best = state().eval_params, progress.best_step
                if best not in (None, self.at):
                    flat, _ = _read(self.checkpoints, lambda: self.checkpoints.find(str(best), self._bar.say))
                    params = meshes.put_tree(self._mesh, checkpoint.params_of(flat, model), shardings and shardings.params)
                result["test_nats_per_char"] = self._score(params, self._corpus.test, config.eval, self._watch).nats_per_char
            except _Interrupted:
                raise self._stopped(state) from None
            except WorkdirError as error:
                self._bar.say(f"no test loss: {error}")
        self._write_result(result)
        self._bar.say(outcome.summary_line(result, self._path))
        return result

    def _log(self, state: Callable[[], TrainState]) -> None:
        """The means since the last line."""
        progress = self.progress
        if counted := progress.steps - progress.left_out:
            loss = progress.loss_sum / counted
            skipped = {"skipped_updates": int(state().opt_state.total_notfinite)} if self._skipping else {}
            self._record(
                "train",
                loss * self._corpus.symbols_per_char,
                loss,
                learning_rate=float(self._learning_rate(self.at - 1 - skipped.get("skipped_updates", 0))),
                grad_norm=progress.norm_sum / counted,
                chars_per_second=progress.steps * self._chars_per_step / progress.seconds,
                **skipped,
            )
        progress.recorded()

    def _evaluate(self, state: Callable[[], TrainState]) -> bool:
        """Score the validation text; whether this is the best so far."""
        config, progress, value = self._config, self.progress, None
        if len(self._corpus.val) >= self._shortest:
            try:
                found = self._score(state().eval_params, self._corpus.val, config.eval, self._watch)
            except _Interrupted:
                progress.interrupted = True
                raise self._stopped(state) from None
            value = found.nats_per_char
            if not math.isfinite(value):
                raise self._diverged("the validation loss is")
            self._record("val", value, found.nats_per_symbol)
        loss = value
        if config.train.best_by == "train":
            loss = progress.eval_sum / progress.eval_steps if progress.eval_steps else None
        self._tracker.draw()
        return loss is not None and progress.evaluated(self.at, loss, value, self._is_due(config.train.eval_every))

    def _draw_sample(self, state: Callable[[], TrainState]) -> None:
        config, corpus = self._config, self._corpus
        seed = (config.seed + self.at) % (LARGEST_SEED + 1)
        _, prompt_ids = sample.prompt_of(config, corpus.vocab, corpus.train, seed)
        params = meshes.whole(self._mesh, state().eval_params)
        texts = sample.sample_text(self._sampler, params, corpus.vocab, config.sample, seed, prompt_ids)
        self._tracker.sample(self.at, texts)
        self._bar.say(f"step {self.at}  a sample:\n{texts[0]}")

    def _save(self, state: Callable[[], TrainState]) -> None:
        self.progress.elapsed = self._elapsed()
        self.checkpoints.save(self.at, state(), dataclasses.asdict(self.progress), self.progress.best_step)
        self._saved = self.at

    def _stopped(self, state: Callable[[], TrainState]) -> Exit:
        """What to raise when a signal came, with everything saved."""
        if self._saved != self.at:
            self._save(state)
        self.checkpoints.wait()
        self._tracker.draw(force=True)
        name = signal.Signals(self._signals.caught).name
        self._bar.say(f"stopped by {name} at step {self.at}; everything is saved, the same command goes on from here")
        return Exit(128 + self._signals.caught)

    def _diverged(self, what: str) -> RunFailed:
        """What to raise when something is not finite, with result.json written."""
        self.checkpoints.wait()
        self._write_result(outcome.result_of("diverged", self.at, self._config, self.progress, self._size))
        self._tracker.draw(force=True)
        kept = f"the last checkpoint is that of step {self._saved}" if self._saved else "there is no checkpoint yet"
        hint = "try a lower optimizer.learning_rate, optimizer.clip_norm or optimizer.skip_not_finite, in another --workdir"
        return RunFailed(f"{what} not finite at step {self.at}; {kept}; {hint}")

    def _watch(self, done: float) -> None:
        """Called while a text is scored."""
        del done
        self._signals.agreed()
        if self._signals.caught:
            raise _Interrupted

    def _record(self, split: str, nats_per_char: float, nats_per_symbol: float, **more: float) -> None:
        self.progress.elapsed = self._elapsed()
        line = {"step": self.at, "epoch": self.at / self._layout.steps_per_epoch, "chars": self.at * self._chars_per_step}
        line |= {"seconds": self.progress.elapsed, "split": split}
        line |= {"nats_per_char": nats_per_char, "bits_per_char": nats_per_char / math.log(2), **more}
        if self._corpus.vocab.kind == "bytes":
            line["nats_per_byte"] = nats_per_symbol
        self._tracker.record(line)
        self._bar.record(line)

    def _write_result(self, result: dict) -> None:
        self._tracker.end(result)
        if processes.leads():
            workdir.write_result(self._path, result)

    def _elapsed(self) -> float:
        return self._earlier + time.monotonic() - self._began

    def _seconds_left(self) -> float:
        """Until `train.seconds`."""
        return (self._config.train.seconds or math.inf) - self.progress.train_seconds

    def _is_due(self, every: int) -> bool:
        return bool(every) and self.at % every == 0


def _read(
    checkpoints: checkpoint.Checkpoints, find: Callable[[], tuple[checkpoint.Flat, dict] | None]
) -> tuple[checkpoint.Flat, dict] | None:
    """The checkpoint that process 0 finds, in all processes."""
    found = None

    def step_found() -> int:
        nonlocal found
        found = find()
        return found[1]["step"] if found else -1

    at = processes.decided(step_found)
    return found if processes.leads() or at < 0 else checkpoints.restore(at)


def _model_name(config: config_dict.ConfigDict) -> str:
    layers = f"{config.model.num_layers} x " if config.model.num_layers > 1 else ""
    return f"{layers}{config.model.cell.upper()} {config.model.hidden_size}"
