"""The simple recurrent network, the LSTM and the GRU, with hand-written derivatives.

Their steps are written gate by gate, in place, because that suits a CPU. `cells` contains the cells whose derivative JAX
computes.

Letters: B batch, H hidden, G gates times hidden.
"""

import jax
import jax.numpy as jnp

from charlm.nn.cell import Blocks, Carry, Cell, Derivative, Dot, Matrix, Params, Saved, Vector, blocks, sigmoid


def _rnn_forward(params: Params, x_proj_HB: jax.Array, h_proj_HB: jax.Array, carry: Carry) -> tuple[Carry, Saved]:
    del params, carry
    h_HB = jnp.tanh(x_proj_HB + h_proj_HB)
    return (h_HB,), ((h_HB,),)


def _rnn_backward(
    params: Params, saved: tuple[jax.Array, ...], before: Carry, after: Carry, dcarry: Carry
) -> tuple[Params, Blocks, Blocks, Carry]:
    del params, before, after
    (h_HB,), (dh_HB,) = saved, dcarry
    return {}, (dh_HB * (1 - h_HB * h_HB),), (), (jnp.zeros_like(dh_HB),)


def rnn_update(params: Params, x_proj_HB: jax.Array, carry: Carry, dot: Dot) -> Carry:
    """Return the next carry of the simple recurrent network, h' = tanh(x_proj + W_h h) (Elman 1990)."""
    return _rnn_forward(params, x_proj_HB, dot("W_h", carry[0]), carry)[0]


def _lstm_forward(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> tuple[Carry, Saved]:
    del params
    tanh_GB = lstm_tanh(x_proj_GB + h_proj_GB)
    i, f, g, o = lstm_gates(tanh_GB)
    c_HB = f * carry[1] + i * g
    return (o * jnp.tanh(c_HB), c_HB), ((tanh_GB,),)


def _lstm_backward(
    params: Params, saved: tuple[jax.Array, ...], before: Carry, after: Carry, dcarry: Carry
) -> tuple[Params, Blocks, Blocks, Carry]:
    del params
    (tanh_GB,) = saved
    i, f, g, o = lstm_gates(tanh_GB)
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


def lstm_tanh(a_GB: jax.Array) -> jax.Array:
    """Return tanh(a) in the rows of g and tanh(a / 2) in the other rows, which gives sigmoid(a) = tanh(a / 2) / 2 + 1 / 2."""
    scale_G = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], a_GB.dtype), a_GB.shape[0] // 4)
    return jnp.tanh(a_GB * scale_G[:, None])


def lstm_gates(tanh_GB: jax.Array) -> Blocks:
    """Return the gates i, f, g, o from the result of `lstm_tanh`."""
    i, f, g, o = jnp.split(tanh_GB, 4)
    return 0.5 * i + 0.5, 0.5 * f + 0.5, g, 0.5 * o + 0.5


def lstm_step(preactivations_GB: jax.Array, c_HB: jax.Array) -> tuple[Carry, Blocks]:
    """Return the carry (h', c') of an LSTM and its gates i, f, g, o.

    i, f, o = sigmoid and g = tanh of their blocks of the preactivations. c' = f c + i g; h' = o tanh(c').
    """
    i, f, g, o = lstm_gates(lstm_tanh(preactivations_GB))
    c_HB = f * c_HB + i * g
    return (o * jnp.tanh(c_HB), c_HB), (i, f, g, o)


def lstm_update(params: Params, x_proj_GB: jax.Array, carry: Carry, dot: Dot) -> Carry:
    """Return the next carry of the LSTM with a forget gate and without peepholes.

    This is `lstm_step` of x_proj + W_h h (Hochreiter and Schmidhuber 1997; Gers et al. 2000).
    """
    del params
    return lstm_step(x_proj_GB + dot("W_h", carry[0]), carry[1])[0]


def _lstm_gate_values(params: Params, x_proj_GB: jax.Array, carry: Carry, dot: Dot) -> Blocks:
    del params
    return lstm_step(x_proj_GB + dot("W_h", carry[0]), carry[1])[1]


def _gru_forward(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> tuple[Carry, Saved]:
    (h_HB,) = carry
    hidden = h_HB.shape[0]
    rz = sigmoid(x_proj_GB[: 2 * hidden] + h_proj_GB[: 2 * hidden])
    r, z = blocks(rz, 2)
    h_n = h_proj_GB[2 * hidden :] + params["b_h"][:, None]
    n = jnp.tanh(x_proj_GB[2 * hidden :] + r * h_n)
    return (n + z * (h_HB - n),), ((rz, n), (h_n,))


def _gru_backward(
    params: Params, saved: tuple[jax.Array, ...], before: Carry, after: Carry, dcarry: Carry
) -> tuple[Params, Blocks, Blocks, Carry]:
    del params, after
    rzn_GB, h_n = saved
    r, z, n = jnp.split(rzn_GB, 3)
    (h_HB,), (dh_HB,) = before, dcarry
    dn = dh_HB * (1 - z) * (1 - n * n)
    dx = (dn * h_n * (r - r * r), dh_HB * (h_HB - n) * (z - z * z), dn)
    return {"b_h": (dn * r).sum(axis=1)}, dx, (dn * r,), (dh_HB * z,)


def gru_step(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> Carry:
    """Return the next carry of a GRU from x_proj and its product with W_h, h_proj. The parameter is b_h (H,).

    With the blocks r, z, n of both: r, z = sigmoid(x + h); n = tanh(x_n + r (h_n + b_h)); h' = (1 - z) n + z h.
    """
    return _gru_forward(params, x_proj_GB, h_proj_GB, carry)[0]


def gru_update(params: Params, x_proj_GB: jax.Array, carry: Carry, dot: Dot) -> Carry:
    """Return the next carry of the GRU (Cho et al. 2014) in the form of cuDNN, PyTorch and Flax.

    That form applies r after the product with W_h (`gru_step`).
    """
    return gru_step(params, x_proj_GB, dot("W_h", carry[0]), carry)


def gru_gates(params: Params, x_proj_GB: jax.Array, h_proj_GB: jax.Array, carry: Carry) -> Blocks:
    """Return the gates r, z, n of `gru_step`."""
    _, ((rz, n), _) = _gru_forward(params, x_proj_GB, h_proj_GB, carry)
    return (*blocks(rz, 2), n)


def _gru_gate_values(params: Params, x_proj_GB: jax.Array, carry: Carry, dot: Dot) -> Blocks:
    return gru_gates(params, x_proj_GB, dot("W_h", carry[0]), carry)


RNN = Cell(
    rnn_update,
    gates=("h",),
    matrices=(Matrix("W_h"),),
    gate_values=rnn_update,
    derivative=Derivative(_rnn_forward, _rnn_backward),
)
LSTM = Cell(
    lstm_update,
    gates=("i", "f", "g", "o"),
    carries=("h", "c"),
    matrices=(Matrix("W_h", 4),),
    open_gates=("f",),
    gate_values=_lstm_gate_values,
    derivative=Derivative(_lstm_forward, _lstm_backward),
)
GRU = Cell(
    gru_update,
    gates=("r", "z", "n"),
    matrices=(Matrix("W_h", 3),),
    vectors=(Vector("b_h"),),
    gate_values=_gru_gate_values,
    derivative=Derivative(_gru_forward, _gru_backward),
)
