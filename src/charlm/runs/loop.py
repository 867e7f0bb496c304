"""The training loop, for one run and for several runs side by side.

The host dispatches chunks of steps; the device trains. After each chunk the host records, evaluates, samples and saves what is
due. How often it does so changes no bit of the parameters.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from charlm.config import to_json
from charlm.data.batching import WindowSource, device_windows, prefetched_windows
from charlm.inference.sampler import make_sampler
from charlm.inference.scorer import make_scorer
from charlm.nn.model import CharLM
from charlm.parallel import mesh as meshes
from charlm.parallel import processes
from charlm.runs import flat_state
from charlm.runs.host import Callback, Host
from charlm.runs.memory import check_memory
from charlm.runs.signals import Signals
from charlm.runs.start import Prepared, open_run, prepare, record_failure
from charlm.runs.warm_start import load_source, match_params
from charlm.runs.workdir import load_run
from charlm.system.errors import Exit, RunFailed
from charlm.system.progress import say
from charlm.training.chunk import MAX_STEPS_PER_DISPATCH, compile_train_chunk
from charlm.training.state import Program, TrainState, compute_first_state, init_state, shapes_of_state, state_shardings


def train(
    config: ConfigDict,
    path: str | Path,
    extend: bool = False,
    until: int | None = None,
    callback: Callback | None = None,
    text: str | None = None,
) -> None:
    """Start the run in the folder `path`, or continue it from its last checkpoint.

    Args:
        config: from `charlm.config.default_config()`.
        path: the run's folder.
        extend: allow a finished run to be continued to a larger length.
        until: stop at this step, as if a limit had been reached.
        callback: called with each line of metrics.jsonl after it was written. What it raises ends the run, except
            KeyboardInterrupt, which stops the run as SIGINT does.
        text: the text of a run that keeps it in its folder (`run_corpus.RUN_TEXT`); None: `config.data` names the text.

    Raises:
        UserError: config, corpus and workdir do not allow it. Nothing was written.
        RunFailed: a loss is not finite, or something cannot be written.
        Exit: a signal came; everything is saved.
    """
    path, prepared = Path(path), prepare(config, Path(path), text)
    check_memory(prepared.config, prepared.corpus.vocab.size, training=True)
    arguments = {"config": to_json(prepared.config), "--workdir": str(path), "--extend": str(extend)}
    processes.check_same({**arguments, "text": prepared.corpus.sha256})
    mesh = meshes.make_mesh(prepared.config)
    with contextlib.ExitStack() as stack:
        if not processes.broadcast_from_primary(lambda: stack.enter_context(open_run(path, prepared, extend))):
            return
        with record_failure(prepared.config, path):
            end = prepared.num_steps if until is None else min(until, prepared.num_steps)
            _train_one_run(path, prepared, mesh, end, callback)


class ChunkResult(NamedTuple):
    """What one run did in a chunk of steps.

    Attributes:
        metrics: name -> one value for each step.
        finite: whether all parameters are finite at the end.
    """

    metrics: dict[str, list[float]]
    finite: bool


class Trainer(Protocol):
    """The device's side of the training loop: it holds the states of the runs and trains them."""

    def take_steps(self, at: int, n: int) -> Sequence[ChunkResult]:
        """Take n steps from step `at` on, with every run; return one result for each run."""

    def state(self, index: int) -> TrainState:
        """Return the state of one run."""


def training_loop(hosts: Sequence[Host], trainer: Trainer, signals: Signals) -> dict[int, RunFailed]:
    """Train runs to their ends: dispatch a chunk of steps, then do what is due, until every run is over.

    Returns:
        {index of the run: error} of the runs that failed. The other runs continue.

    Raises:
        Exit: a signal came; everything is saved.
    """
    active, failures, stopped = dict(enumerate(hosts)), {}, None
    while active and not stopped:
        # A run that was stopped during an evaluation, or just before its end, has to catch up before the next step.
        behind = [index for index, host in active.items() if host.must_evaluate_again or host.is_over()]
        n = 0 if behind else min(host.steps_to_take() for host in active.values())
        if n:
            start = time.monotonic()
            results = trainer.take_steps(next(iter(active.values())).at, n)
            seconds = signals.synchronize(time.monotonic() - start) / len(active)
        for index in behind or list(active):
            host, state = active[index], functools.partial(trainer.state, index)
            try:
                if n:
                    host.add_steps(results[index].metrics, results[index].finite, seconds)
                if n or host.must_evaluate_again:
                    if host.is_due("log"):
                        host.record(state)
                    improved = host.is_due("eval") and host.evaluate(state)
                    if host.is_due("sample"):
                        host.draw_sample(state)
                    if improved or host.is_due("checkpoint"):
                        host.save(state)
                    host.stop_if_signalled(state)
                if host.is_over():
                    host.finish(state)
                    del active[index]
            except RunFailed as error:
                failures[index] = host.cause_of(error)
                del active[index]
            except Exit as error:
                stopped = error
    if stopped:
        raise stopped
    return failures


