"""keras_lstm_256.py as a practitioner would build it: embedded characters, a loss on every step, and a carried state.

    python -m charlm.train --config configs/keras_lstm_256_all.py

Text, cell, dropout, optimizer and batch shape are those of keras_lstm_256.py. That config reads 100 characters for each
target. This config has a target for each character that it reads, so it needs a hundredth of the steps for the same
number of targets. It runs for 7,841 steps, which read as many characters as one epoch of keras_lstm_256.py.

Expect: 1.507 nats per character on held-out text after a quarter of the steps, which takes about 9 minutes on 2 cores of an
Intel Xeon with AVX-512, 2026-11-22 (experiments/recipes). The full length is not on record.
"""

from charlm.config import default_config


def get_config():
    config = default_config()
    config.data.corpus = "tinyshakespeare"
    config.data.lowercase = True
    config.batching.layout = "stream"
    config.batching.batch_size = 128
    config.batching.seq_len = 100
    config.model.cell = "lstm"
    config.model.hidden_size = 256
    config.model.encoding = "embedding"
    config.model.dropout = 0.3
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.001
    config.train.steps = 7841
    config.train.log_every = 100
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.train.sample_every = 1000
    config.sample.length = 400
    return config
