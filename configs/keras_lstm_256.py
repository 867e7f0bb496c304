"""Many-to-one: 100 characters, each a single number, predict the next (a notebook after Keras' text generation).

    python -m charlm.train --config configs/keras_lstm_256.py
    python -m charlm.sample --workdir runs/keras_lstm_256

The id of a character, divided by the number of symbols, is the one input of an LSTM of 256 units; dropout of 0.3; a dense
softmax on the last step alone. Every window of 100 characters, one from each character on, in a new order every epoch,
predicts the character after it; Adam with a rate of 0.001, batches of 128, 20 epochs; a checkpoint whenever the training
loss is the lowest so far. A sample goes on from a random window of the training text, takes the most probable character,
and reads the last 100 characters anew for each (`--window=0` carries the state instead, a hundredth of the work).

Departures: the text is tiny Shakespeare, lower-cased, of which the last tenth is held out; checkpoints are looked for
every 1,000 steps.

An id is no quantity: 'a' is not a little less than 'b'. And a window of 100 characters is read for a single target. What
a practitioner would choose is keras_lstm_256_all.py. experiments/recipes runs both; the source prints
no loss.
"""

from charlm.config import default_config


def get_config():
    config = default_config()
    config.data.corpus = "tinyshakespeare"
    config.data.lowercase = True
    config.batching.layout = "sliding"
    config.batching.loss_on = "last"
    config.batching.batch_size = 128
    config.batching.seq_len = 100
    config.model.cell = "lstm"
    config.model.hidden_size = 256
    config.model.encoding = "scalar"
    config.model.dropout = 0.3
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.001
    config.train.epochs = 20.0
    config.train.best_by = "train"
    config.train.log_every = 100
    config.train.eval_every = 1000
    config.train.checkpoint_every = 1000
    config.train.sample_every = 1000
    config.sample.random_prompt = 100
    config.sample.window = 100
    config.sample.greedy = True
    config.sample.length = 400
    return config
