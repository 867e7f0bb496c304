"""The default config, documented key by key, and the checks that every config passes before anything runs.

A config file starts from `default_config()` and assigns what differs:

    from charlm.config import default_config

    def get_config():
        config = default_config()
        config.model.hidden_size = 512
        return config
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from charlm import cudnn
from charlm.batching import LAYOUTS, LOSSES_ON
from charlm.cells import CELLS
from charlm.errors import ConfigError
from charlm.model import DTYPES, ENCODINGS, RECURRENCES, RECURRENT_INITS
from charlm.optim import LOSS_REDUCTIONS, OPTIMIZERS, SCHEDULES, schedule_spans_run
from charlm.step import MAX_STEPS_PER_DISPATCH
from charlm.vocab import KINDS

# Keys that say when the host looks, where the text lies and which devices share the work, not what is computed: they may
# change between starts of a run.
CADENCE_KEYS = (
    "data.device_bytes",
    "mesh.data",
    "mesh.shard_params",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.sample_every",
    "train.steps_per_dispatch",
    "train.wandb_project",
    "train.tensorboard_hparams",
)
# Keys that say how long a run is: `--extend` may raise them.
LENGTH_KEYS = ("train.steps", "train.epochs", "train.seconds")

# A JAX key holds 32 bits of a seed.
LARGEST_SEED = (1 << 32) - 1
_LARGEST = (1 << 31) - 1


def default_config() -> config_dict.ConfigDict:
    """Every key with its default. A key marked `unset` has none; set it to use it."""
    unset = config_dict.placeholder
    config = config_dict.ConfigDict()
    # Everything random comes from it: parameters, dropout, shuffles, resets.
    config.seed = 0

    config.data = data = config_dict.ConfigDict()
    data.corpus = "shakespeare"  # shakespeare (38 plays), or tinyshakespeare (downloaded); without `path` and `url`
    data.path = unset(str)  # UTF-8 text: a file, a directory of files, or a pattern such as "books/**/*.txt"
    data.separator = "\n"  # stands between each file and the next; they are sorted by path
    data.url = unset(str)  # UTF-8 text to download, once
    data.sha256 = unset(str)  # what `url` must give
    data.lowercase = False  # lower-case the text
    data.vocab = "chars"  # chars: the text's characters; bytes: the 256 bytes of UTF-8
    data.max_symbols = unset(int)  # chars: only the most frequent, and one unknown symbol for the others
    data.unknown = False  # chars: an unknown symbol for those in prompts and texts scored later; without it, an error
    data.split = unset(tuple)  # fractions (train, val, test); unset: shakespeare .9 .05 .05 of each play, a file .9 .1 0
    data.device_bytes = 256 << 20  # a larger encoded text stays in the file, windows read ahead; changes no result

    config.batching = batching = config_dict.ConfigDict()
    # stream: parallel streams, state carried. From a zero state: windows: adjacent ones; random: at random places;
    # sliding: one from every character on.
    batching.layout = "stream"
    batching.batch_size = 32  # streams, or windows, in a step
    batching.seq_len = 64  # characters in a window: the gradient stops where it begins
    batching.loss_on = "all"  # all characters of a window; last: many-to-one, the last alone
    batching.reset_prob = 0.02  # stream: chance that a window starts from a zero state
    batching.shuffle = True  # windows, sliding: in a new order every epoch, or in that of the text

    config.model = model = config_dict.ConfigDict()
    # What each of the keys below is worth by itself was measured on tiny Shakespeare (experiments/ablation).
    model.cell = "lstm"  # rnn, lstm, gru; ln_lstm, ln_gru: layer-normalised (Ba et al. 2016), better a step, half as fast
    model.hidden_size = 256
    model.num_layers = 1
    model.encoding = "embedding"  # embedding; one_hot; scalar: the id, divided by the number of symbols
    model.embedding_size = 64
    model.dropout = 0.0  # between layers and before the head; helps where the text is read many times
    model.variational_dropout = False  # one dropout mask for all steps of a window (Gal and Ghahramani 2016); as dropout
    model.recurrent_dropout = 0.0  # of recurrent weights, the same for all steps of a window (Merity et al. 2018); as dropout
    model.residual = False  # add the input of each layer but the first to its output (Prakash et al. 2016); helps a little
    model.tie_weights = False  # the embedding is the head's kernel (Press and Wolf 2017): embedding_size = hidden_size; costs
    model.learn_initial_state = False  # learn the state that a text starts from; False: zero; no difference
    model.recurrent_init = "orthogonal"  # of each gate's recurrent kernel (Saxe et al. 2014); or lecun_normal; no difference
    model.init_std = unset(float)  # when set, all weights are normal with this standard deviation, recurrent ones too
    model.forget_bias = 1.0  # the LSTM's forget gate starts open (Jozefowicz et al. 2015); in short runs 0 is a little better
    # What computes the steps: scan, charlm's own loop; cudnn, NVIDIA's library, for lstm in float32 on such a GPU; auto: cudnn
    # where it can. They agree but for rounding.
    model.recurrence = "auto"
    model.dtype = "float32"  # of the operands of the products; bfloat16 is meant for GPU and TPU

    config.optimizer = optimizer = config_dict.ConfigDict()
    optimizer.name = "adam"  # sgd, rmsprop, adam, adamw
    optimizer.learning_rate = 2e-3  # the peak
    optimizer.schedule = "constant"  # constant, warmup_cosine, step_decay
    optimizer.warmup_steps = 0  # warmup_cosine: steps of linear rise
    optimizer.schedule_steps = unset(int)  # warmup_cosine: its length; unset: the run's
    optimizer.decay_every = unset(int)  # step_decay: after every so many steps ...
    optimizer.decay_factor = 0.5  # ... times this
    optimizer.final_learning_rate = 0.0  # warmup_cosine: where it ends; step_decay: it does not fall below
    optimizer.momentum = 0.0  # sgd, rmsprop
    optimizer.mean_square_decay = 0.9  # rmsprop
    optimizer.b1 = 0.9  # adam, adamw
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8  # adam, adamw, rmsprop
    optimizer.weight_decay = 0.0  # adamw
    optimizer.clip_value = unset(float)  # each element of the gradient to [-x, x]
    optimizer.clip_norm = unset(float)  # the gradient's global norm to at most x
    optimizer.skip_not_finite = 0  # leave out updates whose gradient is not finite, up to so many in a row; 0: the run ends
    optimizer.loss_reduction = "mean"  # over time; or sum_over_time: the sum over a window, mean over the batch
    # Penalties (Merity et al. 2018), times the mean square of the last layer's outputs (2 helps), and of their differences
    # in time (as dropout).
    optimizer.activation_reg = 0.0
    optimizer.temporal_reg = 0.0
    # So many parts of a batch, one after another, their gradients averaged: less memory for the same step (but for
    # rounding, and for dropout, which each part draws anew).
    optimizer.accumulation_steps = 1

    config.train = train = config_dict.ConfigDict()
    train.epochs = 1.0  # how often the text is read
    train.steps = unset(int)  # when set, it wins over `epochs`
    train.seconds = unset(float)  # stop after so many seconds of training; compiling, scoring and saving do not count
    # Cadences, in steps; 0: only where a key says so. They change no bit of the parameters.
    train.log_every = 50  # and at the end
    train.eval_every = 500  # and at the end
    train.checkpoint_every = 500  # and after every evaluation that is the best so far, and at the end
    train.sample_every = 500  # and at the end, unless 0
    train.steps_per_dispatch = 64  # the most steps between two looks of the host; fewer where they are slow
    # Score and sample with a moving average of the parameters (Polyak and Juditsky 1992), such as 0.99; 0: not. It takes
    # the place of a falling learning rate.
    train.ema_decay = 0.0
    train.best_by = "val"  # which loss says what the best checkpoint is: val; train: the mean since the last evaluation
    # The same bits every time on a GPU too, at the price of speed: XLA without what adds in the order of arrival, and scan as
    # model.recurrence. On a CPU they are the same anyway.
    train.deterministic = False
    train.patience = unset(int)  # stop after so many evaluations without a new best
    # Besides metrics.jsonl and the scalars of TensorBoard:
    train.wandb_project = unset(str)  # record in this project of Weights & Biases (extra wandb; WANDB_MODE=offline: here alone)
    train.tensorboard_hparams = False  # every key and the outcome, for TensorBoard's HParams page

    config.eval = evaluation = config_dict.ConfigDict()
    evaluation.num_streams = 64  # the text is scored in so many streams
    evaluation.context = 64  # characters that each stream reads before the first that it scores
    evaluation.batch_size = 64  # streams on the device at a time; changes no result
    evaluation.max_chars = 10_000  # loss_on last: so many symbols are scored, evenly spaced, each after seq_len others
    # evaluate --dynamic (the values were chosen on validation text of tiny Shakespeare)
    evaluation.dynamic_segment = 20  # symbols that are scored and then learnt from
    evaluation.dynamic_rate = 7e-4  # of learning
    evaluation.dynamic_decay = 2e-3  # back to the trained parameters

    config.sample = sample = config_dict.ConfigDict()
    sample.prompt = unset(str)  # what the sample goes on from; unset: a line end
    sample.random_prompt = unset(int)  # without a prompt: so many symbols from a random place of the training text
    sample.window = 0  # read so many symbols anew, from a zero state, for each that is drawn; 0: carry the state
    sample.length = 500  # characters (bytes for the byte vocabulary)
    sample.num_samples = 1
    sample.temperature = 1.0
    sample.top_k = unset(int)  # draw among the k most probable symbols
    sample.top_p = unset(float)  # draw among the most probable symbols that together reach p
    sample.greedy = False  # take the most probable symbol
    sample.dtype = unset(str)  # of the weights while sampling; unset: model.dtype. bfloat16 is meant for GPU and TPU

    config.mesh = mesh = config_dict.ConfigDict()
    # Devices that share each batch equally; 0: all there are; unset: one, or all of a job of several processes. The results
    # are those of one device but for rounding, and for dropout, which each device draws for itself.
    mesh.data = unset(int)
    # Parameters and the optimizer's state in parts on these devices, put together where a step needs them: for models whose
    # training state does not fit one device. The parameters and their gradient have to, while a step is computed.
    mesh.shard_params = False
    return config.lock()


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) pairs, tuples as lists, in the config's order."""
    for key, value in config.items():
        if isinstance(value, (Mapping, config_dict.ConfigDict)):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def to_json(config: config_dict.ConfigDict) -> str:
    """The resolved config as indented JSON."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str, where: str) -> config_dict.ConfigDict:
    """The inverse of `to_json`, checked. `where` names the file in errors."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is not a config: it holds no JSON object")
    config = default_config()
    # Without cadences it says as well what was computed: the record of a version that had fewer of them stays readable.
    check_keys(values, where, may_lack=CADENCE_KEYS)
    for key, value in flatten(values):
        set_key(config, key, value, where)
    check(config, where)
    return config


