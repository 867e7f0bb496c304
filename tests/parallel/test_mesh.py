"""Several devices and several processes, on a CPU: they train like one device, and a run can be resumed on any number of them.

The processes run the real command. XLA treats the cores of the CPU as devices.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import COMMANDS
from jax.sharding import PartitionSpec as P

from charlm.config import cli
from charlm.parallel import mesh as meshes
from charlm.runs.checkpoint import Checkpoints
from charlm.runs.flat_state import sha256
from charlm.runs.tracking import read_metrics

HOST_PATH = "--config.data.device_bytes=0"


def start_job(num_processes, devices, *flags, each=()):
    """Start processes of the training command, with some devices each. `each` holds additional flags for each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"}
    started = []
    for i in range(num_processes):
        command = [sys.executable, "-m", "charlm.train", *flags, *(each[i] if each else ())]
        if num_processes > 1:
            command += [f"--coordinator=localhost:{port}", f"--num_processes={num_processes}", f"--process_id={i}"]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
    return started


def wait_for(started, seconds=120):
    """Wait for the processes; return [(exit code, stderr)]."""
    found = []
    for process in started:
        _, err = process.communicate(timeout=seconds)
        found.append((process.returncode, err))
    return found


def train(path, small_config, num_processes, devices, *flags):
    """Train in a folder; return (result, metrics). A single process with one device is this one."""
    flags = f"--config={small_config}", f"--workdir={path}", *flags
    if (num_processes, devices) == (1, 1):
        assert jax.device_count() == 1 and cli.run(COMMANDS["train"], flags) == 0
        return outcome(path, [])
    return outcome(path, start_job(num_processes, devices, *flags))


def outcome(path, job):
    """Wait for a job that was started; return (result, metrics)."""
    found = wait_for(job)
    assert [code for code, _ in found] == [0] * len(job), found
    assert all("nats per character" not in err for _, err in found[1:]), "only process 0 prints messages"
    return json.loads((path / "result.json").read_text()), read_metrics(path / "metrics.jsonl")


def check_close(a, b):
    """Check that the losses of two runs differ by less than 1e-4."""
    (result, lines), (other, others) = a, b
    assert [(line["step"], line["split"]) for line in lines] == [(line["step"], line["split"]) for line in others]
    losses = [[line["nats_per_char"] for line in each] for each in (lines, others)]
    np.testing.assert_allclose(*losses, atol=1e-4)
    assert result["steps"] == other["steps"] and abs(result["val_nats_per_char"] - other["val_nats_per_char"]) < 1e-4


# What a row of the batch draws does not depend on the device that draws it.
DROPOUT = "--config.model.dropout=0.3", "--config.model.recurrent_dropout=0.2"


@pytest.fixture(scope="module")
def alone(small_config, tmp_path_factory):
    """Train on one device; return (result, metrics)."""
    path = tmp_path_factory.mktemp("alone") / "run"
    return train(path, small_config, 1, 1, *DROPOUT)


def test_devices_share_a_batch_without_changing_the_training(small_config, alone, tmp_path):
    """Several processes do so in `test_processes_share_batches_of_documents` and when a run changes its processes."""
    flags = "--config.mesh.data=2", "--config.mesh.shard_params", *DROPOUT
    check_close(train(tmp_path / "run", small_config, 1, 4, *flags), alone)


@pytest.mark.slow
def test_processes_share_batches_of_documents(small_config, tmp_path):
    flags = "--config.data.documents=lines", "--config.eval.context=0"
    together = train(tmp_path / "together", small_config, 2, 2, *flags, HOST_PATH)
    check_close(together, train(tmp_path / "alone", small_config, 1, 1, *flags))


@pytest.mark.slow
def test_two_devices_of_a_cpu_draw_large_first_states(small_config, tmp_path):
    """Orthogonal kernels of this size that were drawn at the same time, for two layers or devices, once caused a deadlock."""
    large = "--config.model.hidden_size=384", "--config.model.num_layers=2"
    short = *large, "--config.train.steps=2", "--config.train.sample_every=0"
    result, _ = train(tmp_path / "run", small_config, 1, 2, "--config.mesh.data=2", *short)
    assert result["steps"] == 2


@pytest.mark.slow
def test_a_run_continues_with_another_number_of_processes(small_config, tmp_path):
    """One process saves whole arrays, then two save shards, and then two with two devices each.

    The shards of process 1 in the last checkpoint are damaged before the third start.
    """
    path, sharded = tmp_path / "run", ("--config.mesh.shard_params", "--extend")
    wide = "--config.model.hidden_size=64"  # Smaller arrays are not sharded.
    train(path, small_config, 1, 1, wide, "--config.train.steps=10")
    result, _ = train(path, small_config, 2, 1, wide, "--config.train.steps=30", *sharded)
    assert result["params_sha256"] == params_sha256(path, 30)
    of_process_1 = path / "checkpoints" / "30" / "state" / "ocdbt.process_1"
    largest = max((file for file in of_process_1.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))
    job = start_job(2, 2, f"--config={small_config}", f"--workdir={path}", wide, *sharded)
    (code, err), (other_code, other_err) = wait_for(job)
    assert code == other_code == 0, (err, other_err)
    assert "continuing from step 20, the last undamaged checkpoint" in err and "continuing from" not in other_err
    result, lines = outcome(path, [])
    assert result["params_sha256"] == params_sha256(path, 40)
    _, others = train(tmp_path / "alone", small_config, 1, 1, wide)
    kept = {(line["step"], line["split"]): line["nats_per_char"] for line in lines}
    assert len(kept) == len(lines)
    for line in others:
        assert abs(kept[line["step"], line["split"]] - line["nats_per_char"]) < 1e-4


