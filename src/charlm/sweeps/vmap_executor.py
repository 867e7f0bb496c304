"""Train runs that differ only in traced hyperparameters as one compiled program (`training.chunk.train_chunk_of_runs`).

Each run has its own workdir, with the files that it would have if it were trained by itself, and can be continued by itself.

Letters: R runs, K steps in a dispatch, B batch.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from charlm.config import flatten
from charlm.data.batching import Layout, stack_batches
from charlm.inference.sampler import make_sampler
from charlm.inference.scorer import make_scorer
from charlm.nn.model import CharLM
from charlm.runs.checkpoint import DamagedCheckpoint
from charlm.runs.devices import recorded_devices
from charlm.runs.flat_state import unflatten_state
from charlm.runs.host import Host
from charlm.runs.loop import ChunkResult, training_loop
from charlm.runs.memory import check_memory
from charlm.runs.run_corpus import load_run_corpus
from charlm.runs.signals import Signals
from charlm.runs.start import Prepared, open_run, prepare, record_failure
from charlm.system.errors import Exit, RunFailed, UserError
from charlm.system.progress import ProgressLine, say
from charlm.training.chunk import MAX_STEPS_PER_DISPATCH, train_chunk_of_runs
from charlm.training.state import (
    TRACED_HYPERPARAMETERS,
    Program,
    TrainState,
    compute_first_state,
    init_state_of_runs,
    shapes_of_state,
)

# The part of the memory that a group of runs may take.
_MEMORY_FRACTION = 0.5


class NamedRun(Protocol):
    """A run as this executor needs it: the name of its folder, and its config."""

    name: str
    config: ConfigDict


def group_runs(runs: Sequence[NamedRun], folder: Path) -> tuple[list[list[NamedRun]], list[tuple[NamedRun, str]]]:
    """Return (groups that can be one program each, the other runs with the reason why they are trained by themselves)."""
    alike: dict[str, list[NamedRun]] = {}
    alone = []
    for run in runs:
        if why := _why_alone(run.config, folder / run.name):
            alone.append((run, why))
        else:
            alike.setdefault(_program_key(run.config), []).append(run)
    groups = []
    for group in alike.values():
        if len(group) == 1:
            alone.append((group[0], "no other run differs from it only in traced hyperparameters"))
        elif _is_too_large(group[0].config):
            alone += [(run, "its text is larger than data.device_bytes") for run in group]
        else:
            groups.append(group)
    return groups, alone


def _why_alone(config: ConfigDict, path: Path) -> str | None:
    if config.train.seconds is not None:
        return "train.seconds is a limit for one run"
    if config.train.init_from is not None:
        return "train.init_from is set"
    if (devices := recorded_devices(path) if config.mesh.data is None else config.mesh.data) != 1:
        return f"mesh.data is {devices}"
    return None


def _is_too_large(config: ConfigDict) -> bool:
    """Return whether the training text does not fit the device; False if it cannot be loaded, which the run reports itself."""
    with contextlib.suppress(UserError):
        return load_run_corpus(config).train.nbytes > config.data.device_bytes
    return False


def _program_key(config: ConfigDict) -> str:
    """Return what the compiled program depends on: the config, but of a traced hyperparameter only whether it is set."""
    values = dict(flatten(config))
    for key in TRACED_HYPERPARAMETERS:
        if key == "seed" or values[key]:
            values[key] = "traced"
    return json.dumps(values)


def train_group(runs: Sequence[NamedRun], folder: Path) -> dict[str, str]:
    """Train the runs of one group, each in its own subfolder; return {name: reason} of the runs that failed.

    Raises:
        Exit: a signal came; everything is saved.
    """
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        started = []
        for run, prepared in [(run, prepare(run.config, folder / run.name, side_by_side=True)) for run in runs]:
            try:
                check_memory(prepared.config, prepared.corpus.vocab.size, training=True)
                if stack.enter_context(open_run(folder / run.name, prepared)):
                    stack.enter_context(record_failure(prepared.config, folder / run.name))
                    started.append((run, prepared))
            except (UserError, RunFailed) as error:
                failed[run.name] = str(error)
        size = _max_group_size(started[0][1]) if started else 1
        for first in range(0, len(started), size):
            failed |= _train_side_by_side(started[first : first + size], folder)
    return failed


def _max_group_size(prepared: Prepared) -> int:
    """Return how many runs fit into memory: their states twice, and the activations of the runs that are computed at once."""
    config, device = prepared.config, jax.local_devices()[0]
    program = Program(config, prepared.corpus.vocab.size, prepared.num_steps, prepared.layout.carries_state)
    state = shapes_of_state(program)
    state_bytes = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    batching, model = config.batching, config.model
    floats_per_symbol = 8 * model.hidden_size * model.num_layers + 2 * prepared.corpus.vocab.size
    activations = 4 * batching.batch_size * batching.seq_len * floats_per_symbol
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if device.platform == "cpu":  # Each core works on one run at a time.
        return max(1, int((_MEMORY_FRACTION * memory - activations * jax.local_device_count()) // state_bytes))
    return max(1, jax.local_device_count() * int(_MEMORY_FRACTION * memory // (state_bytes + activations)))


class _SideBySide:
    """The `Trainer` of several runs that share a program.

    Args:
        program: of the runs.
        prepared: of each run.
        states: of the runs, padded to a multiple of the devices.
        hyperparameters_R: padded likewise.
        devices: that share the runs.
        bar: shows the mean loss.
    """

    def __init__(
        self,
        program: Program,
        prepared: Sequence[Prepared],
        states: TrainState,
        hyperparameters_R: Mapping[str, np.ndarray],
        devices: Sequence[jax.Device],
        bar: ProgressLine,
    ):
        self._num_runs, self._corpus, self._bar = len(prepared), prepared[0].corpus, bar
        self._hyperparameters_R = hyperparameters_R
        self._hold(states)
        padding = len(hyperparameters_R["seed"]) - self._num_runs
        self._layouts = [each.layout for each in [*prepared, *[prepared[-1]] * padding]]
        self._text = jax.device_put(np.asarray(self._corpus.train), NamedSharding(_mesh(devices), P()))
        batching = program.config.batching
        self._chars_per_step = self._num_runs * batching.batch_size * batching.seq_len
        vectorised = devices[0].platform != "cpu"  # One run keeps a core of a CPU busy.
        chunk = jax.jit(functools.partial(train_chunk_of_runs, program, devices, vectorised), donate_argnums=0)
        arguments = self._text, *_windows(self._layouts, 0, 1), np.int32(1)
        self._train_chunk = chunk.lower(states, hyperparameters_R, *arguments).compile()

    def take_steps(self, at: int, n: int) -> list[ChunkResult]:
        start = time.monotonic()
        arguments = self._text, *_windows(self._layouts, at, n), np.int32(n)
        states, metrics_RK, finite_R = self._train_chunk(self._states, self._hyperparameters_R, *arguments)
        self._hold(states)
        metrics_RK = {name: np.asarray(values)[: self._num_runs, :n] for name, values in metrics_RK.items()}
        finite_R = np.asarray(finite_R)
        seconds = time.monotonic() - start
        loss = float(np.nanmean(metrics_RK["loss"][:, -1])) * self._corpus.symbols_per_char
        self._bar.update(at + n, {"mean loss": loss}, n * self._chars_per_step / seconds, seconds / n)
        return [
            ChunkResult({name: values[r].tolist() for name, values in metrics_RK.items()}, bool(finite_R[r]))
            for r in range(self._num_runs)
        ]

    def state(self, index: int) -> TrainState:
        return self._state_of(index)

    def _hold(self, states: TrainState) -> None:
        """Hold the states on the devices. All of them are fetched at once when one of them is asked for."""
        self._states = states
        on_host = functools.cache(lambda: jax.device_get(states))
        self._state_of = functools.cache(lambda r: jax.tree.map(lambda leaf: jnp.asarray(leaf[r]), on_host()))


def _train_side_by_side(started: Sequence[tuple[NamedRun, Prepared]], folder: Path) -> dict[str, str]:
    """Train runs side by side; return {name: reason} of the runs that failed."""
    names, prepared = [run.name for run, _ in started], [each for _, each in started]
    config, corpus, layout, num_steps, *_ = prepared[0]
    assert all(each.num_steps == num_steps for each in prepared)
    devices = jax.local_devices()[: len(prepared)]
    # The same number of runs for each device: the last run is trained several times, and the copies are dropped.
    padded = [*prepared, *[prepared[-1]] * (-len(prepared) % len(devices))]
    hyperparameters_R = _hyperparameters([each.config for each in padded])
    program = Program(config, corpus.vocab.size, num_steps, layout.carries_state, boundary=corpus.boundary)
    model = CharLM.from_config(config.model, corpus.vocab.size, corpus.boundary)
    score = make_scorer(model, corpus.vocab, config.batching, metrics=config.eval.metrics)
    sampler = make_sampler(model, corpus.vocab, config.sample.window, config.sample.dtype)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        hosts = [
            stack.enter_context(Host(folder / name, each, num_steps, signals, model, score, sampler, silent=True))
            for name, each in zip(names, prepared)
        ]
        states, at = _first_states(program, hyperparameters_R, hosts, devices)
        for host in hosts:
            host.open_records(states.params, len(padded))
        bar = ProgressLine(num_steps, at)
        stack.callback(bar.close)
        trainer = _SideBySide(program, prepared, states, hyperparameters_R, devices, bar)
        try:
            failures = training_loop(hosts, trainer, signals)
        except Exit:
            step = max(host.at for host in hosts)
            say(f"stopped at step {step}; everything is saved, and the same command continues from here")
            raise
    return {names[index]: str(error) for index, error in failures.items()}


def _hyperparameters(configs: Sequence[ConfigDict]) -> dict[str, np.ndarray]:
    """Return the seed and the hyperparameters in which the runs differ; the others are constants of their program."""
    values = [dict(flatten(config)) for config in configs]
    hyperparameters_R = {"seed": np.array([each["seed"] for each in values], np.uint32)}
    for key in TRACED_HYPERPARAMETERS:
        if key != "seed" and len({each[key] for each in values}) > 1:
            hyperparameters_R[key] = np.array([each[key] for each in values], np.float32)
    return hyperparameters_R


def _first_states(
    program: Program,
    hyperparameters_R: Mapping[str, np.ndarray],
    hosts: Sequence[Host],
    devices: Sequence[jax.Device],
) -> tuple[TrainState, int]:
    """Return the states to continue from, and their step: the latest step of which all runs have an undamaged checkpoint."""
    num_runs, by_run = len(hyperparameters_R["seed"]), NamedSharding(_mesh(devices), P("run"))
    for at in sorted(set.intersection(*(set(host.checkpoints.steps()) for host in hosts)), reverse=True):
        try:
            flats = [host.restore(lambda checkpoints, at=at: checkpoints.restore(at)) for host in hosts]
        except DamagedCheckpoint as error:
            say(f"{error}; trying the checkpoint before it")
            continue
        for host in hosts:
            host.checkpoints.drop_after(at)
        like = shapes_of_state(program)
        trees = [unflatten_state(like, flat) for flat in flats]
        trees += [trees[-1]] * (num_runs - len(trees))
        return jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves), by_run), *trees), at
    for host in hosts:
        host.restore(lambda checkpoints: None)
        host.checkpoints.drop_after(0)
    # On one device, as for a single run.
    return jax.device_put(compute_first_state(init_state_of_runs, program, hyperparameters_R), by_run), 0


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.array(devices), ("run",))


def _windows(layouts: Sequence[Layout], at: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return starts_RKB and reset_RKB of n steps from step `at` on."""
    batches = [stack_batches([layout.batch(at + k) for k in range(n)], MAX_STEPS_PER_DISPATCH) for layout in layouts]
    starts_RKB, reset_RKB = (np.stack(each) for each in zip(*batches))
    return starts_RKB, reset_RKB
