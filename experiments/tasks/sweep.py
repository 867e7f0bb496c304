"""Every cell on two tasks that tell cells apart: parity and associative recall.

python -m charlm.sweep --sweep experiments/tasks/sweep.py --workdir runs/tasks --executor vmap
"""

from charlm.config import default_config
from charlm.nn.cells import CELLS
from charlm.sweep import chain, product
from experiments.cells.config import width


def get_sweep():
    config = default_config()
    config.data.documents = "lines"
    config.batching.batch_size = 16
    config.batching.seq_len = 64
    config.model.embedding_size = 32
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.clip_norm = 1.0
    config.train.steps = 2000
    config.train.eval_every = 1000
    config.train.checkpoint_every = 2000
    config.train.sample_every = 0
    config.train.log_every = 200
    tasks = ["experiments.tasks.texts:parity", "experiments.tasks.texts:recall"]
    rates, seeds = [3e-3, 1e-2], [0, 1]
    of_cells = [
        product(
            {
                "data.corpus": tasks,
                "model.cell": [cell],
                "model.hidden_size": [width(cell, lstm_units=64)],
                "optimizer.learning_rate": rates,
                "seed": seeds,
            }
        )
        for cell in CELLS
    ]
    return config, chain(*of_cells)
