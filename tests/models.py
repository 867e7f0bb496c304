"""Untrained models for tests, and a text for them."""

from typing import Any

import jax

import charlm
from charlm.config import default_config
from charlm.data.vocab import Vocab
from charlm.nn.model import CharLM

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
    params = jax.tree.map(lambda leaf: scale * leaf + 0.01, module.initial_params(jax.random.key(1)))
    return charlm.LanguageModel(config.lock(), vocab, params)
