"""One random window of 100 characters at a time into a GRU of 512 units (a notebook after a PyTorch char-RNN).

    python -m charlm.train --config configs/torch_gru_512.py
    python -m charlm.sample --workdir runs/torch_gru_512 --prompt "this be " --temperature 0.75 --length 1500

An embedding as wide as the vocabulary, a GRU of 512 units, a dense layer. A step is one window from a random place, from
a zero state; Adam with a rate of 0.001 on the loss summed over the window; as many windows an epoch as the text has
hundreds of characters, 20 epochs, a sample and the curve redrawn after each.

Departures: the text is tiny Shakespeare, lower-cased, of which the last tenth is held out (the source's is song lyrics);
the last target of a window is the character after it, where the source's wraps around to the window's first; samples are
drawn at a temperature of 0.75 while training too, where the source takes the most probable character.

The source prints no loss. Ours, over half its length, is best after four epochs (1.580 nats per character on held-out
text); nothing clips the gradient, whose norm creeps up from 140 to 250 and blows up in the seventh, and the model does not
find back (experiments/recipes).
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
    config.model.embedding_size = 39  # The symbols of the text in lower case.
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
