"""The commands end to end on a small text: the files of a run, resuming, extending, signals, kills."""

import json
import math
import random
import shutil
import signal
import time

import pytest
from conftest import start

from charlm.runs.tracking import read_metrics

CONTRACT = {
    "config.json",
    "manifest.json",
    "vocab.json",
    "checkpoints",
    "samples.txt",
    "metrics.jsonl",
    "curves.png",
    "result.json",
}
# Together they use every source of state and of randomness: carried states, resets, dropout, optimizer state, shuffles.
STREAM = ("--config.model.dropout=0.3", "--config.batching.reset_prob=0.1", "--config.model.num_layers=2")
WINDOWS = ("--config.batching.layout=windows", "--config.model.dropout=0.3", "--config.model.cell=gru")
# For runs whose evaluations, checkpoints and samples do not matter.
RARELY = ("--config.train.eval_every=100", "--config.train.checkpoint_every=0", "--config.train.sample_every=0")


def result(workdir):
    return json.loads((workdir / "result.json").read_text())


def lines(workdir, split):
    return [(m["step"], m["nats_per_char"]) for m in read_metrics(workdir / "metrics.jsonl") if m["split"] == split]


@pytest.fixture(scope="module")
def whole(small_config, tmp_path_factory):
    """Return a function that trains an uninterrupted run with some flags and returns its workdir."""
    from conftest import COMMANDS

    from charlm.config import cli

    runs = {}

    def train_whole(*flags):
        if flags not in runs:
            runs[flags] = tmp_path_factory.mktemp("whole") / "run"
            assert cli.run(COMMANDS["train"], ["--config", str(small_config), "--workdir", str(runs[flags]), *flags]) == 0
        return runs[flags]

    return train_whole


def test_a_run_writes_the_files_of_the_contract(whole):
    path = whole()
    names = {p.name for p in path.iterdir()}
    assert names >= CONTRACT and any(name.startswith("events.out.tfevents") for name in names)
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) in (["30", "40"], ["20", "30", "40"])
    summary = result(path)
    assert summary["status"] == "completed" and summary["steps"] == 40 and summary["chars"] == 40 * 4 * 8
    assert len(summary["params_sha256"]) == 64 and summary["test_nats_per_char"] is None
    train, val = lines(path, "train"), lines(path, "val")
    assert [step for step, _ in train] == [10, 20, 30, 40] and [step for step, _ in val] == [20, 40]
    assert train[-1][1] < train[0][1]
    best = min(val, key=lambda point: point[1])
    assert (summary["best_step"], summary["val_nats_per_char"]) == best
    assert math.isclose(summary["val_bits_per_char"], best[1] / math.log(2))
    for metric in read_metrics(path / "metrics.jsonl"):
        assert {"epoch", "chars", "seconds", "bits_per_char"} <= metric.keys()
        if metric["split"] == "train":
            assert {"learning_rate", "grad_norm", "chars_per_second"} <= metric.keys()
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["vocab_size"] == len(json.loads((path / "vocab.json").read_text())["symbols"])
    assert len(manifest["corpus_sha256"]) == 64 and manifest["packages"]["jax"]
    samples = (path / "samples.txt").read_text()
    assert samples.count("=== step") == 2


def test_the_same_command_on_a_finished_run_says_so_and_changes_nothing(whole, run, small_config):
    path = whole()
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.name != ".lock"}
    code, out, err = run("train", "--config", str(small_config), "--workdir", str(path))
    assert code == 0 and f"the run in {path} is finished: completed after 40 steps" in err
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.name != ".lock"} == before


def test_an_extended_run_equals_a_longer_one(whole, run, small_config, tmp_path):
    longer = whole("--config.train.steps=60")
    path = tmp_path / "run"
    shutil.copytree(whole(), path)
    flags = "--config", str(small_config), "--workdir", str(path), "--config.train.steps=60"
    code, _, err = run("train", *flags)
    assert code == 2 and "train.steps (40 there, 60 now)" in err and "--extend" in err and err.count("\n") == 1
    assert result(path) == result(whole())
    code, _, err = run("train", *flags, "--extend")
    assert code == 0, err
    assert result(path)["params_sha256"] == result(longer)["params_sha256"]
    assert lines(path, "train") == lines(longer, "train") and lines(path, "val") == lines(longer, "val")
    code, _, err = run("train", *flags, "--extend")
    assert code == 0 and "is finished" in err
    code, _, err = run("train", *flags[:-1], "--config.train.steps=50", "--extend")
    assert code == 2 and "--extend only lengthens" in err and '"steps": 60' in (path / "config.json").read_text()


