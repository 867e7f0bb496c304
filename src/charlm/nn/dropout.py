"""Dropout, and the noise of a cell. What a row of the batch draws depends only on a key and on the index of the row.

So a batch may be divided among devices, or into parts that are processed one after another, without a change of any mask.

Letters: B batch, T time, H hidden, K random numbers that a cell reads in a step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def drop_outputs(
    key: jax.Array, x_TBH: jax.Array, rate: float | jax.Array, first_row: int | jax.Array, variational: bool
) -> jax.Array:
    """Apply dropout (Srivastava et al. 2014) to the outputs of a layer. Unlike Flax's, it accepts a traced rate.

    Args:
        key: PRNG key of the layer and the step.
        x_TBH: the outputs.
        rate: the probability that an element becomes 0.
        first_row: the index of the first of the B rows in the batch.
        variational: whether one mask serves all steps (Gal and Ghahramani 2016).
    """
    length, num_rows, hidden = x_TBH.shape
    shape = (1 if variational else length, hidden)
    draw = jax.vmap(functools.partial(_draw_bits, shape=shape), out_axes=1)
    return _drop(x_TBH, rate, draw(_row_keys(key, first_row, num_rows)))


def drop_weights(key: jax.Array, W: jax.Array, rate: float | jax.Array) -> jax.Array:
    """Apply DropConnect to a matrix (Wan et al. 2013; Merity et al. 2018): one mask for all rows and all steps."""
    return _drop(W, rate, _draw_bits(key, W.shape))


def draw_noise(
    key: jax.Array, shape_TK: tuple[int, int], num_rows: int, first_row: int | jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Return the noise of a cell, uniform in [0, 1), of shape (T, K, B)."""
    draw = jax.vmap(functools.partial(jax.random.uniform, shape=shape_TK, dtype=dtype), out_axes=2)
    return draw(_row_keys(key, first_row, num_rows))


def _row_keys(key: jax.Array, first_row: int | jax.Array, num_rows: int) -> jax.Array:
    """Return a PRNG key for each row."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(first_row + jnp.arange(num_rows))


def _draw_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the random bits of a mask. 16 bits approximate the rate to 1e-5."""
    return jax.random.bits(key, shape, jnp.uint16)


def _drop(x: jax.Array, rate: float | jax.Array, bits: jax.Array) -> jax.Array:
    """Return x with 0 where the bits, which are broadcast to x, say so."""
    keep = bits >= jnp.round(rate * (1 << 16)).astype(jnp.uint16)
    return jnp.where(keep, x / (1 - rate), 0)
