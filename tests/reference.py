"""The reference for `charlm.nn.recurrence`: the equations of each cell in a plain scan, which JAX differentiates.

Arrays have the batch first here.
"""

import jax
import jax.numpy as jnp

sigmoid = jax.nn.sigmoid


def rnn(params, x_proj, carry, dot):
    return (jnp.tanh(x_proj + dot("W_h", carry[0])),)


def lstm_of(a, c):
    i, f, g, o = jnp.split(a, 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    return sigmoid(o) * jnp.tanh(c), c


def lstm(params, x_proj, carry, dot):
    return lstm_of(x_proj + dot("W_h", carry[0]), carry[1])


def gru_of(params, x_proj, h_proj, h):
    x_r, x_z, x_n = jnp.split(x_proj, 3, axis=-1)
    h_r, h_z, h_n = jnp.split(h_proj, 3, axis=-1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = jnp.tanh(x_n + r * (h_n + params["b_h"]))
    return ((1 - z) * n + z * h,)


def gru(params, x_proj, carry, dot):
    return gru_of(params, x_proj, dot("W_h", carry[0]), carry[0])


def normalise(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def ln_lstm(params, x_proj, carry, dot):
    i, f, g, o = jnp.split(x_proj + params["scale_h"] * normalise(dot("W_h", carry[0])), 4, axis=-1)
    c = sigmoid(f) * carry[1] + sigmoid(i) * jnp.tanh(g)
    return sigmoid(o) * jnp.tanh(params["scale_c"] * normalise(c) + params["shift_c"]), c


def ln_gru(params, x_proj, carry, dot):
    return gru_of(params, x_proj, params["scale_h"] * normalise_gru(dot("W_h", carry[0])), carry[0])


def normalise_gru(x):
    hidden = x.shape[-1] // 3
    return jnp.concatenate([normalise(x[..., : 2 * hidden]), normalise(x[..., 2 * hidden :])], axis=-1)


def mlstm(params, x_proj, carry, dot):
    h, c = carry
    hidden = h.shape[1]
    m = x_proj[:, :hidden] * dot("W_hm", h)
    return lstm_of(x_proj[:, hidden:] + dot("W_h", m), c)


def mogrifier_lstm(params, x, carry, dot):
    h, c = carry
    x = 2 * sigmoid(dot("Q_1", h)) * x
    h = 2 * sigmoid(dot("R_2", x)) * h
    x = 2 * sigmoid(dot("Q_3", h)) * x
    h = 2 * sigmoid(dot("R_4", x)) * h
    x = 2 * sigmoid(dot("Q_5", h)) * x
    return lstm_of(dot("W_x", x) + params["b"] + dot("W_h", h), c)


def slstm(params, x_proj, carry, dot):
    """Without the stabiliser. The carries c and n of the cell are these times exp(-m)."""
    h, c, n, m = carry
    i, f, z, o = jnp.split(x_proj + dot("W_h", h), 4, axis=-1)
    c, n = c * jnp.exp(m), n * jnp.exp(m)
    c = sigmoid(f) * c + jnp.exp(i) * jnp.tanh(z)
    n = sigmoid(f) * n + jnp.exp(i)
    m = jnp.maximum(jnp.log(sigmoid(f)) + m, i)
    return sigmoid(o) * c / n, c * jnp.exp(-m), n * jnp.exp(-m), m


def cifg_lstm(params, x_proj, carry, dot):
    f, g, o = jnp.split(x_proj + dot("W_h", carry[0]), 3, axis=-1)
    c = sigmoid(f) * carry[1] + (1 - sigmoid(f)) * jnp.tanh(g)
    return sigmoid(o) * jnp.tanh(c), c


def mgu(params, x_proj, carry, dot):
    (h,) = carry
    x_f, x_n = jnp.split(x_proj, 2, axis=-1)
    f = sigmoid(x_f + dot("W_f", h))
    return ((1 - f) * h + f * jnp.tanh(x_n + dot("W_n", f * h)),)


def indrnn(params, x_proj, carry, dot):
    return (jnp.maximum(x_proj + params["u"] * carry[0], 0),)


def min_gru(params, x_proj, carry, dot):
    z, n = jnp.split(x_proj, 2, axis=-1)
    return ((1 - sigmoid(z)) * carry[0] + sigmoid(z) * n,)


def min_lstm(params, x_proj, carry, dot):
    f, i, n = jnp.split(x_proj, 3, axis=-1)
    total = sigmoid(f) + sigmoid(i)
    return (sigmoid(f) / total * carry[0] + sigmoid(i) / total * n,)


CELLS = {
    each.__name__: each
    for each in (rnn, lstm, gru, ln_lstm, ln_gru, mlstm, mogrifier_lstm, slstm, cifg_lstm, mgu, indrnn, min_gru, min_lstm)
}
# The normalisation of x @ W_x before the bias is added.
NORMALISE_X = {"ln_lstm": normalise, "ln_gru": normalise_gru}


def of_update(cell):
    """Return a reference for a cell that has no entry in CELLS: its update, with the batch first."""

    def update(params, x, carry, dot):
        turned = cell.update(params, x.T, tuple(each.T for each in carry), lambda name, operand: dot(name, operand.T).T)
        return tuple(each.T for each in turned)

    return update


def unroll(update, params, matrices, x_TKB, carry, resets=None):
    """Return what `charlm.nn.recurrence.unroll` returns. `update` is one of CELLS, or comes from `of_update`.

    `resets` are (before_TB, initial), with arrays (H, 1) in `initial`.
    """
    before_TB, initial = resets or (jnp.zeros((len(x_TKB), x_TKB.shape[2]), bool), tuple(each.T for each in carry))

    def step(carry, inputs):
        x_KB, before_B = inputs
        carry = tuple(jnp.where(before_B[:, None], first.T, each) for first, each in zip(initial, carry))
        carry = update(params, x_KB.T, carry, lambda name, operand: operand @ matrices[name].T)
        return carry, carry[0]

    carry, h_TBH = jax.lax.scan(step, carry, (x_TKB, before_TB))
    return h_TBH, carry
