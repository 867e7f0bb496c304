"""Dynamic evaluation: a model that goes on learning from the text that it is scored on (Krause et al. 2018).

The text is read in segments. Each is scored first, with the parameters as they are, and learnt from only then; so no
character ever changes the parameters that it is scored with. This is their RMS variant:

    params <- params - rate * grad / (rms + eps * mean(rms)) + min(decay * rms / mean(rms), 1) * (first - params)

with `first` the trained parameters, `rms` the root of the mean square of gradients on the training text, and its mean
that over all parameters.

Letters: S segments in a dispatch, T time (the length of a segment).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charlm.nn.model import CharLM
from charlm.training.loss import cross_entropy

# Segments in a dispatch.
_SEGMENTS = 256
# Added to the root mean square, as a part of its mean over all parameters: some see hardly any gradient in training.
_EPS = 0.1


def _segment_loss(model: CharLM) -> Callable:
    """(params, carry, window (T + 1,), weights_T) -> (summed nats, (nats of each target, last state))."""

    def loss(params, carry, window, weights_T):
        logits_T1V, last = model.apply({"params": params}, window[:-1, None], carry)
        losses_T = cross_entropy(logits_T1V, window[1:, None])[:, 0] * weights_T
        return losses_T.sum(), (losses_T, last)

    return loss


def gradient_rms(model: CharLM, params: Any, ids: np.ndarray, segment: int, num_segments: int = 500) -> Any:
    """Root mean square of the gradients of single segments, spread evenly over a text; a tree like `params`.

    Each segment's state comes from the one before it, which is read from a zero state.
    """
    gradient = jax.grad(_segment_loss(model), has_aux=True)

    @jax.jit
    def root_mean_square(params, windows_SW):
        def add(total, window):
            _, carry = model.apply({"params": params}, window[:segment, None], model.initial_carry(params, 1))
            grads, _ = gradient(params, carry, window[segment:], jnp.ones(segment))
            return jax.tree.map(lambda t, g: t + g * g, total, grads), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), windows_SW)
        return jax.tree.map(lambda t: jnp.sqrt(t / len(windows_SW)), total)

    width = 2 * segment + 1
    places = len(ids) - width + 1
    starts = np.arange(min(num_segments, places), dtype=np.int64) * places // min(num_segments, places)
    return root_mean_square(params, np.asarray(ids[starts[:, None] + np.arange(width)], np.int32))


def make_dynamic_scorer(model: CharLM, segment: int) -> Callable:
    """(params, rms, ids, rate, decay) -> nats of every symbol of the text but the first, float64, shape (len(ids) - 1,).

    Raises ValueError if the text has fewer than two symbols.
    """
    gradient = jax.grad(_segment_loss(model), has_aux=True)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def read(params, carry, first, scale, pull, windows_SW, weights_ST):
        """Score S segments one after another, and learn from each once it is scored."""

        def one(state, segment):
            params, carry = state
            grads, (losses_T, carry) = gradient(params, carry, *segment)
            params = jax.tree.map(lambda p, g, s, f, d: p - s * g + d * (f - p), params, grads, scale, first, pull)
            return (params, carry), losses_T

        (params, carry), losses_ST = jax.lax.scan(one, (params, carry), (windows_SW, weights_ST))
        return params, carry, losses_ST

    def score(params, rms, ids: np.ndarray, rate: float, decay: float) -> np.ndarray:
        if len(ids) < 2:
            raise ValueError("a text of fewer than two symbols has nothing to score")
        mean = sum(float(r.sum()) for r in jax.tree.leaves(rms)) / sum(r.size for r in jax.tree.leaves(rms))
        scale = jax.tree.map(lambda r: rate / (r + _EPS * mean), rms)
        # No parameter is pulled back by more than all the way.
        pull = jax.tree.map(lambda r: jnp.minimum(decay * r / mean, 1.0), rms)
        first, params = params, jax.tree.map(jnp.copy, params)
        carry, losses = model.initial_carry(params, 1), []
        for at in range(0, len(ids) - 1, _SEGMENTS * segment):
            positions_SW = at + np.arange(_SEGMENTS)[:, None] * segment + np.arange(segment + 1)
            weights_ST = (positions_SW[:, 1:] < len(ids)).astype(np.float32)
            windows_SW = np.asarray(ids[np.minimum(positions_SW, len(ids) - 1)], np.int32)
            params, carry, losses_ST = read(params, carry, first, scale, pull, windows_SW, weights_ST)
            losses.append(np.asarray(losses_ST, np.float64).ravel())
        return np.concatenate(losses)[: len(ids) - 1]

    return score


def dynamic_cross_entropy(model: CharLM, params: Any, train_ids: np.ndarray, ids: np.ndarray, config_eval) -> float:
    """The nats of all symbols of a text but the first, under dynamic evaluation as `config.eval` says.

    Args:
        model: its architecture.
        params: the trained parameters, which stay as they are.
        train_ids: the training text, for the size of the gradients; more than twice `eval.dynamic_segment`.
        ids: the text.
        config_eval: `config.eval`.
    """
    rms = gradient_rms(model, params, train_ids, config_eval.dynamic_segment)
    score = make_dynamic_scorer(model, config_eval.dynamic_segment)
    return float(score(params, rms, ids, config_eval.dynamic_rate, config_eval.dynamic_decay).sum())
