"""Recurrent cells: pure functions of one time step, and their registry.

One step of a recurrent layer computes

    x_proj = x @ W_x + b        for all time steps at once, before the loop
    h_proj = W_h h              the only matrix product inside the loop
    carry  = update(params, x_proj, h_proj, carry)

Cells differ only in `update`; the module `recurrence` does the rest. A new cell is an update function and one entry of `CELLS`
that is built with `by_autodiff(update)`. The cells `rnn`, `lstm` and `gru` have hand-written derivatives, which save less for
the backward pass.

Arrays inside a cell are feature-major, with the batch last; `recurrence` explains why. The rows of one gate are contiguous: a
block of H rows.

Letters: B batch, H hidden, G gates times hidden. Every carry is a tuple of arrays. Its first element is the output h_HB.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

Params = Mapping[str, jax.Array]
Carry = tuple[jax.Array, ...]
# One array, as consecutive blocks of its rows.
Blocks = tuple[jax.Array, ...]
# What the forward pass saves of a step (`Cell.forward`).
Saved = tuple[Blocks | None, ...]
Update = Callable[[Params, jax.Array, jax.Array, Carry], Carry]
GateValues = Callable[[Params, jax.Array, jax.Array, Carry], Blocks]
Forward = Callable[[Params, jax.Array, jax.Array, Carry], tuple[Carry, Saved]]
Backward = Callable[[Params, tuple[jax.Array, ...], Carry, Carry, Carry], tuple[Params, Blocks, Blocks, Carry]]

_LN_LSTM_GROUPS = (4,)
_LN_GRU_GROUPS = (2, 1)


class Vector(NamedTuple):
    """A vector parameter of a cell, in addition to the bias b.

    Attributes:
        name: its key in `params`.
        blocks: its length, as a multiple of H.
        init: the initial value of all its elements.
    """

    name: str
    blocks: int = 1
    init: float = 0.0


class Cell(NamedTuple):
    """Everything that `recurrence` and `model` need to know about a cell.

    Attributes:
        forward: (params, x_proj_GB, h_proj_GB, carry) -> (carry, saved). `saved` holds what `backward` needs besides the
            carries, as one or two arrays, each given as blocks. The first array overwrites x_proj_GB in its buffer; None leaves
            x_proj_GB there. The second array has as many rows as the dh of `backward`.
        backward: (params, saved, carry before, carry after, dcarry) -> (dparams, dx, dh, dcarry), the gradients of one step.
            `saved` arrives as one or two arrays, their blocks concatenated. dx is the gradient with respect to x_proj_GB, and
            dh the gradient with respect to the last rows of h_proj_GB, both as blocks. dh covers only the rows where it differs
            from dx, so it is empty for a cell that reads only the sum x_proj + h_proj.
        gates: the names of the gates, in the order of their blocks of H rows. The order is that of cuDNN and PyTorch.
        carries: the names of the arrays in the carry, each of shape (H, B).
        vectors: the parameters besides W_x, W_h and b. Their names are the keys of `params`.
        norm_groups: for a cell that normalises x_proj and h_proj separately before it adds them: the numbers of consecutive
            gates that are normalised together. `forward` normalises h_proj. The model normalises x_proj and then adds b.
        gate_values: (params, x_proj_GB, h_proj_GB, carry) -> the values of the gates in one step, in the order of `gates`, each
            of shape (H, B). Only `inference.states` uses it. None: the cell does not show its gates.
    """

    forward: Forward
    backward: Backward
    gates: tuple[str, ...]
    carries: tuple[str, ...]
    vectors: tuple[Vector, ...] = ()
    norm_groups: tuple[int, ...] = ()
    gate_values: GateValues | None = None


def by_autodiff(update: Update) -> tuple[Forward, Backward]:
    """Return the `forward` and `backward` of a cell, with a derivative computed by JAX.

    Args:
        update: (params, x_proj_GB, h_proj_GB, carry) -> carry.
    """

    def forward(params, x_proj_GB, h_proj_GB, carry):
        return update(params, x_proj_GB, h_proj_GB, carry), (None, (h_proj_GB,))

    def backward(params, saved, before, after, dcarry):
        del after
        _, pullback = jax.vjp(update, params, *saved, before)
        dparams, dx_GB, dh_GB, dcarry = pullback(dcarry)
        return dparams, (dx_GB,), (dh_GB,), dcarry

    return forward, backward


def _sigmoid(a: jax.Array) -> jax.Array:
    """Return the logistic function of a, computed with tanh, so all gates need only one transcendental function."""
    return 0.5 * jnp.tanh(0.5 * a) + 0.5


def rnn_gate_values(params: Params, x_proj_HB: jax.Array, h_proj_HB: jax.Array, carry: Carry) -> Blocks:
    """Return the only block of the simple recurrent network, which is its new state."""
    del params, carry
    return (jnp.tanh(x_proj_HB + h_proj_HB),)


def rnn_forward(params: Params, x_proj_HB: jax.Array, h_proj_HB: jax.Array, carry: Carry) -> tuple[Carry, Saved]:
    """Compute h' = tanh(x_proj + h_proj) (Elman 1990)."""
    (h_HB,) = rnn_gate_values(params, x_proj_HB, h_proj_HB, carry)
    return (h_HB,), ((h_HB,),)


