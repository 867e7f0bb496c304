"""The rules that every config must follow, and the keys that may change between two starts of a run."""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ml_collections import ConfigDict

from charlm.config import LENGTH_KEYS, RESUMABLE_KEYS, default_config, flatten
from charlm.config.document_rules import check_documents, resolve_documents
from charlm.config.split_rules import check_split
from charlm.data.batching import LAYOUTS, LOSSES_ON
from charlm.data.vocab import KINDS
from charlm.nn import cudnn
from charlm.nn.cells import find_cell
from charlm.nn.model import DTYPES, ENCODINGS, RECURRENCES, RECURRENT_INITS
from charlm.system.errors import ConfigError, short
from charlm.system.progress import say
from charlm.training.chunk import MAX_STEPS_PER_DISPATCH
from charlm.training.metrics import GRADIENT_METRICS, TARGET_METRICS
from charlm.training.optimizers import LOSS_REDUCTIONS, OPTIMIZERS, SCHEDULES, schedule_spans_run

# The seed of a JAX PRNG key has 32 bits.
LARGEST_SEED = (1 << 32) - 1
_LARGEST = (1 << 31) - 1
# The range of float32 without subnormal numbers, which some devices read as 0, and the largest numbers below 1.
_SMALLEST_FLOAT, _LARGEST_FLOAT, _LARGEST_FRACTION = 1.2e-38, 3.4e38, 0.9999999

# Dotted key -> value.
_Values = Mapping[str, Any]
# (key, what would work): raises the ConfigError.
_Refuse = Callable[[str, str], NoReturn]


def from_json(text: str, where: str) -> ConfigDict:
    """Return the config in a text that `to_json` wrote, in this version or in another one. The rules are checked.

    A key that the text lacks gets its default, and a line on stderr says so. The default of a new key computes what was
    computed before the key existed.

    Args:
        text: JSON.
        where: the name of the file in messages.

    Raises:
        ConfigError: the text is not a config, contains an unknown key, or breaks a rule.
    """
    config, missing = parse_json(text, where)
    check(config, where)
    if missing:
        defaults = ", ".join(f"{key} ({value!r})" for key, value in missing.items())
        say(f"{where} lacks keys of this version of charlm, so their defaults are used: {short(defaults, 500)}")
    return config


def parse_json(text: str, where: str) -> tuple[ConfigDict, dict[str, Any]]:
    """Return (config, {missing key: its default}) for a text that `to_json` wrote. The rules are not checked.

    Raises:
        ConfigError: the text is not a config, or contains an unknown key.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is not a config: it must contain a JSON object")
    try:
        config, found = default_config(), dict(flatten(values))
    except RecursionError:
        raise ConfigError(f"{where} is not a config: its objects are nested too deep") from None
    known = dict(flatten(config))
    for key in found:
        if key not in known:
            raise ConfigError(f"{where}: {unknown_key_message(key)}; or a newer version of charlm wrote it")
    if not found:
        raise ConfigError(f"{where} is not a config: it contains no key")
    for key, value in found.items():
        set_key(config, key, value, where)
    return config, {key: value for key, value in known.items() if key not in found}


def check_keys(config: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError unless a config has exactly the keys of the default config."""
    try:
        known, found = dict(flatten(default_config())), dict(flatten(config))
    except RecursionError:
        raise ConfigError(f"{where}: the config contains itself, or its groups are nested too deep") from None
    for key in found:
        if key not in known:
            raise ConfigError(f"{where}: {unknown_key_message(key)}")
    for key in known:
        if key not in found:
            raise ConfigError(f"{where}: the key {key} is missing; start from default_config(), which contains all keys")


def set_key(config: ConfigDict, key: str, value: Any, where: str) -> None:
    """Assign a value to a dotted key. A list becomes a tuple.

    Raises:
        ConfigError: the value has the wrong type.
    """
    *groups, name = key.split(".")
    group = config
    for part in groups:
        group = group[part]
    if isinstance(value, list):
        value = tuple(value)
    try:
        group[name] = value
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {key} has the wrong type: {_one_line(error)}") from None


