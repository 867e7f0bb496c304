"""The loss: cross-entropy in nats, and penalties on the activations.

Letters: B batch, T time, H hidden, V vocabulary.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def cross_entropy(logits_TBV: jax.Array, targets_TB: jax.Array) -> jax.Array:
    """Return the cross-entropy of every target in nats, shape (T, B)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_TBV, targets_TB)


def activation_penalty(
    optimizer: ConfigDict, activations: Mapping[str, tuple[jax.Array]], starts_TB: jax.Array | None = None
) -> jax.Array:
    """Return activation and temporal activation regularisation (Merity et al. 2018, section 4.7), a scalar.

    This is `activation_reg` times the mean square of the last layer's outputs after dropout, plus `temporal_reg` times the
    mean square of the differences between its outputs at consecutive steps, before dropout.

    Args:
        optimizer: `config.optimizer`.
        activations: the collection that `CharLM.__call__` sows.
        starts_TB: whether a document starts at each step; the difference to the step before is then 0. None: no step does.
    """
    (output_TBH,), (dropped_TBH,) = activations["output"], activations["dropped"]
    differences_TBH = output_TBH[1:] - output_TBH[:-1]
    if starts_TB is not None:
        differences_TBH = jnp.where(starts_TB[1:, :, None], 0, differences_TBH)
    # A window of one character has no differences, and the mean of nothing is NaN.
    temporal = jnp.sum(jnp.square(differences_TBH)) / max(differences_TBH.size, 1)
    return optimizer.activation_reg * jnp.mean(jnp.square(dropped_TBH)) + optimizer.temporal_reg * temporal