CADENCES = (
    ("--config.train.log_every=7", "--config.train.eval_every=9", "--config.train.checkpoint_every=3"),
    ("--config.train.steps_per_dispatch=1", "--config.train.checkpoint_every=0", "--config.train.sample_every=0"),
    ("--config.train.steps_per_dispatch=64", "--config.train.log_every=0", "--config.train.eval_every=0"),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [STREAM, WINDOWS], ids=["stream", "windows"])
def test_cadences_do_not_change_the_parameters(whole, run, small_config, tmp_path, kind):
    expected = result(whole(*kind))["params_sha256"]
    # The loop has the same code for every layout, so one cadence is enough for the second one.
    for i, cadence in enumerate(CADENCES if kind is STREAM else CADENCES[:1]):
        code, _, err = run("train", "--config", str(small_config), "--workdir", str(tmp_path / f"{i}"), *kind, *cadence)
        assert code == 0, err
        assert result(tmp_path / f"{i}")["params_sha256"] == expected


def until(process, condition):
    """Wait until a condition holds, while the process is alive."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow  # test_faults.py stops and resumes a run within one process.
@pytest.mark.parametrize(
    "kind, signals",
    [(STREAM, [signal.SIGTERM, signal.SIGINT]), (WINDOWS, [signal.SIGKILL])],
    ids=["stream, SIGTERM and SIGINT", "windows, SIGKILL"],
)
def test_a_run_that_is_stopped_and_resumed_equals_the_uninterrupted_run(whole, small_config, tmp_path, kind, signals):
    """The run is long enough for the signals to arrive before its end. The last start also changes the size of a dispatch."""
    steps = "--config.train.steps=1500"
    flags = "--config", str(small_config), "--workdir", str(tmp_path / "run"), *kind, steps, "--config.train.sample_every=0"
    slow = "--config.train.eval_every=0", "--config.train.checkpoint_every=130", "--config.train.log_every=100"
    uninterrupted = whole(*kind, steps, "--config.train.sample_every=0", *slow)
    path = tmp_path / "run"
    for number, step in zip(signals, ("260", "650")):
        process = start("train", *flags, *slow, "--config.train.steps_per_dispatch=5")
        until(process, (path / "checkpoints" / step).exists)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number], err
        assert not (path / "result.json").exists()
        if number != signal.SIGKILL:
            assert f"stopped by {number.name} at step " in err
    last = start("train", *flags, *slow, "--config.train.steps_per_dispatch=50")
    _, err = last.communicate(timeout=120)
    assert last.returncode == 0 and "; from step " in err, err
    assert result(path)["params_sha256"] == result(uninterrupted)["params_sha256"]
    assert lines(path, "train") == lines(uninterrupted, "train") and lines(path, "val") == lines(uninterrupted, "val")


def test_a_run_with_a_damaged_latest_checkpoint_continues_from_the_one_before(whole, run, small_config, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole(), path)
    (path / "result.json").unlink()
    data = max((path / "checkpoints" / "40").glob("**/d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    code, out, err = run("sample", "--workdir", str(path), "--checkpoint=40")
    assert code == 2 and str(path / "checkpoints" / "40") in err
    code, _, err = run("train", "--config", str(small_config), "--workdir", str(path))
    assert code == 0, err
    assert str(path / "checkpoints" / "40") in err and "continuing from step 30, the last undamaged checkpoint" in err
    assert result(path)["params_sha256"] == result(whole())["params_sha256"]
    assert lines(path, "train") == lines(whole(), "train") and lines(path, "val") == lines(whole(), "val")


def test_patience_stops_a_run(run, small_config, tmp_path):
    path = tmp_path / "run"
    flags = (
        "--config", str(small_config), "--workdir", str(path), "--config.optimizer.learning_rate=1e-12",
        "--config.train.patience=3", "--config.train.eval_every=5",
    )  # fmt: skip
    code, _, err = run("train", *flags)
    assert code == 0, err
    summary, val = result(path), lines(path, "val")
    assert summary["status"] == "stopped_early" and summary["steps"] < 40
    best = min(range(len(val)), key=lambda i: val[i][1])
    assert len(val) == best + 1 + 3 and summary["best_step"] == val[best][0]
    code, _, err = run("train", *flags)
    assert code == 0 and f"is finished: stopped early by train.patience after {summary['steps']} steps" in err


@pytest.mark.slow
def test_patience_stops_an_extended_run_where_it_stops_an_uninterrupted_one(run, small_config, tmp_path):
    """The evaluation at the end of the first part is off the cadence and does not count."""
    flags = (
        "--config", str(small_config), "--config.optimizer.learning_rate=0.5", "--config.train.patience=2",
        "--config.train.eval_every=5",
    )  # fmt: skip
    code, _, err = run("train", *flags, "--workdir", str(tmp_path / "whole"), "--config.train.steps=200")
    assert code == 0, err
    whole = result(tmp_path / "whole")
    assert whole["stopped_by"] == "train.patience" and whole["steps"] > 12
    for steps in (7, 12, 200):
        more = "--workdir", str(tmp_path / "parts"), f"--config.train.steps={steps}", "--extend"
        code, _, err = run("train", *flags, *more)
        assert code == 0, err
    parts = result(tmp_path / "parts")
    assert (parts["steps"], parts["params_sha256"]) == (whole["steps"], whole["params_sha256"])


def test_a_run_without_validation_text_says_so(run, small_config, tmp_path):
    flags = "--config", str(small_config), "--workdir", str(tmp_path / "run"), "--config.data.split=(1.0,0.0,0.0)"
    code, _, err = run("train", *flags)
    assert code == 0 and "no validation: data.split leaves 0 characters, fewer than 2" in err
    code, _, err = run("train", *flags[:3], str(tmp_path / "other"), *flags[4:], "--config.train.patience=1")
    assert code == 2 and "train.patience needs 2 characters to validate on; data.split leaves 0" in err


def test_a_run_that_diverges_fails(run, small_config, tmp_path):
    path = tmp_path / "run"
    flags = (
        "--config", str(small_config), "--workdir", str(path), "--config.optimizer.name=sgd",
        "--config.optimizer.learning_rate=3e38", "--config.model.cell=rnn",
    )  # fmt: skip
    code, _, err = run("train", *flags)
    assert code == 1 and "the loss is not finite at step " in err and "Traceback" not in err
    assert result(path)["status"] == "diverged"
    code, _, err = run("train", *flags)
    assert code == 1 and "diverged" in err
    # The last update of a run, which no loss depends on.
    code, _, err = run("train", *flags[:2], "--workdir", str(tmp_path / "one"), *flags[4:], "--config.train.steps=1")
    assert code == 1 and " not finite at step 1; there is no checkpoint yet" in err
    assert result(tmp_path / "one")["status"] == "diverged" and not list((tmp_path / "one").glob("checkpoints/*"))


def test_sampling_from_a_run(whole, run, text_file):
    flags = "--workdir", str(whole())
    code, text, err = run("sample", *flags, "--length=70", "--prompt=abc\r\nd")
    assert code == 0 and text.startswith("abc\nd") and len(text) == 5 + 70 + 1 and text.endswith("\n")
    assert set(text) <= set(text_file.read_text())
    assert "checkpoint of step" in err
    _, longer, _ = run("sample", *flags, "--length=200", "--prompt=abc\nd")
    assert longer.startswith(text[:-1])
    _, other, _ = run("sample", *flags, "--length=70", "--prompt=abc\nd", "--seed=1")
    assert other != text
    _, batch, _ = run("sample", *flags, "--length=70", "--prompt=abc\nd", "--num_samples=3")
    assert batch.startswith(text) and len(batch) == 3 * len(text)
    _, greedy, _ = run("sample", *flags, "--length=40", "--prompt=a", "--greedy")
    assert run("sample", *flags, "--length=40", "--prompt=a", "--top_k=1", "--seed=9")[1] == greedy
    assert len(run("sample", *flags)[1]) == 31


def test_scoring_a_run(whole, run, text_file, tmp_path):
    flags = "--workdir", str(whole()), "--json"
    code, out, _ = run("evaluate", *flags)
    score = json.loads(out)
    text = text_file.read_text()
    assert code == 0 and score["count"] == len(text) - int(len(text) * 0.9) - 1
    assert math.isclose(score["nats_per_char"], result(whole())["val_nats_per_char"], rel_tol=1e-6)
    assert math.isclose(score["bits_per_char"], score["nats_per_char"] / math.log(2))
    assert math.isclose(score["perplexity"], math.exp(score["nats_per_char"]))
    (tmp_path / "val.txt").write_text(text[int(len(text) * 0.9) :])
    assert math.isclose(
        json.loads(run("evaluate", *flags, f"--text={tmp_path / 'val.txt'}")[1])["nats_per_char"], score["nats_per_char"]
    )
    code, plain, _ = run("evaluate", "--workdir", str(whole()), "--split=train")
    assert code == 0 and "nats per character" in plain and "perplexity" in plain


def test_a_run_continues_with_a_smaller_device_bytes(whole, run, small_config, tmp_path):
    """The second part reads its text from the memory map. A finished run without result.json only writes that file."""
    path, device = tmp_path / "run", "--config.data.device_bytes=0"
    flags = "--config", str(small_config), "--workdir", str(path), "--config.train.steps=60"
    shutil.copytree(whole(), path)
    code, _, err = run("train", *flags, device, "--extend")
    assert code == 0, err
    assert result(path)["params_sha256"] == result(whole("--config.train.steps=60"))["params_sha256"]
    (path / "result.json").unlink()
    code, _, err = run("train", *flags, device)
    assert code == 0 and result(path)["params_sha256"] == result(whole("--config.train.steps=60"))["params_sha256"]


@pytest.mark.parametrize("layout", ["stream", pytest.param("sliding", marks=pytest.mark.slow)])
def test_a_text_too_large_for_the_device_trains_to_the_same_bits(whole, layout):
    """Compare windows that are cut out on the device with windows that Grain reads from the memory map."""
    flags = f"--config.batching.layout={layout}", "--config.train.steps=200", "--config.model.dropout=0.3", *RARELY
    if layout == "sliding":
        flags += "--config.batching.loss_on=last", "--config.model.encoding=scalar"
    on_device, read_ahead = whole(*flags), whole(*flags, "--config.data.device_bytes=0")
    assert result(on_device)["params_sha256"] == result(read_ahead)["params_sha256"]
    assert lines(on_device, "train") == lines(read_ahead, "train") and lines(on_device, "val") == lines(read_ahead, "val")


# Accents, composed and not; Greek; Chinese, Japanese, Korean; Hebrew and Arabic; emoji with joiners and flags.
SCRIPTS = "Être où? Cafe\u0301 ñ ß\nἄνδρα μοι ἔννεπε Σς\n漢字かな交じり文 한국어\nשָׁלוֹם עולם مرحبا\n👩‍👩‍👧 🏳️‍🌈 🇵🇪 👍🏽\n" * 40


@pytest.mark.slow
def test_dynamic_evaluation_adds_its_own_keys(whole, run):
    flags = "--workdir", str(whole())
    static = json.loads(run("evaluate", *flags, "--json")[1])
    code, out, _ = run("evaluate", *flags, "--json", "--dynamic")
    both = json.loads(out)
    assert code == 0 and {key: both[key] for key in static} == static
    assert both["dynamic_nats_per_char"] < both["nats_per_char"]
    assert math.isclose(both["dynamic_bits_per_char"] * math.log(2), both["dynamic_nats_per_char"])
    code, plain, _ = run("evaluate", *flags, "--dynamic")
    assert f"dynamic: nats per character   {both['dynamic_nats_per_char']:.4f}" in plain


@pytest.mark.parametrize("vocab", ["chars", "bytes"])
@pytest.mark.slow
def test_many_scripts_train_and_their_samples_decode(run, small_config, tmp_path, vocab):
    text, path = tmp_path / "t.txt", tmp_path / "run"
    text.write_text(SCRIPTS)
    flags = f"--config.data.path={text}", f"--config.data.vocab={vocab}", "--config.optimizer.learning_rate=0.02", *RARELY
    code, _, err = run("train", "--config", str(small_config), "--workdir", str(path), *flags, "--config.train.steps=400")
    assert code == 0, err
    assert result(path)["val_nats_per_char"] < 1.0
    for prompt in ("ἄνδρα", "👩‍👩‍", "שָׁ"):
        code, out, _ = run("sample", "--workdir", str(path), "--prompt", prompt, "--length=400", "--temperature=0.5")
        assert code == 0 and out.startswith(prompt)
        if vocab == "chars":
            assert set(out) <= set(SCRIPTS) and len(out) == len(prompt) + 400 + 1
        else:
            # The length may cut off the last character, but no other.
            assert "\ufffd" not in out[:-2] and len(out[len(prompt) :].encode()) <= 400 + 3 + 1
    # A text with a symbol that is not in the training text. Only bytes can encode it.
    (tmp_path / "new.txt").write_text(SCRIPTS + "Ж")
    code, out, err = run("evaluate", "--workdir", str(path), "--json", "--text", str(tmp_path / "new.txt"))
    if vocab == "chars":
        assert code == 2 and f"symbol 'Ж' at position {len(SCRIPTS)} is not in the vocabulary" in err
    else:
        score = json.loads(out)
        assert score["count"] == len(SCRIPTS) and score["bytes"] == len((SCRIPTS + "Ж").encode()) - 1
        assert math.isclose(score["nats_per_char"] * score["count"], score["nats_per_byte"] * score["bytes"])
        assert "nats per byte" in run("evaluate", "--workdir", str(path))[1]
        (val,) = [m for m in read_metrics(path / "metrics.jsonl") if m["split"] == "val" and m["step"] == 400]
        ratio = len(SCRIPTS.encode()) / len(SCRIPTS)
        assert math.isclose(val["nats_per_char"] / val["nats_per_byte"], ratio, rel_tol=0.02)


@pytest.mark.slow
def test_unknown_symbols_are_scored_and_counted(run, small_config, tmp_path):
    text, path = tmp_path / "t.txt", tmp_path / "run"
    text.write_text("abcdefgh aaaa bbbb " * 60 + "ж")
    flags = f"--config.data.path={text}", "--config.data.max_symbols=8"
    code, _, err = run("train", "--config", str(small_config), "--workdir", str(path), *flags)
    assert code == 0, err
    (tmp_path / "new.txt").write_text("abc abc xyz")
    code, out, _ = run("evaluate", "--workdir", str(path), "--json", "--text", str(tmp_path / "new.txt"))
    assert code == 0 and json.loads(out)["unknown"] == 3 and json.loads(out)["count"] == 10
    code, out, _ = run("sample", "--workdir", str(path), "--prompt=abz", "--length=5")
    assert code == 0 and out.startswith("abz")


@pytest.mark.slow
def test_a_lower_case_corpus_lower_cases_its_prompts(run, small_config, tmp_path):
    (tmp_path / "t.txt").write_text("Ein Öl, ein Maß: ΑΣ 漢字 🙂\n" * 60)
    path = tmp_path / "run"
    code, _, err = run(
        "train", "--config", str(small_config), "--workdir", str(path), f"--config.data.path={tmp_path / 't.txt'}",
        "--config.data.vocab=bytes", "--config.data.lowercase", "--config.model.encoding=one_hot",
    )  # fmt: skip
    assert code == 0, err
    code, out, _ = run("sample", "--workdir", str(path), "--prompt=EIN ÖL", "--length=50")
    assert code == 0 and out.startswith("ein öl")


def test_a_many_to_one_model_from_training_to_text(run, small_config, text_file, tmp_path):
    path = tmp_path / "run"
    flags = "--config.batching.layout=sliding", "--config.batching.loss_on=last", "--config.eval.max_chars=50", *RARELY
    code, _, err = run("train", "--config", str(small_config), "--workdir", str(path), *flags, "--config.train.steps=200")
    assert code == 0, err
    val = lines(path, "val")
    assert val[-1][1] < val[0][1]
    code, out, _ = run("evaluate", "--workdir", str(path), "--json")
    assert json.loads(out)["count"] == 50
    assert math.isclose(json.loads(out)["nats_per_char"], result(path)["val_nats_per_char"], rel_tol=1e-6)
    assert len(run("sample", "--workdir", str(path), "--length=40")[1]) == 41
    slid = "--random_prompt=8", "--window=8", "--greedy", "--length=30"
    code, out, _ = run("sample", "--workdir", str(path), *slid)
    assert code == 0 and len(out) == 8 + 30 + 1 and out[:8] in text_file.read_text()
    assert run("sample", "--workdir", str(path), *slid, "--window=0")[1][:9] == out[:9]
    code, _, err = run("sample", "--workdir", str(path), "--window=8", "--prompt=abc")
    assert code == 2 and "sample.window is 8, but the prompt has 3 symbols" in err
    code, _, err = run("evaluate", "--workdir", str(path), "--dynamic")
    assert code == 2 and "--dynamic scores all characters, but the run's batching.loss_on is 'last'" in err


@pytest.mark.slow
def test_best_by_selects_the_loss_of_the_best_checkpoint(run, small_config, tmp_path):
    """On noise the training loss falls until the end, while the validation loss rises."""
    draw = random.Random(1)
    (tmp_path / "noise.txt").write_text("".join(draw.choices("abcdefghijklmnop", k=400)))
    flags = (
        "--config", str(small_config), f"--config.data.path={tmp_path / 'noise.txt'}", "--config.optimizer.learning_rate=0.01",
        "--config.train.steps=600", "--config.train.log_every=100", "--config.model.hidden_size=32", *RARELY,
    )  # fmt: skip
    found = {}
    for by in ("val", "train"):
        code, _, err = run("train", *flags, "--workdir", str(tmp_path / by), f"--config.train.best_by={by}")
        assert code == 0, err
        found[by] = result(tmp_path / by)
        val, train = dict(lines(tmp_path / by, "val")), dict(lines(tmp_path / by, "train"))
        assert found[by]["best_step"] == min(val, key=(val if by == "val" else train).get)
        assert found[by]["val_nats_per_char"] == val[found[by]["best_step"]]
    assert found["train"]["best_step"] == 600 > found["val"]["best_step"]
    assert found["train"]["params_sha256"] == found["val"]["params_sha256"]


@pytest.mark.slow
def test_a_time_limit_is_recorded_and_can_be_raised(run, small_config, tmp_path):
    path = tmp_path / "run"
    # The schedule spans the steps, whose number does not change.
    schedule = "--config.optimizer.schedule=warmup_cosine", "--config.optimizer.schedule_steps=100000"
    flags = "--config", str(small_config), "--workdir", str(path), *schedule[:1], "--config.train.steps=100000"
    often = "--config.train.eval_every=0", "--config.train.checkpoint_every=0", "--config.train.sample_every=0"
    code, _, err = run("train", *flags, *often, "--config.train.seconds=1.5")
    assert code == 0, err
    first = result(path)
    assert (first["status"], first["stopped_by"]) == ("stopped_early", "train.seconds")
    assert 0 < first["steps"] < 100_000 and 1.5 <= first["train_seconds"] < 5
    assert lines(path, "val")[-1][0] == lines(path, "train")[-1][0] == first["steps"] == first["best_step"]
    code, _, err = run("train", *flags, *often, "--config.train.seconds=1.5")
    assert code == 0 and "is finished: stopped early by train.seconds" in err
    code, _, err = run("train", *flags, *often, "--config.train.seconds=1.0", "--extend")
    assert code == 2 and "run of train.seconds 1.5; 1.0 are fewer, and --extend only lengthens" in err
    code, _, err = run("train", *flags, *often, "--config.train.seconds=3.0", "--extend")
    assert code == 0, err
    second = result(path)
    assert second["stopped_by"] == "train.seconds" and second["steps"] > first["steps"] and second["train_seconds"] >= 3
    # The parameters do not depend on when the first part was stopped.
    steps = f"--config.train.steps={second['steps']}"
    code, _, err = run("train", *flags[:2], "--workdir", str(tmp_path / "other"), *often, *schedule, steps)
    assert code == 0, err
    assert result(tmp_path / "other")["params_sha256"] == second["params_sha256"]


REGULARISED = (
    "--config.model.dropout=0.3", "--config.model.variational_dropout", "--config.optimizer.name=rmsprop",
    "--config.optimizer.momentum=0.5", "--config.optimizer.schedule=step_decay", "--config.optimizer.decay_every=15",
    "--config.optimizer.accumulation_steps=2",
)  # fmt: skip
SCHEDULE_FREE = ("--config.optimizer.name=schedule_free_adamw", "--config.optimizer.skip_not_finite=1")


EVERY_PART = (
    "--config.model.cell=ln_lstm", "--config.model.num_layers=2", "--config.model.residual", "--config.model.tie_weights",
    "--config.model.embedding_size=16", "--config.model.recurrent_dropout=0.2", "--config.model.learn_initial_state",
    "--config.optimizer.activation_reg=1.0", "--config.optimizer.temporal_reg=1.0", "--config.train.ema_decay=0.9",
)  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [REGULARISED, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (EVERY_PART, SCHEDULE_FREE))],
    ids=["regularised", "every part", "schedule-free"],
)
def test_a_run_with_any_option_resumes_to_the_same_bits(whole, run, small_config, tmp_path, kind):
    """A shorter run that is extended equals a longer run from the start."""
    path = tmp_path / "run"
    shutil.copytree(whole(*kind), path)
    longer = whole(*kind, "--config.train.steps=60")
    flags = "--config", str(small_config), "--workdir", str(path), *kind, "--config.train.steps=60"
    code, _, err = run("train", *flags, "--extend")
    assert code == 0, err
    assert result(path)["params_sha256"] == result(longer)["params_sha256"]
    assert lines(path, "val") == lines(longer, "val")


def test_the_learning_rate_follows_the_schedule(whole):
    path = whole(*REGULARISED, "--config.train.steps=60")
    rates = [m["learning_rate"] for m in read_metrics(path / "metrics.jsonl") if m["split"] == "train"]
    assert [round(rate / 2e-3, 6) for rate in rates] == [1, 0.5, 0.5, 0.25, 0.125, 0.125]


def test_the_moving_average_is_scored_and_sampled_but_does_not_change_training(whole, run):
    plain, averaged = whole(), whole("--config.train.ema_decay=0.9")
    assert result(plain)["params_sha256"] == result(averaged)["params_sha256"]
    assert lines(plain, "train") == lines(averaged, "train") and lines(plain, "val") != lines(averaged, "val")
    for path in (plain, averaged):
        score = json.loads(run("evaluate", "--workdir", str(path), "--checkpoint=40", "--json")[1])
        assert math.isclose(score["nats_per_char"], lines(path, "val")[-1][1], rel_tol=1e-6)
    texts = [run("sample", "--workdir", str(path), "--length=200")[1] for path in (plain, averaged)]
    assert texts[0] != texts[1]


@pytest.mark.slow
def test_a_run_that_failed_says_so_and_continues_when_it_is_started_again(whole, run, small_config, tmp_path, monkeypatch):
    path = tmp_path / "run"
    flags = "--config", str(small_config), "--workdir", str(path)
    with monkeypatch.context() as patch:
        patch.setattr("charlm.runs.tracking.Tracker.sample", None)
        with pytest.raises(TypeError):
            run("train", *flags)
    assert result(path)["status"] == "failed" and result(path)["steps"] == 10
    code, _, err = run("train", *flags)
    assert code == 0 and "; from step 10" in err
    assert result(path)["params_sha256"] == result(whole())["params_sha256"]
    assert lines(path, "train") == lines(whole(), "train")
