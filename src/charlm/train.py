"""Train a model.

    python -m charlm.train --config FILE [--workdir DIR] [--extend] [--config.KEY=VALUE ...]
        [--coordinator=auto | --coordinator=HOST:PORT --num_processes=N --process_id=I]

The same command on an unfinished run goes on from its last checkpoint.
"""

import contextlib
import dataclasses
import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_dict

from charlm import checkpoint, cli, cudnn, optim, outcome, processes, sample, step, tracking, workdir
from charlm import mesh as meshes
from charlm.batching import Gather, Layout, device_gather, host_gather, make_layout
from charlm.config import LARGEST_SEED, to_json
from charlm.corpus import Corpus, load_corpus
from charlm.errors import ConfigError, Exit, RunFailed, UserError, WorkdirError
from charlm.evaluate import make_scorer, shortest_text
from charlm.machine import ask_for_determinism
from charlm.model import CharLM, num_params
from charlm.progress import ProgressLine, say

# A dispatch is sized to take about this long, so that signals and the progress line are never far away.
_DISPATCH_SECONDS = 1.0
# The step counter is an int32.
_MOST_STEPS = (1 << 31) - 1


class _Interrupted(Exception):
    """A signal came while a text was scored."""


def main(argv: Sequence[str]) -> None:
    """The command."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder; default runs/<config file's stem>", flag_values=values)
    flags.DEFINE_bool(
        "extend", False, "go on with a finished run for a larger train.steps, train.epochs or train.seconds", flag_values=values
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "several processes: HOST:PORT of process 0, or auto in SLURM, Kubernetes, Open MPI and TPU pods",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "several processes: how many, unless auto", flag_values=values)
    flags.DEFINE_integer("process_id", None, "several processes: which this is, from 0, unless auto", flag_values=values)
    config = cli.parse_with_config(values, argv, __doc__)
    if config.train.deterministic:
        ask_for_determinism()
        config.model.recurrence = "scan"
    stem = Path(values["config"].config_filename.split(":")[0]).stem
    with processes.joined(values.coordinator, values.num_processes, values.process_id):
        train(config, Path(values.workdir or f"runs/{stem}"), values.extend)


def train(config: config_dict.ConfigDict, path: Path, extend: bool = False, until: int | None = None) -> None:
    """Begin the run in `path`, or go on with it; with `until` no further than that step, as if a limit had been reached.

    Raises:
        UserError: config, corpus and workdir do not allow it. Nothing was written.
        RunFailed: a loss is not finite, or something cannot be written.
        Exit: a signal came; everything is saved.
    """
    # What can be refused is refused before the workdir is touched.
    corpus = load_corpus(config.data)
    processes.check_same({"config": to_json(config), "text": corpus.sha256, "--workdir": str(path), "--extend": str(extend)})
    mesh = meshes.make_mesh(config)
    layout = make_layout(config.batching, config.seed, len(corpus.train))
    num_steps = _num_steps(config, layout)
    shortest = shortest_text(config.batching)
    if len(corpus.val) < shortest and config.train.patience is not None and config.train.best_by == "val":
        raise ConfigError(f"train.patience needs {shortest} characters to validate on; data.split leaves {len(corpus.val)}")
    sample.prompt_of(config, corpus.vocab, corpus.train, config.seed)
    if config.model.recurrence == "cudnn" and not cudnn.is_available():
        device = jax.devices()[0].device_kind
        raise ConfigError(f"model.recurrence is 'cudnn', which needs an NVIDIA GPU; found {device}; auto chooses what works")
    with contextlib.ExitStack() as stack:

        def begin() -> bool:
            stack.enter_context(workdir.locked(path))
            return _begin(config, path, corpus, layout, num_steps, extend)

        if not processes.decided(begin):
            return
        try:
            _fit(config, path, corpus, layout, mesh, num_steps, num_steps if until is None else min(until, num_steps))
        except (UserError, Exit):
            raise
        except RunFailed:
            _mark_failed(path, config)
            raise
        except OSError as error:
            _mark_failed(path, config)
            raise RunFailed(f"cannot write to {path}: {error.strerror or error}; the same command goes on from there") from None
        except Exception:
            _mark_failed(path, config)
            raise


def _begin(config: config_dict.ConfigDict, path: Path, corpus: Corpus, layout: Layout, num_steps: int, extend: bool) -> bool:
    """Make the folder into a run, or see whether the run in it may go on; whether there is anything left to do."""
    if not (path / "config.json").is_file():
        workdir.create_run(path, config, corpus)
        return True
    run = workdir.load_run(path)
    workdir.check_same_run(run, config, corpus, extend)
    if num_steps < (before := _num_steps(run.config, layout)):
        raise ConfigError(f"{path} holds a run of {before} steps; {num_steps} are fewer, and --extend only lengthens")
    if extend and not _no_shorter(run.config.train.seconds, config.train.seconds):
        raise ConfigError(
            f"{path} holds a run of train.seconds {run.config.train.seconds}; {config.train.seconds} are fewer, and "
            "--extend only lengthens"
        )
    if result := workdir.read_result(path):
        if outcome.is_over(path, result, config, num_steps):
            return False
        (path / "result.json").unlink()
    workdir.write_text(path / "config.json", to_json(config))
    if changed := workdir.differing(run.manifest, workdir.make_manifest(corpus)):
        say(f"{path} began elsewhere, so that bits may differ: {', '.join(changed)}")
    return True


def _mark_failed(path: Path, config: config_dict.ConfigDict) -> None:
    """Say in result.json that the run failed, unless it says already how it ended; as far as that can be written."""
    if processes.leads() and workdir.read_result(path) is None:
        kept = checkpoint.Checkpoints(path).steps()
        with contextlib.suppress(OSError):
            workdir.write_result(path, outcome.result_of("failed", kept[-1] if kept else 0, config, outcome.Progress()))


def _num_steps(config: config_dict.ConfigDict, layout: Layout) -> int:
    """The length of a run."""
    num_steps = config.train.steps or config.train.epochs * layout.steps_per_epoch
    if num_steps > _MOST_STEPS:
        raise ConfigError(f"train.epochs {config.train.epochs} are {num_steps:.3g} steps; at most {_MOST_STEPS} can be counted")
    return math.ceil(num_steps)


def _no_shorter(before: float | None, now: float | None) -> bool:
    """Whether one limit in time leaves at least as much as another; None is no limit."""
    return now is None or (before is not None and now >= before)


def _fit(
    config: config_dict.ConfigDict, path: Path, corpus: Corpus, layout: Layout, mesh: Mesh | None, num_steps: int, end: int
) -> None:
    """The training loop: dispatch a chunk of steps; then log, evaluate, sample and save what is due. `num_steps` is the length
    of the run, for its schedule; `end` the step to stop at.
    """
    began = time.monotonic()
    chars_per_step = outcome.chars_per_step(config)
    learning_rate = jax.jit(optim.make_schedule(config.optimizer, num_steps))
    program = step.Program(config, corpus.vocab.size, num_steps, layout.carries_state, mesh)
    numbers = {"seed": np.uint32(config.seed)}
    init = functools.partial(step.init_state, program)
    model = CharLM.from_config(config.model, corpus.vocab.size)
    progress = outcome.Progress()

    checkpoints = checkpoint.Checkpoints(path)
    shardings = None if mesh is None else step.state_shardings(program, jax.eval_shape(init, numbers))
    if found := _read(checkpoints, lambda: checkpoints.restore_latest(say)):
        flat, meta = found
        state = meshes.put_tree(mesh, checkpoint.unflatten_state(jax.eval_shape(init, numbers), flat), shardings)
        progress = outcome.Progress(**meta["progress"])
    else:
        state = jax.jit(init, out_shardings=shardings)(numbers)  # One compilation in place of one an operation.
    at = saved = int(state.step)
    size = num_params(state.params)
    earlier = progress.elapsed
    skipping = bool(config.optimizer.skip_not_finite)

    score = make_scorer(model, corpus.vocab, config.batching, mesh)
    shortest = shortest_text(config.batching)
    sampler = sample.make_sampler(model, corpus.vocab, config.sample.window, config.sample.dtype)

    tracker = tracking.Tracker(path, at) if processes.leads() else tracking.NoTracker()
    bar = ProgressLine(end, at, silent=not processes.leads())
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        stack.callback(tracker.close)
        stack.callback(bar.close)
        signals = stack.enter_context(_caught_signals())
        stop = 0  # The signal that any of the processes caught.

        def agreed(seconds: float) -> float:
            nonlocal stop
            rows = processes.told(seconds, *(signals[:1] or [0]))
            stop = stop or int(rows[:, 1].max())
            return float(rows[0, 0])

        where = f"{jax.devices()[0].device_kind}, {meshes.size(mesh)} of {len(jax.devices())} device(s)"
        where += f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
        text = f"{len(corpus.train):,} bytes"
        if corpus.vocab.kind == "chars":
            text = f"{len(corpus.train):,} characters of {corpus.vocab.size} symbols"
        bar.say(
            f"{path}: {_model_name(config)}, {size:,} parameters; {corpus.name}, {text}; {num_steps} steps on {where}"
            + (f"; from step {at}" if at else "")
        )
        if len(corpus.val) < shortest:
            bar.say(f"no validation: data.split leaves {len(corpus.val)} characters for it, fewer than {shortest}")

        def save() -> None:
            nonlocal saved
            progress.elapsed = earlier + time.monotonic() - began
            checkpoints.save(at, state, dataclasses.asdict(progress), progress.best_step)
            saved = at

        def stopped() -> Exit:
            if saved != at:
                save()
            checkpoints.wait()
            tracker.draw(force=True)
            name = signal.Signals(stop).name
            bar.say(f"stopped by {name} at step {at}; everything is saved, the same command goes on from here")
            return Exit(128 + stop)

        def watch(done: float) -> None:
            del done
            agreed(0.0)
            if stop:
                raise _Interrupted

        def diverged(what: str) -> RunFailed:
            checkpoints.wait()
            write_result(outcome.result_of("diverged", at, config, progress, size))
            tracker.draw(force=True)
            kept = f"the last checkpoint is that of step {saved}" if saved else "there is no checkpoint yet"
            hint = "try a lower optimizer.learning_rate, optimizer.clip_norm or optimizer.skip_not_finite, in another --workdir"
            return RunFailed(f"{what} not finite at step {at}; {kept}; {hint}")

        def write_result(result: dict) -> None:
            if processes.leads():
                workdir.write_result(path, result)

        def record(split: str, nats_per_char: float, nats_per_symbol: float, **more: float) -> None:
            progress.elapsed = earlier + time.monotonic() - began
            line = {"step": at, "epoch": at / layout.steps_per_epoch, "chars": at * chars_per_step}
            line |= {"seconds": progress.elapsed, "split": split}
            line |= {"nats_per_char": nats_per_char, "bits_per_char": nats_per_char / math.log(2), **more}
            if corpus.vocab.kind == "bytes":
                line["nats_per_byte"] = nats_per_symbol
            tracker.record(line)
            bar.record(line)

        gather = _make_gather(config, corpus, layout, mesh, at, end)
        stack.callback(gather.close)
        train_chunk = step.compile_train_chunk(program, state, numbers, gather.ids_N)
        chunk = 1
        while progress.interrupted or (at < end and not outcome.limit_reached(config, progress)):
            if not progress.interrupted:
                n = min(chunk, _steps_until_due(config.train, at), end - at)
                start = time.monotonic()
                state, losses_K, norms_K, finite = train_chunk(state, numbers, *gather.take(at, n), np.int32(n))
                losses, norms = np.asarray(losses_K)[:n].tolist(), np.asarray(norms_K)[:n].tolist()
                seconds = agreed(time.monotonic() - start)
                if not skipping and not all(map(math.isfinite, losses)):
                    at += 1 + next(k for k, loss in enumerate(losses) if not math.isfinite(loss))
                    raise diverged("the loss is")
                at += n
                if not finite:
                    raise diverged("the parameters are")
                progress.stepped(losses, norms, seconds, only_finite=skipping)
                in_time = int(min(_DISPATCH_SECONDS, _seconds_left(config, progress)) * n / seconds)
                chunk = max(1, min(config.train.steps_per_dispatch, 2 * chunk, in_time))
                bar.update(at, losses[-1] * corpus.symbols_per_char, n * chars_per_step / seconds, seconds / n)

            progress.interrupted = False
            last = at == end or _seconds_left(config, progress) <= 0
            if _due(config.train.log_every, at) or last:
                if counted := progress.steps - progress.left_out:
                    loss = progress.loss_sum / counted
                    skipped = {"skipped_updates": int(state.opt_state.total_notfinite)} if skipping else {}
                    record(
                        "train",
                        loss * corpus.symbols_per_char,
                        loss,
                        learning_rate=float(learning_rate(at - 1 - skipped.get("skipped_updates", 0))),
                        grad_norm=progress.norm_sum / counted,
                        chars_per_second=progress.steps * chars_per_step / progress.seconds,
                        **skipped,
                    )
                progress.recorded()
            improved = False
            if _due(config.train.eval_every, at) or last:
                value = None
                if len(corpus.val) >= shortest:
                    try:
                        found = score(state.eval_params, corpus.val, config.eval, watch)
                    except _Interrupted:
                        progress.interrupted = True
                        raise stopped() from None
                    value = found.nats_per_char
                    if not math.isfinite(value):
                        raise diverged("the validation loss is")
                    record("val", value, found.nats_per_symbol)
                loss = value
                if config.train.best_by == "train":
                    loss = progress.eval_sum / progress.eval_steps if progress.eval_steps else None
                if loss is not None:
                    improved = progress.evaluated(at, loss, value, _due(config.train.eval_every, at))
                tracker.draw()
            ending = last or outcome.limit_reached(config, progress)
            if _due(config.train.sample_every, at) or (ending and config.train.sample_every):
                seed = (config.seed + at) % (LARGEST_SEED + 1)
                _, prompt_ids = sample.prompt_of(config, corpus.vocab, corpus.train, seed)
                params = meshes.whole(mesh, state.eval_params)
                texts = sample.sample_text(sampler, params, corpus.vocab, config.sample, seed, prompt_ids)
                tracker.sample(at, texts)
                bar.say(f"step {at}  a sample:\n{texts[0]}")
            if improved or _due(config.train.checkpoint_every, at) or ending:
                save()
            agreed(0.0)
            if stop and not ending:
                raise stopped()

        checkpoints.wait()
        tracker.draw(force=True)
        status = "stopped_early" if at < num_steps else "completed"
        summary = outcome.result_of(status, at, config, progress, size)
        if skipping:
            summary["skipped_updates"] = int(state.opt_state.total_notfinite)
        summary["stopped_by"] = outcome.limit_reached(config, progress) if at < num_steps else None
        summary["params_sha256"] = checkpoint.sha256(checkpoint.flatten_state(state.params))
        if len(corpus.test) >= shortest:
            try:
                params = state.eval_params
                if progress.best_step not in (None, at):
                    best, _ = _read(checkpoints, lambda: checkpoints.find(str(progress.best_step), bar.say))
                    params = meshes.put_tree(mesh, checkpoint.params_of(best, model), shardings and shardings.params)
                summary["test_nats_per_char"] = score(params, corpus.test, config.eval, watch).nats_per_char
            except _Interrupted:
                raise stopped() from None
            except WorkdirError as error:
                bar.say(f"no test loss: {error}")
        write_result(summary)
        bar.say(outcome.summary_line(summary, path))


def _seconds_left(config: config_dict.ConfigDict, progress: outcome.Progress) -> float:
    """Until `train.seconds`."""
    return (config.train.seconds or math.inf) - progress.train_seconds


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


def _make_gather(
    config: config_dict.ConfigDict, corpus: Corpus, layout: Layout, mesh: Mesh | None, at: int, num_steps: int
) -> Gather:
    """The text on the device if it may be there (at most 2^31 - 1 bytes, so that offsets fit an int32), else read ahead."""
    if corpus.train.nbytes <= config.data.device_bytes:
        return device_gather(corpus.train, layout, step.MAX_STEPS_PER_DISPATCH, mesh)
    return host_gather(corpus.train, layout, step.MAX_STEPS_PER_DISPATCH, at, num_steps, mesh)


def _steps_until_due(train: config_dict.ConfigDict, at: int) -> int:
    """Steps to the next one at which the host has something to do."""
    cadences = (train.log_every, train.eval_every, train.checkpoint_every, train.sample_every)
    return min((every - at % every for every in cadences if every), default=step.MAX_STEPS_PER_DISPATCH)


def _due(every: int, at: int) -> bool:
    return bool(every) and at % every == 0


def _model_name(config: config_dict.ConfigDict) -> str:
    layers = f"{config.model.num_layers} x " if config.model.num_layers > 1 else ""
    return f"{layers}{config.model.cell.upper()} {config.model.hidden_size}"


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[signal.Signals]]:
    """A list to which SIGINT and SIGTERM are added instead of ending the process; a second SIGINT ends it."""
    caught: list[signal.Signals] = []

    def catch(number, frame):
        del frame
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number))

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(cli.run(main))