def resolve(config: ConfigDict) -> None:
    """Set the keys that other keys determine: with `train.deterministic` the recurrence is scan (and `resolve_documents`)."""
    if config.train.deterministic:
        config.model.recurrence = "scan"
    resolve_documents(config)


def unknown_key_message(key: str) -> str:
    """Return the error message for an unknown key, with the most similar key as a hint."""
    keys = [known for known, _ in flatten(default_config())]
    groups = [group for group in default_config() if group != "seed"]
    if key in groups:
        return f"{key} is a group of keys, not a key; its keys: {', '.join(k for k in keys if k.startswith(key + '.'))}"
    # The key may be in the wrong group or in none. Otherwise it may be misspelled.
    near = [k for k in keys if k.split(".")[-1] == key.split(".")[-1]] or difflib.get_close_matches(key, keys, 1, 0.6)
    hint = f"did you mean {near[0]}?" if near else f"the groups are {', '.join(groups)}"
    return f"unknown config key {short(key)}; {hint}"


def check(config: ConfigDict, where: str) -> None:
    """Check all rules that concern only the config itself. This reads no file.

    Args:
        config: a config with all keys (`check_keys`).
        where: the file or the command that the config comes from, for messages.

    Raises:
        ConfigError: a value breaks a rule.
    """
    values = dict(flatten(config))

    def refuse(key: str, rule: str) -> NoReturn:
        raise ConfigError(f"{where}: {key} is {short(repr(values[key]))}; {rule}")

    default = default_config()
    for key, known in flatten(default):
        if known is not None and values[key] is None:
            raise ConfigError(f"{where}: {key} is not set; its default is {known!r}")
        kind = _type_of(default, key)
        if values[key] is not None and type(values[key]) is not (list if kind is tuple else kind):
            refuse(key, f"it must be of type {kind.__name__}")
        if isinstance(values[key], float) and values[key] and not _SMALLEST_FLOAT <= abs(values[key]) <= _LARGEST_FLOAT:
            refuse(key, f"it must be 0, or between {_SMALLEST_FLOAT} and {_LARGEST_FLOAT}, the range of float32")
    _check_choices(values, refuse)
    _check_cell(values, where, refuse)
    _check_ranges(values, refuse)
    _check_data(values, refuse)
    check_documents(values, refuse)
    _check_combinations(values, refuse)


