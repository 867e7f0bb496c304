"""Score a text: nats and bits per character, perplexity.

    python -m charlm.evaluate --workdir DIR [--split train|val|test | --text FILE] [--checkpoint best|latest|STEP]
        [--dynamic] [--json]

Letters: B streams at a time, T time, S streams in all.
"""

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
from jax.sharding import Mesh

from charlm import cli
from charlm import mesh as meshes
from charlm.checkpoint import Checkpoints, params_of
from charlm.corpus import encode_file, load_corpus
from charlm.dynamic import dynamic_nats
from charlm.errors import ConfigError, CorpusError
from charlm.model import CharLM
from charlm.progress import ByteProgress, say
from charlm.step import nats
from charlm.vocab import UNKNOWN, Vocab
from charlm.workdir import check_corpus, load_run

# Characters of each stream in one dispatch. It cuts nothing that the score depends on.
_WINDOW = 128
_LABELS = {
    "count": "characters scored",
    "bytes": "bytes scored",
    "unknown": "unknown in the text",
    "nats_per_char": "nats per character",
    "bits_per_char": "bits per character",
    "perplexity": "perplexity",
    "nats_per_byte": "nats per byte",
    "bits_per_byte": "bits per byte",
    "dynamic_nats_per_char": "dynamic: nats per character",
    "dynamic_bits_per_char": "dynamic: bits per character",
    "dynamic_perplexity": "dynamic: perplexity",
    "dynamic_nats_per_byte": "dynamic: nats per byte",
    "dynamic_bits_per_byte": "dynamic: bits per byte",
}


class Score(NamedTuple):
    """The loss of a model on a text.

    Attributes:
        nats: of all symbols that were scored, summed up.
        count: how many those are.
        chars: how many characters they make; `count`, but for bytes.
    """

    nats: float
    count: int
    chars: float

    @property
    def nats_per_char(self) -> float:
        return self.nats / self.chars

    @property
    def nats_per_symbol(self) -> float:
        return self.nats / self.count

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


def shortest_text(batching) -> int:
    """The fewest symbols of a text that a model trained with `config.batching` can be scored on."""
    return 2 if batching.loss_on == "all" else batching.seq_len + 1


def make_scorer(model: CharLM, vocab: Vocab, batching, mesh: Mesh | None = None) -> Callable:
    """(params, ids, config.eval, watch) -> Score, with one compiled program for all texts.

    Each device of a mesh scores its share, and every process gets the whole score.

    Every symbol of the text but the first is scored; for a many-to-one model `eval.max_chars` of them. `watch` is called
    every now and then with the part of the work that is done; what it raises ends the scoring. Raises ValueError if the text
    is shorter than `shortest_text`.
    """
    if batching.loss_on == "last":
        nats_of = _make_window_scorer(model, batching.seq_len, mesh)
    else:
        nats_of = _make_stream_scorer(model, mesh)

    def score(params, ids: np.ndarray, config_eval, watch: Callable[[float], None] = _unwatched) -> Score:
        if len(ids) < shortest_text(batching):
            raise ValueError(f"a text of {len(ids)} symbols is too short to be scored")
        total, count = nats_of(params, ids, config_eval, watch)
        # The characters that begin after the first symbol, in proportion where not all of them are scored.
        return Score(total, count, max(1, vocab.num_chars(ids[1:])) * count / (len(ids) - 1))

    return score


def _unwatched(done: float) -> None:
    del done


def _make_stream_scorer(model: CharLM, mesh: Mesh | None) -> Callable:
    """(params, ids, config.eval, watch) -> (nats, count) over parallel streams, state carried (`cut_streams`)."""

    def score_rows(params, carry, windows, weights_TB):
        windows = windows.astype(jnp.int32)
        logits_TBV, carry = model.apply({"params": params}, windows.T[:-1], carry)
        return carry, meshes.joined(mesh, jnp.sum(nats(logits_TBV, windows.T[1:]) * weights_TB, axis=0))

    specs = (meshes.WHOLE, meshes.ROWS, meshes.ROWS, meshes.OF_STEPS), (meshes.ROWS, meshes.WHOLE)
    score_window = jax.jit(meshes.on_each(mesh, score_rows, *specs), donate_argnums=1)
    first_carry = model.initial_carry
    if mesh is not None:
        first_carry = jax.jit(first_carry, static_argnums=1, out_shardings=meshes.sharding(mesh, meshes.ROWS))

    def score(params, ids: np.ndarray, config_eval, watch) -> tuple[float, int]:
        streams = cut_streams(len(ids), config_eval.num_streams, config_eval.context)
        batch = meshes.shared_equally(mesh, min(config_eval.batch_size * meshes.size(mesh), len(streams.start)))
        total = 0.0
        for group in range(0, len(streams.start), batch):
            start, first, end = (_pad(each[group : group + batch], batch) for each in streams)
            carry, sums = first_carry(params, batch), []
            length = int((end - start).max()) - 1
            for offset in range(0, length, _WINDOW):
                at_BT = start[:, None] + offset + np.arange(_WINDOW + 1)
                targets_BT = at_BT[:, 1:]
                weights_BT = (targets_BT >= first[:, None]) & (targets_BT < end[:, None])
                windows = meshes.put_read(mesh, ids, np.minimum(at_BT, len(ids) - 1))
                weights_TB = meshes.put(mesh, weights_BT.T, meshes.OF_STEPS)
                carry, window_sums = score_window(params, carry, windows, weights_TB)
                if sums:  # Wait for the one before, so that what is told of is not far from what is done.
                    sums[-1] = np.asarray(sums[-1], np.float64)
                sums.append(window_sums)
                watch((group + batch * offset / length) / len(streams.start))
            total += float(np.sum(np.asarray(sums, np.float64)))
        return total, len(ids) - 1

    return score


