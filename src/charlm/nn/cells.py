"""The registry of recurrent cells, and the cells whose derivative JAX computes.

A new cell is a function of one time step (`charlm.nn.cell`) and one entry of `CELLS`. A cell outside the package has a name
of the form `module:name` (`find_cell`).

Each function below returns (carry, values of the gates).

Letters: B batch, H hidden, I input features, G gates times hidden. a is the preactivation of a gate.
"""

import difflib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from charlm.nn import core_cells
from charlm.nn.cell import INPUTS, Blocks, Carry, Cell, Dot, Matrix, Params, Vector, blocks, linear, sigmoid
from charlm.nn.core_cells import gru_gates, gru_step, lstm_gates, lstm_step, lstm_tanh
from charlm.system.errors import ConfigError
from charlm.system.modules import find_imported

_LN_LSTM_GROUPS = (4,)
_LN_GRU_GROUPS = (2, 1)
# The number of times that the Mogrifier gates its input or its state (Melis et al. 2020 use 5 or 6).
_ROUNDS = 5
# The initial stabiliser of the sLSTM, so low that the first input gate is exp(0).
_LOWEST = -1e4


def mlstm(params: Params, x_proj_GB: jax.Array, carry: Carry, dot: Dot) -> tuple[Carry, Blocks]:
    """Compute the multiplicative LSTM (Krause et al. 2016, equations 11 to 15).

    m = x_m * (W_hm h). The gates of the LSTM then read x_proj + W_h m.
    """
    h_HB, c_HB = carry
    hidden = len(h_HB)
    m_HB = x_proj_GB[:hidden] * dot("W_hm", h_HB)
    carry, gates = lstm_step(x_proj_GB[hidden:] + dot("W_h", m_HB), c_HB)
    return carry, (m_HB, *gates)


def mogrifier_lstm(params: Params, x_IB: jax.Array, carry: Carry, dot: Dot) -> tuple[Carry, Blocks]:
    """Compute the Mogrifier LSTM (Melis et al. 2020, equations 1 and 2).

    Input and state gate each other in turn, x = 2 sigmoid(Q h) * x and h = 2 sigmoid(R x) * h. An LSTM step follows.
    """
    h_HB, c_HB = carry
    for k in range(1, _ROUNDS + 1):
        if k % 2:
            x_IB = 2 * sigmoid(dot(f"Q_{k}", h_HB)) * x_IB
        else:
            h_HB = 2 * sigmoid(dot(f"R_{k}", x_IB)) * h_HB
    return lstm_step(dot("W_x", x_IB) + dot("W_h", h_HB) + params["b"][:, None], c_HB)


def slstm(params: Params, x_proj_GB: jax.Array, carry: Carry, dot: Dot) -> tuple[Carry, Blocks]:
    """Compute the sLSTM with one head (Beck et al. 2024, equations 8 to 17).

    The input gate is exponential: i = exp(a_i), f = sigmoid(a_f), c' = f c + i z, n' = f n + i, h' = o c' / n'. The stabiliser
    m' = max(log f + m, a_i) scales c and n by exp(-m), which cancels in h.
    """
    h_HB, c_HB, n_HB, m_HB = carry
    a_i, a_f, a_z, a_o = blocks(x_proj_GB + dot("W_h", h_HB), 4)
    log_f = jax.nn.log_sigmoid(a_f)
    m_new_HB = jnp.maximum(log_f + m_HB, a_i)
    i, f = jnp.exp(a_i - m_new_HB), jnp.exp(log_f + m_HB - m_new_HB)
    z, o = jnp.tanh(a_z), sigmoid(a_o)
    c_HB, n_HB = f * c_HB + i * z, f * n_HB + i
    return (o * c_HB / n_HB, c_HB, n_HB, m_new_HB), (i, f, z, o)


def cifg_lstm(params: Params, x_proj_GB: jax.Array, carry: Carry, dot: Dot) -> tuple[Carry, Blocks]:
    """Compute the LSTM with coupled input and forget gates, i = 1 - f (Greff et al. 2017, variant CIFG)."""
    h_HB, c_HB = carry
    a_f, a_g, a_o = blocks(x_proj_GB + dot("W_h", h_HB), 3)
    f, g, o = sigmoid(a_f), jnp.tanh(a_g), sigmoid(a_o)
    c_HB = g + f * (c_HB - g)
    return (o * jnp.tanh(c_HB), c_HB), (f, g, o)


