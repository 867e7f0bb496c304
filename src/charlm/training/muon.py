"""Muon for recurrent networks: each gate's block of a kernel is orthogonalised by itself.

Letters: H hidden, I input features, G gates times hidden, K number of blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax import contrib

# The root mean square of an update, divided by the learning rate. Adam's is about the same, so both need similar rates (Liu et
# al. 2025, section 2.2).
_RMS = 0.2


def muon(optimizer: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return Muon (Jordan et al. 2024) for the kernels that read a state, and Adam with Nesterov momentum for the others.

    A kernel holds one block for each gate. Gates have different roles, so each block is orthogonalised separately. The first
    layer's W_x, the embedding and the head belong to symbols, so Adam updates them.

    Args:
        optimizer: `config.optimizer`. Its keys b1 and b2 are for Adam.
        schedule: step -> learning rate, of Muon and of Adam.
    """
    inner = contrib.muon(
        schedule,
        ns_steps=optimizer.newton_schulz_steps,
        beta=optimizer.muon_momentum,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        adam_b1=optimizer.b1,
        adam_b2=optimizer.b2,
        adam_weight_decay=optimizer.weight_decay,
        consistent_rms=_RMS,
        muon_weight_dimension_numbers=_dimension_numbers,
    )

    def init(params: Any) -> Any:
        return inner.init(_split(params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(_split(grads), state, _split(params))
        return jax.tree_util.tree_map_with_path(_merge, grads, updates), state

    return optax.GradientTransformation(init, update)


def num_blocks(path: tuple[Any, ...], leaf: jax.Array) -> int:
    """Return K, the number of blocks of a kernel that reads a state; 0 for a parameter that Adam updates.

    Args:
        path: the keys of the parameter in the tree.
        leaf: the parameter. W_x has shape (I, G), and the matrices of a cell have the shape (rows, columns).
    """
    *layers, name = (getattr(key, "key", str(key)) for key in path)
    if leaf.ndim != 2 or not layers or (name == "W_x" and layers[-1] == "layer_0"):
        return 0
    long, short = leaf.shape[::-1] if name == "W_x" else leaf.shape
    return long // short if long % short == 0 else 1


def _split(params: Any) -> Any:
    """Return the parameters with every kernel as its blocks, shape (K, rows, columns)."""

    def split(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        blocks = num_blocks(path, leaf)
        if not blocks:
            return leaf
        return jnp.stack(jnp.split(leaf, blocks, axis=_gate_axis(path)))

    return jax.tree_util.tree_map_with_path(split, params)


def _merge(path: tuple[Any, ...], grad: jax.Array, update: jax.Array) -> jax.Array:
    """Return the update of a parameter, which may come as the update of its blocks."""
    return update if update.ndim == grad.ndim else jnp.concatenate(list(update), axis=_gate_axis(path))


def _gate_axis(path: tuple[Any, ...]) -> int:
    """Return the axis along which a kernel holds its gates: they are side by side in W_x and on top of each other elsewhere."""
    return 1 if path[-1].key == "W_x" else 0


def _dimension_numbers(params: Any) -> Any:
    """Return which axes of the blocks are orthogonalised; None for what Adam updates."""
    numbers = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map(lambda leaf: numbers if leaf.ndim == 3 else None, params)
