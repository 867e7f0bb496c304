"""Dynamic evaluation: the model keeps learning from the text that it is scored on (Krause et al. 2018).

The text is processed in segments. Each segment is first scored with the current parameters, which are then updated with its
gradient. No symbol therefore changes the parameters that it is scored with. The update is the RMS variant of the paper:

    params <- params - rate * grad / (rms + eps * mean(rms)) + min(decay * rms / mean(rms), 1) * (trained - params)

`trained` are the trained parameters. `rms` is the root mean square of the gradients on the training text. `mean(rms)` is its
mean over all parameters.

Letters: S segments in a dispatch, T time (the length of a segment), V vocabulary, W symbols in a window.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from charlm.nn.model import CharLM
from charlm.system.errors import ConfigError
from charlm.training.loss import cross_entropy

# The number of segments in a dispatch.
_SEGMENTS = 256
# `eps` of the update. It bounds the step of a parameter whose gradient in training is almost zero.
_EPS = 0.1


class DynamicScorer(Protocol):
    """A compiled dynamic scorer (`make_dynamic_scorer`)."""

    def __call__(self, params: Any, rms: Any, ids: np.ndarray, rate: float, decay: float) -> np.ndarray:
        """Return the nats of every symbol of a text except the first, float64, shape (len(ids) - 1,).

        Args:
            params: the trained parameters. They are not changed.
            rms: from `gradient_rms`.
            ids: the text, shape (symbols,).
            rate: the learning rate of the updates.
            decay: the strength of the pull towards the trained parameters.

        Raises:
            ValueError: the text has fewer than two symbols.
        """


def check_dynamic(config: ConfigDict, train_ids: np.ndarray) -> None:
    """Raise ConfigError if dynamic evaluation is not possible for a run.

    Args:
        config: the run's config.
        train_ids: its training text, shape (symbols,).
    """
    if config.batching.loss_on == "last":
        raise ConfigError("--dynamic scores all characters, but the run's batching.loss_on is 'last'")
    if len(train_ids) <= (needed := 2 * config.eval.dynamic_segment):
        raise ConfigError(
            f"--dynamic needs more than {needed} symbols of training text, twice eval.dynamic_segment; the text has "
            f"{len(train_ids)}"
        )


def _segment_loss(model: CharLM) -> Callable[..., tuple[jax.Array, tuple[jax.Array, Any]]]:
    """Return a function (params, carry, window of shape (T + 1,), weights_T) -> (summed nats, (nats_T, last carry))."""

    def loss(params, carry, window, weights_T):
        logits_T1V, last = model.apply({"params": params}, window[:-1, None], carry)
        losses_T = cross_entropy(logits_T1V, window[1:, None])[:, 0] * weights_T
        return losses_T.sum(), (losses_T, last)

    return loss


def gradient_rms(model: CharLM, params: Any, ids: np.ndarray, segment: int, num_segments: int = 500) -> Any:
    """Return the root mean square of the gradients of single segments of a text, a tree like `params`.

    The segments are evenly spaced over the text. The carry of each segment comes from the segment before it, which is read from
    a zero state.

    Args:
        model: its architecture.
        params: the trained parameters.
        ids: the training text, shape (symbols,), of more than 2 T symbols.
        segment: T, the length of a segment.
        num_segments: the number of segments, at most.
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
    num_positions = len(ids) - width + 1
    count = min(num_segments, num_positions)
    starts = np.arange(count, dtype=np.int64) * num_positions // count
    return root_mean_square(params, np.asarray(ids[starts[:, None] + np.arange(width)], np.int32))


def make_dynamic_scorer(model: CharLM, segment: int) -> DynamicScorer:
    """Return a dynamic scorer for texts in segments of length T = `segment`."""
    gradient = jax.grad(_segment_loss(model), has_aux=True)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def score_segments(params, carry, trained, scale, pull, windows_SW, weights_ST):
        """Score S segments one after another, and update the parameters after each."""

        def score_and_update(state, segment):
            params, carry = state
            grads, (losses_T, carry) = gradient(params, carry, *segment)
            params = jax.tree.map(lambda p, g, s, t, d: p - s * g + d * (t - p), params, grads, scale, trained, pull)
            return (params, carry), losses_T

        (params, carry), losses_ST = jax.lax.scan(score_and_update, (params, carry), (windows_SW, weights_ST))
        return params, carry, losses_ST

    def score(params: Any, rms: Any, ids: np.ndarray, rate: float, decay: float) -> np.ndarray:
        if len(ids) < 2:
            raise ValueError("a text of fewer than two symbols has nothing to score")
        mean = sum(float(r.sum()) for r in jax.tree.leaves(rms)) / sum(r.size for r in jax.tree.leaves(rms))
        scale = jax.tree.map(lambda r: rate / (r + _EPS * mean), rms)
        # At most 1: a parameter is pulled to its trained value, never beyond it.
        pull = jax.tree.map(lambda r: jnp.minimum(decay * r / mean, 1.0), rms)
        trained, params = params, jax.tree.map(jnp.copy, params)
        carry, losses = model.initial_carry(params, 1), []
        for at in range(0, len(ids) - 1, _SEGMENTS * segment):
            positions_SW = at + np.arange(_SEGMENTS)[:, None] * segment + np.arange(segment + 1)
            weights_ST = (positions_SW[:, 1:] < len(ids)).astype(np.float32)
            windows_SW = np.asarray(ids[np.minimum(positions_SW, len(ids) - 1)], np.int32)
            params, carry, losses_ST = score_segments(params, carry, trained, scale, pull, windows_SW, weights_ST)
            losses.append(np.asarray(losses_ST, np.float64).ravel())
        return np.concatenate(losses)[: len(ids) - 1]

    return score


def dynamic_cross_entropy(model: CharLM, params: Any, train_ids: np.ndarray, ids: np.ndarray, config_eval: ConfigDict) -> float:
    """Return the cross-entropy under dynamic evaluation in nats, summed over all symbols of a text except the first.

    Args:
        model: its architecture.
        params: the trained parameters. They are not changed.
        train_ids: the training text, from which the size of the gradients is estimated. It needs more than twice
            `eval.dynamic_segment` symbols.
        ids: the text, shape (symbols,), of at least two symbols.
        config_eval: `config.eval`, with `dynamic_segment`, `dynamic_rate` and `dynamic_decay`.
    """
    rms = gradient_rms(model, params, train_ids, config_eval.dynamic_segment)
    score = make_dynamic_scorer(model, config_eval.dynamic_segment)
    return float(score(params, rms, ids, config_eval.dynamic_rate, config_eval.dynamic_decay).sum())
