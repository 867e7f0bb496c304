"""Training that is called from Python checks its config as the command does."""

import re

import pytest

from charlm.config import default_config
from charlm.runs.loop import train
from charlm.runs.workdir import load_run, read_result
from charlm.system.errors import ConfigError


@pytest.fixture
def config(text_file):
    config = default_config()
    config.data.path = str(text_file)
    config.batching.update(batch_size=4, seq_len=8)
    config.model.update(hidden_size=8, embedding_size=4)
    config.train.update(steps=2, sample_every=0)
    return config


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("dropout", -0.5, "the config: model.dropout is -0.5; it must be at least 0 and below 1"),
        ("cell", "ltsm", "the config: model.cell is 'ltsm'; did you mean 'lstm'?"),
    ],
)
def test_a_config_that_breaks_a_rule_is_refused_and_nothing_is_written(config, tmp_path, key, value, message):
    config.model[key] = value
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_something_other_than_a_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="^the config is of type dict; it must come from charlm.config.default_config"):
        train({"model": {}}, tmp_path / "run")


def test_paths_may_be_strings_and_the_config_of_the_caller_is_not_changed(config, tmp_path):
    before = config.to_json()
    train(config, f"{tmp_path / 'run'}")
    assert config.to_json() == before
    assert load_run(f"{tmp_path / 'run'}").config.model.hidden_size == 8
    assert read_result(tmp_path / "run")["status"] == "completed"