def check_keys(config: Mapping[str, Any], where: str, may_lack: Sequence[str] = ()) -> None:
    """Raises ConfigError unless a config has just the keys of the default one; some of them it may lack."""
    known, found = dict(flatten(default_config())), dict(flatten(config))
    for key in found:
        if key not in known:
            raise ConfigError(f"{where}: {unknown_key(key)}")
    for key in known:
        if key not in found and key not in may_lack:
            raise ConfigError(
                f"{where}: the key {key} is missing; default_config() of this version of charlm has it, so a run without "
                "it was made by another version"
            )


def set_key(config: config_dict.ConfigDict, key: str, value: Any, where: str) -> None:
    """Assign a dotted key, with the type checked. Lists become tuples."""
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


def settle(config: config_dict.ConfigDict) -> None:
    """Set what one key decides of another: `train.deterministic` takes charlm's own loop."""
    if config.train.deterministic:
        config.model.recurrence = "scan"


def unknown_key(key: str) -> str:
    """The message for a key that there is not, with the nearest that there is."""
    keys = [known for known, _ in flatten(default_config())]
    groups = [group for group in default_config() if group != "seed"]
    if key in groups:
        return f"{key} is a group of keys, not a key; its keys: {', '.join(k for k in keys if k.startswith(key + '.'))}"
    # A key put in the wrong group, or in none; else one misspelt.
    near = [k for k in keys if k.split(".")[-1] == key.split(".")[-1]] or difflib.get_close_matches(key, keys, 1, 0.6)
    hint = f"did you mean {near[0]}?" if near else f"the groups are {', '.join(groups)}"
    return f"unknown config key {_short(key)}; {hint}"


