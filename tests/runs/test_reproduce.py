"""The command `reproduce`: which runs it can train again, and how it reports equal and different results."""

import json
import shutil

import pytest
from conftest import start

from charlm.runs.tracking import read_metrics

STREAM = ("--config.model.dropout=0.3", "--config.batching.reset_prob=0.1")


@pytest.fixture(scope="module")
def recorded(small_config, tmp_path_factory):
    """Return the workdir of a finished run."""
    from conftest import COMMANDS

    from charlm.config import cli

    path = tmp_path_factory.mktemp("runs") / "run"
    assert cli.run(COMMANDS["train"], [f"--config={small_config}", f"--workdir={path}", *STREAM]) == 0
    return path


@pytest.fixture
def altered(recorded, tmp_path):
    """Return a function that copies the run and applies a change to one of its JSON files: altered(name, change)."""

    def alter(name, change):
        copy = tmp_path / "copy"
        shutil.copytree(recorded, copy)
        content = json.loads((copy / name).read_text())
        change(content)
        (copy / name).write_text(json.dumps(content))
        return copy

    return alter


def test_a_run_is_reproduced_to_the_bit(run, recorded, tmp_path):
    before = sorted(p.name for p in recorded.rglob("*"))
    code, out, err = run("reproduce", f"--workdir={recorded}", f"--into={tmp_path / 'again'}")
    assert code == 0, err
    sha256 = json.loads((recorded / "result.json").read_text())["params_sha256"]
    assert f"parameters  the same to the bit, sha256 {sha256}" in out
    assert "machine     the same versions, device and cores" in out
    assert f"metrics     the same to the bit, {len(read_metrics(recorded / 'metrics.jsonl'))} lines" in out
    assert sorted(p.name for p in recorded.rglob("*")) == before
    assert json.loads((tmp_path / "again" / "result.json").read_text())["params_sha256"] == sha256
    for into in (tmp_path / "again", recorded):
        code, out, err = run("reproduce", f"--workdir={recorded}", f"--into={into}")
        assert code == 2 and f"--into {into} holds a run already, so nothing would be trained again" in err and not out


def test_differences_are_reported(run, altered):
    workdir = altered("config.json", lambda config: config.update(seed=1))
    code, out, err = run("reproduce", f"--workdir={workdir}", "--json")
    found = json.loads(out)
    assert code == 1 and err.endswith(f"charlm: {workdir} was not reproduced to the bit\n")
    assert found["same_params"] is False and 0.01 < found["params_differ_by"] and found["metrics_differ_by"] > 0.001
    assert found["result"].keys() >= {"val_nats_per_char"}
    code, out, _ = run("reproduce", f"--workdir={workdir}")
    assert code == 1 and "parameters  differ: sha256 " in out and "metrics     differ by at most " in out


def test_another_machine_is_reported_and_another_corpus_is_refused(run, altered):
    def change(manifest):
        manifest["packages"]["jax"] = "0.1"
        manifest["cpu_cores"] = 99

    workdir = altered("manifest.json", change)
    code, out, _ = run("reproduce", f"--workdir={workdir}")
    assert code == 0 and "cpu_cores (99 then, " in out and "jax (0.1 then, " in out
    manifest = json.loads((workdir / "manifest.json").read_text())
    (workdir / "manifest.json").write_text(json.dumps(manifest | {"corpus_sha256": "0" * 64}))
    code, out, err = run("reproduce", f"--workdir={workdir}")
    assert code == 2 and not out and "is not what the run in" in err


def test_a_run_with_a_time_limit_is_reproduced_up_to_its_last_step(run, small_config, tmp_path):
    flags = "--config.train.seconds=0.05", "--config.train.steps=100000", "--config.train.steps_per_dispatch=5"
    assert run("train", f"--config={small_config}", f"--workdir={tmp_path / 'w'}", *flags)[0] == 0
    code, out, err = run("reproduce", f"--workdir={tmp_path / 'w'}")
    assert code == 0 and "parameters  the same to the bit" in out, out + err


def test_an_unfinished_run_is_reproduced_up_to_its_last_checkpoint(run, recorded, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(recorded, workdir)
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "40")
    code, out, err = run("reproduce", f"--workdir={workdir}")
    assert code == 0 and ": 30 steps, trained again" in out and "the same to the bit" in out, out + err


@pytest.mark.slow
def test_a_run_that_diverged_diverges_again(run, small_config, tmp_path):
    flags = "--config.optimizer.name=sgd", "--config.optimizer.learning_rate=3e38", "--config.model.cell=rnn"
    assert run("train", f"--config={small_config}", f"--workdir={tmp_path / 'w'}", *flags)[0] == 1
    code, out, err = run("reproduce", f"--workdir={tmp_path / 'w'}")
    assert code == 0 and "parameters  not on record" in out, out + err


def test_a_run_is_reproduced_from_a_line_of_results(run, recorded, tmp_path):
    line = {name: json.loads((recorded / f"{name}.json").read_text()) for name in ("config", "manifest", "result")}
    file = tmp_path / "results.jsonl"
    wrong = {"run": "b", **line, "result": line["result"] | {"params_sha256": "0" * 64}}
    lines = [{"kind": "steps"}, {"run": "a", **line}, wrong, {"run": "c"}]
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    code, out, err = run("reproduce", f"--result={file}", "--run=a")
    assert code == 0 and "parameters  the same to the bit" in out, err
    code, out, _ = run("reproduce", f"--result={file}", "--run=b")
    assert code == 1 and "parameters  differ: sha256 0000000000000000... then" in out
    for name, expected in (("c", "run 'c' has no config"), ("d", "has no run 'd'; it has a, b, c")):
        code, _, err = run("reproduce", f"--result={file}", f"--run={name}")
        assert code == 2 and expected in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "give either --workdir DIR, or --result FILE and --run ID"),
        (["--workdir=no", "--result=no"], "give either"),
        (["--result=no"], "--run is missing"),
        (["--result=no", "--run=a"], "cannot read no: No such file"),
        (["--workdir=no"], "does not exist"),
    ],
)
def test_invalid_flags_are_refused(run, flags, expected):
    code, out, err = run("reproduce", *flags)
    assert (code, out) == (2, "") and expected in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_deterministic_run_equals_any_other_on_a_cpu_and_uses_scan(recorded, small_config, tmp_path):
    process = start("train", f"--config={small_config}", f"--workdir={tmp_path / 'w'}", *STREAM, "--config.train.deterministic")
    _, err = process.communicate()
    assert process.returncode == 0, err
    found, expected = (json.loads((path / "result.json").read_text())["params_sha256"] for path in (tmp_path / "w", recorded))
    assert found == expected
    assert json.loads((tmp_path / "w" / "config.json").read_text())["model"]["recurrence"] == "scan"
