"""The executor `ray` on two nodes of one machine: lost processes, schedulers, a search."""

import importlib.util
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import start
from test_sweep import SWEEP, rows_of, without_times

from charlm import sweep
from charlm.config import cli
from charlm.sweeps import plan, results
from charlm.system.machine import num_cores

# Only the process of these tests imports Ray.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed")
# Each run has as many cores as with the sequential executor, because the bits depend on the number of cores.
ALL_CORES = f"--cpus_per_run={num_cores()}"
# One run for each node.
RUNS = 'product({"optimizer.learning_rate": [1e-3, 1e-2]})'
# The length of the runs of which some are stopped.
STEPS = 15_000


@pytest.fixture(scope="module")
def address():
    """Yield the address of a cluster of two nodes. Each of them claims all cores of this machine."""
    from ray.cluster_utils import Cluster

    import charlm.sweeps.ray_executor  # noqa: F401  It sets Ray's environment variables, before Ray starts.

    node = {"num_cpus": num_cores(), "include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**{key: value for key, value in node.items() if key != "include_dashboard"})
    yield cluster.address
    cluster.shutdown()


def flags_for(path, workdir, *flags):
    """Return the flags of the command for a sweep on Ray."""
    return f"--sweep={path}", f"--workdir={workdir}", "--executor=ray", *flags


def wait_for(what, process):
    give_up = time.monotonic() + 120
    while not (found := what()):
        assert process.poll() is None and time.monotonic() < give_up, process.communicate()[1]
        time.sleep(0.05)
    return found


def workers(workdir):
    """Return {name: process id} of the runs of a sweep that are in training."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"charlm.sweeps.ray_worker" in path.read_bytes():
                logs = [Path(os.readlink(path.parent / "fd" / "2"))]
                found |= {log.stem: int(path.parent.name) for log in logs if log.parent == workdir / "logs"}
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def sequential(small_config, tmp_path_factory):
    """Train the runs with the executor `sequential`; return (sweep file, workdir)."""
    folder = tmp_path_factory.mktemp("sweeps")
    (folder / "sweep.py").write_text(SWEEP.format(config=str(small_config), runs=RUNS))
    assert cli.run(sweep.main, [f"--sweep={folder / 'sweep.py'}", f"--workdir={folder / 'sequential'}"]) == 0
    return folder / "sweep.py", folder / "sequential"


@pytest.mark.slow
def test_two_nodes_equal_the_sequential_executor_although_processes_are_lost_and_stopped(address, sequential, tmp_path):
    """The sweep is killed, gets SIGTERM when it is started again, and then loses the process of a run."""
    path, expected = sequential
    flags = f"--ray_address={address}", ALL_CORES

    def saved():
        return {each.parent.parent.name for each in (tmp_path / "w").glob("*/checkpoints/[0-9]*")}

    for at_least, number in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
        process = start("sweep", *flags_for(path, tmp_path / "w", *flags))
        wait_for(lambda least=at_least: len(saved()) >= least, process)
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), err
    process = start("sweep", *flags_for(path, tmp_path / "w", *flags))
    lost = wait_for(lambda: [pid for name, pid in workers(tmp_path / "w").items() if name in saved()], process)
    os.kill(lost[0], signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert without_times(rows_of(tmp_path / "w")) == without_times(rows_of(expected))
    assert len(list((tmp_path / "w" / "logs").iterdir())) == 2 and not (tmp_path / "w" / ".tune").exists()


@pytest.mark.slow
def test_runs_that_fall_behind_are_stopped_and_failures_are_rows_of_the_table(run, address, small_config, tmp_path):
    # The runs are long enough to be stopped under way, and they save seldom.
    long = f"config.train.update(steps={STEPS}, log_every=100, eval_every=750, checkpoint_every=750, sample_every=0)"
    config = tmp_path / "long.py"
    config.write_text(small_config.read_text().replace("    return config", f"    {long}\n    return config"))
    rates = 'product({"optimizer.learning_rate": [1e-2, 1e-8, 1e-9, 1e38]}) + [{"model.hidden_size": 0}]'
    (tmp_path / "sweep.py").write_text(SWEEP.format(config=str(config), runs=rates))
    flags = f"--ray_address={address}", "--scheduler=asha"
    code, _, err = run("sweep", *flags_for(tmp_path / "sweep.py", tmp_path / "w", *flags))
    assert code == 1 and "2 of 5 runs failed" in err, err
    rows = {row["run"]: row for row in rows_of(tmp_path / "w")}
    runs = {each.name: each for each in plan.load_plan(tmp_path / "sweep.py").runs()}
    states = [row["status"] for row in rows.values()]
    assert rows["learning_rate=0.01"]["status"] == "completed" and states.count("stopped_early") >= 1
    assert rows["learning_rate=1e+38"]["status"] == "diverged" and rows["hidden_size=0"]["status"] == "failed"
    for name, row in rows.items():
        if row["status"] == "stopped_early":
            result = json.loads((tmp_path / "w" / name / "result.json").read_text())
            assert result["stopped_by"] == "asha" and result["steps"] < STEPS and result["params_sha256"]
            assert results.is_finished(tmp_path / "w" / name, runs[name].config), "a stopped run is not trained again"


@pytest.mark.slow
@pytest.mark.parametrize("longest", [2, 9, 10, 26, 15_000])
def test_asha_stops_no_run_at_its_last_step(longest):
    from charlm.sweeps.ray_executor import METRIC, _scheduler

    asha = _scheduler("asha", longest)
    asha.set_search_properties(METRIC, "min")
    trials = [SimpleNamespace(trial_id=str(number)) for number in range(3)]
    for trial in trials:
        asha.on_trial_add(None, trial)
    decisions = [
        asha.on_trial_result(None, trial, {"step": step, METRIC: 1.0 if step < longest else float(trial.trial_id)})
        for step in (*range(1, longest, max(1, longest // 100)), longest)
        for trial in trials
    ]
    assert set(decisions) == {asha.CONTINUE}


@pytest.mark.slow
def test_a_search_draws_within_the_ranges_and_can_be_continued(run, address, small_config, tmp_path):
    def search(num_runs, highest, cells):
        draws = f'{{"optimizer.learning_rate": log_uniform(1e-3, {highest}), "model.cell": choice({cells})}}'
        (tmp_path / "sweep.py").write_text(SWEEP.format(config=str(small_config), runs=f"sample({num_runs}, {draws}, 1)"))
        flags = f"--ray_address={address}", "--search=optuna"
        code, _, err = run("sweep", *flags_for(tmp_path / "sweep.py", tmp_path / "w", *flags))
        return code, err, {row["run"]: row for row in rows_of(tmp_path / "w")}

    code, err, first = search(1, 1e-1, ["rnn", "gru"])
    assert code == 0 and len(first) == 1, err
    code, err, rows = search(2, 1e-1, ["rnn", "gru"])
    assert code == 0 and "1 of 1 runs are finished" in err and len(rows) == 2 and rows.items() > first.items(), err
    for row in rows.values():
        assert row["status"] == "completed" and 1e-3 <= float(row["optimizer.learning_rate"]) <= 1e-1
    # Other ranges: they contain none of the earlier runs, and none of their values can be trained.
    code, err, rows = search(1, 2e-3, ["elman"])
    (row,) = rows.values()
    assert code == 1 and row["status"] == "failed" and "model.cell is 'elman'" in row["reason"], err
    (refused,) = plan.load_plan(tmp_path / "sweep.py").runs_in(tmp_path / "w")
    assert refused.refused and refused.name == row["run"], "a refused run is not tried again"


@pytest.mark.slow
def test_impossible_requests_are_refused_with_one_line(run, address, sequential, tmp_path):
    flags = f"--sweep={sequential[0]}", f"--workdir={tmp_path / 'w'}"
    code, _, err = run("sweep", *flags, "--scheduler=asha")
    assert code == 2 and "--scheduler needs --executor ray; found --executor sequential" in err
    code, _, err = run("sweep", *flags, "--executor=ray", f"--ray_address={address}", "--cpus_per_run=1000")
    assert code == 2 and "no node has --cpus_per_run 1000" in err, err
    code, _, err = run("sweep", *flags, "--executor=ray", "--search=optuna")
    assert code == 2 and "--search optuna needs runs that come from sample() alone" in err, err