def check(config: config_dict.ConfigDict, where: str) -> None:
    """Every rule that a config must meet by itself, before any file is read.

    Raises:
        ConfigError: names the file or command (`where`), the key, what was found and what would work.
    """
    values = dict(flatten(config))

    def refuse(key: str, rule: str):
        raise ConfigError(f"{where}: {key} is {_short(repr(values[key]))}; {rule}")

    default = default_config()
    for key, known in flatten(default):
        if known is not None and values[key] is None:
            raise ConfigError(f"{where}: {key} is not set; its default is {known!r}")
        kind = _type_of(default, key)
        if values[key] is not None and type(values[key]) is not (list if kind is tuple else kind):
            refuse(key, f"it must be of type {kind.__name__}")
        if isinstance(values[key], float) and values[key] != values[key]:
            refuse(key, "it must be a number")
    for key, choices in {
        "data.vocab": KINDS,
        "batching.layout": LAYOUTS,
        "batching.loss_on": LOSSES_ON,
        "model.cell": tuple(CELLS),
        "model.encoding": ENCODINGS,
        "model.recurrent_init": RECURRENT_INITS,
        "model.recurrence": RECURRENCES,
        "model.dtype": DTYPES,
        "optimizer.name": OPTIMIZERS,
        "optimizer.schedule": SCHEDULES,
        "optimizer.loss_reduction": LOSS_REDUCTIONS,
        "train.best_by": ("val", "train"),
        "sample.dtype": (None, *DTYPES),
    }.items():
        if values[key] not in choices:
            choices = [choice for choice in choices if choice is not None]
            near = difflib.get_close_matches(str(values[key]), choices, 1, 0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            refuse(key, f"{hint}it must be one of {', '.join(choices)}")
    for key in (
        "batching.batch_size batching.seq_len model.hidden_size model.num_layers model.embedding_size "
        "train.steps train.steps_per_dispatch train.patience eval.num_streams eval.batch_size eval.max_chars "
        "eval.dynamic_segment optimizer.schedule_steps optimizer.decay_every optimizer.accumulation_steps "
        "sample.length sample.num_samples sample.top_k sample.random_prompt "
        "data.max_symbols"
    ).split():
        if values[key] is not None and not 1 <= values[key] <= _LARGEST:
            refuse(key, f"it must be at least 1 and at most {_LARGEST}")
    for key in (
        "optimizer.learning_rate optimizer.clip_value optimizer.clip_norm optimizer.eps train.epochs train.seconds "
        "sample.temperature model.init_std eval.dynamic_rate"
    ).split():
        if values[key] is not None and not 0 < values[key] < float("inf"):
            refuse(key, "it must be greater than 0")
    for key in (
        "train.log_every train.eval_every train.checkpoint_every train.sample_every eval.context "
        "mesh.data optimizer.warmup_steps optimizer.weight_decay optimizer.final_learning_rate data.device_bytes "
        "optimizer.skip_not_finite sample.window eval.dynamic_decay optimizer.activation_reg optimizer.temporal_reg"
    ).split():
        if values[key] is not None and not 0 <= values[key] <= _LARGEST:
            refuse(key, f"it must not be negative, and at most {_LARGEST}")
    for key in (
        "model.dropout model.recurrent_dropout optimizer.momentum optimizer.mean_square_decay optimizer.b1 optimizer.b2 "
        "train.ema_decay"
    ).split():
        if not 0 <= values[key] < 1:
            refuse(key, "it must be at least 0 and below 1")
    if values["model.tie_weights"]:
        if values["model.encoding"] != "embedding":
            refuse("model.tie_weights", f"it needs model.encoding embedding, not {values['model.encoding']}")
        if values["model.embedding_size"] != values["model.hidden_size"]:
            sizes = f"{values['model.embedding_size']} and {values['model.hidden_size']}"
            refuse("model.tie_weights", f"it needs model.embedding_size equal to model.hidden_size; they are {sizes}")
    if values["model.recurrence"] == "cudnn" and not cudnn.can_do(values["model.cell"], values["model.dtype"]):
        found = f"{values['model.cell']} and {values['model.dtype']}"
        refuse("model.recurrence", f"it needs model.cell lstm and model.dtype float32, not {found}; auto chooses what works")
    if values["train.deterministic"] and values["model.recurrence"] == "cudnn":
        refuse("model.recurrence", "train.deterministic needs scan, or auto, which then is scan")
    if not 0 < values["optimizer.decay_factor"] < 1:
        refuse("optimizer.decay_factor", "it must be greater than 0 and below 1")
    if values["optimizer.schedule"] == "step_decay" and values["optimizer.decay_every"] is None:
        refuse("optimizer.schedule", "it needs optimizer.decay_every, a number of steps")
    if values["batching.batch_size"] % values["optimizer.accumulation_steps"]:
        refuse("optimizer.accumulation_steps", f"it must divide batching.batch_size {values['batching.batch_size']}")
    if values["batching.loss_on"] == "last" and values["batching.layout"] == "stream":
        refuse("batching.loss_on", "it needs windows that start from a zero state: batching.layout sliding, random or windows")
    if values["data.url"] is not None:
        if not re.fullmatch(r"https?://\S+", values["data.url"]):
            refuse("data.url", "it must begin with https:// or http://")
        if values["data.sha256"] is None:
            refuse("data.url", "it needs data.sha256, that of the file, so that runs can be repeated")
        if values["data.path"] is not None:
            refuse("data.url", f"data.path is {values['data.path']!r}; set one of them")
    elif values["data.sha256"] is not None:
        refuse("data.sha256", "it is that of data.url, which is not set")
    if values["data.sha256"] is not None and not re.fullmatch("[0-9a-f]{64}", values["data.sha256"]):
        refuse("data.sha256", "it must be 64 hexadecimal digits, in lower case")
    if any("\ud800" <= c <= "\udfff" for c in values["data.separator"]):
        refuse("data.separator", "it must be UTF-8")
    if values["data.vocab"] == "bytes" and (values["data.unknown"] or values["data.max_symbols"] is not None):
        refuse("data.vocab", "it knows all 256 bytes, so data.unknown and data.max_symbols must be left as they are")
    if not 0 <= values["batching.reset_prob"] <= 1:
        refuse("batching.reset_prob", "it must lie between 0 and 1")
    if not 0 <= values["seed"] <= LARGEST_SEED:
        refuse("seed", f"it must lie between 0 and {LARGEST_SEED}")
    if values["optimizer.final_learning_rate"] > values["optimizer.learning_rate"]:
        refuse("optimizer.final_learning_rate", "it must not be above optimizer.learning_rate")
    if values["sample.top_p"] is not None and not 0 < values["sample.top_p"] <= 1:
        refuse("sample.top_p", "it must be greater than 0 and at most 1")
    if values["train.steps_per_dispatch"] > MAX_STEPS_PER_DISPATCH:
        refuse("train.steps_per_dispatch", f"it must be at most {MAX_STEPS_PER_DISPATCH}")
    split = values["data.split"]
    if split is not None:
        numbers = all(isinstance(part, (int, float)) and 0 <= part <= 1 for part in split)
        if len(split) != 3 or not numbers or abs(sum(split) - 1) > 1e-6 or not split[0]:
            refuse("data.split", "it must be three fractions (train, val, test) that sum to 1, train above 0")


def differing_keys(old: config_dict.ConfigDict, new: config_dict.ConfigDict) -> list[str]:
    """The dotted keys in which two configs differ, cadences left out."""
    olds, news = dict(flatten(old)), dict(flatten(new))
    return [key for key in news if key not in CADENCE_KEYS and olds[key] != news[key]]


def check_extension(old: config_dict.ConfigDict, new: config_dict.ConfigDict, where: str) -> None:
    """Whether `--extend` may go on with a run of config `old` under `new`: only the length may differ."""
    keys = differing_keys(old, new)
    other = [key for key in keys if key not in LENGTH_KEYS]
    if other:
        raise ConfigError(
            f"{where} holds a run of another config: {describe_differences(old, new, other)}; --extend changes only "
            f"{', '.join(LENGTH_KEYS)}: choose another --workdir"
        )
    if set(keys) - {"train.seconds"} and schedule_spans_run(new.optimizer):
        raise ConfigError(
            f"{where}: the schedule {new.optimizer.schedule} spans the run, so a longer run is another run; with "
            "optimizer.schedule_steps set from the start a run can be extended"
        )


def describe_differences(old: config_dict.ConfigDict, new: config_dict.ConfigDict, keys: list[str]) -> str:
    """`key (value there, value now)` for each of some keys."""
    olds, news = dict(flatten(old)), dict(flatten(new))
    return ", ".join(f"{key} ({olds[key]!r} there, {news[key]!r} now)" for key in keys)


def _type_of(config: config_dict.ConfigDict, key: str) -> type:
    """The type of a key, of those without a value too."""
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    return config.get_type(name)


def _one_line(error: Exception) -> str:
    return _short(" ".join(str(error).split()), 500)


def _short(text: str, most: int = 200) -> str:
    """Some text as it can stand in a message of one line."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= most else f"{text[:most]}..."