def rnn_backward(
    params: Params, saved: tuple[jax.Array, ...], before: Carry, after: Carry, dcarry: Carry
) -> tuple[Params, Blocks, Blocks, Carry]:
    """Compute the gradients of `rnn_forward`."""
    del params, before, after
    (h_HB,), (dh_HB,) = saved, dcarry
    return {}, (dh_HB * (1 - h_HB * h_HB),), (), (jnp.zeros_like(dh_HB),)


def lstm_forward(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> tuple[Carry, Saved]:
    """Compute the LSTM with a forget gate and without peepholes (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    The four blocks of x_proj + h_proj give the gates: i, f, o = sigmoid and g = tanh of their blocks. Then c' = f c + i g and
    h' = o tanh(c').
    """
    del params
    tanh_GB = _lstm_tanh(x_proj_GB + h_proj_GB)
    i, f, g, o = _lstm_gates(tanh_GB)
    c_HB = f * carry[1] + i * g
    return (o * jnp.tanh(c_HB), c_HB), ((tanh_GB,),)


def lstm_backward(
    params: Params, saved: tuple[jax.Array, ...], before: Carry, after: Carry, dcarry: Carry
) -> tuple[Params, Blocks, Blocks, Carry]:
    """Compute the gradients of `lstm_forward`."""
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
    """Return tanh(a) in the rows of g and tanh(a / 2) in the other rows, which gives sigmoid(a) = tanh(a / 2) / 2 + 1 / 2."""
    scale_G = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], a_GB.dtype), a_GB.shape[0] // 4)
    return jnp.tanh(a_GB * scale_G[:, None])


def _lstm_gates(tanh_GB: jax.Array) -> Blocks:
    """Return the gates i, f, g, o from the result of `_lstm_tanh`."""
    i, f, g, o = jnp.split(tanh_GB, 4)
    return 0.5 * i + 0.5, 0.5 * f + 0.5, g, 0.5 * o + 0.5


