"""Two LSTM layers of 128 units on Shakespeare (after a notebook that follows the char-RNN of Flux.jl).

    python -m charlm.train --config configs/flux_lstm_128x2.py

The model reads one-hot characters and has two LSTM layers of 128 units and a dense layer. It trains on 50 parallel
streams, in windows of 50 characters. The state is carried from window to window; the gradient stops at the start of a
window. Adam has a learning rate of 0.01. The loss is summed over the window and averaged over the streams. Training takes
one pass over the text.

Departures from the source:

- The text is the 38 plays of this project, 90 % of each play. It has no stop symbol, because no stream needs padding.
- The temperature has an effect on samples. The source ignores it.

The source prints 1.834 nats per character as its lowest legible loss, on one fixed window of its training text.

Expect: 1.726 nats per character on a fixed training window, and 1.548 on held-out text. Training takes about 76 seconds
on 2 cores of an Intel Xeon with AVX-512, 2026-11-22 (experiments/recipes).
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
