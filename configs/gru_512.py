"""A GRU of 512 units on 38 plays: more units than the quickstart, and a quarter fewer products than an LSTM of this size.

    python -m charlm.train --config configs/gru_512.py
    python -m charlm.sample --workdir runs/gru_512

Source: charlm's own. It uses truncated BPTT over 32 streams of 128 characters.

Expect: 1.40 nats per character on validation text after 1,000 steps, and 1.303 after two epochs (2,102 steps; 1.311 on
test text). It trains 16,000 to 20,000 characters per second and takes about 9 minutes on 2 cores of an Intel Xeon with
AVX-512 (a virtual machine that did other work at times), 2026-11-21. experiments/ has no record of this run.
"""

from charlm.config import default_config


def get_config():
    config = default_config()
    config.data.corpus = "shakespeare"
    config.batching.batch_size = 32
    config.batching.seq_len = 128
    config.model.cell = "gru"
    config.model.hidden_size = 512
    config.model.embedding_size = 64
    config.model.dropout = 0.1
    config.optimizer.learning_rate = 4e-3
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.clip_norm = 1.0
    config.train.epochs = 2.0
    config.train.log_every = 50
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.train.sample_every = 500
    config.sample.temperature = 0.8
    return config
