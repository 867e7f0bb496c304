"""enwik8, the first 100 million bytes of Wikipedia: three LSTM layers of 1,536 units over bytes, for one day on one GPU.

    python -m charlm.train --config configs/enwik8.py
    python -m charlm.evaluate --workdir runs/enwik8 --split test

This config has not been run. The corpus (mattmahoney.net/dc/textdata.html, 36 MB) was never downloaded for its test either: the
tests use a stand-in of 200 kB. The first 90 million bytes are for training, the next 5 million for validation and the last 5
million for test, as is usual. The unit is bits per byte, which publications also call bits per character.

Source: the AWD-LSTM of Merity et al. 2018 (arXiv:1803.08240). It reports 1.232 bits per byte on the test text, with three
layers and 47 million parameters, after two days on one GPU.

Departures from the source:

- All layers have the same size, which gives 50 million parameters. In the source the last layer is smaller, and its output is
  tied to the embedding.
- The learning rate falls along a cosine. In the source it falls in two steps.
- All windows have 200 bytes. In the source their length is random.
- One rate of dropout serves all layers. In the source the rates differ.
- The run reads the text 30 times, not 50 times, to fit into one day.

Other recurrent networks reach 1.24 (multiplicative LSTM, Krause et al. 2016) and 1.122 (Mogrifier LSTM, Melis et al. 2020) on
the test text. `model.cell` can be `mlstm` or `mogrifier_lstm`; cuDNN, which makes the LSTM fast, has neither.

Expect: 1.24 to 1.28 bits per byte, an estimate from the sources above. The run has 105,450 steps and 8e17 floating-point
operations. At 10 TFLOP/s, which is an assumption, they take 23 hours.
"""

from charlm.config import default_config

STEPS_PER_EPOCH = 3515


def get_config():
    config = default_config()
    config.data.corpus = "enwik8"
    config.data.vocab = "bytes"
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
