"""Compare the recurrence, in float64, with automatic differentiation of a plain scan and with Flax's cells."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.test_util import check_grads

from charlm.nn import recurrence
from charlm.nn.cells import CELLS, Cell, Vector, by_autodiff

T, B, H, V, E = 7, 3, 5, 11, 4


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def inputs(name):
    cell = CELLS[name]
    gates = len(cell.gates) * H
    params = {vector.name: draw(9 + i, vector.blocks * H) for i, vector in enumerate(cell.vectors)}
    carry = tuple(draw(20 + i, B, H) for i in range(len(cell.carries)))
    return params, draw(1, gates, H), draw(2, T, gates, B), carry


def objective(unroll):
    """Return a scalar function of `unroll` that depends on every output and on every element of the last carry."""

    def loss(params, W_h, x_proj, carry):
        h_TBH, last = unroll(params, W_h, x_proj, carry)
        return jnp.sum(jnp.sin(h_TBH) * draw(3, T, B, H)) + sum(jnp.sum(jnp.cos(c) * draw(4, B, H)) for c in last)

    return loss


def close(a, b, tolerance=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("name", CELLS)
def test_values_and_all_gradients_equal_plain_autodiff(x64, name):
    args = inputs(name)

    def fast(*args):
        return recurrence.unroll(CELLS[name], *args, dtype=jnp.float64)

    def plain(*args):
        return reference.unroll(reference.CELLS[name], *args)

    close(fast(*args), plain(*args))
    every = (0, 1, 2, 3)
    close(jax.jit(jax.grad(objective(fast), every))(*args), jax.jit(jax.grad(objective(plain), every))(*args))


def test_a_custom_cell_inherits_the_gradient(x64):
    """The cell is a minimal gated unit with a vector parameter."""

    def update(params, x_proj_GB, h_proj_GB, carry):
        (h,) = carry
        x_f, x_n = jnp.split(x_proj_GB, 2)
        h_f, h_n = jnp.split(h_proj_GB, 2)
        f = jax.nn.sigmoid(x_f + h_f + params["peephole"][:, None] * h)
        return ((1 - f) * h + f * jnp.tanh(x_n + f * h_n),)

    def batch_first(params, x_proj, h_proj, carry):
        return (update(params, x_proj.T, h_proj.T, (carry[0].T,))[0].T,)

    cell = Cell(*by_autodiff(update), gates=("f", "n"), carries=("h",), vectors=(Vector("peephole"),))
    args = {"peephole": draw(9, H)}, draw(1, 2 * H, H), draw(2, T, 2 * H, B), (draw(20, B, H),)

    def fast(*args):
        return recurrence.unroll(cell, *args, dtype=jnp.float64)

    def plain(*args):
        return reference.unroll(batch_first, *args)

    every = (0, 1, 2, 3)
    close(jax.jit(jax.grad(objective(fast), every))(*args), jax.jit(jax.grad(objective(plain), every))(*args))


@pytest.mark.parametrize("name", CELLS)
def test_gradients_equal_finite_differences(x64, name):
    def fast(*args):
        return recurrence.unroll(CELLS[name], *args, dtype=jnp.float64)

    small = jax.tree.map(lambda a: 0.3 * a, inputs(name))
    check_grads(jax.jit(objective(fast)), small, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_a_sequence_in_two_parts_gives_the_same_outputs_and_carry(x64, name):
    params, W_h, x_proj, carry = inputs(name)

    def run(x, c):
        return recurrence.unroll(CELLS[name], params, W_h, x, c, jnp.float64)

    whole, last = run(x_proj, carry)
    first, middle = run(x_proj[:3], carry)
    second, end = run(x_proj[3:], middle)
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
    params, W_h, _, carry = inputs(name)
    x_TBE, W_x, b = draw(5, T, B, E), draw(6, E, len(W_h)), draw(7, len(W_h))

    def ours(params, W_x, W_h, b, x):
        x_proj = recurrence.from_layer(jnp.swapaxes(x, 1, 2)).project(W_x, lambda product: product + b[:, None], jnp.float64)
        return recurrence.unroll(CELLS[name], params, W_h, x_proj, carry, jnp.float64)[0]

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

        x = recurrence.from_ids(ids_TB, table if embedded else None, vocab).project(W_x, finish_columns, jnp.float64)
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
    assert steps * rows * batch > recurrence._MAX_ELEMENTS_IN_ONE_PRODUCT
    grad, x = draw(1, steps, rows, batch), draw(2, steps, H, batch)
    summed = jax.jit(recurrence._kernel_gradient, static_argnums=2)(grad, x, jnp.float64)
    np.testing.assert_allclose(summed, np.einsum("tgb,tib->gi", grad, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CELLS)
def test_no_step_copies_a_buffer_of_all_steps(name):
    """The loop writes its buffers in place. A copy in every step would make the time quadratic in T."""
    cell, steps, hidden, batch = CELLS[name], 37, 32, 16
    rows = len(cell.gates) * hidden

    def loss(params, W_h, x_proj):
        carry = (jnp.ones((batch, hidden)),) * len(cell.carries)
        return jnp.sum(jnp.sin(recurrence.unroll(cell, params, W_h, 2 * x_proj, carry)[0]))

    params = {vector.name: jnp.ones(vector.blocks * hidden) for vector in cell.vectors}
    args = params, jnp.ones((rows, hidden)), jnp.ones((steps, rows, batch))
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile().as_text()
    # The entry computation is the last one. The computations before it are its loops and their fusions.
    loops, entry = compiled.split("\nENTRY ")
    assert f"f32[{steps},{rows},{batch}]" in loops and " while(" in entry
    assert not re.findall(rf"= f32\[(?:{steps}|{steps + 1}),\d+,\d+\]\S* copy\(.*", loops)


@pytest.mark.parametrize("segments, rows", [(1, 5), (7, 40), (50, 12), (600, 300)])
def test_segment_sum_adds_the_rows_of_each_segment(x64, segments, rows):
    ids = np.random.default_rng(segments).integers(0, segments, rows)
    values = draw(1, rows, 3)
    expected = np.zeros((segments, 3))
    np.add.at(expected, ids, np.asarray(values))
    sums = jax.jit(recurrence.segment_sum, static_argnums=2)(values, jnp.asarray(ids), segments)
    close(sums, expected)


@pytest.mark.parametrize("name", CELLS)
def test_bfloat16_applies_only_to_the_operands_of_products(name):
    params, W_h, x_proj, carry = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32) * 0.3, inputs(name))

    def run(dtype):
        return recurrence.unroll(CELLS[name], params, W_h, x_proj, carry, dtype)

    low, high = run(jnp.bfloat16), run(jnp.float32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(low))
    difference = np.abs(np.asarray(low[0]) - np.asarray(high[0])).max()
    assert 0 < difference < 0.02
    grads = jax.grad(lambda W: jnp.sum(recurrence.unroll(CELLS[name], params, W, x_proj, carry, jnp.bfloat16)[0]))(W_h)
    exact = jax.grad(lambda W: jnp.sum(recurrence.unroll(CELLS[name], params, W, x_proj, carry)[0]))(W_h)
    assert grads.dtype == jnp.float32
    np.testing.assert_allclose(grads, exact, rtol=0.05, atol=0.05)
