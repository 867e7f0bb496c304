"""Metrics: what is measured of a training step, and of a scored text, besides the loss. Each is one entry of a registry.

`TARGET_METRICS` look at the logits. `train.metrics` and `eval.metrics` select them by name. `GRADIENT_METRICS` look at the
gradient. `train.metrics` selects them.

Letters: B batch, T time, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

# (logits_TBV, targets_TB) -> the value of each target, shape (T, B), float32. The mean over the targets is recorded.
TargetMetric = Callable[[jax.Array, jax.Array], jax.Array]
# (gradient, parameters) -> {part of the name: scalar}. The gradient is that of the whole batch, before clipping.
GradientMetric = Callable[[Any, Any], Mapping[str, jax.Array]]


def accuracy(logits_TBV: jax.Array, targets_TB: jax.Array) -> jax.Array:
    """Return 1 where the most probable symbol is the target, and 0 elsewhere."""
    return (jnp.argmax(logits_TBV, axis=-1) == targets_TB).astype(jnp.float32)


def grad_norm_by_layer(grads: Any, params: Any) -> dict[str, jax.Array]:
    """Return the global norm of the gradient of each layer, of the embedding and of the head."""
    del params
    layers: dict[str, dict[str, Any]] = {}
    for name, grad in grads.items():
        layers.setdefault("head" if name.startswith("head_") else name, {})[name] = grad
    return {layer: optax.tree.norm(grad) for layer, grad in layers.items()}


TARGET_METRICS: Mapping[str, TargetMetric] = {"accuracy": accuracy}
GRADIENT_METRICS: Mapping[str, GradientMetric] = {"grad_norm_by_layer": grad_norm_by_layer}


def measure_targets(names: Sequence[str], logits_TBV: jax.Array, targets_TB: jax.Array) -> dict[str, jax.Array]:
    """Return {name: values of shape (T, B)} of those metrics that look at the logits. The other names are ignored."""
    return {name: TARGET_METRICS[name](logits_TBV, targets_TB) for name in names if name in TARGET_METRICS}


def measure_gradient(names: Sequence[str], grads: Any, params: Any) -> dict[str, jax.Array]:
    """Return {`name/part`: scalar} of those metrics that look at the gradient. The other names are ignored."""
    return {
        f"{name}/{part}": value
        for name in names
        if name in GRADIENT_METRICS
        for part, value in GRADIENT_METRICS[name](grads, params).items()
    }