def until_step(path, step, processes):
    """Wait until the metrics of a step are recorded."""
    give_up = time.monotonic() + 90
    while not any(line["step"] >= step for line in read_metrics(path / "metrics.jsonl")):
        assert time.monotonic() < give_up and all(process.poll() is None for process in processes)
        time.sleep(0.02)


LONG = ["--config.train.steps=100_000", "--config.train.eval_every=0", "--config.train.sample_every=0"]


@pytest.mark.slow
def test_a_job_that_loses_a_process_ends_and_continues_when_it_is_started_again(small_config, tmp_path):
    """Process 0 is killed first, then process 1. In the third start process 1 gets SIGTERM."""
    flags = f"--config={small_config}", f"--workdir={tmp_path / 'run'}", *LONG
    for victim in (0, 1):
        job = start_job(2, 1, *flags)
        until_step(tmp_path / "run", 30 * (victim + 1), job)
        job[victim].kill()
        killed = time.monotonic()
        found = wait_for(job)
        assert time.monotonic() - killed < 60
        code, err = found[1 - victim]
        assert code == 1 and "another process of the job was lost; started again, the job continues" in err
    job = start_job(2, 1, *flags)
    until_step(tmp_path / "run", 90, job)
    job[1].send_signal(signal.SIGTERM)
    found = wait_for(job)
    assert [code for code, _ in found] == [143, 143], found
    assert "; from step " in found[0][1] and "stopped by SIGTERM" in found[0][1]
    (saved,) = {int(text.split()[0].rstrip(";")) for text in found[0][1].split("stopped by SIGTERM at step ")[1:]}
    whole, _ = train(tmp_path / "whole", small_config, 2, 1, f"--config.train.steps={saved}", *LONG[1:])
    assert whole["params_sha256"] == params_sha256(tmp_path / "run", saved)


def params_sha256(path, step):
    flat, _ = Checkpoints(path).find(str(step), print)
    return sha256({name.removeprefix("params."): each for name, each in flat.items() if name.startswith("params.")})


@pytest.mark.slow
@pytest.mark.parametrize(
    "each, message",
    [
        ([["--config.seed=1"], []], "process 1 was started with another config than process 0; all need the same"),
        ([["--workdir=elsewhere"], []], "process 1 was started with another --workdir than process 0"),
        (
            [["--config.mesh.data=1"], ["--config.mesh.data=1"]],
            "mesh.data is 1; the 2 processes of this job have 2: leave it unset",
        ),
        ([["--config.batching.batch_size=5"]] * 2, "batching.batch_size is 5; 2 devices cannot share it equally"),
    ],
)
def test_processes_with_different_flags_are_refused(small_config, tmp_path, each, message):
    found = wait_for(start_job(2, 1, f"--config={small_config}", f"--workdir={tmp_path / 'run'}", each=each))
    for code, err in found:
        assert code == 2 and message in err, found
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_process_0_ends_all_processes(small_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    (code, err), (other, other_err) = wait_for(start_job(2, 1, f"--config={small_config}", f"--workdir={tmp_path / 'run'}"))
    assert code == other == 2
    assert "is not a run and not empty: it holds 'thesis.tex'" in err
    assert "process 0 failed; its own message says why" in other_err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.mesh.data=9"], "mesh.data is 9; there are "),
        (["--config.mesh.data=-1"], "mesh.data is -1; it must not be negative"),
        (["--num_processes=2"], "--num_processes and --process_id need --coordinator=HOST:PORT"),
        (["--coordinator=somewhere"], "--coordinator is 'somewhere'; it must be auto, or HOST:PORT of process 0"),
        (["--coordinator=localhost:1", "--process_id=0"], "needs both"),
        (["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"], "the second from 0 and below the first"),
    ],
)
def test_invalid_flags_for_jobs_are_refused(run, small_config, tmp_path, flags, message):
    code, _, err = run("train", f"--config={small_config}", f"--workdir={tmp_path / 'run'}", *flags)
    assert code == 2 and message in err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_auto_without_a_cluster_is_refused(small_config, tmp_path):
    command = [sys.executable, "-m", "charlm.train", f"--config={small_config}", f"--workdir={tmp_path / 'run'}"]
    found = subprocess.run([*command, "--coordinator=auto"], capture_output=True, text=True)
    assert found.returncode == 2 and "--coordinator is auto; JAX finds no other processes" in found.stderr


@pytest.mark.slow
def test_a_slurm_step_is_found(small_config, alone, tmp_path):
    """The environment is that of processes which `srun --ntasks=2` starts."""
    command = [sys.executable, "-m", "charlm.train", f"--config={small_config}", f"--workdir={tmp_path / 'run'}", *DROPOUT]
    job = []
    for i in range(2):
        slurm = {"JOB_ID": os.getpid(), "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": i, "LOCALID": i}
        env = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        job.append(subprocess.Popen([*command, "--coordinator=auto"], env=env, **pipes))
    check_close(outcome(tmp_path / "run", job), alone)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["process_count"] == 2


def test_large_arrays_are_sharded_along_their_longest_divisible_axis():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    assert meshes.param_spec((4096, 64), mesh) == P("data") and meshes.param_spec((64, 4096), mesh) == P(None, "data")
    assert meshes.param_spec((4094, 64), mesh) == P(None, "data")
    assert meshes.param_spec((4,), mesh) == meshes.param_spec((4095, 63), mesh) == P()
