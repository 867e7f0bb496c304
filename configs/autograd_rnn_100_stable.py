"""autograd_rnn_100.py with the one change that keeps it from diverging: the gradient's norm is clipped to 20.

    python -m charlm.train --config configs/autograd_rnn_100_stable.py

Clipping each element to [-5, 5] lets the norm of a gradient with 23,165 elements grow to hundreds; what SGD then does at
a rate of 0.01 on a sum over 50 characters is a leap. Clipping the norm (Pascanu et al. 2013) keeps its direction and
bounds its length. Both losses stand side by side in experiments/recipes.
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
