"""Turn a state dict of PyTorch and its vocabulary into a model of charlm."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from charlm.config.rules import check
from charlm.exchange.files import read_state_dict, read_symbols
from charlm.exchange.torch_names import ImportFailed, StateDict, from_torch, recognise
from charlm.runs.language_model import LanguageModel


def import_torch(
    state_dict: str | Path,
    vocab: str | Path,
    embedding: str | None = None,
    head: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> LanguageModel:
    """Return the model of a state dict.

    charlm orders the symbols of a vocabulary by code point, so rows and columns that belong to symbols change their places.

    Args:
        state_dict: a file that `files.read_state_dict` reads.
        vocab: a file that `files.read_symbols` reads.
        embedding: the name of the embedding's module; None: recognised by its shape.
        head: the name of the head's module; None: recognised by its shape.
        say: called with a line for each change that was necessary.

    Raises:
        ImportFailed: a file is damaged, or the model is none that charlm has.
        ConfigError: a package is not installed.
    """
    known, symbols = read_symbols(Path(vocab))
    found = recognise(read_state_dict(Path(state_dict)), embedding, head)
    if len(symbols) != found.vocab_size:
        raise ImportFailed(f"{vocab} has {len(symbols)} symbols, but the model has {found.vocab_size}")
    for note in found.notes:
        say(f"charlm: {note}")
    config = found.config
    config.data.vocab, config.data.unknown = known.kind, known.unknown
    check(config, str(state_dict))
    order = np.argsort([ord(symbol) for symbol in symbols])
    arrays = _reorder_symbols(found.arrays, order, config.model.encoding)
    params = from_torch(config.model, arrays)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise ImportFailed(f"{state_dict}: the sum of two biases is not finite")
    return LanguageModel(config.lock(), known, jax.device_put(params))


def _reorder_symbols(arrays: StateDict, order: np.ndarray, encoding: str) -> StateDict:
    """Return the arrays with the symbols in another order: the k-th becomes the one that was at order[k]."""
    arrays = dict(arrays)
    for name in ("head.weight", "head.bias", *(["embedding.weight"] if encoding == "embedding" else [])):
        arrays[name] = arrays[name][order]
    if encoding == "one_hot":
        arrays["rnn.weight_ih_l0"] = arrays["rnn.weight_ih_l0"][:, order]
    return arrays
