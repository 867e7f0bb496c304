"""A tanh RNN of 100 units, trained with plain SGD on one window at a time (after a notebook that uses HIPS autograd).

    python -m charlm.train --config configs/autograd_rnn_100.py

The input is a one-hot character. The weights start as 0.01 times a normal draw, and the biases start at zero. Training
takes one epoch over windows of 50 characters in the order of the text. Each window starts from a zero state. SGD has a
learning rate of 0.01, and the loss is summed over the window. Each element of the gradient is clipped to [-5, 5].

Departures from the source:

- The output reads the hidden state of its own step, as the equation of the source says. The code of the source reads the
  hidden state of the step before.
- The last tenth of the text is held out. The epoch therefore has 20,077 windows; that of the source has 22,307.

The source prints 2.706 nats per character on window 700, and diverges later.

Expect: 2.028 nats per character on window 700 (mean of three seeds). The run then diverges, as the source does. Its
held-out loss is 3.161 at the end and 2.422 at best. Training takes about 18 seconds on 2 cores of an Intel Xeon with
AVX-512, 2026-11-22 (experiments/recipes). autograd_rnn_100_stable.py prevents the divergence.
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