def mgu(params: Params, x_proj_GB: jax.Array, carry: Carry, dot: Dot) -> tuple[Carry, Blocks]:
    """Compute the minimal gated unit (Zhou et al. 2016, equations 8a to 8c).

    f = sigmoid(x_f + W_f h); n = tanh(x_n + W_n (f * h)); h' = (1 - f) h + f n.
    """
    (h_HB,) = carry
    x_f, x_n = blocks(x_proj_GB, 2)
    f = sigmoid(x_f + dot("W_f", h_HB))
    n = jnp.tanh(x_n + dot("W_n", f * h_HB))
    return (h_HB + f * (n - h_HB),), (f, n)


def indrnn(params: Params, x_proj_HB: jax.Array, carry: Carry, dot: Dot) -> tuple[Carry, Blocks]:
    """Compute the independently recurrent network, h' = relu(x_proj + u * h) (Li et al. 2018, equation 2)."""
    h_HB = jax.nn.relu(x_proj_HB + params["u"][:, None] * carry[0])
    return (h_HB,), (h_HB,)


def min_gru_gates(x_proj_GB: jax.Array) -> Blocks:
    """Return the gates z, n of the minGRU (Feng et al. 2024, section 3.1), which read only the input."""
    z, n = blocks(x_proj_GB, 2)
    return sigmoid(z), n


def min_gru(params: Params, x_proj_GB: jax.Array) -> Blocks:
    """Return the coefficients of the minGRU, h' = (1 - z) h + z n."""
    z, n = min_gru_gates(x_proj_GB)
    return 1 - z, z * n


def min_lstm_gates(x_proj_GB: jax.Array) -> Blocks:
    """Return the gates f, i, n of the minLSTM (Feng et al. 2024, section 3.2), normalised so that f + i = 1.

    f / (f + i) = sigmoid(log f - log i) does not divide by a sum that may underflow.
    """
    a_f, a_i, n = blocks(x_proj_GB, 3)
    difference = jax.nn.log_sigmoid(a_f) - jax.nn.log_sigmoid(a_i)
    return sigmoid(difference), sigmoid(-difference), n


def min_lstm(params: Params, x_proj_GB: jax.Array) -> Blocks:
    """Return the coefficients of the minLSTM, h' = f h + i n."""
    f, i, n = min_lstm_gates(x_proj_GB)
    return f, i * n


def ln_lstm(params: Params, x_proj_GB: jax.Array, carry: Carry, dot: Dot) -> tuple[Carry, Blocks]:
    """Compute the layer-normalised LSTM (Ba et al. 2016, equations 20 to 22).

    The gates read x_proj + scale_h LN(W_h h), where x_proj = scale_x LN(x @ W_x) + b. The carry c' is that of the LSTM, and
    h' = o tanh(scale_c LN(c') + shift_c).
    """
    h_proj_GB = params["scale_h"][:, None] * layer_norm(dot("W_h", carry[0]), _LN_LSTM_GROUPS, axis=0)
    i, f, g, o = lstm_gates(lstm_tanh(x_proj_GB + h_proj_GB))
    c_HB = f * carry[1] + i * g
    read_HB = params["scale_c"][:, None] * layer_norm(c_HB, (1,), axis=0) + params["shift_c"][:, None]
    return (o * jnp.tanh(read_HB), c_HB), (i, f, g, o)


def ln_gru(params: Params, x_proj_GB: jax.Array, carry: Carry, dot: Dot) -> tuple[Carry, Blocks]:
    """Compute the layer-normalised GRU (Ba et al. 2016, appendix).

    This is the GRU of x_proj and scale_h LN(W_h h), where x_proj = scale_x LN(x @ W_x) + b. LN normalises r and z together,
    and n separately.
    """
    h_proj_GB = params["scale_h"][:, None] * layer_norm(dot("W_h", carry[0]), _LN_GRU_GROUPS, axis=0)
    return gru_step(params, x_proj_GB, h_proj_GB, carry), gru_gates(params, x_proj_GB, h_proj_GB, carry)


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


