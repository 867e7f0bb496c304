"""How much do two runs differ by their seed alone? An LSTM of 192 units, Adam, and sixteen seeds.

python -m charlm.sweep --sweep experiments/seeds/sweep.py --executor vmap
"""

from charlm.config import default_config
from charlm.sweep import product


def get_config():
    """Return the config that all runs share: the quickstart as it was when the experiment was made."""
    config = default_config()
    config.data.corpus = "shakespeare"
    config.batching.batch_size = 32
    config.batching.seq_len = 64
    config.model.cell = "lstm"
    config.model.hidden_size = 192
    config.model.embedding_size = 64
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.clip_norm = 1.0
    config.train.steps = 4000
    config.train.log_every = 100
    config.train.eval_every = 1000
    config.train.checkpoint_every = 1000
    config.train.sample_every = 1000
    config.sample.temperature = 0.8
    return config


def get_sweep():
    return get_config(), product({"seed": list(range(16))})
