"""Which learning rate suits which cell? Small models on the default corpus: three cells, five constant rates, three seeds."""

from charlm.config import default_config
from charlm.sweep import product


def get_sweep():
    config = default_config()
    config.model.hidden_size = 64
    config.model.embedding_size = 32
    config.batching.batch_size = 32
    config.batching.seq_len = 64
    config.optimizer.clip_norm = 1.0
    config.train.steps = 1000
    config.train.log_every = 100
    config.train.eval_every = 250
    config.train.checkpoint_every = 500
    config.train.sample_every = 1000
    cells, rates, seeds = ["rnn", "lstm", "gru"], [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], [0, 1, 2]
    return config, product({"model.cell": cells, "optimizer.learning_rate": rates, "seed": seeds})
