"""Sample text from a model: a compiled sampler that takes PRNG keys, and the prompt that it starts from.

Letters: N samples, K characters in a block, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charlm.data.batching import uniform
from charlm.data.text import normalise
from charlm.data.vocab import Vocab, utf8_transitions
from charlm.nn.model import CharLM
from charlm.system.errors import ConfigError, CorpusError

# Characters in one dispatch, and at most so many random numbers for them.
_BLOCK, _MOST_NOISE = 64, 1 << 22


class Settings(NamedTuple):
    """How a character is drawn; arguments of the compiled program, so that changing them compiles nothing.

    Attributes:
        temperature: divides the logits; above 0.
        top_k: draw among the k most probable; V for all.
        top_p: then among the most probable that together reach p (Holtzman et al. 2020); 1 for all.
        greedy: take the most probable.
    """

    temperature: float
    top_k: int
    top_p: float
    greedy: bool

    @classmethod
    def from_config(cls, sample, vocab_size: int) -> "Settings":
        top_k = vocab_size if sample.top_k is None else min(sample.top_k, vocab_size)
        return cls(sample.temperature, top_k, 1.0 if sample.top_p is None else sample.top_p, sample.greedy)


def filter_top_k_top_p(logits_V: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits with those outside the k most probable, and then outside the nucleus of mass p, at -inf."""
    order = jnp.argsort(-logits_V, stable=True)
    ranks = jnp.arange(logits_V.shape[-1])
    sorted_V = jnp.where(ranks < top_k, logits_V[order], -jnp.inf)
    probs = jax.nn.softmax(sorted_V)
    # A symbol stays if those before it have not reached p yet; the first always stays.
    before = jnp.cumsum(probs) - probs
    sorted_V = jnp.where((before < top_p) | (ranks == 0), sorted_V, -jnp.inf)
    return jnp.zeros_like(logits_V).at[order].set(sorted_V)


class Sampler(NamedTuple):
    """How a model writes text over a vocabulary (`make_sampler`).

    Attributes:
        prepare: params -> weights, jitted: what can be made once for all characters.
        start: (weights, N) -> the state before N texts.
        block: (weights, state, ids_N, keys_N, position, prompt_K, forced, settings, truncate) -> (state, ids_N,
            drawn_KN), jitted. Draws K symbols for each of N samples. `ids_N` are the last symbols and `position` their
            place in the text; the symbol at place p is drawn with the key folded with p, so that it depends on nothing
            but the sample's key and what stands before it. The first `forced` of the K are those of the prompt.
            `truncate` is static: whether top_k or top_p is in use.
    """

    prepare: Callable
    start: Callable
    block: Callable


def make_sampler(model: CharLM, vocab: Vocab, window: int = 0, dtype: str | None = None) -> Sampler:
    """The sampler of a model. What it draws over bytes is UTF-8: among those that can come next, by their probability.

    With a `window` W every symbol is drawn after its last W predecessors, read anew from a zero state, as a model that was
    trained on windows of W knows its text, which is W times the work. The prompt must have W symbols or more.

    Weights are kept in `dtype`, or in the model's where none is given.
    """
    dtype = dtype or model.dtype
    folded = model.folded(dtype)
    next_SV = jnp.asarray(utf8_transitions()) if vocab.kind == "bytes" else None

    @jax.jit
    def prepare(params):
        return model.fold(params, dtype)

    def start(weights, num_samples: int):
        utf8_N = None if next_SV is None else jnp.zeros(num_samples, jnp.int32)
        read = jnp.zeros((window, num_samples), jnp.int32) if window else folded.initial_carry(weights, num_samples)
        return read, utf8_N

    def read_on(weights, read, ids_N):
        """(logits_NV, what was read) after one more symbol: a recurrent state, or the window."""
        if not window:
            logits_1NV, read = folded.apply({"params": weights}, ids_N[None], read)
            return logits_1NV[0], read
        window_WN = jnp.concatenate([read[1:], ids_N[None]])
        logits_1NV, _ = folded.apply({"params": weights}, window_WN, folded.initial_carry(weights, len(ids_N)), only_last=True)
        return logits_1NV[0], window_WN

    @functools.partial(jax.jit, static_argnames="truncate")
    def block(weights, state, ids_N, keys_N, position, prompt_K, forced, settings, truncate):
        # Drawing is taking the most probable after adding noise (Gumbel 1954), and the noise of all K can be had at once.
        def noise(place):
            return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, place), (vocab.size,)))(keys_N)

        places_K = position + 1 + jnp.arange(len(prompt_K))
        noise_KNV = jnp.where(settings.greedy, 0, jax.vmap(noise)(places_K))

        def one(state, inputs):
            (read, utf8_N), ids_N = state
            noise_NV, is_forced, forced_id = inputs
            logits_NV, read = read_on(weights, read, ids_N)
            if utf8_N is not None:
                utf8_N = next_SV[utf8_N, ids_N]
                logits_NV = jnp.where(next_SV[utf8_N] >= 0, logits_NV, -jnp.inf)
            logits_NV = logits_NV / settings.temperature
            if truncate:
                logits_NV = jax.vmap(filter_top_k_top_p, (0, None, None))(logits_NV, settings.top_k, settings.top_p)
            ids_N = jnp.where(is_forced, forced_id, jnp.argmax(logits_NV + noise_NV, axis=-1))
            return ((read, utf8_N), ids_N), ids_N

        (state, ids_N), drawn_KN = jax.lax.scan(one, (state, ids_N), (noise_KNV, jnp.arange(len(prompt_K)) < forced, prompt_K))
        return state, ids_N, drawn_KN

    return Sampler(prepare, start, block)


