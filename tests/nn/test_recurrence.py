"""Compare the recurrence, in float64, with automatic differentiation of a plain scan and with Flax's cells."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.test_util import check_grads

from charlm.nn import inputs as layer_inputs
from charlm.nn import products, recurrence
from charlm.nn.cell import Cell, Matrix, Vector, blocks
from charlm.nn.cells import CELLS
from charlm.nn.resets import Resets

T, B, H, V, E = 7, 3, 5, 11, 4


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def inputs(cell):
    """Return arguments of `unroll` for a cell, or for the name of a cell."""
    cell = CELLS.get(cell, cell)
    rows = len(cell.gates) * H
    params = {vector.name: draw(9 + i, vector.blocks * H) for i, vector in enumerate(cell.vectors)}
    matrices = {matrix.name: draw(1 + 40 * i, *matrix.shape(H, E)) for i, matrix in enumerate(cell.matrices)}
    carry = tuple(draw(20 + i, B, H) for i in range(len(cell.carries)))
    if "n" in cell.carries:  # The normaliser of the sLSTM is positive.
        carry = tuple(jnp.abs(each) if name == "n" else each for name, each in zip(cell.carries, carry))
    if cell.reads_features:
        return params | {"b": draw(8, rows)}, matrices | {"W_x": draw(7, rows, E)}, draw(2, T, E, B), carry
    return params, matrices, draw(2, T, rows, B), carry


def objective(unroll):
    """Return a scalar function of `unroll` that depends on every output and on every element of the last carry."""

    def loss(params, matrices, x_TKB, carry):
        h_TBH, last = unroll(params, matrices, x_TKB, carry)
        return jnp.sum(jnp.sin(h_TBH) * draw(3, T, B, H)) + sum(jnp.sum(jnp.cos(c) * draw(4, B, H)) for c in last)

    return loss


def close(a, b, tolerance=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def values_and_gradients(unroll):
    """Return a compiled function that returns what `unroll` returns, and the gradients of `objective`.

    The values come from a call of their own: `recurrence.unroll` computes them in another way when it is differentiated.
    """
    return jax.jit(lambda *args: (unroll(*args), jax.grad(objective(unroll), (0, 1, 2, 3))(*args)))


def plain_values_and_gradients(unroll):
    """Return the function of `values_and_gradients` for a reference. One call gives both, because JAX differentiates it."""

    def scalar_and_values(*args):
        values = unroll(*args)
        return objective(lambda *_: values)(*args), values

    def both(*args):
        gradients, values = jax.grad(scalar_and_values, (0, 1, 2, 3), has_aux=True)(*args)
        return values, gradients

    return jax.jit(both)


def check_against(update, cell):
    """Check values and all gradients of a cell against plain automatic differentiation of a scan."""
    args = inputs(cell)

    def fast(*args):
        return recurrence.unroll(cell, *args, dtype=jnp.float64)

    def plain(*args):
        return reference.unroll(update, *args)

    close(values_and_gradients(fast)(*args), plain_values_and_gradients(plain)(*args))


@pytest.mark.parametrize("name", CELLS)
def test_values_and_all_gradients_equal_plain_autodiff(x64, name):
    check_against(reference.CELLS.get(name) or reference.of_update(CELLS[name]), CELLS[name])


# Resets in the first step, in two neighbouring steps, in the last step; and a row without resets.
RESET_TB = np.zeros((T, B), bool)
RESET_TB[[0, 2, 3], 0] = RESET_TB[T - 1, 1] = True


# A hand-written derivative with two carries, an inherited one with one carry, features as input, a normaliser as carry, and
# no loop. The other cells share the code of one of these.
KINDS_OF_CELL = ("lstm", "ln_gru", "mogrifier_lstm", "slstm", "min_lstm")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS_OF_CELL else pytest.mark.slow) for name in CELLS]
)
def test_values_and_all_gradients_with_resets_equal_plain_autodiff(x64, name):
    """The carry at a reset is that of the cell, or a learned one, so its gradient counts too."""
    *args, carry = inputs(name)
    initial = jax.tree.map(lambda each: 0.3 * each[:1].T + 0.2, carry)

    def fast(params, matrices, x_TKB, both):
        resets = Resets(jnp.asarray(RESET_TB), both[1])
        return recurrence.unroll(CELLS[name], params, matrices, x_TKB, both[0], jnp.float64, resets=resets)

    def plain(params, matrices, x_TKB, both):
        return reference.unroll(reference.CELLS[name], params, matrices, x_TKB, both[0], (RESET_TB, both[1]))

    args = *args, (carry, initial)
    close(values_and_gradients(fast)(*args), plain_values_and_gradients(plain)(*args))


@pytest.mark.parametrize("name", [name for name, cell in CELLS.items() if cell.derivative])
def test_a_hand_written_derivative_is_that_of_the_update(x64, name):
    cell = CELLS[name]._replace(derivative=None)
    check_against(reference.of_update(cell), cell)


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("name", [name for name, cell in CELLS.items() if cell.coefficients])
def test_the_parallel_form_of_a_linear_recurrence_equals_its_loop(x64, monkeypatch, name, platform):
    """Both forms run on this machine. An accelerator runs the one that is called `default`."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, **forms: forms[platform](*args))
    check_against(reference.CELLS[name], CELLS[name])
    check_against(reference.CELLS[name], CELLS[name]._replace(coefficients=None))


