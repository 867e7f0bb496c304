"""How much each symbol of a text influences the prediction of the symbols after it.

Letters: N symbols of a text, K symbols of a window, B windows, H hidden, V vocabulary, T time, I input features.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from charlm.nn.cells import find_cell
from charlm.nn.inputs import from_layer
from charlm.runs.language_model import LanguageModel

# The number of windows in one call of the compiled program.
_BATCH = 64


def influence(model: LanguageModel, ids_N: np.ndarray, states: Mapping[str, np.ndarray], reach: int = 50) -> np.ndarray:
    """Return the influence of the symbols before each symbol, shape (N, K), with K = `reach`.

    Entry [t, k] is the Euclidean norm of the gradient of log p(symbol t | the symbols before it) with respect to the input
    features of symbol t - 1 - k, as in the connectivity of Madsen (2019). The features are the embedding, or the one-hot
    vector. It is 0 where there is no such symbol, and where a boundary between documents stands between the two symbols.

    Args:
        model: the model.
        ids_N: the text.
        states: from `LanguageModel.states` for this text.
        reach: how many symbols back the influence is computed.
    """
    found = np.zeros((len(ids_N), reach), np.float32)
    width = min(reach, len(ids_N) - 1)
    if width < 1:
        return found
    module, params = model.module.clone(recurrence="scan"), model.params

    @jax.jit
    def gradient_norms(params, ids_TB, targets_B, places_B, carry):
        """Return the norms (T, B) for windows whose target follows the symbol at `places_B`."""

        def log_probability(x_TIB):
            logits_TBV, _ = module.apply({"params": params}, from_layer(x_TIB), carry)
            columns = jnp.arange(len(targets_B))
            return jax.nn.log_softmax(logits_TBV[places_B, columns])[columns, targets_B].sum()

        gradient_TIB = jax.grad(log_probability)(module.features(params, ids_TB))
        return jnp.sqrt(jnp.square(gradient_TIB).sum(axis=1))

    # The model replaces its state at a boundary, so a window does not begin before the last boundary of its symbols.
    is_boundary_N = np.asarray(ids_N) == model.boundary
    begins_N = np.maximum.accumulate(np.where(is_boundary_N, np.arange(len(ids_N)), 0))
    before = _states_before(model, states, is_boundary_N)
    for first in range(1, len(ids_N), _BATCH):
        targets_B = np.minimum(np.arange(first, first + _BATCH), len(ids_N) - 1)  # The last batch repeats the last target.
        starts_B = np.maximum(targets_B - width, begins_N[targets_B - 1])
        # What follows the target does not count.
        ids_TB = np.asarray(ids_N[np.minimum(starts_B + np.arange(width)[:, None], len(ids_N) - 1)], np.int32)
        carry = tuple(tuple(each[starts_B] for each in layer) for layer in before)
        places_B = targets_B - 1 - starts_B
        norms_TB = np.asarray(gradient_norms(params, ids_TB, np.asarray(ids_N[targets_B], np.int32), places_B, carry))
        for column, (target, place) in enumerate(zip(targets_B, places_B)):
            found[target, : place + 1] = norms_TB[: place + 1, column][::-1]
    return found


def _states_before(model: LanguageModel, states: Mapping[str, np.ndarray], is_boundary_N: np.ndarray) -> list[list[np.ndarray]]:
    """Return for each layer the carries from which each symbol is read, arrays (N, H)."""
    names = find_cell(model.config.model.cell).carries

    def before(name: str, first_1H: np.ndarray) -> np.ndarray:
        return np.where(is_boundary_N[:, None], first_1H, np.concatenate([first_1H, states[name][:-1]]))

    return [
        [before(f"layer_{k}.{name}", np.asarray(first_1H)) for name, first_1H in zip(names, carry)]
        for k, carry in enumerate(model.initial_state())
    ]
