"""The default config: every key, its default and its meaning. `charlm.config.rules` holds the allowed values.

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

from ml_collections import ConfigDict, config_dict

# Keys that may change between two starts of a run. They determine what the host records and when, where the text is stored and
# which devices share the work, but not what is computed.
RESUMABLE_KEYS = (
    "data.device_bytes",
    "mesh.auto",
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
# Keys that determine the length of a run. With `--extend` they may increase.
LENGTH_KEYS = ("train.steps", "train.epochs", "train.seconds")


def default_config() -> ConfigDict:
    """Return a locked config with every key and its default. A key that is `unset` has the value None and a fixed type."""
    unset = config_dict.placeholder
    config = config_dict.ConfigDict()
    # The seed of everything random: initial parameters, dropout, the choice and order of windows, resets, samples.
    config.seed = 0

    config.data = data = config_dict.ConfigDict()
    # The corpus, used if `path` and `url` are unset: shakespeare (38 plays), or one that is downloaded: tinyshakespeare, enwik8
    # or text8; or module:function, a corpus of your own.
    data.corpus = "shakespeare"
    # Your own UTF-8 text: a file, a directory, a pattern such as "books/**/*.txt", or an archive (zip, gzip, bzip2). "#" names
    # members of a zip archive, such as "books.zip#*.txt".
    data.path = unset(str)
    data.val_path = unset(str)  # The validation text, as for `path`. The text of `path` or `url` is then not split.
    data.test_path = unset(str)  # The test text, as for `path`. "#test.txt" is a member of the archive of `path` or `url`.
    # How the text is split into separate documents, which are shuffled in each epoch, with the state reset between them: lines
    # (one document a line), or the string between two documents. This needs layout stream. Empty: the text is not split.
    data.documents = ""
    data.separator = "\n"  # The text between two files. Files are read in the order of their paths.
    data.url = unset(str)  # The URL of a UTF-8 text or of an archive, which is downloaded once.
    data.sha256 = unset(str)  # The sha256 of the file at `url`, in hexadecimal digits.
    data.lowercase = False  # Whether to convert the text to lower case.
    data.vocab = "chars"  # The symbols: chars (the characters of the text) or bytes (the 256 bytes of UTF-8).
    # For chars: the number of most frequent characters to keep. An unknown symbol replaces the others. Unset: keep all.
    data.max_symbols = unset(int)
    # For chars: whether to add an unknown symbol for characters that occur only in prompts and scored texts. Without it these
    # characters are errors.
    data.unknown = False
    # Keep the vocabulary of the run in this folder. Other characters of the text are errors, or its unknown symbol.
    data.vocab_from = unset(str)
    # The training, validation and test text: fractions, or numbers of characters (of bytes if vocab is bytes). Unset: the split
    # of the corpus, such as (0.9, 0.05, 0.05) of each play for shakespeare, and (0.9, 0.1, 0) for other texts.
    data.split = unset(tuple)
    # An encoded text with more bytes stays on disk, and the host reads its windows ahead of their use. This changes no result.
    data.device_bytes = 256 << 20

    config.batching = batching = config_dict.ConfigDict()
    # Which windows a batch contains. stream: each row of the batch reads its own part of the text and carries its state from
    # window to window. The other layouts start each window from the initial state: windows (adjacent windows), random (windows
    # at random positions), sliding (a window at every position).
    batching.layout = "stream"
    batching.batch_size = 32  # The number of windows in a batch.
    batching.seq_len = 64  # The number of characters in a window. Backpropagation through time stops where the window starts.
    batching.loss_on = "all"  # Which characters of a window count in the loss: all or last (many-to-one).
    batching.reset_prob = 0.02  # For stream: the probability that a window starts from the initial state.
    batching.shuffle = True  # For windows and sliding: whether each epoch has a new random order, not the order of the text.

    # The effects on the loss were measured in experiments/ablation, where one key at a time was changed on tiny Shakespeare.
    config.model = model = config_dict.ConfigDict()
    # The cell: rnn, lstm, gru, ln_lstm, ln_gru, mlstm, mogrifier_lstm, slstm, cifg_lstm, mgu, indrnn, min_gru or min_lstm; or
    # module:name, a cell of your own. Layer normalisation (ln) lowers the loss and halves the speed.
    model.cell = "lstm"
    model.hidden_size = 256  # The number of units in a layer.
    model.num_layers = 1  # The number of recurrent layers.
    model.encoding = "embedding"  # The input for a symbol: embedding, one_hot, or scalar (its id / the number of symbols).
    model.embedding_size = 64  # The number of features of an embedding.
    model.dropout = 0.0  # The dropout rate after each layer. It helps if the text is read many times.
    # Whether dropout uses one mask for all steps of a window (Gal and Ghahramani 2016). It helps in the same cases as dropout.
    model.variational_dropout = False
    # The dropout rate of recurrent weights, with one mask for all steps of a window (Merity et al. 2018). It hardly helps.
    model.recurrent_dropout = 0.0
    # Whether to add the input of a layer to its output, except in the first layer (Prakash et al. 2016). It helps a little.
    model.residual = False
    # Whether to use the embedding as the kernel of the head (Press and Wolf 2017). This needs embedding_size = hidden_size. It
    # raised the loss.
    model.tie_weights = False
    model.learn_initial_state = False  # Whether to learn the initial state of a text, instead of zero. It made no difference.
    # The initial recurrent kernel of each gate: orthogonal (Saxe et al. 2014) or lecun_normal. It made no difference.
    model.recurrent_init = "orthogonal"
    model.init_std = unset(float)  # The standard deviation of all initial kernels and embeddings. Unset: each has its own.
    # The initial bias of the gates that a cell wants open, such as the forget gate of the LSTM. 1 opens the gate (Jozefowicz et
    # al. 2015). In short runs 0 was better.
    model.forget_bias = 1.0
    # The implementation of the loop over time: scan, cudnn (NVIDIA's LSTM in float32), or auto (cudnn where it is available).
    # The results are equal up to rounding.
    model.recurrence = "auto"
    model.dtype = "float32"  # The dtype of the operands of products: float32, or bfloat16 for GPU and TPU.

    config.optimizer = optimizer = config_dict.ConfigDict()
    optimizer.name = "adam"  # sgd, rmsprop, adam, adamw, lion, muon or schedule_free_adamw.
    optimizer.learning_rate = 2e-3  # The highest learning rate of the schedule.
    optimizer.schedule = "constant"  # constant, warmup_cosine or step_decay.
    optimizer.warmup_steps = 0  # For warmup_cosine: the number of steps of the linear rise.
    optimizer.schedule_steps = unset(int)  # For warmup_cosine: the length of the schedule in steps. Unset: that of the run.
    optimizer.decay_every = unset(int)  # For step_decay: the number of steps between two decays of the rate.
    optimizer.decay_factor = 0.5  # For step_decay: the factor of each decay.
    optimizer.final_learning_rate = 0.0  # For warmup_cosine: the rate at the end. For step_decay: the lowest rate.
    optimizer.momentum = 0.0  # For sgd and rmsprop: the momentum.
    optimizer.mean_square_decay = 0.9  # For rmsprop: the decay of the mean square of the gradient.
    # For adam, adamw and muon: the decay of the mean of the gradient. For lion: its weight. For schedule_free_adamw: the weight
    # of the averaged parameters where the gradient is computed.
    optimizer.b1 = 0.9
    # For adam, adamw, muon and schedule_free_adamw: the decay of the mean square of the gradient. For lion: that of the mean.
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8  # The constant in the denominator, except for sgd and lion.
    optimizer.weight_decay = 0.0  # For adamw, lion, muon and schedule_free_adamw: the weight decay.
    optimizer.muon_momentum = 0.95  # For muon: the decay of the mean of the gradient of a kernel.
    optimizer.newton_schulz_steps = 5  # For muon: the number of iterations that orthogonalise the update of a kernel.
    optimizer.clip_value = unset(float)  # Clip each element of the gradient to [-x, x].
    optimizer.clip_norm = unset(float)  # Scale the gradient down if its global norm exceeds x.
    # Skip updates whose gradient is not finite, up to this many in a row. 0: such a gradient ends the run.
    optimizer.skip_not_finite = 0
    optimizer.loss_reduction = "mean"  # The reduction over a window: mean or sum_over_time. Over the batch it is the mean.
    # The factor of a penalty on the mean square of the last layer's outputs (Merity et al. 2018). 2 lowered the loss.
    optimizer.activation_reg = 0.0
    # The factor of a penalty on the mean square of the change of these outputs from step to step (Merity et al. 2018). It helps
    # in the same cases as dropout.
    optimizer.temporal_reg = 0.0
    # Compute the gradient of a batch in this many parts, one after another, and average it. This needs less memory. The step is
    # the same up to rounding.
    optimizer.accumulation_steps = 1

    config.train = train = config_dict.ConfigDict()
    train.epochs = 1.0  # The length of the run: how often it reads the training text.
    train.steps = unset(int)  # The length of the run in steps. If it is set, `epochs` is ignored.
    train.seconds = unset(float)  # Stop after this training time. Compilation, evaluation and saving do not count.
    # Start from the best parameters of the run in this folder, and not from random ones. Symbols are matched by value. The
    # vocabulary is that of the other run together with that of the text; new symbols get random rows.
    train.init_from = unset(str)
    # The intervals are in steps. 0 leaves only the other occasions of the key. No interval changes a bit of the parameters.
    train.log_every = 50  # Record training metrics this often, and at the end.
    train.eval_every = 500  # Evaluate this often, and at the end.
    train.checkpoint_every = 500  # Save this often, after each evaluation that is the best so far, and at the end.
    train.sample_every = 500  # Draw samples this often, and at the end. 0: never.
    train.steps_per_dispatch = 64  # The most steps in one dispatch to the device. Slow steps get smaller dispatches.
    # Evaluate and sample with a moving average of the parameters with this decay, for example 0.99 (Polyak and Juditsky 1992).
    # It can replace a falling learning rate. 0: no average.
    train.ema_decay = 0.0
    train.best_by = "val"  # The loss that selects the best checkpoint: val, or train (the mean since the last evaluation).
    # Whether every run on a GPU computes the same bits. XLA then uses only deterministic operations, and model.recurrence is
    # scan, so training is slower. On a CPU the bits are always the same.
    train.deterministic = False
    train.patience = unset(int)  # Stop after this many evaluations without a new best.
    train.metrics = ()  # Further training metrics: accuracy, grad_norm_by_layer (training/metrics.py).
    # Trackers in addition to metrics.jsonl and TensorBoard's scalars:
    train.wandb_project = unset(str)  # The project of Weights & Biases (extra `wandb`). WANDB_MODE=offline records locally.
    train.tensorboard_hparams = False  # Whether to record all keys and the outcome for TensorBoard's HParams page.

    config.eval = evaluation = config_dict.ConfigDict()
    evaluation.num_streams = 64  # The number of streams into which a scored text is split.
    evaluation.context = 64  # The number of characters that each stream reads before the first one that it scores.
    evaluation.batch_size = 64  # The number of streams on the device at a time. It changes no result.
    # For loss_on last: the number of symbols that are scored. They are evenly spaced. Each is predicted from seq_len symbols.
    evaluation.max_chars = 10_000
    evaluation.metrics = ()  # Further metrics of a scored text: accuracy.
    # For evaluate --dynamic. The defaults were chosen on the validation text of tiny Shakespeare.
    evaluation.dynamic_segment = 20  # The number of symbols that are scored before the model learns from them.
    evaluation.dynamic_rate = 7e-4  # The learning rate.
    evaluation.dynamic_decay = 2e-3  # How strongly each update returns to the trained parameters.

    config.sample = sample = config_dict.ConfigDict()
    sample.prompt = unset(str)  # The text that the sample continues. Unset: a line break.
    sample.random_prompt = unset(int)  # If `prompt` is unset: use this many symbols from a random place in the training text.
    # Before each draw, read this many last symbols again from the initial state. 0: carry the state from symbol to symbol.
    sample.window = 0
    sample.length = 500  # The number of characters to draw, or of bytes if data.vocab is bytes.
    sample.num_samples = 1  # The number of samples.
    sample.temperature = 1.0  # The divisor of the logits. Values below 1 prefer probable symbols.
    sample.top_k = unset(int)  # Draw only from the k most probable symbols.
    sample.top_p = unset(float)  # Draw only from the most probable symbols that together reach probability p.
    sample.greedy = False  # Whether to always take the most probable symbol.
    sample.dtype = unset(str)  # The dtype of the weights: float32, or bfloat16 for GPU and TPU. Unset: model.dtype.

    config.mesh = mesh = config_dict.ConfigDict()
    # The number of devices that share each batch equally. 0: all devices. Unset: one device, or all devices of a job of several
    # processes. The results are those of one device up to rounding.
    mesh.data = unset(int)
    # Choose mesh.data when a run begins, if it is unset: on a CPU, the cores share each batch of a model of at most 256 units,
    # with at least 8 rows for each core. The run records the choice and keeps it. A job of several processes ignores this key.
    mesh.auto = False
    # Shard the parameters and the optimizer's state over these devices, and gather the parameters for each step. This is for
    # models whose training state does not fit on one device. The parameters and their gradient must still fit during a step.
    mesh.shard_params = False
    return config.lock()


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every key, in the order of the config. Tuples become lists."""
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def to_json(config: ConfigDict) -> str:
    """Return a config as indented JSON."""
    return json.dumps(config.to_dict(), indent=2) + "\n"