def test_a_custom_cell_inherits_the_gradient(x64):
    """The cell has two dependent products with one matrix, a product of a computed operand, and a vector parameter."""

    def update(params, x_proj_GB, carry, dot):
        h, m = carry
        x_f, x_n = blocks(x_proj_GB, 2)
        f = jax.nn.sigmoid(x_f + dot("U", dot("U", h)) + params["peephole"][:, None] * m)
        wide = dot("V", jnp.concatenate([f * h, m]))
        return (1 - f) * h + f * jnp.tanh(x_n * wide), f * m + h

    matrices = (Matrix("U"), Matrix("V", 1, 2))
    cell = Cell(update, gates=("f", "n"), carries=("h", "m"), matrices=matrices, vectors=(Vector("peephole"),))
    check_against(reference.of_update(cell), cell)


def test_the_noise_of_a_cell_has_no_gradient_and_reaches_every_step(x64):
    def update(params, x_HB, carry, dot, noise_HB):
        h_HB = jnp.tanh(x_HB + dot("W_h", carry[0]))
        return (h_HB if noise_HB is None else jnp.where(noise_HB < 0.5, carry[0], h_HB),)

    cell = Cell(update, gates=("h",), matrices=(Matrix("W_h"),), noise=1)
    params, matrices, x_THB, carry = inputs(cell)
    noise_THB = jnp.asarray(np.random.default_rng(0).uniform(size=(T, H, B)))

    def plain(params, matrices, x_THB, carry):
        def step(h_BH, inputs):
            x_HB, noise_HB = inputs
            new_BH = jnp.tanh(x_HB.T + h_BH @ matrices["W_h"].T)
            h_BH = jnp.where(noise_HB.T < 0.5, h_BH, new_BH)
            return h_BH, h_BH

        last, h_TBH = jax.lax.scan(step, carry[0], (x_THB, noise_THB))
        return h_TBH, (last,)

    def fast(*args):
        return recurrence.unroll(cell, *args, dtype=jnp.float64, noise_TKB=noise_THB)

    args = params, matrices, x_THB, carry
    gradients = [jax.jit(jax.value_and_grad(objective(each), (1, 2, 3)))(*args) for each in (fast, plain)]
    close(*gradients)


