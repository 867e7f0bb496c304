"""keras_lstm_256.py as a practitioner would build it: embedded characters, a loss on every step, the state carried.

    python -m charlm.train --config configs/keras_lstm_256_all.py

The same text, cell, dropout, optimizer and batch shape. The original reads 100 characters for each target; this one has
a target for each character that it reads, so that it needs a hundredth of the steps to have had as many targets. It runs
for as many characters as one epoch of the original reads: 7,841 steps.
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
