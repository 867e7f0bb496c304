"""Sweep files, executors and records, tested through the command."""

import csv
import json
import math
import random
import signal
import time

import numpy as np
import pytest
from conftest import start
from hypothesis import given
from hypothesis import strategies as st

from charlm import sweep
from charlm.config import cli, default_config
from charlm.runs.tracking import read_metrics
from charlm.sweeps import plan, vmap_executor
from charlm.system.errors import ConfigError

SWEEP = """
from charlm.sweep import chain, choice, integer, log_uniform, product, sample, uniform_between, zipped

def get_sweep():
    return {config!r}, {runs}
"""


@pytest.fixture
def sweep_file(small_config, tmp_path):
    """Return a function that writes a sweep file over the small config and returns its path: sweep_file(runs)."""

    def write(runs):
        (tmp_path / "rates").mkdir(exist_ok=True)
        path = tmp_path / "rates" / "sweep.py"
        path.write_text(SWEEP.format(config=str(small_config), runs=runs))
        return path

    return write


def rows_of(workdir):
    with open(workdir / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


GRID = 'product({"optimizer.learning_rate": [1e-3, 1e-2], "seed": [0, 1]})'


def test_overrides_are_combined():
    assert sweep.product({"a": [1, 2], "b": [3, 4]}) == [{"a": a, "b": b} for a in (1, 2) for b in (3, 4)]
    assert sweep.zipped({"a": [1, 2], "b": [3, 4]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert sweep.chain([{"a": 1}], sweep.product({"b": [2]})) == [{"a": 1}, {"b": 2}]
    with pytest.raises(ConfigError, match=r"the same number of values for every key; found \{'a': 1, 'b': 2\}"):
        sweep.zipped({"a": [1], "b": [3, 4]})


@given(st.integers(0, 2**32), st.integers(1, 30))
def test_random_values_stay_within_their_ranges_and_do_not_depend_on_the_number_of_runs(seed, num_runs):
    draws = {
        "rate": sweep.log_uniform(1e-4, 1e-1),
        "dropout": sweep.uniform_between(0.0, 0.5),
        "layers": sweep.integer(1, 3),
        "cell": sweep.choice(["lstm", "gru"]),
    }
    runs = sweep.sample(num_runs, draws, seed)
    assert runs == sweep.sample(num_runs + 5, draws, seed)[:num_runs]
    for run in runs:
        assert 1e-4 <= run["rate"] <= 1e-1 and 0 <= run["dropout"] <= 0.5
        assert run["layers"] in (1, 2, 3) and run["cell"] in ("lstm", "gru")
        assert all(draws[key].can_draw(value) for key, value in run.items())
    outside = {"rate": 2e-1, "dropout": -0.1, "layers": 4, "cell": "rnn"}
    assert not any(draws[key].can_draw(value) for key, value in outside.items())


def test_the_logarithm_of_a_log_uniform_value_is_uniform():
    rates = [run["x"] for run in sweep.sample(4000, {"x": sweep.log_uniform(1e-4, 1.0)}, 3)]
    shares = np.histogram(np.log10(rates), bins=4, range=(-4, 0))[0] / len(rates)
    assert abs(shares - 0.25).max() < 0.03


def test_names_of_runs_are_stable_short_and_valid_folder_names():
    assert plan.run_name({"learning_rate": 0.004, "seed": 1}) == "learning_rate=0.004,seed=1"
    assert plan.run_name({}) == "base"
    slashes = plan.run_name({"path": "/data/a b.txt"})
    assert "/" not in slashes and slashes != plan.run_name({"path": "_data_a_b.txt"})
    assert len(plan.run_name({"path": "x" * 500})) <= 120


def test_a_dry_run_lists_the_runs_and_trains_none(run, sweep_file, tmp_path):
    code, out, _ = run("sweep", f"--sweep={sweep_file(GRID)}", f"--workdir={tmp_path / 'w'}", "--dry_run")
    assert code == 0 and not (tmp_path / "w").exists()
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert names == [f"learning_rate={rate},seed={seed}" for rate in (0.001, 0.01) for seed in (0, 1)]


@pytest.mark.parametrize(
    "runs, message",
    [
        (
            'product({"optimizer.learning_rat": [1]})',
            "unknown config key optimizer.learning_rat; did you mean optimizer.learning",
        ),
        ('product({"model.hidden_size": ["big"]})', "run hidden_size=big: model.hidden_size has the wrong type"),
        ('product({"seed": [1, 1]})', "1 runs are listed more than once, the first is seed=1"),
        ("[]", "get_sweep() returns no runs"),
        ('{"seed": 1}', "get_sweep() must return a config or the path of one, and a list of {dotted key: value}"),
        ("1 / 0", "line 5: ZeroDivisionError: division by zero"),
        ("", "sweep.py, line 5"),
    ],
)
def test_an_invalid_sweep_file_is_refused_before_anything_is_trained(run, sweep_file, tmp_path, runs, message):
    path = sweep_file(runs)
    if not runs:
        path.write_text("\n\n\n\nget_sweep(")
    code, _, err = run("sweep", f"--sweep={path}", f"--workdir={tmp_path / 'w'}")
    assert code == 2 and message in err and not (tmp_path / "w").exists()


def test_a_sweep_file_that_is_missing_or_empty_is_refused(run, tmp_path):
    assert run("sweep", "--sweep=nowhere.py")[0] == 2
    (tmp_path / "empty.py").touch()
    code, _, err = run("sweep", f"--sweep={tmp_path / 'empty.py'}")
    assert code == 2 and "has no function get_sweep()" in err


@pytest.fixture(scope="module")
def done(small_config, tmp_path_factory):
    """Train the grid with the executors `sequential` and `vmap`; return the folder that holds a workdir for each."""
    folder = tmp_path_factory.mktemp("sweeps")
    path = folder / "sweep.py"
    path.write_text(SWEEP.format(config=str(small_config), runs=GRID))
    assert cli.run(sweep.main, [f"--sweep={path}", f"--workdir={folder / 'sequential'}"]) == 0
    # JAX must not have initialised its devices before the executor `vmap` makes each core a device.
    process = start("sweep", f"--sweep={path}", f"--workdir={folder / 'vmap'}", "--executor=vmap")
    _, err = process.communicate()
    assert process.returncode == 0, err
    return folder


def test_both_executors_agree(done):
    rows = {executor: rows_of(done / executor) for executor in ("sequential", "vmap")}
    for ours, theirs in zip(*rows.values(), strict=True):
        for key in ("optimizer.learning_rate", "seed", "best_step", "steps", "status", "run"):
            assert ours[key] == theirs[key]
        loss, other = float(ours["val_nats_per_char"]), float(theirs["val_nats_per_char"])
        assert abs(loss - other) < 1e-4 * loss
        lines, others = (read_metrics(done / executor / ours["run"] / "metrics.jsonl") for executor in rows)
        assert [(line["step"], line["split"]) for line in lines] == [(line["step"], line["split"]) for line in others]
        losses = [[line["nats_per_char"] for line in each] for each in (lines, others)]
        np.testing.assert_allclose(*losses, rtol=1e-4)
    assert len({row["params_sha256"] for row in rows["sequential"]}) == 4


def test_a_run_of_a_sweep_equals_that_of_the_training_command(run, done, small_config, tmp_path):
    flags = "--config.optimizer.learning_rate=0.01", "--config.seed=1"
    assert run("train", f"--config={small_config}", f"--workdir={tmp_path / 'alone'}", *flags)[0] == 0
    alone = json.loads((tmp_path / "alone" / "result.json").read_text())
    assert alone["params_sha256"] == rows_of(done / "sequential")[3]["params_sha256"]


def test_the_records_of_a_sweep_can_be_used_by_other_commands(run, done):
    with open(done / "sequential" / "summary.csv", newline="") as file:
        head = next(csv.reader(file))
    measured = ["val_nats_per_char", "best_step", "steps", "train_seconds", "params_sha256", "status"]
    assert head[:8] == ["optimizer.learning_rate", "seed", *measured]
    assert (done / "sequential" / "sweep.png").stat().st_size > 10_000
    flags = "--result", str(done / "sequential" / "results.jsonl"), "--run", "learning_rate=0.001,seed=1"
    code, out, err = run("reproduce", *flags)
    assert code == 0 and "the same to the bit" in out, err
    code, out, _ = run("sample", f"--workdir={done / 'vmap' / 'learning_rate=0.01,seed=0'}")
    assert code == 0 and len(out) > 20


@pytest.mark.parametrize("executor", ["sequential", "vmap"])
def test_a_finished_sweep_is_not_trained_again(run, done, executor):
    before = {path: path.stat().st_mtime_ns for path in (done / executor).glob("*/metrics.jsonl")}
    summary = (done / executor / "summary.csv").read_text()
    code, _, err = run("sweep", f"--sweep={done / 'sweep.py'}", f"--workdir={done / executor}")
    assert code == 0 and "4 of 4 runs are finished" in err
    assert before == {path: path.stat().st_mtime_ns for path in (done / executor).glob("*/metrics.jsonl")}
    assert (done / executor / "summary.csv").read_text() == summary


def without_times(rows):
    return [{key: value for key, value in row.items() if key != "train_seconds"} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["sequential", "vmap"])
def test_a_sweep_that_is_killed_and_stopped_continues(done, tmp_path, executor):
    flags = f"--sweep={done / 'sweep.py'}", f"--workdir={tmp_path / 'w'}", f"--executor={executor}"
    draw = random.Random(executor)
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start("sweep", *flags)
        seen = len(list((tmp_path / "w").glob("*/checkpoints/*")))
        give_up = time.monotonic() + 60
        while process.poll() is None and len(list((tmp_path / "w").glob("*/checkpoints/*"))) <= seen:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode in (-number, 128 + number, 0), err
    process = start("sweep", *flags)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert without_times(rows_of(tmp_path / "w")) == without_times(rows_of(done / executor))


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["sequential", "vmap"])
def test_a_run_that_fails_is_a_row_of_the_table_and_the_others_finish(run, sweep_file, tmp_path, executor):
    rates = 'product({"optimizer.learning_rate": [1e-3, 1e38, 2e-3]})'
    path = sweep_file(rates + ' + [{"model.hidden_size": 0}, {"data.split": (0.99, 0.01, 0.0)}]')
    flags = f"--sweep={path}", f"--workdir={tmp_path / 'w'}", f"--executor={executor}"
    code, _, err = run("sweep", *flags)
    assert code == 1 and "2 of 5 runs failed; the first is hidden_size=0" in err, err
    rows = rows_of(tmp_path / "w")
    assert [row["status"] for row in rows] == ["completed", "diverged", "completed", "failed", "completed"]
    assert "not finite at step" in rows[1]["reason"] and "model.hidden_size is 0; it must be at least 1" in rows[3]["reason"]
    assert math.isfinite(float(rows[0]["val_nats_per_char"])) and rows[1]["val_nats_per_char"] == ""


def test_only_runs_that_can_share_a_program_are_grouped(sweep_file, tmp_path):
    path = sweep_file(
        'product({"seed": [0, 1]}) + [{"model.hidden_size": 12}, {"train.seconds": 100.0}, {"model.dropout": 0.1}]'
        ' + [{"model.dropout": 0.2}, {"mesh.data": 2}] + product({"data.device_bytes": [100], "seed": [0, 1]})'
    )
    groups, alone = vmap_executor.group_runs(plan.load_plan(path).runs(), tmp_path)
    assert [[run.name for run in group] for group in groups] == [["seed=0", "seed=1"], ["dropout=0.1", "dropout=0.2"]]
    assert {run.name: why for run, why in alone} == {
        "hidden_size=12": "no other run differs from it only in traced hyperparameters",
        "seconds=100": "train.seconds is a limit for one run",
        "data=2": "mesh.data is 2",
        "device_bytes=100,seed=0": "its text is larger than data.device_bytes",
        "device_bytes=100,seed=1": "its text is larger than data.device_bytes",
    }


def test_the_base_may_be_a_config_instead_of_a_path(tmp_path):
    path = tmp_path / "own.py"
    text = "from charlm.config import default_config\n\ndef get_sweep():\n"
    path.write_text(text + "    return default_config(), [{'seed': 3}, {'model.cell': 'gru'}]\n")
    first, second = plan.load_plan(path).runs()
    assert first.config.seed == 3 and second.config.model.cell == "gru" and second.config.seed == default_config().seed
