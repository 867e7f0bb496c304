"""Your own text: a UTF-8 file, a directory or a pattern. The default model suits one or two megabytes of text.

    python -m charlm.train --config configs/my_text.py --config.data.path=FILE --workdir runs/mine
    python -m charlm.sample --workdir runs/mine --prompt "The "

Source: charlm's own. The last tenth of the text is held out for validation, and the best checkpoint is kept. Training
stops early after six evaluations in a row without a better one.

Change these keys here, or with --config.KEY=VALUE. The advice is a set of rules of thumb, not of measurements:

- Less than 500 kB of text: model.dropout 0.3 to 0.5, model.hidden_size 128.
- More than 5 MB: model.dropout 0, model.hidden_size 512 or more, train.epochs 2 to 5.
- More than 50 MB: data.split (0.998, 0.001, 0.001), because each validation scores all of the held-out text.
- Many scripts or emoji: data.vocab "bytes", which covers every character. Alternatively, set data.max_symbols.
- Other texts will be scored later: data.unknown True, or data.vocab "bytes". Otherwise an unknown symbol is an error.
- Case does not matter: data.lowercase True.

Expect, for tiny Shakespeare (Karpathy 2015; 1,115,394 characters, the last tenth held out): 1.481 nats per character on
validation text after 8 epochs (3,920 steps). This takes 3.4 minutes on 2 cores of an Intel Xeon with AVX-512 (a virtual
machine that did other work at times), 2026-11-21. experiments/ has no record of this run.
"""

from charlm.config import default_config


def get_config():
    config = default_config()
    config.data.path = "my_text.txt"
    config.data.vocab = "chars"
    config.data.lowercase = False
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
    config.mesh.auto = True
    config.train.epochs = 8.0
    config.train.patience = 6
    config.train.log_every = 50
    config.train.eval_every = 250
    config.train.checkpoint_every = 250
    config.train.sample_every = 500
    config.sample.temperature = 0.8
    return config
