"""A GRU by hand: 100 units, one window at a time, plain SGD (a notebook on HIPS autograd's char-RNN).

    python -m charlm.train --config configs/autograd_gru_100.py

As autograd_rnn_100.py, with a GRU. The source has the heading and nothing under it; this is what would stand there, by
the equations of Cho et al. 2014 in cuDNN's form.
"""

from charlm.config import default_config


def get_config():
    config = default_config()
    config.data.corpus = "tinyshakespeare"
    config.batching.layout = "windows"
    config.batching.shuffle = False
    config.batching.batch_size = 1
    config.batching.seq_len = 50
    config.model.cell = "gru"
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
