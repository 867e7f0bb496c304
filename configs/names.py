"""A list of names, one a line: each name is a document of its own, and a sample is a whole name.

    python -m charlm.train --config configs/names.py --config.data.path=names.txt
    python -m charlm.sample --workdir runs/names --num_samples 1000 --novelty

Source: charlm's own. The task is that of makemore (Karpathy 2022, github.com/karpathy/makemore). Its names.txt, with 32,000
names, fits this config; charlm was never trained on it. A tenth of the names is held out, and a sample ends by itself.

Expect, for 20,000 invented names (python experiments/names/measure.py): 1.814 nats per character on held-out names, where the
distribution from which the names are drawn has 1.798. The command takes 48 seconds on 2 cores of an AMD EPYC (a virtual
machine), 2026-11-27. All of 1,000 samples end by themselves, and 81 % of them are new.
"""

from charlm.config import default_config


def get_config():
    config = default_config()
    config.data.path = "names.txt"
    config.data.documents = "lines"
    config.data.lowercase = True
    config.batching.batch_size = 32
    config.batching.seq_len = 32
    config.model.cell = "lstm"
    config.model.hidden_size = 128
    config.model.embedding_size = 32
    config.model.dropout = 0.1
    config.optimizer.learning_rate = 5e-3
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.clip_norm = 1.0
    config.mesh.auto = True
    config.train.steps = 2000
    config.train.log_every = 100
    config.train.eval_every = 250
    config.train.checkpoint_every = 250
    config.train.sample_every = 500
    config.sample.length = 100
    config.sample.temperature = 1.0
    return config
