"""The recurrent cells: tiny pure functions between two matrix products, and their registry.

A recurrent step is

    x_proj = x @ W_x + b        for all time steps at once, outside the scan
    h_proj = W_h h              the only matrix product inside it
    carry  = update(params, x_proj, h_proj, carry)

and only `update` tells one cell from another. `recurrence` does the rest, so a new cell is an `update` and a line in
`CELLS`: `by_autodiff(update)`. The cells that most people train have their derivative written out, which keeps less for the
way back.

Within a cell arrays are feature-major, the batch last: `recurrence` says why. A gate is then a block of H whole rows.

Letters: B batch, H hidden, G gates times hidden. Every carry is a tuple whose first element is the output h_HB.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

Params = Mapping[str, jax.Array]
Carry = tuple[jax.Array, ...]
# An array as blocks of whole rows, in their order.
Blocks = tuple[jax.Array, ...]

_LN_LSTM_GROUPS = (4,)
_LN_GRU_GROUPS = (2, 1)


class Vector(NamedTuple):
    """A vector parameter of a cell, besides the bias b.

    Attributes:
        name: its key in `params`.
        blocks: its length in multiples of H.
        init: the initial value of all its elements.
    """

    name: str
    blocks: int = 1
    init: float = 0.0


class Cell(NamedTuple):
    """What `recurrence` and `model` must know of a cell.

    Attributes:
        forward: (params, x_proj_GB, h_proj_GB, carry) -> (carry, saved). What `backward` needs of the step besides the states
            is saved as one or two arrays, each as blocks: the first takes the place of x_proj_GB, or leaves it there if it is
            None; the second has as many rows as `backward`'s dh.
        backward: (params, saved, carry before, carry after, dcarry) -> (dparams, dx, dh, dcarry), the gradients of a step.
            `saved` comes back as whole arrays. dx is the gradient at x_proj_GB; dh that at the last rows of h_proj_GB, those
            where it is another one than dx. Both are blocks; dh has none for a cell that reads x_proj + h_proj alone.
        gates: the gates in the order of their blocks of H rows, cuDNN's and PyTorch's order.
        carries: elements of the carry, each (H, B).
        vectors: parameters besides W_x, W_h and b; their names are the keys of `params`.
        norm_groups: for a cell that normalises its two products before it adds them up: how many gates, in their order,
            are normalised together. `forward` does so to h_proj; x_proj comes normalised, with b added after.
    """

    forward: Callable[[Params, jax.Array, jax.Array, Carry], tuple[Carry, tuple[Blocks | None, ...]]]
    backward: Callable[[Params, tuple[jax.Array, ...], Carry, Carry, Carry], tuple[Params, Blocks, Blocks, Carry]]
    gates: tuple[str, ...]
    carries: int
    vectors: tuple[Vector, ...] = ()
    norm_groups: tuple[int, ...] = ()


def by_autodiff(update: Callable[[Params, jax.Array, jax.Array, Carry], Carry]) -> tuple[Callable, Callable]:
    """The `forward` and `backward` of a cell by its update (params, x_proj_GB, h_proj_GB, carry) -> carry."""

    def forward(params, x_proj_GB, h_proj_GB, carry):
        return update(params, x_proj_GB, h_proj_GB, carry), (None, (h_proj_GB,))

    def backward(params, saved, before, after, dcarry):
        del after
        _, pullback = jax.vjp(update, params, *saved, before)
        dparams, dx_GB, dh_GB, dcarry = pullback(dcarry)
        return dparams, (dx_GB,), (dh_GB,), dcarry

    return forward, backward


def _sigmoid(a: jax.Array) -> jax.Array:
    """The logistic function as a tanh, so that one transcendental serves all gates."""
    return 0.5 * jnp.tanh(0.5 * a) + 0.5


def rnn_forward(params: Params, x_proj_HB: jax.Array, h_proj_HB: jax.Array, carry: Carry):
    """h' = tanh(x_proj + h_proj) (Elman 1990)."""
    del params, carry
    h_HB = jnp.tanh(x_proj_HB + h_proj_HB)
    return (h_HB,), ((h_HB,),)


def rnn_backward(params: Params, saved, before: Carry, after: Carry, dcarry: Carry):
    """The derivative of `rnn_forward`."""
    del params, before, after
    (h_HB,), (dh_HB,) = saved, dcarry
    return {}, (dh_HB * (1 - h_HB * h_HB),), (), (jnp.zeros_like(dh_HB),)


def lstm_forward(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry):
    """The LSTM with a forget gate and no peepholes (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    i, f, o = sigmoid, g = tanh of the four blocks of x_proj + h_proj; c' = f c + i g; h' = o tanh(c').
    """
    del params
    tanh_GB = _lstm_tanh(x_proj_GB + h_proj_GB)
    i, f, g, o = _lstm_gates(tanh_GB)
    c_HB = f * carry[1] + i * g
    return (o * jnp.tanh(c_HB), c_HB), ((tanh_GB,),)


