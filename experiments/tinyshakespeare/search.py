"""The search for the hyperparameters of configs/tinyshakespeare.py, on a validation text of its own.

    python -m charlm.sweep --sweep experiments/tinyshakespeare/search.py --workdir runs/tinyshakespeare_search

The last tenth of the text, on which the config is scored, plays no part. The ninth tenth is the validation text of all runs.
"""

from charlm.config import default_config

ADAM = {"optimizer.name": "adam", "optimizer.learning_rate": 1e-2}
COSINE = {"optimizer.schedule": "warmup_cosine", "optimizer.warmup_steps": 50}
MUON = {"optimizer.name": "muon", "optimizer.learning_rate": 1.5e-2, "optimizer.final_learning_rate": 1e-3, **COSINE}
MUON_3 = MUON | {"optimizer.newton_schulz_steps": 3}


def get_config():
    """Return the config that all runs share."""
    config = default_config()
    config.data.corpus = "tinyshakespeare"
    config.data.split = (0.81, 0.09, 0.10)
    config.batching.batch_size = 32
    config.batching.seq_len = 64
    config.model.hidden_size = 256
    config.model.embedding_size = 64
    config.model.forget_bias = 0.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.activation_reg = 2.0
    config.train.ema_decay = 0.99
    config.train.steps = 1300
    config.train.log_every = 50
    config.train.eval_every = 325
    config.train.checkpoint_every = 1300
    config.train.sample_every = 0
    return config


def get_sweep():
    cells = [ADAM | {"model.cell": cell} for cell in ("lstm", "gru", "mgu", "ln_lstm")]
    optimizers = [
        ADAM | {"optimizer.b2": 0.99},
        ADAM | COSINE | {"optimizer.learning_rate": 1.5e-2, "optimizer.final_learning_rate": 1e-3},
        {"optimizer.name": "schedule_free_adamw", "optimizer.learning_rate": 1e-2, "train.ema_decay": 0.0},
        {"optimizer.name": "muon", "optimizer.learning_rate": 5e-3},
        {"optimizer.name": "muon", "optimizer.learning_rate": 1e-2},
        {"optimizer.name": "muon", "optimizer.learning_rate": 1.5e-2},
        MUON,
        MUON | {"optimizer.learning_rate": 2e-2, "optimizer.final_learning_rate": 1e-4, "train.ema_decay": 0.98},
        MUON | {"model.cell": "ln_lstm"},
        MUON | {"optimizer.activation_reg": 1.0},
        MUON | {"model.hidden_size": 320},
    ]
    details = [
        {},
        {"optimizer.activation_reg": 3.0},
        {"optimizer.weight_decay": 0.1},
        {"optimizer.final_learning_rate": 3e-4},
        {"train.ema_decay": 0.98},
    ]
    return get_config(), [*cells, *optimizers, *(MUON_3 | each for each in details)]
