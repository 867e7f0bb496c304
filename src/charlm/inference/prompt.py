"""The prompt from which samples start: as text, and as the ids that the sampler reads."""

import numpy as np
from ml_collections import ConfigDict

from charlm.data.batching import uniform
from charlm.data.documents import Documents
from charlm.data.text import normalise
from charlm.data.vocab import Vocab
from charlm.system.errors import ConfigError, CorpusError


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
