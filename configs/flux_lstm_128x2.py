"""Two LSTM layers of 128 units on Shakespeare (a notebook after Flux.jl's char-RNN).

    python -m charlm.train --config configs/flux_lstm_128x2.py

One-hot characters, two LSTM layers of 128 units, a dense layer. 50 parallel streams, windows of 50 characters, the
state carried along and the gradient cut at the window; Adam with a rate of 0.01 on the loss summed over the window, mean
over the streams; one pass over the text.

Departures: the text is this project's 38 plays, 90 % of each, and has no stop symbol, as no stream needs padding; the
sampler's temperature does something.

The source prints 1.834 nats per character as its lowest legible loss, on one fixed window of its training text. See
experiments/recipes for ours, on a fixed training window and on held-out text.
"""

from charlm.config import default_config


def get_config():
    config = default_config()
    config.data.corpus = "shakespeare"
    config.batching.layout = "stream"
    config.batching.batch_size = 50
    config.batching.seq_len = 50
    config.batching.reset_prob = 0.0
    config.model.cell = "lstm"
    config.model.hidden_size = 128
    config.model.num_layers = 2
    config.model.encoding = "one_hot"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.01
    config.optimizer.loss_reduction = "sum_over_time"
    config.train.epochs = 1.0
    config.train.log_every = 30
    config.train.eval_every = 300
    config.train.checkpoint_every = 300
    config.train.sample_every = 300
    return config