def sample_keys(seed: int, num_samples: int) -> jax.Array:
    """One key a sample; the i-th is the same however many there are."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(num_samples))


def generate(
    sampler: Sampler, params, vocab: Vocab, prompt: np.ndarray, keys_N: jax.Array, length: int, settings: Settings
) -> Iterator[np.ndarray]:
    """Ids drawn after a prompt, in pieces of shape (N, up to K), `length` in all.

    Args:
        sampler: from `make_sampler(model, vocab)`.
        prompt: ids, at least one; the same for all samples.
        keys_N: from `sample_keys`.
    """
    num_samples = keys_N.shape[0]
    size = min(_BLOCK, max(1, _MOST_NOISE // (num_samples * vocab.size)))
    weights = sampler.prepare(params)
    state = sampler.start(weights, num_samples)
    ids_N = jnp.full(num_samples, int(prompt[0]), jnp.int32)
    truncate = settings.top_k < vocab.size or settings.top_p < 1
    for position in range(0, len(prompt) - 1 + length, size):
        ahead = prompt[position + 1 : position + 1 + size]
        prompt_K = np.zeros(size, np.int32)
        prompt_K[: len(ahead)] = ahead
        state, ids_N, drawn_KN = sampler.block(
            weights, state, ids_N, keys_N, position, prompt_K, len(ahead), settings, truncate=truncate
        )
        end = len(prompt) - 1 + length - position
        drawn = np.asarray(drawn_KN)[len(ahead) : end]
        if drawn.size:
            yield drawn.T


def make_prompt(config, vocab: Vocab, train_ids: np.ndarray | None, seed: int) -> tuple[str, np.ndarray]:
    """The prompt as the corpus would have it, and the ids to start from.

    Without `sample.prompt` a text starts after `sample.random_prompt` symbols of the training text, from a place that
    the seed decides; without that either, after a line end, or after the first symbol where the corpus has no line ends.

    Args:
        config: the run's, with what is asked of the sample.
        vocab: the run's.
        train_ids: the training text, shape (N,); needed for a random prompt alone.
        seed: the sample's.

    Raises:
        ConfigError: a symbol is not in the vocabulary, or the prompt is shorter than `sample.window`.
    """
    prompt = normalise(config.sample.prompt or "", config.data.lowercase)
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        raise ConfigError(f"sample.prompt is {prompt!r}; it must be UTF-8")
    if not prompt and config.sample.random_prompt is not None:
        ids = _random_prompt(train_ids, vocab, config.sample.random_prompt, seed)
        prompt = vocab.decode(ids)
    else:
        try:
            ids = vocab.encode(prompt or ("\n" if "\n" in vocab.symbols else vocab.symbols[0]))
        except CorpusError as error:
            raise ConfigError(f"sample.prompt: {error}") from None
    if len(ids) < config.sample.window:
        raise ConfigError(
            f"sample.window is {config.sample.window}, but the prompt has {len(ids)} symbols; give it as many, or set "
            "sample.random_prompt"
        )
    return prompt, ids


def _random_prompt(train_ids: np.ndarray, vocab: Vocab, length: int, seed: int) -> np.ndarray:
    """Symbols from a random place of a text; of bytes, whole characters, and so up to three more."""
    if len(train_ids) < length:
        raise ConfigError(f"sample.random_prompt is {length}, but the training text has {len(train_ids)} symbols")

    def inside_a_char(place: int) -> bool:
        return 0 < place < len(train_ids) and vocab.num_chars(train_ids[place : place + 1]) == 0

    start = int(uniform(seed, 0, 1)[0] * (len(train_ids) - length + 1))
    while inside_a_char(start):
        start -= 1
    end = start + length
    while inside_a_char(end):
        end += 1
    return np.asarray(train_ids[start:end])


def sample_text(sampler: Sampler, params, vocab: Vocab, sample, seed: int, prompt_ids: np.ndarray) -> list[str]:
    """Whole samples as text, without the prompt."""
    settings = Settings.from_config(sample, vocab.size)
    keys_N = sample_keys(seed, sample.num_samples)
    pieces = list(generate(sampler, params, vocab, prompt_ids, keys_N, sample.length, settings))
    return [vocab.decode(ids) for ids in np.concatenate(pieces, axis=1)]
