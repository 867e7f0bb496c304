"""Sample text from a model: the compiled sampler and the PRNG keys.

Letters: N samples, K symbols in a block, V vocabulary, S states of the UTF-8 automaton, W symbols in a window, C most probable
symbols.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from charlm.data.vocab import Vocab, utf8_transitions
from charlm.inference.decoding import decode_samples
from charlm.nn.cells import SameCell
from charlm.nn.model import CharLM

# The most symbols that a dispatch draws, the symbols that it reads of a long prompt, and the most random numbers in a dispatch.
_BLOCK, _READ, _MAX_NOISE = 64, 1024, 1 << 22
_TINY_TEMPERATURE = 1e-30


class Settings(NamedTuple):
    """How a symbol is drawn. These are arguments of the compiled program, so changing them triggers no recompilation.

    Each one is a number for all samples, or an array (N,).

    Attributes:
        temperature: the logits are divided by it; above 0.
        top_k: top-k filtering: draw from the k most probable symbols; V: from all.
        top_p: top-p (nucleus) filtering after it: draw from the most probable symbols whose probabilities together reach p
            (Holtzman et al. 2020); 1: from all.
        greedy: take the most probable symbol.
    """

    temperature: float | np.ndarray
    top_k: int | np.ndarray
    top_p: float | np.ndarray
    greedy: bool | np.ndarray

    @classmethod
    def from_config(cls, sample: ConfigDict, vocab_size: int) -> "Settings":
        """Return the settings of `config.sample` for a vocabulary of this size."""
        top_k = vocab_size if sample.top_k is None else min(sample.top_k, vocab_size)
        return cls(sample.temperature, top_k, 1.0 if sample.top_p is None else sample.top_p, sample.greedy)


def filter_top_k_top_p(logits_V: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Return the logits, shape (V,), with those that top-k and then top-p filtering exclude set to -inf."""
    order = jnp.argsort(-logits_V, stable=True)
    ranks = jnp.arange(logits_V.shape[-1])
    sorted_V = jnp.where(ranks < top_k, logits_V[order], -jnp.inf)
    probs = jax.nn.softmax(sorted_V)
    # A symbol is kept if the more probable symbols have not reached p together. The most probable symbol is always kept.
    before = jnp.cumsum(probs) - probs
    sorted_V = jnp.where((before < top_p) | (ranks == 0), sorted_V, -jnp.inf)
    # Without a filter nothing is excluded, not even what rounding would exclude.
    return jnp.where((top_k >= len(ranks)) & (top_p >= 1), logits_V, jnp.zeros_like(logits_V).at[order].set(sorted_V))


class Logprobs(NamedTuple):
    """The log-probabilities of K symbols of N samples, from the unfiltered distribution at temperature 1.

    Attributes:
        drawn_KN: those of the symbols that were drawn, or taken from the prompt.
        top_KNC: those of the C most probable symbols, the most probable first.
        top_ids_KNC: these symbols.
    """

    drawn_KN: jax.Array
    top_KNC: jax.Array
    top_ids_KNC: jax.Array


class Sampler(NamedTuple):
    """The functions that draw text from a model (`make_sampler`).

    Attributes:
        prepare: params -> weights, jitted. It does the work that is the same for all symbols.
        start: (weights, N) -> the state before the first symbol of N samples.
        regroup: (weights, state, ids_N, source_N, first_ids_N) -> (state, ids_N) of N samples, jitted. Sample i goes on from
            sample `source_N[i]` of `state` and `ids_N`, or starts with the symbol `first_ids_N[i]` if that is -1.
        read: (weights, state, prompt_KN) -> the state after K more symbols of N samples, jitted. The symbols are those of all
            samples, an array (K, 1), or each sample's own, (K, N). It gives the state of `block`, up to rounding, and is faster
            because it computes no logits and draws nothing.
        block: (weights, state, ids_N, keys_N, position, prompt_KN, prompt_length, settings, filtered, num_top) -> (state,
            ids_N, drawn_KN, Logprobs or None), jitted. It draws K symbols for each of N samples. `ids_N` are the last symbols
            and `position` is their position in the text. The symbol at position p is drawn with the sample's key, folded with
            p, so it depends only on the key and on the symbols before it. The first `prompt_length` of the K symbols are taken
            from `prompt_KN` instead. Position and prompt are those of all samples, a number and an array (K, 1), or each
            sample's own, arrays (N,) and (K, N). `filtered` and `num_top` are static: whether top-k or top-p filtering is in
            use, and the number C of the `Logprobs` (None: there are none).
    """

    prepare: Callable[[Any], Any]
    start: Callable[[Any, int], Any]
    regroup: Callable[..., tuple[Any, jax.Array]]
    read: Callable[[Any, Any, Any], Any]
    block: Callable[..., tuple[Any, jax.Array, jax.Array, Logprobs | None]]


