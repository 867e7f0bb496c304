"""The LSTM of cuDNN, NVIDIA's library: one call computes all projections and steps of a layer, in place of `recurrence`.

JAX contains the binding (`jax.experimental.rnn`). It supports only float32. The device may round the operands of its products
to TF32, as in other float32 products.

Letters: B batch, T time, H hidden, I input features, G gates times hidden.
"""

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from charlm.nn.cells import Carry


def is_available() -> bool:
    """Return whether JAX's default device is an NVIDIA GPU."""
    return "cuda" in jax.devices()[0].client.platform_version.lower()


def supports(cell: str, dtype: str) -> bool:
    """Return whether cuDNN can compute this cell (a key of `cells.CELLS`) with products in this dtype."""
    return cell == "lstm" and dtype == "float32"


def unroll(W_x_IG: jax.Array, W_h_GH: jax.Array, b_G: jax.Array, x_TIB: jax.Array, carry: Carry) -> tuple[jax.Array, Carry]:
    """Run an LSTM over T steps, input projections included.

    The result is that of `recurrence.unroll`, up to rounding. It is differentiable, but `jax.vmap` does not support it.

    Args:
        W_x_IG: the input kernel.
        W_h_GH: the recurrent kernel.
        b_G: the bias.
        x_TIB: the input features.
        carry: the carry (h, c) before the first step, arrays of shape (B, H).

    Returns:
        The outputs h_TBH and the carry after the last step.
    """
    num_steps, input_size, batch = x_TIB.shape
    # cuDNN reads all weights from one vector: both kernels, then a bias for each. One bias is enough, so the other is zero.
    weights = jnp.concatenate([W_x_IG.T.ravel(), W_h_GH.ravel(), b_G, jnp.zeros_like(b_G)])
    x_BTI = jnp.transpose(x_TIB, (2, 0, 1))
    lengths_B = jnp.full(batch, num_steps, jnp.int32)
    initial = (each_BH[None] for each_BH in carry)
    h_BTH, *last = rnn.lstm(
        x_BTI,
        *initial,
        weights,
        lengths_B,
        input_size=input_size,
        hidden_size=W_h_GH.shape[1],
        num_layers=1,
        dropout=0.0,
        bidirectional=False,
    )
    return jnp.swapaxes(h_BTH, 0, 1), tuple(each[0] for each in last)
