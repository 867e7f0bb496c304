"""Score a text: nats and bits per character, perplexity.

    python -m charlm.evaluate --workdir DIR [--split train|val|test | --text FILE] [--checkpoint best|latest|STEP] [--json]

Letters: B streams at a time, T time, S streams in all.
"""

import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from charlm import cli
from charlm.checkpoint import Checkpoints, params_of
from charlm.corpus import encode_file, load_corpus
from charlm.errors import ConfigError, CorpusError
from charlm.model import CharLM
from charlm.step import nats
from charlm.tracking import say
from charlm.workdir import check_corpus, load_run

# Characters of each stream in one dispatch. It cuts nothing that the score depends on.
_WINDOW = 128


class Score(NamedTuple):
    """The loss of a model on a text: `count` characters, every one but the first."""

    nats_per_char: float
    count: int

    @property
    def bits_per_char(self) -> float:
        return self.nats_per_char / math.log(2)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_char) if self.nats_per_char < 700 else math.inf


class Streams(NamedTuple):
    """Where S streams of a text begin, and the targets [first, end) that each scores; int64, shape (S,)."""

    start: np.ndarray
    first: np.ndarray
    end: np.ndarray


def cut_streams(num_chars: int, num_streams: int, context: int) -> Streams:
    """Cut a text into streams that together score every character but the first exactly once.

    Each stream reads `context` characters, or as many as there are, before the first that it scores.
    """
    targets = num_chars - 1
    num_streams = min(num_streams, targets)
    bounds = 1 + np.arange(num_streams + 1, dtype=np.int64) * targets // num_streams
    first, end = bounds[:-1], bounds[1:]
    # The input that predicts a stream's first target is itself one character of context.
    return Streams(np.maximum(first - 1 - context, 0), first, end)


def make_scorer(model: CharLM) -> Callable:
    """(params, ids, config.eval) -> Score, with one compiled program for all texts."""

    @functools.partial(jax.jit, donate_argnums=1)
    def score_window(params, carry, windows, weights_TB):
        windows = windows.astype(jnp.int32)
        logits_TBV, carry = model.apply({"params": params}, windows.T[:-1], carry)
        return carry, jnp.sum(nats(logits_TBV, windows.T[1:]) * weights_TB, axis=0)

    def score(params, ids: np.ndarray, config_eval) -> Score:
        """Raises ValueError if the text has fewer than two characters."""
        if len(ids) < 2:
            raise ValueError("a text of fewer than two characters has nothing to score")
        streams = cut_streams(len(ids), config_eval.num_streams, config_eval.context)
        batch = min(config_eval.batch_size, len(streams.start))
        total = 0.0
        for group in range(0, len(streams.start), batch):
            start, first, end = (_pad(each[group : group + batch], batch) for each in streams)
            carry, sums = model.initial_carry(batch), []
            for offset in range(0, int((end - start).max()) - 1, _WINDOW):
                at_BT = start[:, None] + offset + np.arange(_WINDOW + 1)
                targets_BT = at_BT[:, 1:]
                weights_BT = (targets_BT >= first[:, None]) & (targets_BT < end[:, None])
                windows = ids[np.minimum(at_BT, len(ids) - 1)]
                carry, window_sums = score_window(params, carry, windows, weights_BT.T)
                sums.append(window_sums)
            total += float(np.sum(np.asarray(jax.device_get(sums), np.float64)))
        return Score(total / (len(ids) - 1), len(ids) - 1)

    return score


def _pad(values: np.ndarray, size: int) -> np.ndarray:
    """A group with streams that read from the beginning and score nothing, so that every group has one shape."""
    return np.concatenate([values, np.zeros(size - len(values), np.int64)])


def main(argv: Sequence[str]) -> None:
    """The command."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    flags.DEFINE_enum("split", "val", ["train", "val", "test"], "the part of the run's corpus to score", flag_values=values)
    flags.DEFINE_string("text", None, "a UTF-8 text file to score instead", flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
    cli.parse(values, argv, __doc__)
    run = load_run(Path(cli.required(values, "workdir")))
    checkpoints = Checkpoints(run.path)
    flat, meta = checkpoints.find(values.checkpoint, say)
    if values.text is not None:
        if values["split"].present:
            raise ConfigError("--split and --text exclude each other; give one")
        name, ids = values.text, encode_file(Path(values.text), run.vocab, run.config.data.lowercase)
    else:
        corpus = load_corpus(run.config.data)
        check_corpus(run, corpus)
        name, ids = f"{corpus.name} {values.split}", corpus.split(values.split)
    if len(ids) < 2:
        raise CorpusError(f"{name} has {len(ids)} characters; at least 2 are needed for a score")
    model = CharLM.from_config(run.config.model, run.vocab.size)
    score = make_scorer(model)(params_of(flat, model), ids, run.config.eval)
    if values.json:
        print(
            json.dumps(
                {
                    "text": name,
                    "checkpoint": meta["step"],
                    "nats_per_char": score.nats_per_char,
                    "bits_per_char": score.bits_per_char,
                    "perplexity": score.perplexity,
                    "count": score.count,
                }
            )
        )
        return
    unit = "character" if run.vocab.kind == "chars" else "byte"
    print(f"{name}, checkpoint of step {meta['step']}")
    print(f"  {'nats per ' + unit:18}  {score.nats_per_char:.4f}")
    print(f"  {'bits per ' + unit:18}  {score.bits_per_char:.4f}")
    print(f"  {'perplexity':18}  {score.perplexity:.3f}")
    print(f"  {unit + 's scored':18}  {score.count:,}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
