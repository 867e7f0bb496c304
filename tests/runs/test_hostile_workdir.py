"""Workdirs in unusual places, and workdirs whose files are damaged or wrong on purpose: one line, and nothing is lost."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import COMMANDS, start

from charlm.config import cli
from charlm.runs.checkpoint import Checkpoints
from charlm.runs.samples import read_samples
from charlm.system.errors import RunFailed


@pytest.fixture(scope="module")
def trained(small_config, tmp_path_factory):
    """Return the workdir of a finished run with three checkpoints: 20, 30 and 40. The best is the latest."""
    path = tmp_path_factory.mktemp("trained") / "run"
    flags = "--config.train.eval_every=10", "--config.optimizer.learning_rate=0.01"
    assert cli.run(COMMANDS["train"], [f"--config={small_config}", f"--workdir={path}", *flags]) == 0
    return path


@pytest.fixture
def train(run, small_config):
    def command(path, *flags):
        rate = "--config.train.eval_every=10", "--config.optimizer.learning_rate=0.01"
        return run("train", f"--config={small_config}", f"--workdir={path}", *rate, *flags)

    return command


@pytest.fixture
def copy(trained, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(trained, path)
    return path


def one_line(err):
    return err.startswith("charlm: ") and err.count("\n") == 1


def damage(step_folder):
    data = max((step_folder / "state").glob("**/d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


@pytest.mark.parametrize("character", "[]*?{}%#:@|, '\"")
def test_a_folder_with_any_character_in_its_name_can_be_read(trained, run, tmp_path, character):
    path = tmp_path / f"a{character}b{character}"
    shutil.copytree(trained, path)
    code, out, err = run("sample", f"--workdir={path}", "--length=20")
    assert code == 0 and len(out) == 21, err


def test_a_run_in_a_folder_with_a_strange_name_is_resumed_to_the_same_bits(trained, train, tmp_path):
    path = tmp_path / "[a]*{b}%20#c:d@e|f?,g"
    assert train(path, "--config.train.steps=20")[0] == 0
    code, _, err = train(path, "--extend")
    assert code == 0 and "; from step 20" in err, err
    results = [json.loads((each / "result.json").read_text()) for each in (path, trained)]
    assert results[0]["params_sha256"] == results[1]["params_sha256"]


def test_samples_that_look_like_headers_survive_a_resumed_run(copy, train):
    fake = "=== step 999 ===\nnot a header\n=== step " + "9" * 5000 + " ===\n"
    lines = [{"step": 20, "text": fake}, {"step": 40, "text": "later"}]
    (copy / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(copy / "checkpoints" / "40")
    (copy / "result.json").unlink()
    code, _, err = train(copy)
    assert code == 0 and "; from step 30" in err, err
    samples = read_samples(copy)
    assert samples[0] == (20, fake) and [sample.step for sample in samples] == [20, 40] and samples[1].text != "later"
    assert (copy / "samples.txt").read_text().startswith(f"=== step 20 ===\n{fake}\n=== step 40 ===\n")


def test_samples_of_old_runs_are_kept_when_they_are_resumed(copy, train):
    fake = "=== step 999 ===\nfirst\n=== step " + "9" * 5000 + " ===\n"
    (copy / "samples.jsonl").unlink()
    (copy / "samples.txt").write_text(f"=== step 20 ===\n{fake}\n=== step 30 ===\nsecond\n=== step 40 ===\nthird\n")
    shutil.rmtree(copy / "checkpoints" / "40")
    (copy / "result.json").unlink()
    code, _, err = train(copy)
    assert code == 0 and "; from step 30" in err, err
    text = (copy / "samples.txt").read_text()
    assert text.startswith(f"=== step 20 ===\n{fake}\n=== step 30 ===\nsecond\n=== step 40 ===\n") and "third" not in text


def test_a_damaged_checkpoint_that_is_the_latest_and_the_best_is_replaced_by_another_one_and_healed(copy, trained, train, run):
    whole = json.loads((trained / "result.json").read_text())
    assert whole["best_step"] == 40
    damage(copy / "checkpoints" / "40")
    for which in ("best", "latest"):
        code, out, err = run("sample", f"--workdir={copy}", f"--checkpoint={which}", "--length=20")
        assert code == 0 and len(out) == 21, err
        assert f"{copy / 'checkpoints' / '40'} is damaged" in err and f"using the {which} of the others, step 30" in err
    code, _, err = train(copy)
    assert code == 0 and "its last checkpoint is damaged, so the steps since the one before it are trained again" in err
    assert json.loads((copy / "result.json").read_text())["params_sha256"] == whole["params_sha256"]
    assert run("reproduce", f"--workdir={copy}")[0] == 0


def test_a_damaged_best_checkpoint_is_replaced_by_the_latest(trained, copy, run):
    """The latest checkpoint names an earlier one as the best."""
    checkpoints = Checkpoints(copy)
    flat, meta = checkpoints.restore(40)
    checkpoints.save(50, flat, meta["progress"], 40)
    checkpoints.wait()
    checkpoints.close()
    damage(copy / "checkpoints" / "40")
    code, _, err = run("sample", f"--workdir={copy}", "--length=20")
    assert code == 0 and "40 is damaged" in err and "checkpoint of step 50" in err


def test_all_checkpoints_damaged_is_one_line_and_the_result_stays(copy, train, run):
    for path in (copy / "checkpoints").iterdir():
        damage(path)
    for code, out, err in (run("sample", f"--workdir={copy}"), run("evaluate", f"--workdir={copy}"), train(copy)):
        assert code == 2 and err.splitlines()[-1].startswith("charlm: the checkpoint ") and not out
    assert (copy / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_folder_that_is_moved_or_deleted_during_training_is_one_line(small_config, tmp_path, how):
    path = tmp_path / "run"
    steps = "--config.train.steps=100000", "--config.train.log_every=500", "--config.train.eval_every=1000"
    process = start("train", f"--config={small_config}", f"--workdir={path}", *steps)
    while not (path / "checkpoints" / "200").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    path.rename(tmp_path / "elsewhere")  # A deletion that meets a save under way would leave a part of it.
    if how == "deleted":
        shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith(f"charlm: {path} was moved or deleted while the run was trained")
    assert not path.exists()


@pytest.mark.parametrize("error", [RunFailed("a checkpoint could not be written"), OSError("no such file")])
def test_a_folder_that_is_deleted_between_its_check_and_a_write_is_one_line(train, tmp_path, monkeypatch, error):
    def save(self, *args):
        shutil.rmtree(tmp_path / "run")
        raise error

    monkeypatch.setattr(Checkpoints, "save", save)
    code, out, err = train(tmp_path / "run")
    assert code == 1 and f"charlm: {tmp_path / 'run'} was moved or deleted while the run was trained" in err
    assert not out and not (tmp_path / "run").exists()


def test_the_best_is_chosen_again_if_training_deletes_it(copy):
    """Retention deletes the best checkpoint after it was chosen, and before it is read."""
    checkpoints = Checkpoints(copy)
    flat, meta = checkpoints.restore(40)
    checkpoints.save(50, flat, meta["progress"], 30)
    checkpoints.wait()
    checkpoints.close()
    sound, reader = Checkpoints.restore, Checkpoints(copy)

    def restore(self, step):
        if step == 30 and (copy / "checkpoints" / "30").exists():
            shutil.rmtree(copy / "checkpoints" / "30")
            shutil.copytree(copy / "checkpoints" / "50", copy / "checkpoints" / "60")
            writer = Checkpoints(copy)
            shutil.rmtree(copy / "checkpoints" / "60")
            writer.save(60, flat, meta["progress"], 60)
            writer.wait()
            writer.close()
        return sound(self, step)

    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "restore", restore)
        assert reader.find("best", said.append)[1]["step"] == 60
    assert not said


def test_a_checkpoint_that_declares_other_arrays_is_refused_before_they_are_read(copy, run, tmp_path, monkeypatch):
    """The checkpoint of a large model under the config of a small one. Compressed zeros are small on disk."""
    large = tmp_path / "large"
    checkpoints = Checkpoints(large)
    flat, meta = Checkpoints(copy).restore(40)
    name = max(flat, key=lambda each: flat[each].size)
    checkpoints.save(40, flat | {name: np.zeros((1 << 14, 1 << 12), np.float32)}, meta["progress"], 40)
    checkpoints.wait()
    checkpoints.close()
    for step in (20, 30, 40):
        shutil.rmtree(copy / "checkpoints" / str(step), ignore_errors=True)
    shutil.copytree(large / "checkpoints" / "40", copy / "checkpoints" / "40")
    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointHandler.restore", None)  # A call would fail.
    code, out, err = run("sample", f"--workdir={copy}")
    assert code == 2 and one_line(err) and f"does not fit config.json: the array {name} should be float32" in err and not out


def write_progress(path, change):
    """Replace the latest checkpoint by one whose sha256 is right and whose progress was changed."""
    checkpoints = Checkpoints(path)
    flat, meta = checkpoints.restore(40)
    checkpoints.save(40, flat, meta["progress"] | change, 40)
    checkpoints.wait()
    checkpoints.close()


@pytest.mark.parametrize("change", [{"best_loss": "low"}, {"sums": [1]}, {"train_seconds": None}, {"counts": {"loss": "3"}}])
def test_a_progress_of_wrong_types_is_one_line(copy, train, change):
    write_progress(copy, change)
    (copy / "result.json").unlink()
    code, _, err = train(copy)
    assert code == 2 and f"a checkpoint holds a progress whose {next(iter(change))} is" in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "samples.jsonl", "result.json", "config.json", "vocab.json", "manifest.json"]
)
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_folder_or_a_pipe_in_place_of_a_file_is_one_line(copy, train, run, name, kind):
    (copy / name).unlink()
    (copy / name).mkdir() if kind == "folder" else os.mkfifo(copy / name)
    if name not in ("result.json", "config.json"):
        (copy / "result.json").unlink()
    found = [run("report", f"--workdir={copy}")]
    if (
        name != "config.json"
    ):  # Without config.json, the folder holds no run, and a run may not start in a folder that is not empty.
        found.append(train(copy))
    for code, _, err in found:
        assert code == 2 and err.splitlines()[-1].startswith("charlm: ") and "Traceback" not in err, err


@pytest.mark.parametrize(
    "name, content",
    [
        ("metrics.jsonl", '{"step": "x", "split": "val", "nats_per_char": 1}\n{"step": 1}\n[]\n{"step": 1' + "0" * 400 + "}\n"),
        ("result.json", '{"status": 3, "steps": 40}'),
        ("result.json", "[]"),
        ("config.json", '{"a":' * 986 + "1" + "}" * 986),
        ("config.json", "[" * 100_000),
        ("vocab.json", '{"kind": "chars", "symbols": 3}'),
        ("manifest.json", "3"),
    ],
)
def test_wrong_content_is_read_without_it_or_is_one_line(copy, run, name, content):
    (copy / name).write_text(content)
    code, _, err = run("report", f"--workdir={copy}")
    assert "Traceback" not in err and (code == 0 if name == "metrics.jsonl" else code == 2 and one_line(err)), err
    if name == "metrics.jsonl":
        assert "metrics.jsonl: 4 of 4 lines are damaged and left out" in err
        assert run("reproduce", f"--workdir={copy}")[0] == 0


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "reproduce", "report", "sweep"])
@pytest.mark.parametrize("name", ["a" * 300, "file/below", "\udcff\udcfe"], ids=["long", "below a file", "not UTF-8"])
def test_a_folder_that_cannot_exist_is_one_line(run, small_config, tmp_path, monkeypatch, command, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    flags = [f"--workdir={name}"]
    if command == "train":
        flags.append(f"--config={small_config}")
    if command == "sweep":
        (tmp_path / "sweep.py").write_text(f"def get_sweep():\n    return {str(small_config)!r}, [{{'train.steps': 1}}]\n")
        flags.append("--sweep=sweep.py")
    code, _, err = run(command, *flags)
    assert code == 2 and one_line(err), err


def test_numbers_with_thousands_of_digits_are_one_line(trained, run, small_config, tmp_path):
    digits = "9" * 5000
    for command in (
        ("sample", f"--workdir={trained}", f"--checkpoint={digits}"),
        ("sample", f"--workdir={trained}", f"--seed={digits}"),
        ("train", f"--config={small_config}", f"--config.seed={digits}"),
        ("train", f"--config={small_config}", f"--workdir={tmp_path / 'w'}", f"--config.optimizer.learning_rate={digits}"),
    ):
        code, out, err = run(*command)
        assert code == 2 and one_line(err) and len(err) < 700 and not out, err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.model.hidden_size=1000000"], "for the parameters, and this machine has"),
        (["--config.model.hidden_size=2147483647"], "lower model.hidden_size, model.num_layers or model.embedding_size"),
        (["--config.model.embedding_size=2147483647"], "for the parameters"),
        (["--config.batching.batch_size=2147483647", "--config.batching.layout=random"], "lower batching.batch_size"),
        (["--config.sample.num_samples=2147483647"], "lower sample.num_samples"),
    ],
)
def test_sizes_that_cannot_be_had_are_refused_before_anything_is_compiled(run, small_config, tmp_path, flags, message):
    code, _, err = run("train", f"--config={small_config}", f"--workdir={tmp_path / 'w'}", *flags)
    assert code == 2 and one_line(err) and "the config needs at least " in err and message in err, err
    assert not (tmp_path / "w").exists()


def test_too_many_samples_and_a_device_as_text_are_refused(trained, run):
    code, _, err = run("sample", f"--workdir={trained}", "--num_samples=2147483647")
    assert code == 2 and one_line(err) and "lower sample.num_samples" in err
    code, _, err = run("evaluate", f"--workdir={trained}", "--text=/dev/zero")
    assert code == 2 and one_line(err) and "/dev/zero is a device, not a text" in err


@pytest.mark.parametrize("temperature", ["1e-40", "1e300", "1e-46", "-1", "nan", "inf"])
def test_a_temperature_that_float32_cannot_hold_is_refused(trained, run, temperature):
    code, out, err = run("sample", f"--workdir={trained}", f"--temperature={temperature}")
    assert code == 2 and one_line(err) and "sample.temperature is" in err and not out


def test_the_lowest_temperature_draws_the_most_probable_symbols(trained, run):
    greedy = run("sample", f"--workdir={trained}", "--greedy", "--length=100")[1]
    for temperature in ("1.3e-38", "1e-30", "1e-20"):
        assert run("sample", f"--workdir={trained}", f"--temperature={temperature}", "--length=100")[1] == greedy


def shell(command):
    """Run a command line. Its streams are buffered, as they are in a user's shell."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_closed_and_full_streams(trained, small_config, tmp_path):
    python, expected = sys.executable, json.loads((trained / "result.json").read_text())["params_sha256"]
    flags = f"--config={small_config} --config.train.eval_every=10 --config.optimizer.learning_rate=0.01"
    for name, streams in {
        "neither": ">&- 2>&-",
        "full": ">/dev/full 2>/dev/full",
        "gone": "2>&1 | true",
    }.items():
        path = tmp_path / name
        found = shell(f"set -o pipefail; {python} -m charlm.train {flags} --workdir='{path}' {streams}")
        assert found.returncode == 0, (name, found)
        assert json.loads((path / "result.json").read_text())["params_sha256"] == expected
        assert not any(b"LSTM 16" in file.read_bytes() for file in path.glob("*.json*")), "a message went into a file"
    for name, stream in (("sample", ">&-"), ("sample", ">/dev/full"), ("evaluate", ">/dev/full")):
        found = shell(f"{python} -m charlm.{name} --workdir={trained} {stream}")
        assert found.returncode == 1 and "Traceback" not in found.stderr, (name, stream, found)
        assert found.stderr.splitlines()[-1].startswith("charlm: the output cannot be written to stdout: ")
    assert shell(f"{python} -m charlm.sample --workdir={trained} 2>/dev/full >/dev/null").returncode == 0


