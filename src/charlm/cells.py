"""The recurrent cells: tiny pure functions between two matrix products, and their registry.

A recurrent step is

    x_proj = x @ W_x + b        for all time steps at once, outside the scan
    h_proj = h @ W_h            the only matrix product inside it
    carry  = update(params, x_proj, h_proj, carry)

and only `update` tells one cell from another. `recurrence` does the rest, gradients included, so a new cell is an
`update` and a line in `CELLS`.

Letters: B batch, H hidden, G gates times hidden. Every carry is a tuple whose first element is the output h_BH.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

Params = Mapping[str, jax.Array]
Carry = tuple[jax.Array, ...]


class Cell(NamedTuple):
    """What `recurrence` and `model` must know of a cell.

    Attributes:
        update: (params, x_proj_BG, h_proj_BG, carry) -> carry.
        gates: the gates in the order of their blocks of H columns, cuDNN's and PyTorch's order.
        carries: elements of the carry, each (B, H).
        additive: `update` reads only x_proj + h_proj, so that one array a step is kept for the gradient, not two. It
            is then called with the sum as `x_proj` and 0 as `h_proj`.
        biases: vectors (H,) of the cell's own, besides b: the keys of `params`.
    """

    update: Callable[[Params, jax.Array, jax.Array, Carry], Carry]
    gates: tuple[str, ...]
    carries: int
    additive: bool
    biases: tuple[str, ...] = ()


def rnn_update(params: Params, x_proj_BG: jax.Array, h_proj_BG: jax.Array, carry: Carry) -> Carry:
    """h' = tanh(x_proj + h_proj) (Elman 1990)."""
    del params, carry
    return (jnp.tanh(x_proj_BG + h_proj_BG),)


def lstm_update(params: Params, x_proj_BG: jax.Array, h_proj_BG: jax.Array, carry: Carry) -> Carry:
    """The LSTM with a forget gate and no peepholes (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    i, f, o = sigmoid, g = tanh of the four blocks of x_proj + h_proj; c' = f c + i g; h' = o tanh(c').
    """
    del params
    _, c_BH = carry
    # sigmoid(a) = tanh(a / 2) / 2 + 1 / 2, so that one tanh over the whole row serves all four gates.
    hidden = c_BH.shape[-1]
    a_BG = x_proj_BG + h_proj_BG
    scale_G = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], a_BG.dtype), hidden)
    i, f, g, o = jnp.split(jnp.tanh(a_BG * scale_G), 4, axis=-1)
    i, f, o = (0.5 * gate + 0.5 for gate in (i, f, o))
    c_BH = f * c_BH + i * g
    return o * jnp.tanh(c_BH), c_BH


def gru_update(params: Params, x_proj_BG: jax.Array, h_proj_BG: jax.Array, carry: Carry) -> Carry:
    """The GRU that resets after the product (Cho et al. 2014, in the form of cuDNN, PyTorch and Flax).

    r, z = sigmoid(x_proj + h_proj); n = tanh(x_n + r (h_n + b_h)); h' = (1 - z) n + z h.
    """
    (h_BH,) = carry
    hidden = h_BH.shape[-1]
    rz = 0.5 * jnp.tanh(0.5 * (x_proj_BG[:, : 2 * hidden] + h_proj_BG[:, : 2 * hidden])) + 0.5
    r, z = jnp.split(rz, 2, axis=-1)
    n = jnp.tanh(x_proj_BG[:, 2 * hidden :] + r * (h_proj_BG[:, 2 * hidden :] + params["b_h"]))
    return (n + z * (h_BH - n),)


CELLS: Mapping[str, Cell] = {
    "rnn": Cell(rnn_update, gates=("h",), carries=1, additive=True),
    "lstm": Cell(lstm_update, gates=("i", "f", "g", "o"), carries=2, additive=True),
    "gru": Cell(gru_update, gates=("r", "z", "n"), carries=1, additive=False, biases=("b_h",)),
}


def zero_carry(cell: Cell, batch_size: int, hidden_size: int, dtype=jnp.float32) -> Carry:
    """The state before the first character."""
    # One array each: a donated state must not hold the same buffer twice.
    return tuple(jnp.zeros((batch_size, hidden_size), dtype) for _ in range(cell.carries))
