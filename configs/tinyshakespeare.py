"""Tiny Shakespeare: 1,115,394 characters of several plays (Karpathy 2015), with the split of nanoGPT.

    python -m charlm.train --config configs/tinyshakespeare.py
    python -m charlm.train --config configs/tinyshakespeare.py:ten_minutes --workdir runs/tinyshakespeare_ten_minutes
    python -m charlm.train --config configs/tinyshakespeare.py:gpu --workdir runs/tinyshakespeare_gpu

Source: charlm's own. The text is downloaded once (1.1 MB). The first nine tenths are for training and the last tenth is
for validation, so that losses can be compared with those that others report for this text. The choice of hyperparameters comes
from experiments/tinyshakespeare and experiments/ablation.

Expect: 1.456 nats per character on validation text (mean of three seeds), and 1.325 with dynamic evaluation (python -m
charlm.evaluate --workdir runs/tinyshakespeare --dynamic). Training takes about 126 seconds on 2 cores of an AMD EPYC,
2026-11-27. There PyTorch takes longer for bare training steps on 3.5 million characters (experiments/tinyshakespeare). The
setting `ten_minutes` reaches 1.422, and 1.300 with dynamic evaluation, in 13 minutes there (one seed). The setting `gpu` is
meant for ten minutes on a GPU. It has not been run yet.
"""

from charlm.config import default_config


def get_config(setting: str = "cpu"):
    """Return the config for two CPU cores (`cpu`, or with more time `ten_minutes`) or for a GPU (`gpu`)."""
    config = default_config()
    config.data.corpus = "tinyshakespeare"
    config.batching.batch_size = 32
    config.batching.seq_len = 64
    config.model.cell = "lstm"
    config.model.hidden_size = 288
    config.model.embedding_size = 64
    config.model.forget_bias = 0.0
    config.optimizer.name = "muon"
    config.optimizer.newton_schulz_steps = 3
    config.optimizer.learning_rate = 1.5e-2
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.final_learning_rate = 1e-3
    config.optimizer.clip_norm = 1.0
    config.optimizer.activation_reg = 2.0
    config.train.ema_decay = 0.99
    config.train.steps = 1370
    config.train.log_every = 50
    config.train.eval_every = 685
    config.train.checkpoint_every = 685
    config.train.sample_every = 1370
    config.sample.temperature = 0.8
    if setting == "ten_minutes":
        config.batching.batch_size = 64
        config.model.hidden_size = 512
        config.model.dropout = 0.4
        config.optimizer.learning_rate = 1e-2
        config.optimizer.final_learning_rate = 5e-4
        config.train.steps = 1300
    elif setting == "gpu":
        config.batching.batch_size = 64
        config.batching.seq_len = 128
        config.model.hidden_size = 512
        config.model.num_layers = 2
        config.model.dropout = 0.5
        config.optimizer.name = "adam"
        config.optimizer.learning_rate = 4e-3
        config.optimizer.warmup_steps = 100
        config.optimizer.final_learning_rate = 4e-4
        config.train.ema_decay = 0.999
        config.train.steps = 8000
        config.train.log_every = 100
        config.train.eval_every = 500
        config.train.checkpoint_every = 1000
        config.train.sample_every = 2000
    elif setting != "cpu":
        raise ValueError(f"unknown setting {setting!r}; the settings are cpu, ten_minutes and gpu")
    return config
