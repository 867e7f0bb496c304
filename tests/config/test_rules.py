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


def test_the_default_config_follows_the_rules_and_survives_json():
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
def test_an_invalid_value_is_refused_with_the_name_of_its_key(key, value):
    config = default_config()
    rules.set_key(config, key, value, "test")
    with pytest.raises(ConfigError) as error:
        rules.check(config, "some.py")
    assert str(error.value).startswith(f"some.py: {key} is ") and "\n" not in str(error.value)


@given(st.sampled_from(sorted(DEFAULTS)), st.data())
def test_the_message_for_a_misspelled_key_suggests_a_key(key, data):
    at = data.draw(st.integers(1, len(key) - 1))
    misspelled = key[:at] + "q" + key[at + 1 :]
    if misspelled not in DEFAULTS and "." in misspelled:
        message = rules.unknown_key_message(misspelled)
        assert message.startswith(f"unknown config key {misspelled}; ")
        assert len(key) < 9 or "did you mean" in message


def test_the_message_for_a_key_in_the_wrong_group_names_the_right_group():
    assert rules.unknown_key_message("optimizer.dropout").endswith("did you mean model.dropout?")
    assert "is a group of keys" in rules.unknown_key_message("optimizer")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "{}", '{"nothing": {"here": 1}}'])
def test_a_config_json_without_a_config_is_a_user_error(text):
    with pytest.raises(ConfigError, match="^DIR/config.json"):
        rules.from_json(text, "DIR/config.json")


def test_extend_may_change_only_the_length():
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
            with pytest.raises(
                ConfigError, match="the run cannot be extended, because optimizer.schedule warmup_cosine depends on its length"
            ):
                rules.check_extension(new, longer, "DIR")


def test_resumable_keys_may_differ_between_starts():
    old, new = default_config(), default_config()
    for key in RESUMABLE_KEYS:
        rules.set_key(new, key, {bool: True, int: 3, str: "a", tuple: ("accuracy",)}[rules._type_of(old, key)], "test")
    assert rules.differing_keys(old, new) == []
    new.seed = 4
    assert rules.differing_keys(old, new) == ["seed"]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_file_follows_the_rules_and_names_its_command(path):
    get_config = runpy.run_path(str(path))["get_config"]
    for settings in [()] + [("gpu",)] * bool(inspect.signature(get_config).parameters):
        config = get_config(*settings)
        rules.check_keys(config, str(path))
        rules.check(config, str(path))
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"python -m charlm.train --config configs/{path.name}" in head


def test_missing_keys_get_their_defaults_and_unknown_keys_are_refused(capfd):
    values = json.loads(to_json(default_config()))
    values["model"]["hidden_size"] = 7
    del values["train"]["ema_decay"], values["eval"]["metrics"], values["mesh"]
    config = rules.from_json(json.dumps(values), "old")
    assert config.model.hidden_size == 7 and config.to_dict() | {"model": None} == default_config().to_dict() | {"model": None}
    err = capfd.readouterr().err
    assert err.startswith("old lacks keys of this version of charlm, so their defaults are used: ")
    assert all(each in err for each in ("train.ema_decay (0.0)", "eval.metrics ([])", "mesh.data (None)"))
    values["train"]["from_the_future"] = 1
    with pytest.raises(ConfigError, match="old: unknown config key train.from_the_future.*a newer version of charlm wrote it"):
        rules.from_json(json.dumps(values), "old")
    with pytest.raises(ConfigError, match="old is not a config: it contains no key"):
        rules.from_json("{}", "old")


def test_metrics_are_selected_by_name():
    config = default_config()
    config.train.metrics, config.eval.metrics = ("accuracy", "grad_norm_by_layer"), ("accuracy",)
    rules.check(config, "test")
    for key, names in {"train.metrics": ("acuracy",), "eval.metrics": ("grad_norm_by_layer",)}.items():
        config = default_config()
        rules.set_key(config, key, names, "test")
        with pytest.raises(ConfigError, match=f"{key} is .*; it must be a tuple of different names from accuracy"):
            rules.check(config, "test")