def lstm_gate_values(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> Blocks:
    """Return the gates i, f, g, o of `lstm_forward`."""
    del params, carry
    return _lstm_gates(_lstm_tanh(x_proj_GB + h_proj_GB))


def ln_lstm_gate_values(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> Blocks:
    """Return the gates i, f, g, o of `ln_lstm_update`."""
    h_proj_GB = params["scale_h"][:, None] * layer_norm(h_proj_GB, _LN_LSTM_GROUPS, axis=0)
    return lstm_gate_values(params, x_proj_GB, h_proj_GB, carry)


def ln_lstm_update(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> Carry:
    """Compute the layer-normalised LSTM (Ba et al. 2016, equations 20 to 22).

    The gates read x_proj + scale_h LN(h_proj), where x_proj = scale_x LN(x @ W_x) + b. The carry c' is that of the LSTM, and
    h' = o tanh(scale_c LN(c') + shift_c).
    """
    i, f, g, o = ln_lstm_gate_values(params, x_proj_GB, h_proj_GB, carry)
    c_HB = f * carry[1] + i * g
    read_HB = params["scale_c"][:, None] * layer_norm(c_HB, (1,), axis=0) + params["shift_c"][:, None]
    return o * jnp.tanh(read_HB), c_HB


def gru_forward(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> tuple[Carry, Saved]:
    """Compute the GRU (Cho et al. 2014) in the form of cuDNN, PyTorch and Flax, which applies r after the product with W_h.

    With the blocks r, z, n of x_proj and h_proj: r, z = sigmoid(x_proj + h_proj); n = tanh(x_n + r (h_n + b_h));
    h' = (1 - z) n + z h.
    """
    (h_HB,) = carry
    hidden = h_HB.shape[0]
    rz = _sigmoid(x_proj_GB[: 2 * hidden] + h_proj_GB[: 2 * hidden])
    r, z = jnp.split(rz, 2)
    h_n = h_proj_GB[2 * hidden :] + params["b_h"][:, None]
    n = jnp.tanh(x_proj_GB[2 * hidden :] + r * h_n)
    return (n + z * (h_HB - n),), ((rz, n), (h_n,))


def gru_gate_values(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> Blocks:
    """Return the gates r, z, n of `gru_forward`."""
    _, ((rz, n), _) = gru_forward(params, x_proj_GB, h_proj_GB, carry)
    return (*jnp.split(rz, 2), n)


def gru_backward(
    params: Params, saved: tuple[jax.Array, ...], before: Carry, after: Carry, dcarry: Carry
) -> tuple[Params, Blocks, Blocks, Carry]:
    """Compute the gradients of `gru_forward`."""
    del params, after
    rzn_GB, h_n = saved
    r, z, n = jnp.split(rzn_GB, 3)
    (h_HB,), (dh_HB,) = before, dcarry
    dn = dh_HB * (1 - z) * (1 - n * n)
    dx = (dn * h_n * (r - r * r), dh_HB * (h_HB - n) * (z - z * z), dn)
    return {"b_h": (dn * r).sum(axis=1)}, dx, (dn * r,), (dh_HB * z,)


def ln_gru_update(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> Carry:
    """Compute the layer-normalised GRU (Ba et al. 2016, appendix).

    This is the GRU of x_proj and scale_h LN(h_proj), where x_proj = scale_x LN(x @ W_x) + b. LN normalises r and z together,
    and n separately.
    """
    return gru_forward(params, x_proj_GB, _ln_gru_h_proj(params, h_proj_GB), carry)[0]


def ln_gru_gate_values(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> Blocks:
    """Return the gates r, z, n of `ln_gru_update`."""
    return gru_gate_values(params, x_proj_GB, _ln_gru_h_proj(params, h_proj_GB), carry)


def _ln_gru_h_proj(params: Params, h_proj_GB: jax.Array) -> jax.Array:
    return params["scale_h"][:, None] * layer_norm(h_proj_GB, _LN_GRU_GROUPS, axis=0)


def layer_norm(x: jax.Array, groups: tuple[int, ...], axis: int) -> jax.Array:
    """Return x with each group of blocks normalised to mean 0 and variance 1 (Ba et al. 2016, without scale and shift).

    Args:
        x: sum(groups) blocks of equal size along `axis`.
        groups: the number of consecutive blocks in each group.
    """

    def standardise(part: jax.Array) -> jax.Array:
        centred = part - part.mean(axis, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis, keepdims=True) + 1e-5)

    block = x.shape[axis] // sum(groups)
    parts = jnp.split(x, [block * end for end in itertools.accumulate(groups[:-1])], axis)
    return jnp.concatenate([standardise(part) for part in parts], axis)


CELLS: Mapping[str, Cell] = {
    "rnn": Cell(rnn_forward, rnn_backward, gates=("h",), carries=("h",), gate_values=rnn_gate_values),
    "lstm": Cell(lstm_forward, lstm_backward, gates=("i", "f", "g", "o"), carries=("h", "c"), gate_values=lstm_gate_values),
    "gru": Cell(
        gru_forward,
        gru_backward,
        gates=("r", "z", "n"),
        carries=("h",),
        gate_values=gru_gate_values,
        vectors=(Vector("b_h"),),
    ),
    "ln_lstm": Cell(
        *by_autodiff(ln_lstm_update),
        gates=("i", "f", "g", "o"),
        carries=("h", "c"),
        gate_values=ln_lstm_gate_values,
        vectors=(Vector("scale_h", 4, 1.0), Vector("scale_c", 1, 1.0), Vector("shift_c")),
        norm_groups=_LN_LSTM_GROUPS,
    ),
    "ln_gru": Cell(
        *by_autodiff(ln_gru_update),
        gates=("r", "z", "n"),
        carries=("h",),
        gate_values=ln_gru_gate_values,
        vectors=(Vector("b_h"), Vector("scale_h", 3, 1.0)),
        norm_groups=_LN_GRU_GROUPS,
    ),
}