class _OneRun:
    """The `Trainer` of a single run, on one device or on a mesh."""

    def __init__(self, program: Program, state: TrainState, hyperparameters: dict, windows: WindowSource):
        self._state, self._hyperparameters, self._windows = state, hyperparameters, windows
        self._train_chunk = compile_train_chunk(program, state, hyperparameters, windows.ids_N)

    def take_steps(self, at: int, n: int) -> list[ChunkResult]:
        chunk = self._windows.take(at, n)
        self._state, metrics_K, finite = self._train_chunk(self._state, self._hyperparameters, *chunk, np.int32(n))
        metrics = {name: np.asarray(values)[:n].tolist() for name, values in metrics_K.items()}
        return [ChunkResult(metrics, bool(finite))]

    def state(self, index: int) -> TrainState:
        del index
        return self._state


def _train_one_run(path: Path, prepared: Prepared, mesh: Mesh | None, end: int, callback: Callback | None) -> None:
    """Train one run to step `end`."""
    config, corpus, layout, num_steps, *_ = prepared
    program = Program(config, corpus.vocab.size, num_steps, layout.carries_state, mesh, corpus.boundary)
    hyperparameters = {"seed": np.uint32(config.seed)}
    shapes = functools.partial(shapes_of_state, program)
    shardings = None if mesh is None else state_shardings(program, shapes())
    model = CharLM.from_config(config.model, corpus.vocab.size, corpus.boundary)
    score = make_scorer(model, corpus.vocab, config.batching, mesh, config.eval.metrics)
    sampler = make_sampler(model, corpus.vocab, config.sample.window, config.sample.dtype)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        host = Host(path, prepared, end, signals, model, score, sampler, mesh, shardings, callback=callback)
        stack.enter_context(host)
        if (state := _restored_state(host, shapes, mesh, shardings)) is None:
            state = compute_first_state(init_state, program, hyperparameters, shardings)
            state = _warm_start(path, prepared, program, state, shardings)
        host.open_records(state.params)
        windows = _make_windows(prepared, mesh, host.at, end)
        stack.callback(windows.close)
        for error in training_loop([host], _OneRun(program, state, hyperparameters, windows), signals).values():
            raise error


def _restored_state(
    host: Host, shapes: Callable[[], TrainState], mesh: Mesh | None, shardings: TrainState | None
) -> TrainState | None:
    """Return the state of the latest undamaged checkpoint, on the devices; None if there is no checkpoint."""
    flat = host.restore(lambda checkpoints: checkpoints.restore_latest(say))
    return None if flat is None else meshes.put_tree(mesh, flat_state.unflatten_state(shapes(), flat), shardings)


def _warm_start(
    path: Path, prepared: Prepared, program: Program, state: TrainState, shardings: TrainState | None
) -> TrainState:
    """Return the first state with the parameters that `train.init_from` names; the state itself if it is not set."""
    config, vocab = prepared.config, prepared.corpus.vocab
    source = prepared.source or load_source(config, vocab, load_run(path).manifest.get("init_from"))
    if source is None:
        return state
    flat, lines = match_params(source, config, vocab, flat_state.flatten_state(state.params))
    if processes.is_primary():
        for line in lines:
            say(line)
    host_params = flat_state.unflatten_state(state.params, flat)
    params = meshes.put_tree(program.mesh, host_params, shardings and shardings.params)
    carry = state.carry
    if carry and config.model.learn_initial_state:
        carry = CharLM.from_config(config.model, vocab.size).initial_carry(host_params, config.batching.batch_size)
        carry = meshes.put_tree(program.mesh, carry, shardings and shardings.carry)
    return state.started_from(params, carry)


def _make_windows(prepared: Prepared, mesh: Mesh | None, at: int, end: int) -> WindowSource:
    """Return the windows of a text on the device, if it fits `data.device_bytes` (at most 2^31 - 1), else read ahead."""
    ids_N, layout = prepared.corpus.train, prepared.layout
    if ids_N.nbytes <= prepared.config.data.device_bytes:
        return device_windows(ids_N, layout, MAX_STEPS_PER_DISPATCH, mesh)
    return prefetched_windows(ids_N, layout, MAX_STEPS_PER_DISPATCH, at, end, mesh)
