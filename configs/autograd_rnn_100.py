"""A tanh RNN by hand: 100 units, one window at a time, plain SGD (a notebook on HIPS autograd's char-RNN).

    python -m charlm.train --config configs/autograd_rnn_100.py

One-hot characters into a tanh RNN of 100 units, weights 0.01 times a normal draw, biases zero. One epoch over windows of
50 characters in the order of the text, each from a zero state; SGD with a rate of 0.01 on the loss summed over the
window; every element of the gradient clipped to [-5, 5].

Departures: the output reads the hidden state of its own step, as the source's equation has it, not that of the step
before, as its code does. The last tenth of the text is held out, so that the epoch has 20,077 windows for the source's
22,307.

The source prints 2.706 nats per character on window 700 and diverges later. So does this: see experiments/recipes, and
autograd_rnn_100_stable.py for the change that stops it.
"""

from charlm.config import default_config


def get_config():
    config = default_config()
    config.data.corpus = "tinyshakespeare"
    config.batching.layout = "windows"
    config.batching.shuffle = False
    config.batching.batch_size = 1
    config.batching.seq_len = 50
    config.model.cell = "rnn"
    config.model.hidden_size = 100
    config.model.encoding = "one_hot"
    config.model.init_std = 0.01
    config.model.forget_bias = 0.0
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.01
    config.optimizer.loss_reduction = "sum_over_time"
    config.optimizer.clip_value = 5.0
    config.train.epochs = 1.0
    config.train.log_every = 100
    config.train.eval_every = 2000
    config.train.checkpoint_every = 2000
    config.train.sample_every = 2000
    config.sample.prompt = "a"
    config.sample.length = 100
    return config