def make_sampler(model: CharLM, vocab: Vocab, window: int = 0, dtype: str | None = None) -> Sampler:
    """Return the sampler of a model.

    A model over bytes draws valid UTF-8: each byte is drawn from those that can come next, with their renormalised
    probabilities.

    Args:
        model: its architecture.
        vocab: the vocabulary of the texts.
        window: 0: carry the state from symbol to symbol. W > 0: read the last W symbols again from a zero state for each symbol
            that is drawn, as in training on windows of W symbols. This is W times the work, and the prompt needs at least W
            symbols.
        dtype: the dtype of the weights; None: that of the model.
    """
    return _make_sampler(model, SameCell(model.cell), vocab.size, vocab.kind == "bytes", window, dtype or model.dtype)


# The samplers of the latest models are kept, so that a process compiles a model once, however often it is loaded or trained.
@functools.lru_cache(maxsize=8)
def _make_sampler(model: CharLM, cell: SameCell, vocab_size: int, draws_bytes: bool, window: int, dtype: str) -> Sampler:
    """Return the sampler of `make_sampler`."""
    folded = model.folded(dtype)
    next_SV = jnp.asarray(utf8_transitions()) if draws_bytes else None

    @jax.jit
    def prepare(params: Any) -> Any:
        return model.fold_params(params, dtype)

    # The context of a sample is what the model knows of its text: the carry, or with a window the last W symbols.
    def start(weights: Any, num_samples: int) -> Any:
        utf8_N = None if next_SV is None else jnp.zeros(num_samples, jnp.int32)
        context = jnp.zeros((num_samples, window), jnp.int32) if window else folded.initial_carry(weights, num_samples)
        return context, utf8_N

    @jax.jit
    def regroup(weights: Any, state: Any, ids_N: jax.Array, source_N: jax.Array, first_ids_N: jax.Array) -> Any:
        def choose(old: jax.Array, first: jax.Array) -> jax.Array:
            return jnp.where(jnp.expand_dims(source_N >= 0, tuple(range(1, old.ndim))), old[source_N], first)

        return jax.tree.map(choose, (state, ids_N), (start(weights, len(source_N)), first_ids_N))

    def next_logits(weights: Any, state: Any, ids_N: jax.Array) -> tuple[jax.Array, Any]:
        """Return (logits_NV, state) after the symbols `ids_N`."""
        context, utf8_N = state
        if utf8_N is not None:
            utf8_N = next_SV[utf8_N, ids_N]
        if not window:
            logits_1NV, context = folded.apply({"params": weights}, ids_N[None], context)
        else:
            context = jnp.concatenate([context[:, 1:], ids_N[:, None]], axis=1)
            carry = folded.initial_carry(weights, len(ids_N))
            logits_1NV, _ = folded.apply({"params": weights}, context.T, carry, only_last=True)
        return logits_1NV[0], (context, utf8_N)

    @jax.jit
    def read(weights: Any, state: Any, prompt_KN: jax.Array) -> Any:
        ids_KN = jnp.broadcast_to(prompt_KN, (len(prompt_KN), len(jax.tree.leaves(state)[0])))
        return jax.lax.scan(lambda state, ids_N: (next_logits(weights, state, ids_N)[1], None), state, ids_KN)[0]

    @functools.partial(jax.jit, static_argnames=("filtered", "num_top"))
    def block(weights, state, ids_N, keys_N, position, prompt_KN, prompt_length, settings, filtered, num_top=None):
        shape = len(prompt_KN), len(ids_N)
        offsets_K1 = jnp.arange(len(prompt_KN))[:, None]
        temperature_N1, _, _, greedy_N1 = (jnp.asarray(each)[..., None] for each in settings)
        filters_N = [jnp.broadcast_to(each, len(ids_N)) for each in (settings.top_k, settings.top_p)]
        # The quotient of a tiny temperature overflows, except for logits of at most 0. Others keep the bits of their draws.
        tiny_N1 = temperature_N1 < _TINY_TEMPERATURE

        # To draw a symbol, add Gumbel noise to the logits and take the largest (Gumbel 1954). The noise of all K symbols is
        # drawn at once, outside the loop.
        def noise(key, at):
            return jax.random.gumbel(jax.random.fold_in(key, at), (vocab_size,))

        positions_KN = jnp.broadcast_to(position + 1 + offsets_K1, shape)
        noise_KNV = jnp.where(greedy_N1, 0, jax.vmap(jax.vmap(noise), (None, 0))(keys_N, positions_KN))

        def draw_symbol(carried, inputs):
            state, ids_N = carried
            noise_NV, in_prompt_N, prompt_N = inputs
            logits_NV, state = next_logits(weights, state, ids_N)
            logprobs_NV = None if num_top is None else jax.nn.log_softmax(logits_NV)
            if (utf8_N := state[1]) is not None:
                logits_NV = jnp.where(next_SV[utf8_N] >= 0, logits_NV, -jnp.inf)
            logits_NV = (logits_NV - jnp.where(tiny_N1, logits_NV.max(-1, keepdims=True), 0.0)) / temperature_N1
            if filtered:
                logits_NV = jax.vmap(filter_top_k_top_p)(logits_NV, *filters_N)
            ids_N = jnp.where(in_prompt_N, prompt_N, jnp.argmax(logits_NV + noise_NV, axis=-1))
            logprobs = None
            if num_top is not None:
                logprobs = Logprobs(logprobs_NV[jnp.arange(len(ids_N)), ids_N], *jax.lax.top_k(logprobs_NV, num_top))
            return (state, ids_N), (ids_N, logprobs)

        in_prompt_KN = jnp.broadcast_to(offsets_K1 < prompt_length, shape)
        inputs = noise_KNV, in_prompt_KN, jnp.broadcast_to(prompt_KN, shape)
        (state, ids_N), (drawn_KN, logprobs) = jax.lax.scan(draw_symbol, (state, ids_N), inputs)
        return state, ids_N, drawn_KN, logprobs

    return Sampler(prepare, start, regroup, read, block)


