"""An LSTM of 100 units, trained with plain SGD on one window at a time (after a notebook that uses HIPS autograd).

    python -m charlm.train --config configs/autograd_lstm_100.py

Everything except the cell is as in autograd_rnn_100.py.

Departure from the source: the cell of the source does not run as printed, because variables are misnamed and the
candidate has no bias. This config follows the equations of the LSTM, with a bias for each gate. All biases start at zero.

The source prints 2.884 nats per character on window 700.

Expect: 2.882 nats per character on window 700, and a held-out loss of 1.866 at the end (means of three seeds). Training
takes about 35 seconds on 2 cores of an Intel Xeon with AVX-512, 2026-11-22 (experiments/recipes).
"""

from charlm.config import default_config


def get_config():
    config = default_config()
    config.data.corpus = "tinyshakespeare"
    config.batching.layout = "windows"
    config.batching.shuffle = False
    config.batching.batch_size = 1
    config.batching.seq_len = 50
    config.model.cell = "lstm"
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
