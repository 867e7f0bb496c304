"""Width or depth, and which cell? The question of Karpathy, Johnson and Fei-Fei (2015), table 1, at equal parameter counts."""

from charlm.config import default_config
from charlm.sweep import chain, product


def get_sweep():
    config = default_config()
    config.batching.batch_size = 32
    config.batching.seq_len = 64
    config.model.embedding_size = 32
    config.optimizer.learning_rate = 5e-3
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.clip_norm = 1.0
    config.train.steps = 1000
    config.train.log_every = 100
    config.train.eval_every = 250
    config.train.checkpoint_every = 500
    config.train.sample_every = 1000
    layers, lstm_widths = [1, 2, 3], [32, 64, 128, 256]
    # An LSTM layer has four kernels, a GRU layer three, an RNN layer one. With these widths, each RNN and each GRU has the same
    # number of parameters as the LSTM with the same number of layers, to within 3 %.
    widths = {"rnn": [2 * w for w in lstm_widths], "lstm": lstm_widths, "gru": [round(1.156 * w) for w in lstm_widths]}
    runs = [product({"model.cell": [c], "model.num_layers": layers, "model.hidden_size": widths[c]}) for c in widths]
    return config, chain(*runs)
