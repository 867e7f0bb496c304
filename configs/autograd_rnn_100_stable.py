"""autograd_rnn_100.py with one change that prevents its divergence: the norm of the gradient is clipped to 20.

    python -m charlm.train --config configs/autograd_rnn_100_stable.py

The gradient has 23,165 elements. If only each element is clipped to [-5, 5], the norm of the gradient can grow to
hundreds. At a learning rate of 0.01, with the loss summed over 50 characters, a step of SGD is then far too large. Clipping
the norm (Pascanu et al. 2013) keeps the direction of the gradient and limits its length.

Expect: 2.133 nats per character on window 700, and a held-out loss of 2.024 at the end (means of three seeds). Training
takes about 20 seconds on 2 cores of an Intel Xeon with AVX-512, 2026-11-22. experiments/recipes compares it with
autograd_rnn_100.py.
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
    config.optimizer.clip_norm = 20.0
    config.train.epochs = 1.0
    config.train.log_every = 100
    config.train.eval_every = 2000
    config.train.checkpoint_every = 2000
    config.train.sample_every = 2000
    config.sample.prompt = "a"
    config.sample.length = 100
    return config
