"""What the runs of this experiment share, and the width with which each cell has about as many parameters as the LSTM."""

import jax

from charlm.config import default_config
from charlm.nn.model import CharLM, num_params

# The widths were computed for this number of symbols. The built-in corpus has 76, so the head of a wide layer is smaller than
# assumed, and a cell with a wide layer has up to 6 % fewer parameters than the LSTM.
_VOCAB_SIZE = 84


def get_config():
    """Return the config that all runs share."""
    config = default_config()
    config.batching.batch_size = 32
    config.batching.seq_len = 64
    config.model.hidden_size = 128
    config.model.embedding_size = 32
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.clip_norm = 1.0
    config.train.steps = 500
    config.train.log_every = 50
    config.train.eval_every = 100
    config.train.checkpoint_every = 500
    config.train.sample_every = 0
    return config


def parameters(cell: str, width: int) -> int:
    """Return the number of parameters of a model with this cell and this width."""
    model = get_config().model
    model.cell, model.hidden_size = cell, width
    # With a scan, and with a key made while tracing, JAX starts no device: a sweep wants to choose the devices itself.
    model.recurrence = "scan"
    initial_params = CharLM.from_config(model, _VOCAB_SIZE).initial_params
    return num_params(jax.eval_shape(lambda: initial_params(jax.random.key(0))))


def width(cell: str, lstm_units: int = 128) -> int:
    """Return the width with which a cell has about as many parameters as an LSTM with `lstm_units` units."""
    goal = parameters("lstm", lstm_units)
    low, high = 1, 4096
    while low < high:  # The smallest width that reaches the goal.
        middle = (low + high) // 2
        low, high = (low, middle) if parameters(cell, middle) >= goal else (middle + 1, high)
    return min((low - 1, low), key=lambda each: abs(parameters(cell, each) - goal))