def sample_keys(seed: int, num_samples: int, first: int = 0) -> jax.Array:
    """Return one PRNG key for each sample, shape (N,). The key of sample i, counted from `first`, depends only on i."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), first + jnp.arange(num_samples))


def block_size(num_samples: int, vocab_size: int) -> int:
    """Return the number of symbols in a dispatch, for which the random numbers of N samples fit into memory."""
    return min(_BLOCK, max(1, _MAX_NOISE // (num_samples * vocab_size)))


def generate(
    sampler: Sampler, params: Any, vocab: Vocab, prompt: np.ndarray, keys_N: jax.Array, length: int, settings: Settings
) -> Iterator[np.ndarray]:
    """Draw symbols after a prompt; yield their ids in pieces of shape (N, up to K), `length` symbols in all.

    Args:
        sampler: from `make_sampler(model, vocab)`.
        params: the parameters of the model.
        vocab: the vocabulary of the model.
        prompt: ids of at least one symbol, the same for all samples.
        keys_N: from `sample_keys`.
        length: the number of symbols to draw for each sample.
        settings: how a symbol is drawn.
    """
    num_samples = keys_N.shape[0]
    size = block_size(num_samples, vocab.size)
    weights = sampler.prepare(params)
    state = sampler.start(weights, num_samples)
    start = 0
    while start + _READ < len(prompt):
        state = sampler.read(weights, state, np.asarray(prompt[start : start + _READ, None], np.int32))
        start += _READ
    ids_N = jnp.full(num_samples, int(prompt[start]), jnp.int32)
    filtered = settings.top_k < vocab.size or settings.top_p < 1
    last: tuple[jax.Array, slice] | None = None
    for position in range(start, len(prompt) - 1 + length, size):
        ahead = prompt[position + 1 : position + 1 + size]
        prompt_K1 = np.zeros((size, 1), np.int32)
        prompt_K1[: len(ahead), 0] = ahead
        state, ids_N, drawn_KN, _ = sampler.block(
            weights, state, ids_N, keys_N, position, prompt_K1, len(ahead), settings, filtered=filtered
        )
        if last is not None:  # The device draws the next block while the host reads the last one.
            yield from _drawn(*last)
        last = drawn_KN, slice(len(ahead), len(prompt) - 1 + length - position)
    if last is not None:
        yield from _drawn(*last)


def _drawn(drawn_KN: jax.Array, wanted: slice) -> Iterator[np.ndarray]:
    """Wait for a block and yield the symbols of it that are wanted, if there are any."""
    drawn = np.asarray(drawn_KN)[wanted]
    if drawn.size:
        yield drawn.T


def sample_text(
    sampler: Sampler,
    params: Any,
    vocab: Vocab,
    config_sample: ConfigDict,
    seed: int,
    prompt_ids: np.ndarray,
    stops: Sequence[str] = (),
) -> list[str]:
    """Return `config.sample.num_samples` samples as text, without the prompt.

    Args:
        sampler: from `make_sampler(model, vocab)`.
        params: the parameters of the model.
        vocab: the vocabulary of the model.
        config_sample: `config.sample`.
        seed: the seed of the samples.
        prompt_ids: ids of at least one symbol.
        stops: see `decoding.SampleDecoder`.
    """
    settings = Settings.from_config(config_sample, vocab.size)
    keys_N = sample_keys(seed, config_sample.num_samples)
    pieces = generate(sampler, params, vocab, prompt_ids, keys_N, config_sample.length, settings)
    return ["".join(texts) for texts in zip(*decode_samples(pieces, vocab, config_sample.num_samples, stops))]