def lstm_backward(params: Params, saved, before: Carry, after: Carry, dcarry: Carry):
    """The derivative of `lstm_forward`."""
    del params
    (tanh_GB,) = saved
    i, f, g, o = _lstm_gates(tanh_GB)
    tanh_c_HB = jnp.tanh(after[1])
    dh_HB, dc_HB = dcarry
    dc_HB += dh_HB * o * (1 - tanh_c_HB * tanh_c_HB)
    dx = (
        dc_HB * g * (i - i * i),
        dc_HB * before[1] * (f - f * f),
        dc_HB * i * (1 - g * g),
        dh_HB * tanh_c_HB * (o - o * o),
    )
    return {}, dx, (), (jnp.zeros_like(dh_HB), dc_HB * f)


def _lstm_tanh(a_GB: jax.Array) -> jax.Array:
    """One tanh over all rows: sigmoid(a) = tanh(a / 2) / 2 + 1 / 2."""
    scale_G = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], a_GB.dtype), a_GB.shape[0] // 4)
    return jnp.tanh(a_GB * scale_G[:, None])


def _lstm_gates(tanh_GB: jax.Array) -> Blocks:
    """i, f, g, o of that."""
    i, f, g, o = jnp.split(tanh_GB, 4)
    return 0.5 * i + 0.5, 0.5 * f + 0.5, g, 0.5 * o + 0.5


def ln_lstm_update(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> Carry:
    """The layer-normalised LSTM (Ba et al. 2016, equations 20 to 22).

    The gates read x_proj + scale_h LN(h_proj), with x_proj = scale_x LN(x @ W_x) + b; c' as in the LSTM;
    h' = o tanh(scale_c LN(c') + shift_c).
    """
    h_proj_GB = params["scale_h"][:, None] * normalise(h_proj_GB, _LN_LSTM_GROUPS, axis=0)
    i, f, g, o = _lstm_gates(_lstm_tanh(x_proj_GB + h_proj_GB))
    c_HB = f * carry[1] + i * g
    read_HB = params["scale_c"][:, None] * normalise(c_HB, (1,), axis=0) + params["shift_c"][:, None]
    return o * jnp.tanh(read_HB), c_HB


def gru_forward(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry):
    """The GRU that resets after the product (Cho et al. 2014, in the form of cuDNN, PyTorch and Flax).

    r, z = sigmoid(x_proj + h_proj); n = tanh(x_n + r (h_n + b_h)); h' = (1 - z) n + z h.
    """
    (h_HB,) = carry
    hidden = h_HB.shape[0]
    rz = _sigmoid(x_proj_GB[: 2 * hidden] + h_proj_GB[: 2 * hidden])
    r, z = jnp.split(rz, 2)
    h_n = h_proj_GB[2 * hidden :] + params["b_h"][:, None]
    n = jnp.tanh(x_proj_GB[2 * hidden :] + r * h_n)
    return (n + z * (h_HB - n),), ((rz, n), (h_n,))


def gru_backward(params: Params, saved, before: Carry, after: Carry, dcarry: Carry):
    """The derivative of `gru_forward`."""
    del params, after
    rzn_GB, h_n = saved
    r, z, n = jnp.split(rzn_GB, 3)
    (h_HB,), (dh_HB,) = before, dcarry
    dn = dh_HB * (1 - z) * (1 - n * n)
    dx = (dn * h_n * (r - r * r), dh_HB * (h_HB - n) * (z - z * z), dn)
    return {"b_h": (dn * r).sum(axis=1)}, dx, (dn * r,), (dh_HB * z,)


def ln_gru_update(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> Carry:
    """The layer-normalised GRU (Ba et al. 2016, appendix): the GRU of x_proj and scale_h LN(h_proj), r and z normalised
    together and n by itself; x_proj = scale_x LN(x @ W_x) + b.
    """
    h_proj_GB = params["scale_h"][:, None] * normalise(h_proj_GB, _LN_GRU_GROUPS, axis=0)
    return gru_forward(params, x_proj_GB, h_proj_GB, carry)[0]


def normalise(x: jax.Array, groups: tuple[int, ...], axis: int) -> jax.Array:
    """x, of sum(groups) blocks along an axis, each group of blocks with mean 0 and variance 1 (Ba et al. 2016)."""

    def standardise(part):
        centred = part - part.mean(axis, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis, keepdims=True) + 1e-5)

    block = x.shape[axis] // sum(groups)
    parts = jnp.split(x, [block * end for end in itertools.accumulate(groups[:-1])], axis)
    return jnp.concatenate([standardise(part) for part in parts], axis)


CELLS: Mapping[str, Cell] = {
    "rnn": Cell(rnn_forward, rnn_backward, gates=("h",), carries=1),
    "lstm": Cell(lstm_forward, lstm_backward, gates=("i", "f", "g", "o"), carries=2),
    "gru": Cell(gru_forward, gru_backward, gates=("r", "z", "n"), carries=1, vectors=(Vector("b_h"),)),
    "ln_lstm": Cell(
        *by_autodiff(ln_lstm_update),
        gates=("i", "f", "g", "o"),
        carries=2,
        vectors=(Vector("scale_h", 4, 1.0), Vector("scale_c", 1, 1.0), Vector("shift_c")),
        norm_groups=_LN_LSTM_GROUPS,
    ),
    "ln_gru": Cell(
        *by_autodiff(ln_gru_update),
        gates=("r", "z", "n"),
        carries=1,
        vectors=(Vector("b_h"), Vector("scale_h", 3, 1.0)),
        norm_groups=_LN_GRU_GROUPS,
    ),
}
