"""Untrusted files in a workdir: they are either read or refused with one line, and no code in them is executed."""

import json
import shutil

import pytest
from altered import FEW, altered, altered_bytes, altered_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from charlm.config import default_config, rules
from charlm.data.vocab import Vocab
from charlm.runs.checkpoint import Checkpoints
from charlm.runs.workdir import load_run, read_result
from charlm.system.errors import UserError


@pytest.fixture(scope="module")
def trained(small_config, tmp_path_factory):
    """Return the workdir of a finished run."""
    from conftest import COMMANDS

    from charlm.config import cli

    path = tmp_path_factory.mktemp("runs") / "run"
    assert cli.run(COMMANDS["train"], [f"--config={small_config}", f"--workdir={path}", "--config.train.steps=20"]) == 0
    return path


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """Return a copy of the run, whose files the tests damage."""
    path = tmp_path_factory.mktemp("harmed") / "run"
    shutil.copytree(trained, path)
    return path


CONFIG = default_config().to_dict()
VOCAB = Vocab.from_chars("abc\n").to_json()
SHARED = settings(suppress_health_check=list(HealthCheck))


def loads_or_refuses(load):
    try:
        return load()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return None


@pytest.mark.fuzz
@SHARED
@given(content=altered(CONFIG))
def test_an_altered_config_is_read_or_refused(workdir, content):
    (workdir / "config.json").write_bytes(content)
    run = loads_or_refuses(lambda: load_run(workdir))
    if run is not None:  # A config that is read meets the rules.
        rules.check_keys(run.config, "test")
        rules.check(run.config, "test")


@pytest.mark.fuzz
@SHARED
@given(content=altered(VOCAB))
def test_an_altered_vocabulary_is_read_or_refused(trained, workdir, content):
    shutil.copy(trained / "config.json", workdir)
    (workdir / "vocab.json").write_bytes(content)
    run = loads_or_refuses(lambda: load_run(workdir))
    if run is not None and run.vocab.kind == "chars":
        assert run.vocab.decode(run.vocab.encode(run.vocab.symbols)).encode() == run.vocab.symbols.encode()


@pytest.mark.fuzz
@settings(SHARED, max_examples=FEW)
@given(content=altered({"packages": {"jax": "0"}, "device_kind": "cpu", "corpus_sha256": "0"}))
def test_an_altered_manifest_or_result_is_read_or_refused(trained, workdir, content):
    for name in ("config.json", "vocab.json"):
        shutil.copy(trained / name, workdir)
    (workdir / "manifest.json").write_bytes(content)
    loads_or_refuses(lambda: load_run(workdir))
    (workdir / "result.json").write_bytes(content)
    loads_or_refuses(lambda: read_result(workdir))


@pytest.fixture(scope="module")
def metadata(trained):
    """Return {path: content} of the files of a checkpoint that hold no array data."""
    step = trained / "checkpoints" / "20"
    files = [path for path in sorted(step.rglob("*")) if path.is_file() and "d" not in path.relative_to(step).parts]
    return {path.relative_to(step): path.read_bytes() for path in files}


# An example takes a tenth of a second.
@pytest.mark.fuzz
@settings(SHARED, max_examples=FEW)
@given(data=st.data())
def test_altered_metadata_of_a_checkpoint_restores_the_saved_state_or_is_refused(workdir, metadata, data):
    """The sha256 ensures that a state which is restored is the state that was saved."""
    step = workdir / "checkpoints" / "20"
    name = data.draw(st.sampled_from(sorted(metadata)))
    sound = metadata[name]
    try:
        values = altered_values(json.loads(sound)).map(lambda each: json.dumps(each).encode())
    except ValueError:
        values = st.nothing()
    (step / name).write_bytes(data.draw(altered_bytes(sound) | values))
    checkpoints = Checkpoints(workdir)
    try:
        loads_or_refuses(lambda: checkpoints.find("20", lambda line: None))
    finally:
        checkpoints.close()
        (step / name).write_bytes(sound)
