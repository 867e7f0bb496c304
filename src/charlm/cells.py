"""The recurrent cells: tiny pure functions between two matrix products, and their registry.

A recurrent step is

    x_proj = x @ W_x + b        for all time steps at once, outside the scan
    h_proj = h @ W_h            the only matrix product inside it
    carry  = update(params, x_proj, h_proj, carry)

and only `update` tells one cell from another. `recurrence` does the rest, gradients included, so a new cell is an
`update` and a line in `CELLS`.

Letters: B batch, H hidden, G gates times hidden. Every carry is a tuple whose first element is the output h_BH.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

Params = Mapping[str, jax.Array]
Carry = tuple[jax.Array, ...]

_LN_LSTM_GROUPS = (4,)
_LN_GRU_GROUPS = (2, 1)


class Own(NamedTuple):
    """A parameter of a cell's own: so many blocks of H numbers, and their first value."""

    name: str
    blocks: int = 1
    first: float = 0.0


class Cell(NamedTuple):
    """What `recurrence` and `model` must know of a cell.

    Attributes:
        update: (params, x_proj_BG, h_proj_BG, carry) -> carry.
        gates: the gates in the order of their blocks of H columns, cuDNN's and PyTorch's order.
        carries: elements of the carry, each (B, H).
        additive: `update` reads only x_proj + h_proj, so that one array a step is kept for the gradient, not two. It
            is then called with the sum as `x_proj` and 0 as `h_proj`.
        own: parameters besides W_x, W_h and b; their names are the keys of `params`.
        norm_groups: for a cell that normalises its two products before it adds them up: how many gates, in their order,
            are normalised together. `update` does so to h_proj; x_proj comes normalised, with b added after.
    """

    update: Callable[[Params, jax.Array, jax.Array, Carry], Carry]
    gates: tuple[str, ...]
    carries: int
    additive: bool
    own: tuple[Own, ...] = ()
    norm_groups: tuple[int, ...] = ()


def rnn_update(params: Params, x_proj_BG: jax.Array, h_proj_BG: jax.Array, carry: Carry) -> Carry:
    """h' = tanh(x_proj + h_proj) (Elman 1990)."""
    del params, carry
    return (jnp.tanh(x_proj_BG + h_proj_BG),)


def lstm_update(params: Params, x_proj_BG: jax.Array, h_proj_BG: jax.Array, carry: Carry) -> Carry:
    """The LSTM with a forget gate and no peepholes (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    i, f, o = sigmoid, g = tanh of the four blocks of x_proj + h_proj; c' = f c + i g; h' = o tanh(c').
    """
    del params
    i, f, g, o = _lstm_gates(x_proj_BG + h_proj_BG)
    c_BH = f * carry[1] + i * g
    return o * jnp.tanh(c_BH), c_BH


def _lstm_gates(a_BG: jax.Array) -> tuple[jax.Array, ...]:
    """i, f, g, o of what they read."""
    # sigmoid(a) = tanh(a / 2) / 2 + 1 / 2, so that one tanh over the whole row serves all four gates.
    scale_G = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], a_BG.dtype), a_BG.shape[-1] // 4)
    i, f, g, o = jnp.split(jnp.tanh(a_BG * scale_G), 4, axis=-1)
    i, f, o = (0.5 * gate + 0.5 for gate in (i, f, o))
    return i, f, g, o


def ln_lstm_update(params: Params, x_proj_BG: jax.Array, h_proj_BG: jax.Array, carry: Carry) -> Carry:
    """The layer-normalised LSTM (Ba et al. 2016, equations 20 to 22).

    The gates read x_proj + scale_h LN(h_proj), with x_proj = scale_x LN(x @ W_x) + b; c' as in the LSTM;
    h' = o tanh(scale_c LN(c') + shift_c).
    """
    h_proj_BG = params["scale_h"] * normalise(h_proj_BG, _LN_LSTM_GROUPS)
    i, f, g, o = _lstm_gates(x_proj_BG + h_proj_BG)
    c_BH = f * carry[1] + i * g
    return o * jnp.tanh(params["scale_c"] * normalise(c_BH, (1,)) + params["shift_c"]), c_BH


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


def ln_gru_update(params: Params, x_proj_BG: jax.Array, h_proj_BG: jax.Array, carry: Carry) -> Carry:
    """The layer-normalised GRU (Ba et al. 2016, appendix): the GRU of x_proj and scale_h LN(h_proj), r and z normalised
    together and n by itself; x_proj = scale_x LN(x @ W_x) + b.
    """
    return gru_update(params, x_proj_BG, params["scale_h"] * normalise(h_proj_BG, _LN_GRU_GROUPS), carry)


def normalise(x: jax.Array, groups: tuple[int, ...]) -> jax.Array:
    """The rows of x, of sum(groups) blocks, each group of blocks with mean 0 and variance 1 (Ba et al. 2016)."""

    def standardise(part):
        centred = part - part.mean(axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5)

    block = x.shape[-1] // sum(groups)
    parts = jnp.split(x, [block * end for end in itertools.accumulate(groups[:-1])], axis=-1)
    return jnp.concatenate([standardise(part) for part in parts], axis=-1)


CELLS: Mapping[str, Cell] = {
    "rnn": Cell(rnn_update, gates=("h",), carries=1, additive=True),
    "lstm": Cell(lstm_update, gates=("i", "f", "g", "o"), carries=2, additive=True),
    "gru": Cell(gru_update, gates=("r", "z", "n"), carries=1, additive=False, own=(Own("b_h"),)),
    "ln_lstm": Cell(
        ln_lstm_update,
        gates=("i", "f", "g", "o"),
        carries=2,
        additive=False,
        own=(Own("scale_h", 4, 1.0), Own("scale_c", 1, 1.0), Own("shift_c")),
        norm_groups=_LN_LSTM_GROUPS,
    ),
    "ln_gru": Cell(
        ln_gru_update,
        gates=("r", "z", "n"),
        carries=1,
        additive=False,
        own=(Own("b_h"), Own("scale_h", 3, 1.0)),
        norm_groups=_LN_GRU_GROUPS,
    ),
}
