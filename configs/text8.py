"""text8, 100 million letters and spaces of Wikipedia: three LSTM layers of 1,536 units, for one day on one GPU.

    python -m charlm.train --config configs/text8.py
    python -m charlm.evaluate --workdir runs/text8 --split test

This config has not been run. The corpus (mattmahoney.net/dc/textdata.html, 31 MB) was never downloaded for its test either: the
tests use a stand-in of 200 kB. The text has 27 symbols: the letters a to z and the space. The first 90 million characters are
for training, the next 5 million for validation and the last 5 million for test, as is usual. The unit is bits per character.

Source: charlm's own. Model and training are those of enwik8.py, whose source is Merity et al. 2018 (arXiv:1803.08240).
The multiplicative LSTM (Krause et al. 2016) reaches 1.27 bits per character on the test text.

Expect: 1.27 to 1.32 bits per character, an estimate from this result. The run has 105,450 steps and 8e17 floating-point
operations. At 10 TFLOP/s, which is an assumption, they take 23 hours.
"""

from charlm.config import default_config

STEPS_PER_EPOCH = 3515


def get_config():
    config = default_config()
    config.data.corpus = "text8"
    config.data.vocab = "chars"
    config.batching.layout = "stream"
    config.batching.batch_size = 128
    config.batching.seq_len = 200
    config.batching.reset_prob = 0.01
    config.model.cell = "lstm"
    config.model.hidden_size = 1536
    config.model.num_layers = 3
    config.model.embedding_size = 400
    config.model.dropout = 0.1
    config.model.variational_dropout = True
    config.model.recurrent_dropout = 0.2
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.warmup_steps = 1000
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.clip_norm = 0.25
    config.train.epochs = 30.0
    config.train.log_every = 100
    config.train.eval_every = STEPS_PER_EPOCH
    config.train.checkpoint_every = STEPS_PER_EPOCH // 4
    config.train.sample_every = STEPS_PER_EPOCH
    config.eval.num_streams = 512
    config.eval.batch_size = 512
    config.eval.context = 500
    config.sample.temperature = 0.8
    return config