@pytest.mark.slow
def test_a_name_that_the_terminal_cannot_show(trained, text_file, tmp_path):
    path = tmp_path / "té🙂.txt"
    shutil.copy(text_file, path)
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "charlm.evaluate", f"--workdir={trained}", f"--text={path}"]
    found = subprocess.run(command, capture_output=True, text=True, env=env)
    assert found.returncode == 0 and "t\\xe9\\U0001f642.txt" in found.stdout, found


def test_reading_while_a_run_trains_never_fails(copy):
    """A writer saves, and keeps the latest and the best, while a reader asks for the best."""
    flat, meta = Checkpoints(copy).restore(40)
    done = threading.Event()

    def write():
        try:
            writer = Checkpoints(copy)
            for step in range(50, 250, 10):
                writer.save(step, flat, meta["progress"], step - step % 20)
                writer.wait()
            writer.close()
        finally:
            done.set()

    thread, said, found = threading.Thread(target=write), [], set()
    thread.start()
    while not done.is_set():
        found.add(Checkpoints(copy).find("best", said.append)[1]["step"])
    thread.join()
    assert Checkpoints(copy).steps()[-1] == 240, "the writer failed"
    assert not said and all(step % 20 == 0 for step in found), (said, found)


def test_a_checkpoint_without_read_permission_is_named(copy, run, monkeypatch):
    """The tests may run as root, who can read everything, so the answer of the system is replaced."""
    for path in (copy / "checkpoints" / "40" / "state").iterdir():
        if path.is_file():
            path.unlink()
    closed = copy / "checkpoints" / "40" / "state"
    monkeypatch.setattr("charlm.runs.checkpoint_store.os.access", lambda path, mode: path != closed)
    code, _, err = run("sample", f"--workdir={copy}", "--checkpoint=40")
    assert code == 2 and one_line(err) and f"{closed} is not readable; check its permissions" in err
