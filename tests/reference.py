"""The reference for `charlm.nn.recurrence`: the equations of each cell in a plain scan, which JAX differentiates."""

import jax
import jax.numpy as jnp

sigmoid = jax.nn.sigmoid


def rnn(params, x_proj, h_proj, carry):
    return (jnp.tanh(x_proj + h_proj),)


def lstm(params, x_proj, h_proj, carry):
    i, f, g, o = jnp.split(x_proj + h_proj, 4, axis=-1)
    c = sigmoid(f) * carry[1] + sigmoid(i) * jnp.tanh(g)
    return sigmoid(o) * jnp.tanh(c), c


def gru(params, x_proj, h_proj, carry):
    x_r, x_z, x_n = jnp.split(x_proj, 3, axis=-1)
    h_r, h_z, h_n = jnp.split(h_proj, 3, axis=-1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = jnp.tanh(x_n + r * (h_n + params["b_h"]))
    return ((1 - z) * n + z * carry[0],)


def normalise(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def ln_lstm(params, x_proj, h_proj, carry):
    i, f, g, o = jnp.split(x_proj + params["scale_h"] * normalise(h_proj), 4, axis=-1)
    c = sigmoid(f) * carry[1] + sigmoid(i) * jnp.tanh(g)
    return sigmoid(o) * jnp.tanh(params["scale_c"] * normalise(c) + params["shift_c"]), c


def ln_gru(params, x_proj, h_proj, carry):
    return gru(params, x_proj, params["scale_h"] * normalise_gru(h_proj), carry)


def normalise_gru(x):
    hidden = x.shape[-1] // 3
    return jnp.concatenate([normalise(x[..., : 2 * hidden]), normalise(x[..., 2 * hidden :])], axis=-1)


CELLS = {"rnn": rnn, "lstm": lstm, "gru": gru, "ln_lstm": ln_lstm, "ln_gru": ln_gru}
# The normalisation of x @ W_x before the bias is added.
NORMALISE_X = {"ln_lstm": normalise, "ln_gru": normalise_gru}


def unroll(update, params, W_h_GH, x_proj_TGB, carry):
    """Return what `charlm.nn.recurrence.unroll` returns. `update` is one of CELLS, whose arrays have the batch first."""

    def step(carry, x_proj_GB):
        carry = update(params, x_proj_GB.T, carry[0] @ W_h_GH.T, carry)
        return carry, carry[0]

    carry, h_TBH = jax.lax.scan(step, carry, x_proj_TGB)
    return h_TBH, carry
