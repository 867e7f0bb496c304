"""The LSTM of cuDNN, NVIDIA's library, in place of the loop in `recurrence`: one call does a layer's projections and steps.

It comes with JAX (`jax.experimental.rnn`), for float32 alone, whose products may be TF32 like all others on such a device.

Letters: B batch, T time, H hidden, I input features, G gates times hidden.
"""

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from charlm.nn.cells import Carry


def is_available() -> bool:
    """Whether JAX's default device is NVIDIA's."""
    return "cuda" in jax.devices()[0].client.platform_version.lower()


def can_do(cell: str, dtype: str) -> bool:
    """Whether it has this cell, with products in this dtype."""
    return cell == "lstm" and dtype == "float32"


def unroll(W_x_IG: jax.Array, W_h_GH: jax.Array, b_G: jax.Array, x_TIB: jax.Array, carry: Carry) -> tuple[jax.Array, Carry]:
    """`recurrence.unroll` of an LSTM, from what its input projections are made of. Differentiable; not under `jax.vmap`."""
    num_steps, input_size, batch = x_TIB.shape
    # Its weights are one vector: both kernels, and then a bias with each, of which one is enough.
    weights = jnp.concatenate([W_x_IG.T.ravel(), W_h_GH.ravel(), b_G, jnp.zeros_like(b_G)])
    x_BTI = jnp.transpose(x_TIB, (2, 0, 1))
    lengths_B = jnp.full(batch, num_steps, jnp.int32)
    first = (each_BH[None] for each_BH in carry)
    h_BTH, *last = rnn.lstm(
        x_BTI,
        *first,
        weights,
        lengths_B,
        input_size=input_size,
        hidden_size=W_h_GH.shape[1],
        num_layers=1,
        dropout=0.0,
        bidirectional=False,
    )
    return jnp.swapaxes(h_BTH, 0, 1), tuple(each[0] for each in last)
