"""Train runs that differ in seed and numbers alone as one compiled program (`step.train_chunk_of_runs`).

Each run keeps a workdir of its own, with the files that it would have if it were trained by itself, and can go on by itself.

Letters: R runs, K steps in a dispatch, B batch.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_dict

from charlm import sample, step
from charlm.batching import Layout, stacked
from charlm.checkpoint import DamagedCheckpoint, unflatten_state
from charlm.config import flatten
from charlm.corpus import load_corpus
from charlm.errors import Exit, RunFailed, UserError
from charlm.evaluate import make_scorer
from charlm.host import Host, Signals
from charlm.model import CharLM, num_params
from charlm.progress import ProgressLine, say
from charlm.train import Prepared, begun, marked_if_it_fails, prepare

# Of the memory that there is, the part that a group of runs may take.
_MEMORY = 0.5


class NamedRun(Protocol):
    """What is needed of a run: the name of its folder, and its config."""

    name: str
    config: config_dict.ConfigDict


def use_all_cores(cores: int) -> None:
    """Have JAX take each core of a CPU for a device. Only before it first looks for its devices."""
    jax.config.update("jax_num_cpu_devices", cores)


def groups_of(runs: Sequence[NamedRun]) -> tuple[list[list[NamedRun]], list[tuple[NamedRun, str]]]:
    """(groups that can be one program each, those that are by themselves and why)."""
    alike: dict[str, list[NamedRun]] = {}
    alone = []
    for run in runs:
        if why := _why_not(run.config):
            alone.append((run, why))
        else:
            alike.setdefault(_all_but_numbers(run.config), []).append(run)
    groups = []
    for group in alike.values():
        if len(group) == 1:
            alone.append((group[0], "no other run differs from it in numbers alone"))
        elif _is_too_large(group[0].config):
            alone += [(run, "its text is larger than data.device_bytes") for run in group]
        else:
            groups.append(group)
    return groups, alone


def _why_not(config: config_dict.ConfigDict) -> str | None:
    if config.train.seconds is not None:
        return "train.seconds is a limit for one run"
    if config.mesh.data not in (None, 1):
        return f"mesh.data is {config.mesh.data}"
    return None


def _is_too_large(config: config_dict.ConfigDict) -> bool:
    """Whether the training text is not to be on the device; False if there is none, which a run says better."""
    with contextlib.suppress(UserError):
        return load_corpus(config.data).train.nbytes > config.data.device_bytes
    return False


def _all_but_numbers(config: config_dict.ConfigDict) -> str:
    """All that a program depends on: the config, of a number only whether it is unset or 0."""
    values = dict(flatten(config))
    for key in step.NUMBERS:
        if key == "seed" or values[key]:
            values[key] = "a number"
    return json.dumps(values)


def train_together(runs: Sequence[NamedRun], workdir: Path) -> dict[str, str]:
    """Train runs of one group, each in its folder of the workdir; {name: why} of those that failed.

    Raises:
        Exit: a signal came; everything is saved.
    """
    prepared = [prepare(run.config) for run in runs]
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        started = []
        for run, its in zip(runs, prepared):
            try:
                if stack.enter_context(begun(run.config, workdir / run.name, its)):
                    stack.enter_context(marked_if_it_fails(run.config, workdir / run.name))
                    started.append((run, its))
            except (UserError, RunFailed) as error:
                failed[run.name] = str(error)
        at_once = _most_at_once(*started[0]) if started else 1
        for first in range(0, len(started), at_once):
            failed |= _fit_together(started[first : first + at_once], workdir)
    return failed


def _most_at_once(run: NamedRun, prepared: Prepared) -> int:
    """How many runs fit into memory: their states twice over, and the activations of those that a device works on at once."""
    config, device = run.config, jax.local_devices()[0]
    program = step.Program(config, prepared.corpus.vocab.size, prepared.num_steps, prepared.layout.carries_state)
    state = jax.eval_shape(functools.partial(step.init_state, program), {"seed": np.uint32(0)})
    state_bytes = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    batching, model = config.batching, config.model
    numbers_per_symbol = 8 * model.hidden_size * model.num_layers + 2 * prepared.corpus.vocab.size
    activations = 4 * batching.batch_size * batching.seq_len * numbers_per_symbol
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if device.platform == "cpu":  # One after another on each core.
        return max(1, int((_MEMORY * memory - activations * jax.local_device_count()) // state_bytes))
    return max(1, jax.local_device_count() * int(_MEMORY * memory // (state_bytes + activations)))


def _fit_together(started: Sequence[tuple[NamedRun, Prepared]], workdir: Path) -> dict[str, str]:
    """The training loop of `charlm.train`, for several runs in step."""
    runs = [run for run, _ in started]
    (corpus, layout, num_steps), config = started[0][1], runs[0].config
    assert all(its.num_steps == num_steps for _, its in started)
    devices = jax.local_devices()[: len(runs)]
    # As many for each device; what is too much is trained and forgotten.
    padded = [*started, *[started[-1]] * (-len(runs) % len(devices))]
    numbers_R = _numbers([run.config for run, _ in padded])
    program = step.Program(config, corpus.vocab.size, num_steps, layout.carries_state)
    model = CharLM.from_config(config.model, corpus.vocab.size)
    score = make_scorer(model, corpus.vocab, config.batching)
    sampler = sample.make_sampler(model, corpus.vocab, config.sample.window, config.sample.dtype)
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        hosts = {}
        for r, (run, its) in enumerate(started):
            own = run.config, workdir / run.name, corpus, its.layout
            hosts[r] = stack.enter_context(Host(*own, num_steps, num_steps, signals, score, sampler, silent=True))
        states, at = _first_states(program, numbers_R, list(hosts.values()), devices)
        for host in hosts.values():
            host.begin(num_params(states.params) // len(padded))
        bar = ProgressLine(num_steps, at)
        stack.callback(bar.close)
        text = jax.device_put(np.asarray(corpus.train), NamedSharding(_mesh(devices), P()))
        layouts = [its.layout for _, its in padded]
        train_chunk = _compile(program, devices, states, numbers_R, text, layouts)
        active = dict(hosts)
        # What a signal kept them from, first; those that had come to their end have yet to say so.
        to_attend = [r for r, host in hosts.items() if host.progress.interrupted or host.is_over()]
        while active:
            if not to_attend:
                n = min(host.steps_to_take() for host in active.values())
                start = time.monotonic()
                states, *found = train_chunk(states, numbers_R, text, *_stack(layouts, at, n), np.int32(n))
                losses_RK, norms_RK, finite_R = map(np.asarray, found)
                seconds = time.monotonic() - start
                at += n
                chars_per_second = n * len(active) * config.batching.batch_size * config.batching.seq_len / seconds
                loss = float(np.mean([losses_RK[r, n - 1] for r in active])) * corpus.symbols_per_char
                bar.update(at, loss, chars_per_second, seconds / n)
                for r, host in list(active.items()):
                    try:  # Each run is told of its share of the time.
                        host.stepped(
                            losses_RK[r, :n].tolist(), norms_RK[r, :n].tolist(), bool(finite_R[r]), seconds / len(active)
                        )
                    except RunFailed as error:
                        failed[runs[r].name] = str(error)
                        del active[r]
            stopped, state_of = None, _fetched(states)
            for r in to_attend or list(active):
                host, state = active[r], functools.partial(state_of, r)
                try:
                    if host.progress.interrupted or not to_attend:
                        host.attend(state)
                    if host.is_over():
                        host.finish(state, model)
                        del active[r]
                except Exit as error:
                    stopped = error
                except RunFailed as error:
                    failed[runs[r].name] = str(error)
                    del active[r]
            if stopped:
                say(f"stopped at step {at}; everything is saved, the same command goes on from here")
                raise stopped
            to_attend = []
    return failed


def _numbers(configs: Sequence[config_dict.ConfigDict]) -> dict[str, np.ndarray]:
    """The seed, and the numbers in which runs differ; the others are constants of their program."""
    values = [dict(flatten(config)) for config in configs]
    numbers_R = {"seed": np.array([each["seed"] for each in values], np.uint32)}
    for key in step.NUMBERS:
        if key != "seed" and len({each[key] for each in values}) > 1:
            numbers_R[key] = np.array([each[key] for each in values], np.float32)
    return numbers_R


def _first_states(
    program: step.Program, numbers_R: dict[str, np.ndarray], hosts: Sequence[Host], devices: Sequence[jax.Device]
) -> tuple[step.TrainState, int]:
    """The states that runs go on from, and their step: the latest of which all have a whole checkpoint."""
    num_runs, by_run = len(numbers_R["seed"]), NamedSharding(_mesh(devices), P("run"))
    for at in sorted(set.intersection(*(set(host.checkpoints.steps()) for host in hosts)), reverse=True):
        try:
            flats = [host.restored(lambda checkpoints, at=at: checkpoints.restore(at)) for host in hosts]
        except DamagedCheckpoint as error:
            say(f"{error}; going back to one before it")
            continue
        for host in hosts:
            host.checkpoints.drop_after(at)
        like = jax.eval_shape(functools.partial(step.init_state, program), {"seed": np.uint32(0)})
        trees = [unflatten_state(like, flat) for flat in flats]
        trees += [trees[-1]] * (num_runs - len(trees))
        return jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves), by_run), *trees), at
    for host in hosts:
        host.restored(lambda checkpoints: None)
        host.checkpoints.drop_after(0)
    # On one device, as in `charlm.train`.
    return jax.device_put(step.first_state(step.init_state_of_runs, program, numbers_R), by_run), 0


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.array(devices), ("run",))


def _compile(
    program: step.Program, devices: Sequence[jax.Device], states, numbers_R, text, layouts: Sequence[Layout]
) -> Callable:
    """`step.train_chunk_of_runs`, compiled, so that no step waits for it."""
    at_once = devices[0].platform != "cpu"  # A CPU's core is kept busy by one run.
    chunk = jax.jit(functools.partial(step.train_chunk_of_runs, program, devices, at_once), donate_argnums=0)
    return chunk.lower(states, numbers_R, text, *_stack(layouts, 0, 1), np.int32(1)).compile()


def _stack(layouts: Sequence[Layout], at: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """starts_RKB, reset_RKB of n steps from `at` on."""
    batches = [stacked([layout.batch(at + k) for k in range(n)], step.MAX_STEPS_PER_DISPATCH) for layout in layouts]
    starts_RKB, reset_RKB = (np.stack(each) for each in zip(*batches))
    return starts_RKB, reset_RKB


def _fetched(states: step.TrainState) -> Callable[[int], step.TrainState]:
    """r -> the state of run r, on the first device; all are fetched from the devices at once, if any is asked for."""
    on_host = functools.cache(lambda: jax.device_get(states))
    return functools.cache(lambda r: jax.tree.map(lambda leaf: jnp.asarray(leaf[r]), on_host()))
