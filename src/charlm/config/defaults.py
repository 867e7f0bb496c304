"""The default config, documented key by key. What each key may be is in `charlm.rules`.

A config file starts from `default_config()` and assigns what differs:

    from charlm.config import default_config

    def get_config():
        config = default_config()
        config.model.hidden_size = 512
        return config
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import config_dict

# Keys that say when the host looks, where the text lies and which devices share the work, not what is computed: they may
# change between starts of a run.
RESUMABLE_KEYS = (
    "data.device_bytes",
    "mesh.data",
    "mesh.shard_params",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.sample_every",
    "train.steps_per_dispatch",
    "train.metrics",
    "eval.metrics",
    "train.wandb_project",
    "train.tensorboard_hparams",
)
# Keys that say how long a run is: `--extend` may raise them.
LENGTH_KEYS = ("train.steps", "train.epochs", "train.seconds")


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
    # Training metrics to record besides the loss and the gradient's norm: accuracy, grad_norm_by_layer (training/metrics.py).
    train.metrics = ()
    # Besides metrics.jsonl and the scalars of TensorBoard:
    train.wandb_project = unset(str)  # record in this project of Weights & Biases (extra wandb; WANDB_MODE=offline: here alone)
    train.tensorboard_hparams = False  # every key and the outcome, for TensorBoard's HParams page

    config.eval = evaluation = config_dict.ConfigDict()
    evaluation.num_streams = 64  # the text is scored in so many streams
    evaluation.context = 64  # characters that each stream reads before the first that it scores
    evaluation.batch_size = 64  # streams on the device at a time; changes no result
    evaluation.max_chars = 10_000  # loss_on last: so many symbols are scored, evenly spaced, each after seq_len others
    evaluation.metrics = ()  # metrics of a scored text besides the loss: accuracy
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