def _make_window_scorer(model: CharLM, seq_len: int, mesh: Mesh | None) -> Callable:
    """(params, ids, config.eval, watch) -> (nats, count) of the last targets of evenly spaced windows, each from zero."""

    def score_rows(params, windows):
        windows = windows.astype(jnp.int32)
        carry = model.initial_carry(params, windows.shape[0])
        logits_1BV, _ = model.apply({"params": params}, windows.T[:-1], carry, only_last=True)
        return meshes.joined(mesh, nats(logits_1BV, windows.T[-1:])[0])

    score_windows = jax.jit(meshes.on_each(mesh, score_rows, (meshes.WHOLE, meshes.ROWS), meshes.WHOLE))

    def score(params, ids: np.ndarray, config_eval, watch) -> tuple[float, int]:
        windows = len(ids) - seq_len
        count = min(config_eval.max_chars, windows)
        start = np.arange(count, dtype=np.int64) * windows // count
        batch = meshes.shared_equally(mesh, min(config_eval.batch_size * meshes.size(mesh), count))
        total = 0.0
        for group in range(0, count, batch):
            of_group = start[group : group + batch]
            at_BT = _pad(of_group, batch)[:, None] + np.arange(seq_len + 1)
            losses_B = np.asarray(score_windows(params, meshes.put_read(mesh, ids, at_BT)), np.float64)
            total += float(losses_B[: len(of_group)].sum())
            watch(group / count)
        return total, count

    return score


def _pad(values: np.ndarray, size: int) -> np.ndarray:
    """A group with streams that read from the beginning and score nothing, so that every group has one shape."""
    return np.concatenate([values, np.zeros(size - len(values), np.int64)])


def _losses(score: Score, vocab: Vocab) -> dict[str, float]:
    """A score in every unit."""
    losses = {"nats_per_char": score.nats_per_char, "bits_per_char": score.bits_per_char, "perplexity": score.perplexity}
    if vocab.kind == "bytes":
        losses |= {"nats_per_byte": score.nats_per_symbol, "bits_per_byte": score.nats_per_symbol / math.log(2)}
    return losses


def main(argv: Sequence[str]) -> None:
    """The command."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    flags.DEFINE_enum("split", "val", ["train", "val", "test"], "the part of the run's corpus to score", flag_values=values)
    flags.DEFINE_string("text", None, "a UTF-8 text file to score instead", flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step", flag_values=values)
    flags.DEFINE_bool("dynamic", False, "also let the model learn from the text once it is scored", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
    cli.parse(values, argv, __doc__)
    run = load_run(Path(cli.required(values, "workdir")))
    flat, meta = Checkpoints(run.path).find(values.checkpoint, say)
    if values.text is not None and values["split"].present:
        raise ConfigError("--split and --text exclude each other; give one")
    if values.text is None or values.dynamic:
        corpus = load_corpus(run.config.data)
        check_corpus(run.path, run.manifest, corpus)
    if values.text is None:
        name, ids = f"{corpus.name} {values.split}", corpus.split(values.split)
    else:
        name, ids = values.text, encode_file(Path(values.text), run.vocab, run.config.data.lowercase)
    if len(ids) < (shortest := shortest_text(run.config.batching)):
        raise CorpusError(f"{name} has {len(ids)} characters; at least {shortest} are needed for a score")
    if values.dynamic:
        _check_dynamic(run.config, corpus.train)
    model = CharLM.from_config(run.config.model, run.vocab.size)
    params = params_of(flat, model)
    with ByteProgress(f"scoring {name}", ids.nbytes) as progress:
        scorer = make_scorer(model, run.vocab, run.config.batching)
        score = scorer(params, ids, run.config.eval, lambda done: progress.reach(done * ids.nbytes))
    found = {"text": name, "checkpoint": meta["step"], **_losses(score, run.vocab), "count": math.ceil(score.chars)}
    if run.vocab.kind == "bytes":
        found["bytes"] = score.count
    if run.vocab.unknown:
        found["unknown"] = int(np.count_nonzero(ids == run.vocab.symbols.index(UNKNOWN)))
    if values.dynamic:
        adapted = score._replace(nats=dynamic_nats(model, params, corpus.train, ids, run.config.eval))
        found |= {f"dynamic_{key}": value for key, value in _losses(adapted, run.vocab).items()}
    print(json.dumps(found) if values.json else _as_lines(found))


def _check_dynamic(config, train_ids: np.ndarray) -> None:
    """Raises ConfigError where dynamic evaluation has no meaning."""
    if config.batching.loss_on == "last":
        raise ConfigError("--dynamic scores all characters; the run's batching.loss_on is 'last'")
    if len(train_ids) <= (needed := 2 * config.eval.dynamic_segment):
        raise ConfigError(
            f"--dynamic needs more than {needed} symbols of training text, twice eval.dynamic_segment; there are "
            f"{len(train_ids)}"
        )


def _as_lines(found: dict) -> str:
    """What was found, for people."""
    lines = [f"{found['text']}, checkpoint of step {found['checkpoint']}"]
    for key, label in _LABELS.items():
        if key in found:
            value = found[key]
            lines.append(f"  {label:28}  {format(value, ',') if isinstance(value, int) else format(value, '.4f')}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
