"""A first model: an LSTM of 192 units on 38 plays, in about two minutes on two cores.

Source: charlm's own. Truncated BPTT over 32 streams, as in char-rnn (Karpathy 2015), with random resets.

    python -m charlm.train --config configs/quickstart.py
    python -m charlm.sample --workdir runs/quickstart

Expect: 1.38 nats per character on validation text and 1.38 on test text; 121 s for both commands, 79,660
characters a second while training, on 2 cores of an Intel Xeon with AVX-512 (a virtual machine), 2026-11-21.
"""

from charlm.config import default_config


def get_config():
    config = default_config()
    config.data.corpus = "shakespeare"
    config.batching.batch_size = 32
    config.batching.seq_len = 64
    config.model.cell = "lstm"
    config.model.hidden_size = 192
    config.model.embedding_size = 64
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.clip_norm = 1.0
    config.train.steps = 4000
    config.train.log_every = 100
    config.train.eval_every = 1000
    config.train.checkpoint_every = 1000
    config.train.sample_every = 1000
    config.sample.temperature = 0.8
    return config
