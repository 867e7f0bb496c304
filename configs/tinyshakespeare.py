"""Tiny Shakespeare: 1,115,394 characters of several plays (Karpathy 2015), split as nanoGPT splits it.

    python -m charlm.train --config configs/tinyshakespeare.py

The text is downloaded once (1.1 MB). Its first nine tenths are for training, the last for validation, so that losses
can be put beside those that others report for this text.

Expect: 1.481 nats per character on validation text after 8 epochs (3,920 steps), in 3.4 minutes on 2 cores of an Intel
Xeon with AVX-512 (a virtual machine that did other work at times), 2026-11-22.
"""

from charlm.config import default_config


def get_config():
    config = default_config()
    config.data.corpus = "tinyshakespeare"
    config.batching.batch_size = 32
    config.batching.seq_len = 64
    config.model.cell = "lstm"
    config.model.hidden_size = 256
    config.model.embedding_size = 64
    config.model.dropout = 0.2
    config.optimizer.learning_rate = 5e-3
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.clip_norm = 1.0
    config.train.epochs = 8.0
    config.train.log_every = 50
    config.train.eval_every = 250
    config.train.checkpoint_every = 250
    config.train.sample_every = 500
    config.sample.temperature = 0.8
    return config
