"""What a recurrent cell declares: its update, its parameters, its gates and its carries.

One time step of a recurrent layer computes

    x_proj = W_x.T x + b                              for all time steps at once, before the loop
    carry  = update(params, x_proj, carry, dot)

`dot("W_h", h)` is the product of one of the cell's matrices with a vector that the step computes. A cell may call `dot` any
number of times, and each product may depend on the ones before. `recurrence` unrolls the update, and computes the gradient of
every matrix as one large product after the loop.

Arrays inside a cell are feature-major, with the batch last; `recurrence` explains why. The rows of one gate are contiguous: a
block of H rows.

Letters: B batch, H hidden, I input features, G gates times hidden, K any number of rows.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Mapping[str, jax.Array]
Carry = tuple[jax.Array, ...]
# One array, as consecutive blocks of its rows.
Blocks = tuple[jax.Array, ...]
# (name of a matrix, vector for each sequence (K, B)) -> product.
Dot = Callable[[str, jax.Array], jax.Array]
# (params, x_proj_GB, carry, dot) -> carry. A cell with noise gets the noise as a fifth argument.
Update = Callable[..., Carry]
GateValues = Callable[[Params, jax.Array, Carry, Dot], Blocks]
# (params, x_proj_GB) -> (decay_HB, added_HB).
Coefficients = Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]
# What the forward pass saves of a step (`Derivative.forward`).
Saved = tuple[Blocks, ...]
Initializer = Callable[..., jax.Array]

# As the number of rows or columns of a matrix: I, the number of input features.
INPUTS = "inputs"


class Vector(NamedTuple):
    """A vector parameter of a cell, in addition to the bias b.

    Attributes:
        name: its key in `params`.
        blocks: its length, as a multiple of H.
        init: the initial value of all its elements, or an initialiser (key, shape, dtype) -> array.
    """

    name: str
    blocks: int = 1
    init: float | Initializer = 0.0


class Matrix(NamedTuple):
    """A matrix that a cell multiplies inside the loop, shape (rows, columns).

    Attributes:
        name: its key in the parameters of the layer, and the first argument of `dot`.
        rows: the number of rows, as a multiple of H, or INPUTS.
        columns: the number of columns, likewise.
        init: its initialiser. None: square blocks are drawn by `model.recurrent_init`, and other matrices by LeCun's
            initialiser. `model.init_std` overrides all of them.
    """

    name: str
    rows: int | str = 1
    columns: int | str = 1
    init: Initializer | None = None

    def shape(self, hidden: int, inputs: int) -> tuple[int, int]:
        """Return (rows, columns) for H and I."""
        rows, columns = (inputs if size == INPUTS else int(size) * hidden for size in (self.rows, self.columns))
        return rows, columns


class Derivative(NamedTuple):
    """A hand-written derivative of a cell whose only product is `dot("W_h", h)`. It saves less than automatic differentiation.

    Attributes:
        forward: (params, x_proj_GB, h_proj_GB, carry) -> (carry, saved), where h_proj is W_h h. `saved` holds what `backward`
            needs besides the carries, as one or two arrays, each given as blocks. The first array overwrites x_proj_GB in its
            buffer. The second array has as many rows as the dh of `backward`.
        backward: (params, saved, carry before, carry after, dcarry) -> (dparams, dx, dh, dcarry), the gradients of one step.
            `saved` arrives as one or two arrays, their blocks concatenated. dx is the gradient with respect to x_proj_GB, and
            dh the gradient with respect to the last rows of h_proj_GB, both as blocks. dh covers only the rows where it differs
            from dx, so it is empty for a cell that reads only the sum x_proj + h_proj.
    """

    forward: Callable[[Params, jax.Array, jax.Array, Carry], tuple[Carry, Saved]]
    backward: Callable[[Params, tuple[jax.Array, ...], Carry, Carry, Carry], tuple[Params, Blocks, Blocks, Carry]]


class Cell(NamedTuple):
    """Everything that `recurrence` and `model` need to know about a cell.

    Attributes:
        update: (params, x_proj_GB, carry, dot) -> carry, one time step.
        gates: the names of the blocks of x_proj, each of H rows. For the LSTM and the GRU the order is that of cuDNN and
            PyTorch.
        carries: the names of the arrays in the carry, each of shape (H, B). The first one is the output.
        matrices: the matrices of the products inside the loop.
        vectors: the parameters besides W_x, b and the matrices. Their names are the keys of `params`.
        open_gates: the gates whose bias starts at `model.forget_bias`. All other biases start at 0.
        initial: the value of each carry at the start of a text. Empty: 0 for all of them.
        reads_features: whether the update reads the input's features x_IB in place of x_proj_GB. It then computes the
            projection with `dot("W_x", x)` (G rows), and finds the bias in `params["b"]`.
        noise: the number of blocks of H rows of uniform random numbers that the update gets in each step, for zoneout and its
            like. The update's fifth argument is then an array of shape (noise * H, B) with values in [0, 1). It is None outside
            of training.
        norm_groups: for a cell that normalises x_proj and its product with W_h separately before it adds them: the numbers of
            consecutive gates that are normalised together. The model normalises x_proj and then adds b. The update normalises
            the product.
        gate_values: (params, x_proj_GB, carry, dot) -> the values of the gates in one step, in the order of `gates`, each of
            shape (H, B). Only `inference.states` uses it. None: the cell does not show its gates.
        derivative: a hand-written derivative of the update. None: automatic differentiation of one step.
        coefficients: for a linear recurrence h' = decay * h + added whose coefficients do not depend on the state (`linear`).
    """

    update: Update
    gates: tuple[str, ...]
    carries: tuple[str, ...] = ("h",)
    matrices: tuple[Matrix, ...] = ()
    vectors: tuple[Vector, ...] = ()
    open_gates: tuple[str, ...] = ()
    initial: tuple[float, ...] = ()
    reads_features: bool = False
    noise: int = 0
    norm_groups: tuple[int, ...] = ()
    gate_values: GateValues | None = None
    derivative: Derivative | None = None
    coefficients: Coefficients | None = None

    def shapes(self, hidden: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters of a layer, except those of `learn_initial_state`."""
        rows = len(self.gates) * hidden
        shapes: dict[str, tuple[int, ...]] = {"W_x": (inputs, rows), "b": (rows,)}
        shapes |= {matrix.name: matrix.shape(hidden, inputs) for matrix in self.matrices}
        shapes |= {vector.name: (vector.blocks * hidden,) for vector in self.vectors}
        return shapes | ({"scale_x": (rows,)} if self.norm_groups else {})

    def initial_value(self, k: int) -> float:
        """Return the value of carry k at the start of a text."""
        return self.initial[k] if self.initial else 0.0


def linear(coefficients: Coefficients, gates: tuple[str, ...], **fields: Any) -> Cell:
    """Return the cell of a linear recurrence h' = decay * h + added, whose coefficients depend only on the input.

    The same function gives the step and the parallel form, so the two cannot differ.

    Args:
        coefficients: (params, x_proj_GB) -> (decay_HB, added_HB). It must treat every column separately, and accept arrays with
            further axes before the rows.
        gates: the names of the blocks of x_proj.
        fields: other fields of `Cell`.
    """

    def update(params: Params, x_proj_GB: jax.Array, carry: Carry, dot: Dot) -> Carry:
        del dot
        decay_HB, added_HB = coefficients(params, x_proj_GB)
        return (decay_HB * carry[0] + added_HB,)

    return Cell(update, gates=gates, coefficients=coefficients, **fields)


def blocks(x: jax.Array, num: int) -> Blocks:
    """Return the `num` blocks of rows of an array of shape (..., K, B)."""
    return tuple(jnp.split(x, num, axis=-2))


def sigmoid(a: jax.Array) -> jax.Array:
    """Return the logistic function of a, computed with tanh, so all gates need only one transcendental function."""
    return 0.5 * jnp.tanh(0.5 * a) + 0.5
