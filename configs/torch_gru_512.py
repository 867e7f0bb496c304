"""A GRU of 512 units that trains on one random window of 100 characters at a time (after a char-RNN notebook in PyTorch).

    python -m charlm.train --config configs/torch_gru_512.py
    python -m charlm.sample --workdir runs/torch_gru_512 --prompt "this be " --temperature 0.75 --length 1500

The model has an embedding as wide as the vocabulary, a GRU of 512 units and a dense layer. A step trains on one window
from a random place of the text, from a zero state. Adam has a learning rate of 0.001, and the loss is summed over the
window. An epoch has one window for each hundred characters of the text. Training takes 20 epochs; a sample is drawn and
the curve is redrawn after each epoch.

Departures from the source:

- The text is tiny Shakespeare in lower case, and its last tenth is held out. That of the source is song lyrics.
- The last target of a window is the character after the window. In the source it is the first character of the window.
- Samples during training are drawn at a temperature of 0.75. The source takes the most probable character there.

The source prints no loss.

Expect: 1.580 nats per character on held-out text after four epochs, which is the best of the ten epochs on record, and 2.281
at the end of the tenth. The gradient is not clipped. Its norm slowly rises from 140 to 250, the loss jumps in the seventh
epoch, and the model does not recover. Ten epochs take about an hour on 2 cores of an Intel Xeon with AVX-512, 2026-11-22
(experiments/recipes).
"""

from charlm.config import default_config


def get_config():
    config = default_config()
    config.data.corpus = "tinyshakespeare"
    config.data.lowercase = True
    config.batching.layout = "random"
    config.batching.batch_size = 1
    config.batching.seq_len = 100
    config.model.cell = "gru"
    config.model.hidden_size = 512
    config.model.encoding = "embedding"
    config.model.embedding_size = 39  # The number of symbols of the text in lower case.
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.001
    config.optimizer.loss_reduction = "sum_over_time"
    config.train.epochs = 20.0
    config.train.log_every = 500
    config.train.eval_every = 10038
    config.train.checkpoint_every = 10038
    config.train.sample_every = 10038
    config.sample.prompt = "this be "
    config.sample.temperature = 0.75
    config.sample.length = 500
    return config
