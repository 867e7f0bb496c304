"""Train a model.

    python -m charlm.train --config FILE [--workdir DIR] [--extend] [--config.KEY=VALUE ...]
        [--coordinator=auto | --coordinator=HOST:PORT --num_processes=N --process_id=I]

The same command on an unfinished run goes on from its last checkpoint.
"""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_dict

from charlm import checkpoint, cli, cudnn, outcome, processes, sample, step, workdir
from charlm import mesh as meshes
from charlm.batching import Gather, Layout, device_gather, host_gather, make_layout
from charlm.config import to_json
from charlm.corpus import Corpus, load_corpus
from charlm.errors import ConfigError, Exit, RunFailed, UserError
from charlm.evaluate import make_scorer, shortest_text
from charlm.host import Host, Signals
from charlm.machine import ask_for_determinism
from charlm.model import CharLM, num_params
from charlm.progress import say
from charlm.rules import settle
from charlm.tracking import check_trackers

# The step counter is an int32.
_MOST_STEPS = (1 << 31) - 1


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
        settle(config)
    stem = Path(values["config"].config_filename.split(":")[0]).stem
    with processes.joined(values.coordinator, values.num_processes, values.process_id):
        train(config, Path(values.workdir or f"runs/{stem}"), values.extend)


class Prepared(NamedTuple):
    """A config that can be trained here: its text, where its batches come from, and how many steps it has."""

    corpus: Corpus
    layout: Layout
    num_steps: int


def prepare(config: config_dict.ConfigDict) -> Prepared:
    """Load the text and see whether the config can be trained on it. Raises UserError if not; writes no workdir."""
    corpus = load_corpus(config.data)
    layout = make_layout(config.batching, config.seed, len(corpus.train))
    num_steps = _num_steps(config, layout)
    shortest = shortest_text(config.batching)
    if len(corpus.val) < shortest and config.train.patience is not None and config.train.best_by == "val":
        raise ConfigError(f"train.patience needs {shortest} characters to validate on; data.split leaves {len(corpus.val)}")
    sample.prompt_of(config, corpus.vocab, corpus.train, config.seed)
    check_trackers(config)
    if config.model.recurrence == "cudnn" and not cudnn.is_available():
        device = jax.devices()[0].device_kind
        raise ConfigError(f"model.recurrence is 'cudnn', which needs an NVIDIA GPU; found {device}; auto chooses what works")
    return Prepared(corpus, layout, num_steps)


def train(config: config_dict.ConfigDict, path: Path, extend: bool = False, until: int | None = None) -> None:
    """Begin the run in `path`, or go on with it; with `until` no further than that step, as if a limit had been reached.

    Raises:
        UserError: config, corpus and workdir do not allow it. Nothing was written.
        RunFailed: a loss is not finite, or something cannot be written.
        Exit: a signal came; everything is saved.
    """
    prepared = prepare(config)
    sha256 = prepared.corpus.sha256
    processes.check_same({"config": to_json(config), "text": sha256, "--workdir": str(path), "--extend": str(extend)})
    mesh = meshes.make_mesh(config)
    with contextlib.ExitStack() as stack:
        if not processes.decided(lambda: stack.enter_context(begun(config, path, prepared, extend))):
            return
        with marked_if_it_fails(config, path):
            _fit(config, path, prepared, mesh, prepared.num_steps if until is None else min(until, prepared.num_steps))


@contextlib.contextmanager
def begun(config: config_dict.ConfigDict, path: Path, prepared: Prepared, extend: bool = False) -> Iterator[bool]:
    """Hold a folder that is made into a run, or in which the run may go on; whether there is anything left to do."""
    with workdir.locked(path):
        yield _begin(config, path, prepared, extend)


def _begin(config: config_dict.ConfigDict, path: Path, prepared: Prepared, extend: bool) -> bool:
    corpus, layout, num_steps = prepared
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


@contextlib.contextmanager
def marked_if_it_fails(config: config_dict.ConfigDict, path: Path) -> Iterator[None]:
    """Has result.json say so if a run fails, whatever the error; one of the disk's becomes a RunFailed."""
    try:
        yield
    except (UserError, Exit):
        raise
    except OSError as error:
        _mark_failed(path, config)
        raise RunFailed(f"cannot write to {path}: {error.strerror or error}; the same command goes on from there") from None
    except Exception:
        _mark_failed(path, config)
        raise


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


def _fit(config: config_dict.ConfigDict, path: Path, prepared: Prepared, mesh: Mesh | None, end: int) -> None:
    """The training loop, to step `end`: dispatch a chunk of steps, then have the host do what is due."""
    corpus, layout, num_steps = prepared
    program = step.Program(config, corpus.vocab.size, num_steps, layout.carries_state, mesh)
    numbers = {"seed": np.uint32(config.seed)}
    init = functools.partial(step.init_state, program)
    shardings = None if mesh is None else step.state_shardings(program, jax.eval_shape(init, numbers))
    model = CharLM.from_config(config.model, corpus.vocab.size)
    score = make_scorer(model, corpus.vocab, config.batching, mesh)
    sampler = sample.make_sampler(model, corpus.vocab, config.sample.window, config.sample.dtype)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        host = stack.enter_context(Host(config, path, corpus, layout, num_steps, end, signals, score, sampler, mesh))
        if (flat := host.restored(lambda checkpoints: checkpoints.restore_latest(say))) is not None:
            state = meshes.put_tree(mesh, checkpoint.unflatten_state(jax.eval_shape(init, numbers), flat), shardings)
        else:
            state = step.first_state(step.init_state, program, numbers, shardings)
        host.begin(num_params(state.params))
        gather = _make_gather(config, corpus, layout, mesh, host.at, end)
        stack.callback(gather.close)
        train_chunk = step.compile_train_chunk(program, state, numbers, gather.ids_N)

        def current() -> step.TrainState:
            return state

        while host.progress.interrupted or not host.is_over():
            if not host.progress.interrupted:
                n = host.steps_to_take()
                start = time.monotonic()
                state, losses_K, norms_K, finite = train_chunk(state, numbers, *gather.take(host.at, n), np.int32(n))
                losses, norms = np.asarray(losses_K)[:n].tolist(), np.asarray(norms_K)[:n].tolist()
                host.stepped(losses, norms, bool(finite), signals.agreed(time.monotonic() - start))
            host.attend(current)
        host.finish(current, model, shardings)


def _make_gather(
    config: config_dict.ConfigDict, corpus: Corpus, layout: Layout, mesh: Mesh | None, at: int, num_steps: int
) -> Gather:
    """The text on the device if it may be there (at most 2^31 - 1 bytes, so that offsets fit an int32), else read ahead."""
    if corpus.train.nbytes <= config.data.device_bytes:
        return device_gather(corpus.train, layout, step.MAX_STEPS_PER_DISPATCH, mesh)
    return host_gather(corpus.train, layout, step.MAX_STEPS_PER_DISPATCH, at, num_steps, mesh)


if __name__ == "__main__":
    sys.exit(cli.run(main))
