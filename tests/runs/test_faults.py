"""Faults during a run: kills, signals, a full disk, a loss that is not finite.

After each fault the same command continues, and the result equals that of the uninterrupted run. Damaged checkpoints,
incomplete lines and changed texts are tested in test_checkpoint.py, test_loop.py, test_tracking.py and test_cli.py.
"""

import json
import math
import random
import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
from conftest import start

from charlm.inference import scorer
from charlm.runs.tracking import read_metrics
from charlm.training import state, step
from experiments.faults.run import PHASES, Outcome, disturb, outcome_of


def make_result(workdir):
    return json.loads((workdir / "result.json").read_text())


@pytest.fixture
def broken_loss(monkeypatch):
    """Return a function that makes the loss NaN in every step whose first target is a symbol, or with None in every step."""
    sound = step.cross_entropy

    def break_at(symbol):
        def cross_entropy(logits_TBV, targets_TB):
            broken = True if symbol is None else targets_TB[0, 0] == symbol
            return sound(logits_TBV, targets_TB) * jnp.where(broken, jnp.nan, 1.0)

        monkeypatch.setattr(step, "cross_entropy", cross_entropy)
        forget_compiled()

    def forget_compiled():
        state._jit_program.cache_clear()

    yield break_at
    forget_compiled()


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_and_counted(run, small_config, broken_loss, tmp_path):
    broken_loss(0)  # Symbol 0 is the line end.
    flags = "--config", str(small_config), "--workdir"
    code, _, err = run("train", *flags, str(tmp_path / "stops"))
    assert code == 1 and "the loss is not finite at step " in err and "optimizer.skip_not_finite" in err
    found = []
    for name, per_dispatch in (("a", 7), ("b", 1)):
        more = "--config.optimizer.skip_not_finite=3", f"--config.train.steps_per_dispatch={per_dispatch}"
        code, _, err = run("train", *flags, str(tmp_path / name), *more)
        assert code == 0, err
        lines = [line for line in read_metrics(tmp_path / name / "metrics.jsonl") if line["split"] == "train"]
        assert all(math.isfinite(line["nats_per_char"]) and math.isfinite(line["grad_norm"]) for line in lines)
        assert 0 < make_result(tmp_path / name)["skipped_updates"] == lines[-1]["skipped_updates"] < 20
        found.append((make_result(tmp_path / name)["params_sha256"], [(line["step"], line["nats_per_char"]) for line in lines]))
    assert found[0] == found[1]


def test_too_many_skipped_updates_in_a_row_end_the_run(run, small_config, broken_loss, tmp_path):
    broken_loss(None)
    flags = "--config", str(small_config), "--workdir", str(tmp_path / "w"), "--config.optimizer.skip_not_finite=3"
    code, _, err = run("train", *flags, "--config.train.steps_per_dispatch=1")
    assert code == 1 and "the parameters are not finite at step 4; there is no checkpoint yet" in err
    assert make_result(tmp_path / "w")["status"] == "diverged"


@pytest.fixture(scope="module")
def uninterrupted(small_config, tmp_path_factory) -> Outcome:
    from conftest import COMMANDS

    from charlm.config import cli

    path = tmp_path_factory.mktemp("whole") / "run"
    assert cli.run(COMMANDS["train"], [f"--config={small_config}", f"--workdir={path}", "--config.model.dropout=0.2"]) == 0
    return outcome_of(path)


@pytest.mark.slow
def test_kills_lose_nothing(small_config, uninterrupted, tmp_path):
    """A small version of experiments/faults, which kills a hundred times."""
    flags = f"--config={small_config}", "--config.model.dropout=0.2"
    # The run is shorter than those of the experiment, so the kills come earlier.
    short = {name: phase._replace(times=1, seconds=phase.seconds / 4) for name, phase in PHASES.items()}
    assert disturb(tmp_path / "run", flags, 4, random.Random(0), short)
    assert outcome_of(tmp_path / "run") == uninterrupted


def test_a_signal_does_not_wait_for_an_evaluation(small_config, uninterrupted, tmp_path, run, monkeypatch):
    """A scheduler waits half a minute, but an evaluation may take an hour. It is repeated when the run is resumed."""
    flags = f"--config={small_config}", f"--workdir={tmp_path / 'w'}", "--config.model.dropout=0.2"
    sound, scored = scorer.cut_streams, []

    def cut_streams(*args):
        signal.raise_signal(signal.SIGTERM)
        scored.append(args)
        return sound(*args)

    with monkeypatch.context() as patch:
        patch.setattr(scorer, "cut_streams", cut_streams)
        for _ in range(2):  # The second start begins with the repeated evaluation.
            code, _, err = run("train", *flags)
            assert code == 143 and "stopped by SIGTERM at step 20; everything is saved" in err
    assert len(scored) == 2
    assert run("train", *flags)[0] == 0
    assert outcome_of(tmp_path / "w") == uninterrupted


@pytest.mark.slow
def test_a_full_disk_is_reported_and_nothing_is_lost(small_config, uninterrupted, tmp_path):
    """The size of files is limited after the second checkpoint, so the third cannot be written."""
    flags = f"--config={small_config}", f"--workdir={tmp_path / 'w'}", "--config.model.dropout=0.2"
    small = f"""
import resource, sys
from charlm.runs import checkpoint
from charlm.config import cli
from charlm import train
sound, saves = checkpoint.Checkpoints.save, []

def save(*args):
    saves.append(args)
    if len(saves) == 3:
        args[0].wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
    return sound(*args)

checkpoint.Checkpoints.save = save
sys.exit(cli.run(train.main, {list(flags)!r}))
"""
    found = subprocess.run([sys.executable, "-c", small], capture_output=True, text=True)
    assert found.returncode == 1, found.stderr
    # Orbax's threads also write to stderr, possibly before or after the message on the same line.
    begin = re.escape(f"charlm: a checkpoint could not be written to {tmp_path / 'w' / 'checkpoints'}: ")
    (said,) = re.findall(f"{begin}.*continues from it", found.stderr)
    assert "File too large" in said and "the last one is that of step 20, and the same command continues from it" in said
    second = start("train", *flags)
    _, err = second.communicate()
    assert second.returncode == 0 and "; from step 20" in err, err
    assert outcome_of(tmp_path / "w") == uninterrupted


def test_a_clock_that_jumps_between_starts_changes_nothing(small_config, uninterrupted, tmp_path, run, monkeypatch):
    """Within a start, charlm uses a monotonic clock. Orbax does not: it aborts a save that seems to take 20 minutes."""
    sound = time.time
    flags = f"--config={small_config}", f"--workdir={tmp_path / 'w'}", "--config.model.dropout=0.2"
    for days, more in ((1, ["--config.train.steps=20"]), (-1, ["--extend"])):
        monkeypatch.setattr(time, "time", lambda days=days: sound() + 86400 * days)
        code, _, err = run("train", *flags, *more)
        assert code == 0, err
    assert outcome_of(tmp_path / "w") == uninterrupted
    seconds = [line["seconds"] for line in read_metrics(tmp_path / "w" / "metrics.jsonl")]
    assert seconds == sorted(seconds) and 0 < seconds[-1] < 600
