"""Sample text from a model: the compiled sampler, the PRNG keys, and the prompt.

Letters: N samples, K symbols in a block, V vocabulary, S states of the UTF-8 automaton, W symbols in a window.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from charlm.data.batching import uniform
from charlm.data.documents import Documents
from charlm.data.text import normalise
from charlm.data.vocab import Vocab, utf8_transitions
from charlm.nn.cells import SameCell
from charlm.nn.model import CharLM
from charlm.system.errors import ConfigError, CorpusError

# The number of symbols in a dispatch, and the most random numbers in a dispatch. The second may lower the first.
_BLOCK, _MAX_NOISE = 64, 1 << 22
_TINY_TEMPERATURE = 1e-30


class Settings(NamedTuple):
    """How a symbol is drawn. These are arguments of the compiled program, so changing them triggers no recompilation.

    Attributes:
        temperature: the logits are divided by it; above 0.
        top_k: top-k filtering: draw from the k most probable symbols; V: from all.
        top_p: top-p (nucleus) filtering after it: draw from the most probable symbols whose probabilities together reach p
            (Holtzman et al. 2020); 1: from all.
        greedy: take the most probable symbol.
    """

    temperature: float
    top_k: int
    top_p: float
    greedy: bool

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
    return jnp.zeros_like(logits_V).at[order].set(sorted_V)


class Sampler(NamedTuple):
    """The functions that draw text from a model (`make_sampler`).

    Attributes:
        prepare: params -> weights, jitted. It does the work that is the same for all symbols.
        start: (weights, N) -> the state before the first symbol of N samples.
        block: (weights, state, ids_N, keys_N, position, prompt_K, prompt_length, settings, filtered) -> (state, ids_N,
            drawn_KN), jitted. It draws K symbols for each of N samples. `ids_N` are the last symbols and `position` is their
            position in the text. The symbol at position p is drawn with the sample's key, folded with p, so it depends only on
            the key and on the symbols before it. The first `prompt_length` of the K symbols are taken from `prompt_K` instead.
            `filtered` is static and says whether top-k or top-p filtering is in use.
    """

    prepare: Callable[[Any], Any]
    start: Callable[[Any, int], Any]
    block: Callable[..., tuple[Any, jax.Array, jax.Array]]


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
        context = jnp.zeros((window, num_samples), jnp.int32) if window else folded.initial_carry(weights, num_samples)
        return context, utf8_N

    def next_logits(weights: Any, context: Any, ids_N: jax.Array) -> tuple[jax.Array, Any]:
        """Return (logits_NV, context) after the symbols `ids_N`."""
        if not window:
            logits_1NV, carry = folded.apply({"params": weights}, ids_N[None], context)
            return logits_1NV[0], carry
        window_WN = jnp.concatenate([context[1:], ids_N[None]])
        logits_1NV, _ = folded.apply({"params": weights}, window_WN, folded.initial_carry(weights, len(ids_N)), only_last=True)
        return logits_1NV[0], window_WN

    @functools.partial(jax.jit, static_argnames="filtered")
    def block(weights, state, ids_N, keys_N, position, prompt_K, prompt_length, settings, filtered):
        # To draw a symbol, add Gumbel noise to the logits and take the largest (Gumbel 1954). The noise of all K symbols is
        # drawn at once, outside the loop.
        def noise(at):
            return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, at), (vocab_size,)))(keys_N)

        positions_K = position + 1 + jnp.arange(len(prompt_K))
        noise_KNV = jnp.where(settings.greedy, 0, jax.vmap(noise)(positions_K))

        def draw_symbol(state, inputs):
            (context, utf8_N), ids_N = state
            noise_NV, in_prompt, prompt_id = inputs
            logits_NV, context = next_logits(weights, context, ids_N)
            if utf8_N is not None:
                utf8_N = next_SV[utf8_N, ids_N]
                logits_NV = jnp.where(next_SV[utf8_N] >= 0, logits_NV, -jnp.inf)
            # The quotient of a tiny temperature overflows, except for logits of at most 0. Others keep the bits of their draws.
            tiny = settings.temperature < _TINY_TEMPERATURE
            logits_NV = (logits_NV - jnp.where(tiny, logits_NV.max(-1, keepdims=True), 0.0)) / settings.temperature
            if filtered:
                logits_NV = jax.vmap(filter_top_k_top_p, (0, None, None))(logits_NV, settings.top_k, settings.top_p)
            ids_N = jnp.where(in_prompt, prompt_id, jnp.argmax(logits_NV + noise_NV, axis=-1))
            return ((context, utf8_N), ids_N), ids_N

        in_prompt_K = jnp.arange(len(prompt_K)) < prompt_length
        (state, ids_N), drawn_KN = jax.lax.scan(draw_symbol, (state, ids_N), (noise_KNV, in_prompt_K, prompt_K))
        return state, ids_N, drawn_KN

    return Sampler(prepare, start, block)


def sample_keys(seed: int, num_samples: int, first: int = 0) -> jax.Array:
    """Return one PRNG key for each sample, shape (N,). The key of sample i, counted from `first`, depends only on i."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), first + jnp.arange(num_samples))


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
    size = min(_BLOCK, max(1, _MAX_NOISE // (num_samples * vocab.size)))
    weights = sampler.prepare(params)
    state = sampler.start(weights, num_samples)
    ids_N = jnp.full(num_samples, int(prompt[0]), jnp.int32)
    filtered = settings.top_k < vocab.size or settings.top_p < 1
    for position in range(0, len(prompt) - 1 + length, size):
        ahead = prompt[position + 1 : position + 1 + size]
        prompt_K = np.zeros(size, np.int32)
        prompt_K[: len(ahead)] = ahead
        state, ids_N, drawn_KN = sampler.block(
            weights, state, ids_N, keys_N, position, prompt_K, len(ahead), settings, filtered=filtered
        )
        end = len(prompt) - 1 + length - position
        drawn = np.asarray(drawn_KN)[len(ahead) : end]
        if drawn.size:
            yield drawn.T


class SampleDecoder:
    """Turns the ids of one sample into text, piece by piece, and ends the text where a stop string begins.

    Args:
        vocab: the vocabulary of the ids.
        stops: the strings that end the sample and do not belong to it. The one that begins first ends it.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(self, vocab: Vocab, stops: Sequence[str] = ()):
        self._decode, self._stops, self._held, self.stopped = vocab.decoder(), stops, "", False

    def feed(self, ids: np.ndarray) -> str:
        """Return the text that the next ids add. What may be the beginning of a stop string is held back."""
        if self.stopped or not self._stops:
            return "" if self.stopped else self._decode(ids)
        text = self._held + self._decode(ids)
        # A stop string that may still be completed can begin before one that is complete.
        sure = len(text) - max(n for stop in self._stops for n in range(len(stop)) if text.endswith(stop[:n]))
        end = self._find_stop(text)
        self.stopped = end <= sure and end < len(text)
        end = min(end, sure)
        self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """Return the text that was held back, after the last ids."""
        return "" if self.stopped else self._held[: self._find_stop(self._held)]

    def _find_stop(self, text: str) -> int:
        """Return where the first stop string begins; the length of the text if there is none."""
        return min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=len(text))


def decode_samples(
    pieces: Iterator[np.ndarray], vocab: Vocab, num_samples: int, stops: Sequence[str] = ()
) -> Iterator[list[str]]:
    """Yield the new text of each sample for each piece of ids from `generate`; end when all samples have stopped.

    Args:
        pieces: ids of shape (num_samples, up to K).
        vocab: the vocabulary of the ids.
        num_samples: the number of samples.
        stops: see `SampleDecoder`.
    """
    decoders = [SampleDecoder(vocab, stops) for _ in range(num_samples)]
    for piece in pieces:
        yield [decoder.feed(ids) for decoder, ids in zip(decoders, piece)]
        if all(decoder.stopped for decoder in decoders):
            return
    yield [decoder.flush() for decoder in decoders]


def make_prompt(config: ConfigDict, vocab: Vocab, train_ids: np.ndarray | None, seed: int) -> tuple[str, np.ndarray]:
    """Return the prompt, normalised like the corpus, and the ids from which a sample starts.

    The prompt is `sample.prompt`. Without it, the prompt is `sample.random_prompt` symbols of the training text, from a
    position that the seed determines. Without both, the prompt is empty and the sample starts after a line end, or after the
    first symbol of the vocabulary if it has no line end. For documents the prompt is the beginning of a document, so the sample
    starts from a boundary and the prompt.

    Args:
        config: the run's config, with `config.sample` as it is to be used.
        vocab: the run's vocabulary.
        train_ids: the training text, shape (symbols,). Only a random prompt needs it.
        seed: the seed of the sample.

    Raises:
        ConfigError: a symbol is not in the vocabulary, the prompt is shorter than `sample.window`, or it ends a document.
    """
    documents = Documents.from_config(config.data)
    prompt = normalise(config.sample.prompt or "", config.data.lowercase)
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        raise ConfigError(f"sample.prompt is {prompt!r}; it must be UTF-8")
    if documents and (documents.separator in prompt or documents.boundary in prompt):
        raise ConfigError(f"sample.prompt is {prompt!r}; it must not contain {documents.separator!r}, which ends a document")
    if not prompt and config.sample.random_prompt is not None:
        ids = _random_prompt(train_ids, vocab, config.sample.random_prompt, seed)
        prompt = vocab.decode(ids)
    else:
        try:
            ids = vocab.encode(prompt)
            if documents or not prompt:
                ids = np.concatenate([vocab.encode(start_text(vocab, documents)), ids])
        except CorpusError as error:
            raise ConfigError(f"sample.prompt: {error}") from None
    if len(ids) < config.sample.window:
        raise ConfigError(
            f"sample.window is {config.sample.window}, but the prompt has {len(ids)} symbols; give a longer one, or set "
            "sample.random_prompt"
        )
    return prompt, ids


def start_text(vocab: Vocab, documents: Documents | None = None) -> str:
    """Return the text after which a sample without a prompt starts: for documents the boundary."""
    if documents is not None:
        return documents.boundary
    return "\n" if "\n" in vocab.symbols else vocab.symbols[0]


def _random_prompt(train_ids: np.ndarray, vocab: Vocab, length: int, seed: int) -> np.ndarray:
    """Return symbols from a random position of a text. Of bytes, return whole characters, so up to three bytes more."""
    if len(train_ids) < length:
        raise ConfigError(f"sample.random_prompt is {length}, but the training text has {len(train_ids)} symbols")

    def inside_a_char(at: int) -> bool:
        return 0 < at < len(train_ids) and vocab.num_chars(train_ids[at : at + 1]) == 0

    start = int(uniform(seed, 0, 1)[0] * (len(train_ids) - length + 1))
    while inside_a_char(start):
        start -= 1
    end = start + length
    while inside_a_char(end):
        end += 1
    return np.asarray(train_ids[start:end])


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
        stops: see `SampleDecoder`.
    """
    settings = Settings.from_config(config_sample, vocab.size)
    keys_N = sample_keys(seed, config_sample.num_samples)
    pieces = generate(sampler, params, vocab, prompt_ids, keys_N, config_sample.length, settings)
    return ["".join(texts) for texts in zip(*decode_samples(pieces, vocab, config_sample.num_samples, stops))]
