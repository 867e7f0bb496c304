import ast
import inspect
import json
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.config import RESUMABLE_KEYS, default_config, flatten, rules, to_json
from charlm.system.errors import ConfigError

DEFAULTS = dict(flatten(default_config()))


def test_the_default_config_passes_its_own_checks_and_survives_json():
    config = default_config()
    rules.check(config, "test")
    config.data.split = (0.8, 0.1, 0.1)
    again = rules.from_json(to_json(config), "test")
    assert again == config and again.data.split == (0.8, 0.1, 0.1)


@pytest.mark.parametrize(
    "key, value",
    [
        ("batching.batch_size", 0),
        ("batching.seq_len", -1),
        ("batching.layout", "streams"),
        ("batching.reset_prob", 1.5),
        ("model.cell", "ltsm"),
        ("model.hidden_size", 0),
        ("model.num_layers", 0),
        ("model.dropout", 1.0),
        ("model.dtype", "float16"),
        ("model.recurrent_dropout", 1.0),
        ("model.tie_weights", True),
        ("optimizer.activation_reg", -1.0),
        ("optimizer.temporal_reg", float("inf")),
        ("train.ema_decay", 1.0),
        ("optimizer.learning_rate", -1e-3),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.learning_rate", float("inf")),
        ("optimizer.name", "adagrad"),
        ("optimizer.clip_norm", 0.0),
        ("train.steps", 0),
        ("train.epochs", 0.0),
        ("train.patience", 0),
        ("train.log_every", -1),
        ("train.steps_per_dispatch", 129),
        ("eval.num_streams", 0),
        ("eval.context", -1),
        ("sample.temperature", 0.0),
        ("sample.top_p", 1.1),
        ("sample.top_k", 0),
        ("data.split", (0.5, 0.4)),
        ("data.split", (0.5, 0.4, 0.2)),
        ("data.split", (0.0, 0.5, 0.5)),
        ("data.vocab", "words"),
        ("seed", -1),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(key, value):
    config = default_config()
    rules.set_key(config, key, value, "test")
    with pytest.raises(ConfigError) as error:
        rules.check(config, "some.py")
    assert str(error.value).startswith(f"some.py: {key} is ") and "\n" not in str(error.value)


@given(st.sampled_from(sorted(DEFAULTS)), st.data())
def test_a_misspelt_key_is_answered_with_the_right_one(key, data):
    at = data.draw(st.integers(1, len(key) - 1))
    misspelt = key[:at] + "q" + key[at + 1 :]
    if misspelt not in DEFAULTS and "." in misspelt:
        message = rules.unknown_key(misspelt)
        assert message.startswith(f"unknown config key {misspelt}; ")
        assert len(key) < 9 or "did you mean" in message


def test_a_key_in_the_wrong_group_is_found():
    assert rules.unknown_key("optimizer.dropout").endswith("did you mean model.dropout?")
    assert "is a group of keys" in rules.unknown_key("optimizer")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"seed": 1}', '{"nothing": {"here": 1}}'])
def test_a_config_json_that_is_none_is_a_user_error(text):
    with pytest.raises(ConfigError, match="^DIR/config.json"):
        rules.from_json(text, "DIR/config.json")


def test_only_the_length_may_grow_under_extend():
    old, new = default_config(), default_config()
    new.train.steps = 10
    rules.check_extension(old, new, "DIR")
    new.model.hidden_size = 8
    with pytest.raises(ConfigError, match="model.hidden_size"):
        rules.check_extension(old, new, "DIR")
    new = default_config()
    new.optimizer.schedule = "warmup_cosine"
    rules.check_extension(new, new, "DIR")
    for schedule_steps in (None, 100):
        new.optimizer.schedule_steps = schedule_steps
        longer = rules.from_json(to_json(new), "test")
        longer.train.steps = 10
        if schedule_steps:
            rules.check_extension(new, longer, "DIR")
        else:
            with pytest.raises(ConfigError, match="spans the run"):
                rules.check_extension(new, longer, "DIR")


def test_cadences_do_not_make_another_run():
    old, new = default_config(), default_config()
    for key in RESUMABLE_KEYS:
        rules.set_key(new, key, {bool: True, int: 3, str: "a"}[rules._type_of(old, key)], "test")
    assert rules.differing_keys(old, new) == []
    new.seed = 4
    assert rules.differing_keys(old, new) == ["seed"]


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_of_the_project_can_be_run_and_says_how(path):
    get_config = runpy.run_path(str(path))["get_config"]
    for settings in [()] + [("gpu",)] * bool(inspect.signature(get_config).parameters):
        config = get_config(*settings)
        rules.check_keys(config, str(path))
        rules.check(config, str(path))
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"python -m charlm.train --config configs/{path.name}" in head


def test_a_record_from_before_a_cadence_was_a_key_can_be_read_and_one_that_says_less_cannot():
    values = json.loads(to_json(default_config()))
    del values["train"]["wandb_project"]
    assert rules.from_json(json.dumps(values), "old").train.wandb_project is None
    del values["train"]["ema_decay"]
    with pytest.raises(ConfigError, match="old: the key train.ema_decay is missing"):
        rules.from_json(json.dumps(values), "old")