# The gradients of all cells are compared with automatic differentiation above.
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("lstm", "min_gru") else pytest.mark.slow) for n in CELLS])
def test_gradients_equal_finite_differences(x64, name):
    def fast(*args):
        return recurrence.unroll(CELLS[name], *args, dtype=jnp.float64)

    small = jax.tree.map(lambda a: 0.3 * a, inputs(name))
    check_grads(jax.jit(objective(fast)), small, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_a_sequence_in_two_parts_gives_the_same_outputs_and_carry(x64, name):
    params, matrices, x_proj, carry = inputs(name)

    @jax.jit
    def run(x, c):
        return recurrence.unroll(CELLS[name], params, matrices, x, c, jnp.float64)

    whole, last = run(x_proj[:6], carry)
    first, middle = run(x_proj[:3], carry)
    second, end = run(x_proj[3:6], middle)
    close((whole, last), (jnp.concatenate([first, second]), end), 1e-14)


def flax_weights(name, params, W_x, W_h, b):
    """Return the same weights in the parameter tree of Flax's cells, which have one kernel for each gate."""
    gates = CELLS[name].gates
    weights = {}
    for k, gate in enumerate(gates):
        block = slice(k * H, (k + 1) * H)
        inner, outer = {"kernel": W_x[:, block]}, {"kernel": W_h[block].T}
        if name == "lstm":
            outer["bias"] = b[block]
        else:
            inner["bias"] = b[block]
            if gate == "n":
                outer["bias"] = params["b_h"]
        weights |= {f"i{gate}": inner, f"h{gate}": outer}
    return {"params": weights}


@pytest.mark.parametrize("name, flax_cell", [("lstm", nn.LSTMCell), ("lstm", nn.OptimizedLSTMCell), ("gru", nn.GRUCell)])
def test_outputs_and_gradients_equal_those_of_flax(x64, name, flax_cell):
    params, matrices, _, carry = inputs(name)
    W_h = matrices["W_h"]
    x_TBE, W_x, b = draw(5, T, B, E), draw(6, E, len(W_h)), draw(7, len(W_h))

    def ours(params, W_x, W_h, b, x):
        x_proj = layer_inputs.from_layer(jnp.swapaxes(x, 1, 2)).project(W_x, lambda product: product + b[:, None], jnp.float64)
        return recurrence.unroll(CELLS[name], params, {"W_h": W_h}, x_proj, carry, jnp.float64)[0]

    def theirs(params, W_x, W_h, b, x):
        cell = flax_cell(H, dtype=jnp.float64, param_dtype=jnp.float64)
        initial = carry[0] if name == "gru" else (carry[1], carry[0])
        weights = flax_weights(name, params, W_x, W_h, b)

        def step(c, x_BE):
            return cell.apply(weights, c, x_BE)

        return jax.lax.scan(step, initial, x)[1]

    args = params, W_x, W_h, b, x_TBE
    close(ours(*args), theirs(*args))

    def loss(f):
        return lambda *a: jnp.sum(jnp.sin(f(*a)) * draw(8, T, B, H))

    close(jax.jit(jax.grad(loss(ours), range(5)))(*args), jax.jit(jax.grad(loss(theirs), range(5)))(*args))


@pytest.mark.parametrize("vocab", [V, T * B + 1, 600])
@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
def test_projected_ids_equal_the_projection_of_their_embeddings(x64, vocab, embedded, normalised):
    ids_TB = jnp.asarray(np.random.default_rng(0).integers(0, vocab, (T, B)))
    table, W_x, b = draw(1, vocab, E), draw(2, E if embedded else vocab, 4 * H), draw(3, 4 * H)

    def finish(rows, b):
        return reference.normalise(rows) + b if normalised else rows + b

    def fast(table, W_x, b):
        def finish_columns(product):
            return jnp.swapaxes(finish(jnp.swapaxes(product, -1, -2), b), -1, -2)

        x = layer_inputs.from_ids(ids_TB, table if embedded else None, vocab).project(W_x, finish_columns, jnp.float64)
        return jnp.sum(jnp.sin(jnp.swapaxes(x, 1, 2)) * draw(4, T, B, 4 * H))

    def plain(table, W_x, b):
        encoded = table[ids_TB] if embedded else jax.nn.one_hot(ids_TB, vocab, dtype=jnp.float64)
        return jnp.sum(jnp.sin(finish(encoded @ W_x, b)) * draw(4, T, B, 4 * H))

    gradients = [jax.jit(jax.value_and_grad(f, (0, 1, 2)))(table, W_x, b) for f in (fast, plain)]
    close(*gradients)


@pytest.mark.parametrize("steps", [16, 19, 33])
def test_a_large_kernel_gradient_is_summed_over_all_steps(x64, steps):
    """On a CPU the sum consists of products of 16 steps each, and a shorter first one."""
    batch, rows = 64, 5000
    assert steps * rows * batch > products._MAX_ELEMENTS_IN_ONE_PRODUCT
    grad, x = draw(1, steps, rows, batch), draw(2, steps, H, batch)
    summed = jax.jit(products.kernel_gradient, static_argnums=2)(grad, x, jnp.float64)
    np.testing.assert_allclose(summed, np.einsum("tgb,tib->gi", grad, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, cell in CELLS.items() if not cell.coefficients])
def test_no_step_copies_a_buffer_of_all_steps(name):
    """The loop writes its buffers in place. A copy in every step would make the time quadratic in T."""
    cell, steps, hidden, batch, features = CELLS[name], 37, 32, 16, 48
    rows = len(cell.gates) * hidden
    width = features if cell.reads_features else rows

    def loss(params, matrices, x_TKB):
        carry = (jnp.ones((batch, hidden)),) * len(cell.carries)
        return jnp.sum(jnp.sin(recurrence.unroll(cell, params, matrices, 2 * x_TKB, carry)[0]))

    shapes = cell.shapes(hidden, features)
    params = {vector.name: jnp.ones(shapes[vector.name]) for vector in cell.vectors}
    matrices = {matrix.name: jnp.ones(shapes[matrix.name]) for matrix in cell.matrices}
    if cell.reads_features:
        params, matrices = params | {"b": jnp.ones(rows)}, matrices | {"W_x": jnp.ones((rows, features))}
    args = params, matrices, jnp.ones((steps, width, batch))
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile().as_text()
    # The entry computation is the last one. The computations before it are its loops and their fusions.
    loops, entry = compiled.split("\nENTRY ")
    assert f"f32[{steps},{width},{batch}]" in loops and " while(" in entry
    assert not re.findall(rf"= f32\[(?:{steps}|{steps + 1}),\d+,\d+\]\S* copy\(.*", loops)


@pytest.mark.parametrize("segments, rows", [(1, 5), (7, 40), (50, 12), (600, 300)])
def test_segment_sum_adds_the_rows_of_each_segment(x64, segments, rows):
    ids = np.random.default_rng(segments).integers(0, segments, rows)
    values = draw(1, rows, 3)
    expected = np.zeros((segments, 3))
    np.add.at(expected, ids, np.asarray(values))
    sums = jax.jit(layer_inputs.segment_sum, static_argnums=2)(values, jnp.asarray(ids), segments)
    close(sums, expected)


# A derivative written by hand, one that is replayed, and products of computed operands; the other cells share their code.
IN_BFLOAT16 = [
    pytest.param(name, marks=() if name in ("lstm", "slstm", "mogrifier_lstm") else pytest.mark.slow)
    for name, cell in CELLS.items()
    if cell.matrices
]


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_bfloat16_applies_only_to_the_operands_of_products(name):
    params, matrices, x_proj, carry = jax.tree.map(lambda a: np.asarray(a, np.float32) * np.float32(0.3), inputs(name))

    @functools.partial(jax.jit, static_argnums=0)
    def outputs_and_gradient(dtype, matrices):
        def run(matrices):
            return recurrence.unroll(CELLS[name], params, matrices, x_proj, carry, dtype)

        return run(matrices), jax.grad(lambda matrices: jnp.sum(run(matrices)[0]))(matrices)

    (low, grads), (high, exact) = (outputs_and_gradient(dtype, matrices) for dtype in (jnp.bfloat16, jnp.float32))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(low))
    difference = np.abs(np.asarray(low[0]) - np.asarray(high[0])).max()
    assert 0 < difference < 0.02
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    close(grads, exact, 0.05)