def _check_choices(values: _Values, refuse: _Refuse) -> None:
    """Check the keys with a fixed set of values."""
    for key, choices in {
        "data.vocab": KINDS,
        "batching.layout": LAYOUTS,
        "batching.loss_on": LOSSES_ON,
        "model.encoding": ENCODINGS,
        "model.recurrent_init": RECURRENT_INITS,
        "model.recurrence": RECURRENCES,
        "model.dtype": DTYPES,
        "optimizer.name": tuple(OPTIMIZERS),
        "optimizer.schedule": tuple(SCHEDULES),
        "optimizer.loss_reduction": LOSS_REDUCTIONS,
        "train.best_by": ("val", "train"),
        "sample.dtype": (None, *DTYPES),
    }.items():
        if values[key] not in choices:
            choices = [choice for choice in choices if choice is not None]
            near = difflib.get_close_matches(str(values[key]), choices, 1, 0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            refuse(key, f"{hint}it must be one of {', '.join(choices)}")
    for key, names in {"train.metrics": (*TARGET_METRICS, *GRADIENT_METRICS), "eval.metrics": tuple(TARGET_METRICS)}.items():
        if any(name not in names for name in values[key]) or len(set(values[key])) < len(values[key]):
            refuse(key, f"it must be a tuple of different names from {', '.join(names)}, such as ({names[0]!r},)")


def _check_cell(values: _Values, where: str, refuse: _Refuse) -> None:
    """Check the cell, and that the keys that belong to some cells have a meaning for it."""
    name = values["model.cell"]
    try:
        cell = find_cell(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: model.cell is {short(repr(name))}; {error}") from None
    for key, gives_meaning, allowed in (
        ("recurrent_dropout", cell.matrices, (0,)),
        ("recurrent_init", cell.matrices, (RECURRENT_INITS[0],)),
        ("forget_bias", cell.open_gates, (0, 1)),
    ):
        if not gives_meaning and values[f"model.{key}"] not in allowed:
            refuse(f"model.{key}", f"it has no meaning for the cell {name}, so it must be {' or '.join(map(str, allowed))}")


def _check_ranges(values: _Values, refuse: _Refuse) -> None:
    """Check the ranges of numbers."""
    for key in (
        "batching.batch_size batching.seq_len model.hidden_size model.num_layers model.embedding_size "
        "train.steps train.steps_per_dispatch train.patience eval.num_streams eval.batch_size eval.max_chars "
        "eval.dynamic_segment optimizer.schedule_steps optimizer.decay_every optimizer.accumulation_steps "
        "optimizer.newton_schulz_steps sample.length sample.num_samples sample.top_k sample.random_prompt data.max_symbols"
    ).split():
        if values[key] is not None and not 1 <= values[key] <= _LARGEST:
            refuse(key, f"it must be at least 1 and at most {_LARGEST}")
    for key in (
        "optimizer.learning_rate optimizer.clip_value optimizer.clip_norm optimizer.eps train.epochs train.seconds "
        "sample.temperature model.init_std eval.dynamic_rate"
    ).split():
        if values[key] is not None and not 0 < values[key]:
            refuse(key, f"it must be greater than 0: between {_SMALLEST_FLOAT} and {_LARGEST_FLOAT}")
    for key in (
        "train.log_every train.eval_every train.checkpoint_every train.sample_every eval.context "
        "mesh.data optimizer.warmup_steps optimizer.weight_decay optimizer.final_learning_rate data.device_bytes "
        "optimizer.skip_not_finite sample.window eval.dynamic_decay optimizer.activation_reg optimizer.temporal_reg"
    ).split():
        if values[key] is not None and not 0 <= values[key] <= _LARGEST:
            refuse(key, f"it must not be negative, and at most {_LARGEST}")
    for key in (
        "model.dropout model.recurrent_dropout optimizer.momentum optimizer.muon_momentum optimizer.mean_square_decay "
        "optimizer.b1 optimizer.b2 train.ema_decay"
    ).split():
        if not 0 <= values[key] <= _LARGEST_FRACTION:
            refuse(key, f"it must be at least 0 and below 1: at most {_LARGEST_FRACTION}")
    if not 0 < values["optimizer.decay_factor"] <= _LARGEST_FRACTION:
        refuse("optimizer.decay_factor", f"it must be greater than 0 and below 1: at most {_LARGEST_FRACTION}")
    if not 0 <= values["batching.reset_prob"] <= 1:
        refuse("batching.reset_prob", "it must lie between 0 and 1")
    if not 0 <= values["seed"] <= LARGEST_SEED:
        refuse("seed", f"it must lie between 0 and {LARGEST_SEED}")
    if values["sample.top_p"] is not None and not 0 < values["sample.top_p"] <= 1:
        refuse("sample.top_p", "it must be greater than 0 and at most 1")
    if values["train.steps_per_dispatch"] > MAX_STEPS_PER_DISPATCH:
        refuse("train.steps_per_dispatch", f"it must be at most {MAX_STEPS_PER_DISPATCH}")


def _check_data(values: _Values, refuse: _Refuse) -> None:
    """Check the group `data`."""
    if values["data.url"] is not None:
        if not re.fullmatch(r"https?://\S+", values["data.url"]):
            refuse("data.url", "it must begin with https:// or http://")
        if values["data.sha256"] is None:
            refuse("data.url", "it needs data.sha256, the sha256 of the file, so that runs can be repeated")
        if values["data.path"] is not None:
            refuse("data.url", f"data.path is {values['data.path']!r}; set only one of the two keys")
    elif values["data.sha256"] is not None:
        refuse("data.sha256", "it belongs to data.url, which is not set")
    if values["data.sha256"] is not None and not re.fullmatch("[0-9a-f]{64}", values["data.sha256"]):
        refuse("data.sha256", "it must be 64 hexadecimal digits, in lower case")
    if any("\ud800" <= c <= "\udfff" for c in values["data.separator"]):
        refuse("data.separator", "it must be UTF-8")
    if values["data.vocab"] == "bytes" and (values["data.unknown"] or values["data.max_symbols"] is not None):
        refuse("data.vocab", "it contains all 256 bytes, so data.unknown and data.max_symbols must keep their defaults")
    if values["data.vocab_from"] is not None and (values["data.unknown"] or values["data.max_symbols"] is not None):
        refuse("data.vocab_from", "it keeps a vocabulary as it is, so data.unknown and data.max_symbols must not be set")
    check_split(values, refuse)


def _check_combinations(values: _Values, refuse: _Refuse) -> None:
    """Check keys that depend on each other."""
    if values["model.tie_weights"]:
        if values["model.encoding"] != "embedding":
            refuse("model.tie_weights", f"it needs model.encoding embedding, not {values['model.encoding']}")
        if values["model.embedding_size"] != values["model.hidden_size"]:
            sizes = f"{values['model.embedding_size']} and {values['model.hidden_size']}"
            refuse("model.tie_weights", f"it needs model.embedding_size equal to model.hidden_size; they are {sizes}")
    if values["model.recurrence"] == "cudnn" and not cudnn.supports(values["model.cell"], values["model.dtype"]):
        found = f"{values['model.cell']} and {values['model.dtype']}"
        refuse("model.recurrence", f"it needs model.cell lstm and model.dtype float32, not {found}; auto chooses what works")
    if values["train.deterministic"] and values["model.recurrence"] == "cudnn":
        refuse("model.recurrence", "with train.deterministic it must be scan or auto")
    for name, what in SCHEDULES[values["optimizer.schedule"]].needs.items():
        if values[f"optimizer.{name}"] is None:
            refuse("optimizer.schedule", f"it needs optimizer.{name}, {what}")
    if values["optimizer.name"] == "schedule_free_adamw":
        if not values["optimizer.b1"]:
            refuse("optimizer.b1", "it must be greater than 0 for schedule_free_adamw")
        if values["train.ema_decay"]:
            refuse("train.ema_decay", "it must be 0 with schedule_free_adamw, which averages the parameters itself")
    if values["batching.batch_size"] % values["optimizer.accumulation_steps"]:
        refuse("optimizer.accumulation_steps", f"it must divide batching.batch_size {values['batching.batch_size']}")
    if values["batching.loss_on"] == "last" and values["batching.layout"] == "stream":
        refuse("batching.loss_on", "it needs windows that start from a zero state: batching.layout sliding, random or windows")
    if values["optimizer.final_learning_rate"] > values["optimizer.learning_rate"]:
        refuse("optimizer.final_learning_rate", "it must not be above optimizer.learning_rate")


def differing_keys(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Return the dotted keys in which two configs differ, without those that may change between starts (RESUMABLE_KEYS)."""
    olds, news = dict(flatten(old)), dict(flatten(new))
    return [key for key in news if key not in RESUMABLE_KEYS and olds[key] != news[key]]


def check_extension(old: ConfigDict, new: ConfigDict, where: str) -> None:
    """Check that `--extend` may continue a run with config `old` under config `new`.

    Raises:
        ConfigError: the configs differ in more than the length, or the learning-rate schedule depends on the length.
    """
    keys = differing_keys(old, new)
    other = [key for key in keys if key not in LENGTH_KEYS]
    if other:
        raise ConfigError(
            f"{where} holds a run of another config: {describe_differences(old, new, other)}; --extend may change only "
            f"{', '.join(LENGTH_KEYS)}, so choose another --workdir"
        )
    if set(keys) - {"train.seconds"} and schedule_spans_run(new.optimizer):
        raise ConfigError(
            f"{where}: the run cannot be extended, because optimizer.schedule {new.optimizer.schedule} depends on its length; "
            "a run that starts with optimizer.schedule_steps can be extended"
        )


def describe_differences(old: ConfigDict, new: ConfigDict, keys: list[str]) -> str:
    """Return `key (value there, value now)` for each of the keys, separated by commas."""
    olds, news = dict(flatten(old)), dict(flatten(new))
    return ", ".join(f"{key} ({olds[key]!r} there, {news[key]!r} now)" for key in keys)


def _type_of(config: ConfigDict, key: str) -> type:
    """Return the type of a key, also if it has no value."""
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    return config.get_type(name)


def _one_line(error: Exception) -> str:
    """Return the message of an error on one line."""
    return short(" ".join(str(error).split()), 500)
