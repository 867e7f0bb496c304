"""An LSTM of 1,024 units on 38 plays: shuffled windows, each from a zero state, and the best of up to 20 epochs.

    python -m charlm.train --config configs/lstm_1024.py
    python -m charlm.sample --workdir runs/lstm_1024

Source: a notebook on character-level language models in Flux (Julia). It has an embedding of 256, an LSTM of 1,024 units,
Adam with a learning rate of 0.001, and batches of 64 windows of 100 characters. It trains for up to 20 epochs and stops
after 5 epochs without improvement. It prints a held-out loss of 4.255 nats per character before training, 2.356 after one
epoch, and 1.918 at best.

Departures from the source:

- The source divides the mean over a batch by the batch size once more. Here a loss is in nats per character.
- The source draws its held-out windows at random from the text that it trains on. Here the end of each play is held out.
- The source cannot load the model that it saved. Here sampling reads the best checkpoint.
- The text is another edition of the plays. That of the source has 67 symbols and 4.57 million characters.
- The bias of the forget gate starts at 1, and the recurrent kernels start orthogonal. These are the defaults of charlm.

Expect: 2.35 nats per character on validation text after 20 steps, 2.08 after 40 steps, and 1.369 after one epoch (673
steps; 1.376 on test text). An epoch took 26 minutes (2,757 characters per second) on 2 cores of an Intel Xeon with
AVX-512 (a virtual machine that did other work at times), 2026-11-22. The loss after one epoch and its time are on record
in experiments/recipes; the other losses are not on record. The 20 epochs would take almost 9 hours there and were not
run: use a GPU.
"""

from charlm.config import default_config

STEPS_PER_EPOCH = 673


def get_config():
    config = default_config()
    config.data.corpus = "shakespeare"
    config.batching.layout = "windows"
    config.batching.batch_size = 64
    config.batching.seq_len = 100
    config.batching.shuffle = True
    config.model.cell = "lstm"
    config.model.hidden_size = 1024
    config.model.embedding_size = 256
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.train.epochs = 20.0
    config.train.patience = 5
    config.train.log_every = 10
    config.train.eval_every = STEPS_PER_EPOCH
    config.train.checkpoint_every = 200
    config.train.sample_every = STEPS_PER_EPOCH
    config.sample.length = 100
    return config