def showing_gates(step: Callable[..., tuple[Carry, Blocks]], **fields: Any) -> Cell:
    """Return a cell from a function (params, x_proj_GB, carry, dot) -> (carry, values of the gates).

    Args:
        step: one time step.
        fields: the other fields of `Cell`.
    """
    return Cell(lambda *args: step(*args)[0], gate_values=lambda *args: step(*args)[1], **fields)


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.uniform(key, shape, dtype)


_LSTM = {"gates": ("i", "f", "g", "o"), "carries": ("h", "c"), "open_gates": ("f",)}
_QS = tuple(Matrix(f"Q_{k}", INPUTS, 1) for k in range(1, _ROUNDS + 1, 2))
_RS = tuple(Matrix(f"R_{k}", 1, INPUTS) for k in range(2, _ROUNDS + 1, 2))

CELLS: Mapping[str, Cell] = {
    "rnn": core_cells.RNN,
    "lstm": core_cells.LSTM,
    "gru": core_cells.GRU,
    "ln_lstm": showing_gates(
        ln_lstm,
        **_LSTM,
        matrices=(Matrix("W_h", 4),),
        vectors=(Vector("scale_h", 4, 1.0), Vector("scale_c", 1, 1.0), Vector("shift_c")),
        norm_groups=_LN_LSTM_GROUPS,
    ),
    "ln_gru": showing_gates(
        ln_gru,
        gates=("r", "z", "n"),
        matrices=(Matrix("W_h", 3),),
        vectors=(Vector("b_h"), Vector("scale_h", 3, 1.0)),
        norm_groups=_LN_GRU_GROUPS,
    ),
    "mlstm": showing_gates(mlstm, **_LSTM | {"gates": ("m", "i", "f", "g", "o")}, matrices=(Matrix("W_hm"), Matrix("W_h", 4))),
    "mogrifier_lstm": showing_gates(mogrifier_lstm, **_LSTM, matrices=(*_QS, *_RS, Matrix("W_h", 4)), reads_features=True),
    "slstm": showing_gates(
        slstm,
        gates=("i", "f", "z", "o"),
        carries=("h", "c", "n", "m"),
        open_gates=("f",),
        initial=(0.0, 0.0, 0.0, _LOWEST),
        matrices=(Matrix("W_h", 4),),
    ),
    "cifg_lstm": showing_gates(
        cifg_lstm, gates=("f", "g", "o"), carries=("h", "c"), open_gates=("f",), matrices=(Matrix("W_h", 3),)
    ),
    "mgu": showing_gates(mgu, gates=("f", "n"), matrices=(Matrix("W_f"), Matrix("W_n"))),
    "indrnn": showing_gates(indrnn, gates=("h",), vectors=(Vector("u", 1, _uniform),)),
    "min_gru": linear(min_gru, gates=("z", "n"), gate_values=lambda params, x, carry, dot: min_gru_gates(x)),
    "min_lstm": linear(
        min_lstm, gates=("f", "i", "n"), open_gates=("f",), gate_values=lambda params, x, carry, dot: min_lstm_gates(x)
    ),
}


def find_cell(name: str) -> Cell:
    """Return a cell of `CELLS`, or the cell `module:name` of a module that is imported already.

    A config may come from somebody else, so this function imports nothing (`system.modules`).

    Raises:
        ConfigError: there is no such cell. The message says what would work.
    """
    if name in CELLS:
        return CELLS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, CELLS, 1, 0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{hint}it must be one of {', '.join(CELLS)}, or module:name for a cell of your own")
    cell = find_imported(name, "cell_module")
    if not isinstance(cell, Cell):
        raise ConfigError(f"it is no charlm.nn.cell.Cell; found {type(cell).__name__}")
    return cell


class SameCell:
    """A cell as a part of the key of a cache: it equals only itself, because the fields of a cell need not be hashable."""

    def __init__(self, name: str):
        self._cell = find_cell(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameCell) and self._cell is other._cell

    def __hash__(self) -> int:
        return id(self._cell)
