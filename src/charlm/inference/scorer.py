"""Score a text: the cross-entropy of every symbol, and the metrics that `eval.metrics` selects.

Letters: B streams at a time, T time, S streams in all, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from charlm.data.documents import document_positions
from charlm.data.vocab import Vocab
from charlm.nn.cells import SameCell
from charlm.nn.model import CharLM
from charlm.parallel import mesh as meshes
from charlm.parallel.mesh import BATCH_SHARDED, REPLICATED, STEPS_BATCH_SHARDED
from charlm.training.loss import cross_entropy
from charlm.training.metrics import measure_targets

# Characters of each stream in one dispatch. The score does not depend on it.
WINDOW = 128
# Called with the part of the work that is done. What it raises ends the scoring.
Watch = Callable[[float], None]


class Score(NamedTuple):
    """The loss of a model on a text.

    Attributes:
        nats: the cross-entropy, summed over all symbols that were scored.
        count: the number of these symbols.
        chars: the number of characters in these symbols; `count`, except for bytes.
        metrics: name -> mean over these symbols.
        nats_N: the cross-entropy of every symbol but the first, float32, shape (symbols - 1,); nan for a symbol that was not
            scored. None unless it was asked for.
    """

    nats: float
    count: int
    chars: float
    metrics: Mapping[str, float] = {}
    nats_N: np.ndarray | None = None

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


class Scorer(Protocol):
    """A compiled scorer (`make_scorer`)."""

    def __call__(
        self, params: Any, ids: np.ndarray, config_eval: ConfigDict, watch: Watch = ..., per_symbol: bool = False
    ) -> Score:
        """Score a text. Raises ValueError if it is shorter than `min_text_length`.

        Args:
            params: of the model.
            ids: the text, shape (symbols,).
            config_eval: `config.eval`.
            watch: called every now and then with the part of the work that is done; what it raises ends the scoring.
            per_symbol: whether to return `Score.nats_N`. It changes no bit of the other values. Not for several processes.
        """


class Streams(NamedTuple):
    """Where S streams of a text start, and the targets [first, end) that each stream scores; int64, shape (S,)."""

    start: np.ndarray
    first: np.ndarray
    end: np.ndarray


def cut_streams(num_chars: int, num_streams: int, context: int) -> Streams:
    """Cut a text into streams that together score every character except the first exactly once.

    Each stream reads `context` characters, or as many as there are, before the first character that it scores.
    """
    targets = num_chars - 1
    num_streams = min(num_streams, targets)
    bounds = 1 + np.arange(num_streams + 1, dtype=np.int64) * targets // num_streams
    first, end = bounds[:-1], bounds[1:]
    # The input that predicts a stream's first target is itself one character of context.
    return Streams(np.maximum(first - 1 - context, 0), first, end)


def cut_documents(boundaries: np.ndarray, num_symbols: int, num_streams: int) -> Streams:
    """Cut a text of documents into streams that begin at boundaries, so that they need no context (`cut_streams`).

    Args:
        boundaries: the positions of the boundaries (`documents.document_positions`).
        num_symbols: the length of the text.
        num_streams: the number of streams; there are fewer if the documents are few.
    """
    even = np.arange(1, num_streams) * (num_symbols - 1) // num_streams
    seams = boundaries[np.minimum(np.searchsorted(boundaries, even), len(boundaries) - 1)]
    start = np.unique(np.concatenate([[0], seams[seams < num_symbols - 1]])).astype(np.int64)
    return Streams(start, start + 1, np.append(start[1:], num_symbols - 1) + 1)


def cut_windows(num_symbols: int, seq_len: int, max_chars: int) -> Streams:
    """Cut a text into windows, evenly spaced. Each scores the symbol after `seq_len` others. There are at most `max_chars`."""
    windows = num_symbols - seq_len
    count = min(max_chars, windows)
    start = np.arange(count, dtype=np.int64) * windows // count
    return Streams(start, start + seq_len, start + seq_len + 1)


def cut_text(ids: np.ndarray, batching: ConfigDict, config_eval: ConfigDict, boundary: int | None) -> Streams:
    """Cut a text into the streams that a scorer reads, each from the initial state.

    Args:
        ids: the text, shape (symbols,), of at least `min_text_length`.
        batching: `config.batching`.
        config_eval: `config.eval`.
        boundary: the id of the symbol between documents; None: the text has no documents.
    """
    if batching.loss_on == "last":
        return cut_windows(len(ids), batching.seq_len, config_eval.max_chars)
    return _cut_into_streams(ids, config_eval, boundary)


def _cut_into_streams(ids: np.ndarray, config_eval: ConfigDict, boundary: int | None) -> Streams:
    if boundary is None:
        return cut_streams(len(ids), config_eval.num_streams, config_eval.context)
    return cut_documents(document_positions(ids, boundary), len(ids), config_eval.num_streams)


def min_text_length(batching: ConfigDict) -> int:
    """Return the number of symbols that a text needs, so that a model trained with `config.batching` can score it."""
    return 2 if batching.loss_on == "all" else batching.seq_len + 1


def make_scorer(
    model: CharLM, vocab: Vocab, batching: ConfigDict, mesh: Mesh | None = None, metrics: Sequence[str] = ()
) -> Scorer:
    """Return a scorer with one compiled program for all texts.

    It scores every symbol of a text except the first; for a many-to-one model, `eval.max_chars` of them. Documents are scored
    from the initial state, each with the boundary at its end. Each device of a mesh scores its share, and every process returns
    the whole score.

    Args:
        model: its architecture.
        vocab: the vocabulary of the texts.
        batching: `config.batching`; a many-to-one model is scored window by window.
        mesh: the devices that share the work.
        metrics: names from `training.metrics.TARGET_METRICS`.
    """
    if batching.loss_on == "last":
        sum_over = _make_window_scorer(model, SameCell(model.cell), batching.seq_len, mesh, tuple(metrics))
    else:
        sum_over = _make_stream_scorer(model, SameCell(model.cell), mesh, tuple(metrics))

    def score(
        params: Any,
        ids: np.ndarray,
        config_eval: ConfigDict,
        watch: Watch = lambda done: None,
        per_symbol: bool = False,
    ) -> Score:
        if len(ids) < min_text_length(batching):
            raise ValueError(f"a text of {len(ids)} symbols is too short to be scored")
        nats_N = np.full(len(ids) - 1, np.nan, np.float32) if per_symbol else None
        sums, count = sum_over(params, ids, config_eval, watch, nats_N)
        # The characters that begin after the first symbol, in proportion if not all symbols are scored.
        chars = max(1, vocab.num_chars(ids[1:])) * count / (len(ids) - 1)
        return Score(sums.pop("nats"), count, chars, {name: total / count for name, total in sums.items()}, nats_N)

    return score


# (params, ids, config.eval, watch, nats_N or None) -> ({"nats" or metric: sum over the scored symbols}, number of scored
# symbols). The cross-entropy of every scored symbol is written into nats_N.
_SumOver = Callable[[Any, np.ndarray, ConfigDict, Watch, np.ndarray | None], tuple[dict[str, float], int]]


def _measure(metrics: Sequence[str], logits_TBV: jax.Array, targets_TB: jax.Array) -> dict[str, jax.Array]:
    """Return the values of every target, shape (T, B)."""
    return {"nats": cross_entropy(logits_TBV, targets_TB), **measure_targets(metrics, logits_TBV, targets_TB)}


def make_window_program(model: CharLM, mesh: Mesh | None, metrics: Sequence[str]) -> Callable[..., Any]:
    """Return the jitted function that scores one window of B streams.

    (params, carry, windows (B, T + 1), weights_TB) -> (carry, {"nats" or metric: weighted sum over the window, (B,)}, nats_TB).
    It donates the carry.
    """

    def score_rows(params, carry, windows, weights_TB):
        windows = windows.astype(jnp.int32)
        logits_TBV, carry = model.apply({"params": params}, windows.T[:-1], carry)
        measured = _measure(metrics, logits_TBV, windows.T[1:])
        sums = {n: meshes.all_gather(mesh, jnp.sum(v * weights_TB, axis=0)) for n, v in measured.items()}
        return carry, sums, measured["nats"]

    outputs = BATCH_SHARDED, REPLICATED, STEPS_BATCH_SHARDED
    specs = (REPLICATED, BATCH_SHARDED, BATCH_SHARDED, STEPS_BATCH_SHARDED), outputs
    return jax.jit(meshes.shard_map(mesh, score_rows, *specs), donate_argnums=1)


# The scorers of the latest models are kept, so that a process compiles a model once, however often it is loaded or trained.
@functools.lru_cache(maxsize=8)
def _make_stream_scorer(model: CharLM, cell: SameCell, mesh: Mesh | None, metrics: tuple[str, ...]) -> _SumOver:
    """Return a function that scores a text in parallel streams and carries the state (`cut_streams`)."""
    score_window = make_window_program(model, mesh, metrics)
    initial_carry = model.initial_carry
    if mesh is not None:
        initial_carry = jax.jit(initial_carry, static_argnums=1, out_shardings=meshes.sharding(mesh, BATCH_SHARDED))

    def sum_over(
        params: Any, ids: np.ndarray, config_eval: ConfigDict, watch: Watch, nats_N: np.ndarray | None
    ) -> tuple[dict[str, float], int]:
        streams = _cut_into_streams(ids, config_eval, model.boundary)
        batch = meshes.round_up(mesh, min(config_eval.batch_size * meshes.num_devices(mesh), len(streams.start)))
        totals: dict[str, float] = {}
        for group in range(0, len(streams.start), batch):
            start, first, end = (_pad(each[group : group + batch], batch) for each in streams)
            carry, sums = initial_carry(params, batch), []
            length = int((end - start).max()) - 1
            for offset in range(0, length, WINDOW):
                at_BT = start[:, None] + offset + np.arange(WINDOW + 1)
                targets_BT = at_BT[:, 1:]
                weights_BT = (targets_BT >= first[:, None]) & (targets_BT < end[:, None])
                windows = meshes.put_rows(mesh, ids, np.minimum(at_BT, len(ids) - 1))
                weights_TB = meshes.put(mesh, weights_BT.T, STEPS_BATCH_SHARDED)
                carry, window_sums, nats_TB = score_window(params, carry, windows, weights_TB)
                if nats_N is not None:
                    nats_N[targets_BT[weights_BT] - 1] = np.asarray(nats_TB).T[weights_BT]
                if sums:  # Wait for the window before, so that the reported progress is close to the real one.
                    sums[-1] = jax.tree.map(_to_float64, sums[-1])
                sums.append(window_sums)
                watch((group + batch * offset / length) / len(streams.start))
            sums[-1] = jax.tree.map(_to_float64, sums[-1])
            for name in sums[-1]:
                totals[name] = totals.get(name, 0.0) + float(np.sum(np.asarray([window[name] for window in sums])))
        return totals, len(ids) - 1

    return sum_over


@functools.lru_cache(maxsize=8)
def _make_window_scorer(model: CharLM, cell: SameCell, seq_len: int, mesh: Mesh | None, metrics: tuple[str, ...]) -> _SumOver:
    """Return a function that scores the last targets of evenly spaced windows, each from a zero state."""

    def score_rows(params, windows):
        windows = windows.astype(jnp.int32)
        carry = model.initial_carry(params, windows.shape[0])
        logits_1BV, _ = model.apply({"params": params}, windows.T[:-1], carry, only_last=True)
        return {n: meshes.all_gather(mesh, v[0]) for n, v in _measure(metrics, logits_1BV, windows.T[-1:]).items()}

    score_windows = jax.jit(meshes.shard_map(mesh, score_rows, (REPLICATED, BATCH_SHARDED), REPLICATED))

    def sum_over(
        params: Any, ids: np.ndarray, config_eval: ConfigDict, watch: Watch, nats_N: np.ndarray | None
    ) -> tuple[dict[str, float], int]:
        start = cut_windows(len(ids), seq_len, config_eval.max_chars).start
        count = len(start)
        batch = meshes.round_up(mesh, min(config_eval.batch_size * meshes.num_devices(mesh), count))
        totals: dict[str, float] = {}
        for group in range(0, count, batch):
            of_group = start[group : group + batch]
            at_BT = _pad(of_group, batch)[:, None] + np.arange(seq_len + 1)
            for name, values_B in score_windows(params, meshes.put_rows(mesh, ids, at_BT)).items():
                values_B = _to_float64(values_B)[: len(of_group)]
                totals[name] = totals.get(name, 0.0) + float(values_B.sum())
                if name == "nats" and nats_N is not None:
                    nats_N[of_group + seq_len - 1] = values_B
            watch(group / count)
        return totals, count

    return sum_over


def _to_float64(x: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64)


def _pad(values: np.ndarray, size: int) -> np.ndarray:
    """Pad a group with streams that start at 0 and score nothing, so that every group has the same shape."""
    return np.concatenate([values, np.zeros(size - len(values), np.int64)])
