"""The options of a sample: the group `config.sample` with the values of a call or a command."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from charlm.config.rules import LARGEST_SEED, check
from charlm.inference.sampler import Sampler, Settings
from charlm.runs.memory import check_memory
from charlm.system.errors import ConfigError


class Start(NamedTuple):
    """What samples of one prompt start from, and how they are drawn. Letters: N samples.

    Attributes:
        prompt: the prompt, as the model reads it.
        ids: the symbols from which the samples start, at least one.
        keys_N: their PRNG keys.
        length: the number of symbols to draw for each.
        settings: how a symbol is drawn.
        stops: the strings that end a sample.
        sampler: the compiled sampler.
    """

    prompt: str
    ids: np.ndarray
    keys_N: jax.Array
    length: int
    settings: Settings
    stops: list[str]
    sampler: Sampler


def with_sample_options(config: ConfigDict, named: Mapping[str, Any], seed: Any, stop: Any, vocab_size: int) -> ConfigDict:
    """Return a copy of a config with other values for some keys of `config.sample`. All arguments of a sample are checked.

    Args:
        config: the run's config.
        named: values for keys of `config.sample`; None: that of the config.
        seed: the seed.
        stop: the string that ends a sample; None: there is none.
        vocab_size: the number of symbols of the vocabulary.

    Raises:
        ConfigError: an argument is unknown, of the wrong type or out of range, or the samples do not fit into memory.
    """
    config = copy.deepcopy(config)
    for name, value in named.items():
        if name not in config.sample:
            raise ConfigError(f"sampling has no argument {name!r}; it has {', '.join(config.sample)}, seed and stop")
        if value is not None:
            try:
                config.sample[name] = value.item() if isinstance(value, np.generic) else value
            except (TypeError, ValueError):
                raise ConfigError(f"{name} is {value!r}, a value of type {type(value).__name__}") from None
    check(config, "the arguments of the sample")
    if not isinstance(seed, int | np.integer) or not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"the seed is {seed!r}; it must be an integer between 0 and {LARGEST_SEED}")
    if stop is not None and (not isinstance(stop, str) or not stop):
        raise ConfigError(f"stop is {stop!r}; it must be a string of at least one character")
    check_memory(config, vocab_size, training=False)
    return config
