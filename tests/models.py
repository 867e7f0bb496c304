"""Untrained models for tests, and a text for them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import charlm
from charlm.config import default_config
from charlm.data.vocab import Vocab
from charlm.nn.model import CharLM, Params

TEXT = "the cat sat on the mat; the dog ate the rat.\nthat was that, said the cat, and sat.\n" * 3


def small_model(
    cell: str = "lstm", layers: int = 1, kind: str = "chars", scale: float = 1.5, text: str = TEXT, **changes: Any
) -> charlm.LanguageModel:
    """Return an untrained model of the characters of `text`, whose parameters are far from zero.

    With a scale above 1 the state can be chaotic, so that rounding errors grow from symbol to symbol.
    """
    config = default_config()
    config.update_from_flattened_dict(
        {
            "model.cell": cell,
            "model.hidden_size": 12,
            "model.embedding_size": 6,
            "model.num_layers": layers,
            "data.vocab": kind,
            "eval.num_streams": 1,
            "sample.length": 40,
            **changes,
        }
    )
    vocab = Vocab.all_bytes() if kind == "bytes" else Vocab.from_chars(text)
    module = CharLM.from_config(config.model, vocab.size)
    return charlm.LanguageModel(config.lock(), vocab, _params(module, scale))


@functools.cache
def _params(module: CharLM, scale: float) -> Params:
    drawn = module.initial_params(jax.random.key(1))
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) * np.float32(scale) + np.float32(0.01)), drawn)
