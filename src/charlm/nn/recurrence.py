"""Unroll any cell over time: hoisted input projections, one loop, and a gradient without products that can wait.

Four things make this faster than differentiating a plain scan, all exact:

- The input of the first layer is a character id, so its projection is a column of a table with V of them: V of work in
  place of B * T (`from_ids`).
- The gradient of W_h is not summed up inside the backward loop. The loop returns the gradient at `h_proj` for every
  step and dW_h is one large product at the end (`unroll`), or on a CPU a few of the size that suits its caches.
- Inside the loop arrays are feature-major, the batch last, so that W_h stands on the left of its product. A CPU's product
  reads its left operand as it lies and packs its right one anew each time: the state is small, W_h is not.
- One array as large as all projections is enough: a step writes what it saves over its projection, and on the way back its
  gradient over what it had saved. That holds as long as XLA need not copy the array, for which every reader of a step's
  rows must come before their first writer; hence the order in `_put`, and the rows that are handed from step to step on the
  way back.

Letters: B batch, T time, H hidden, V vocabulary, E embedding, I input features, G gates times hidden.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from charlm.nn.cells import Blocks, Carry, Cell, Params

# Up to this many symbols the gradient of a table is a product with one-hot vectors.
_ONE_HOT_SYMBOLS = 512

# A CPU sums the products of gradients of more numbers than the first part by part, each of about so many columns as the second.
_NUMBERS_AT_ONCE = 2**22
_COLUMNS_OF_A_PART = 1024


def matmul(x: jax.Array, w: jax.Array, dtype) -> jax.Array:
    """x @ w with the operands cast to `dtype`, summed up and returned in the dtype of x."""
    return jnp.matmul(x.astype(dtype), w.astype(dtype), preferred_element_type=x.dtype)


class Inputs(NamedTuple):
    """What a layer reads at every step, as features or projected (`from_ids`, `from_layer`).

    Attributes:
        size: I, the number of features.
        columns: () -> x_TIB.
        project: (W_x_IG, finish, dtype) -> finish(W_x.T @ x) of all steps, shape (T, G, B). `finish` is what is done to each
            column of the product by itself: the bias, for some cells a normalisation before it.
    """

    size: int
    columns: Callable[[], jax.Array]
    project: Callable[[jax.Array, Callable[[jax.Array], jax.Array], Any], jax.Array]


def from_layer(x_TIB: jax.Array) -> Inputs:
    """The inputs of a layer above another."""

    def project(W_x_IG, finish, dtype=jnp.float32):
        return finish(_product_of_steps(jnp.dtype(dtype), W_x_IG.T, x_TIB))

    return Inputs(x_TIB.shape[1], lambda: x_TIB, project)


def from_ids(ids_TB: jax.Array, embedding_VE: jax.Array | None, num_symbols: int) -> Inputs:
    """Character ids, embedded, or one-hot if `embedding_VE` is None."""

    def columns():
        return jax.nn.one_hot(ids_TB, num_symbols, axis=1) if embedding_VE is None else lookup(embedding_VE.T, ids_TB)

    def project(W_x_IG, finish, dtype=jnp.float32):
        if num_symbols < ids_TB.size:  # It is a table of all symbols that is projected.
            table_VG = W_x_IG if embedding_VE is None else matmul(embedding_VE, W_x_IG, dtype)
            # As it stands, for a CPU has no product of bfloat16 that a transposition was folded into.
            return lookup(finish(_as_it_stands(table_VG).T), ids_TB)
        if embedding_VE is None:
            return finish(lookup(W_x_IG.T, ids_TB))
        return from_layer(columns()).project(W_x_IG, finish, dtype)

    return Inputs(num_symbols if embedding_VE is None else embedding_VE.shape[1], columns, project)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product_of_steps(dtype, W_GI: jax.Array, x_TIB: jax.Array) -> jax.Array:
    """W @ x of every step, (T, G, B), with the operands in `dtype`.

    On a CPU one after another: all steps in one product would have to be turned around in memory before and after it. A GPU
    is kept busy by one large product alone.
    """

    def one_by_one(W, x):
        W = _as_it_stands(W)
        return jax.lax.map(lambda x_IB: _product(W, x_IB), x)

    return jax.lax.platform_dependent(W_GI.astype(dtype), x_TIB, cpu=one_by_one, default=_product)


def _product_of_steps_fwd(dtype, W_GI, x_TIB):
    return _product_of_steps(dtype, W_GI, x_TIB), (W_GI, x_TIB)


def _product_of_steps_bwd(dtype, residuals, grad_TGB):
    W_GI, x_TIB = residuals
    return _sum_of_products(grad_TGB, x_TIB, dtype), _product_of_steps(dtype, W_GI.T, grad_TGB)


_product_of_steps.defvjp(_product_of_steps_fwd, _product_of_steps_bwd)


@jax.custom_vjp
def lookup(table_GV: jax.Array, ids_TB: jax.Array) -> jax.Array:
    """The columns of a table, shape (T, G, B), with a gradient that is the same to the bit every time.

    The gradient of plain indexing is a scatter-add, which on a GPU adds in the order in which threads arrive.
    """
    (T, B), (G, V) = ids_TB.shape, table_GV.shape
    if ids_TB.size <= V:
        return jnp.swapaxes(table_GV.T[ids_TB], 1, 2)
    # Of many columns XLA would make one pass for this and one for the transposition.
    columns = jnp.broadcast_to(table_GV, (T, G, V)), jnp.broadcast_to(ids_TB[:, None], (T, G, B))
    return jnp.take_along_axis(*columns, axis=2, mode="clip")


def _lookup_fwd(table_GV, ids_TB):
    return lookup(table_GV, ids_TB), (ids_TB, table_GV.shape[1])


def _lookup_bwd(residuals, grad_TGB):
    ids_TB, symbols = residuals
    if symbols <= _ONE_HOT_SYMBOLS:
        one_hot_TVB = jax.nn.one_hot(ids_TB, symbols, dtype=grad_TGB.dtype, axis=1)
        return _as_it_stands(_sum_of_products(grad_TGB, one_hot_TVB, grad_TGB.dtype)), None
    # A CPU scatters one row after another, so that the order is fixed without sorting.
    grad_VG = jax.lax.platform_dependent(
        ids_TB.reshape(-1),
        _flat(grad_TGB).T,
        cpu=lambda i, g: jnp.zeros((symbols, g.shape[-1]), g.dtype).at[i].add(g),
        default=lambda i, g: segment_sum(g, i, symbols),
    )
    return grad_VG.T, None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


def segment_sum(values_NG: jax.Array, segment_N: jax.Array, num_segments: int) -> jax.Array:
    """Sums of the rows of each segment, shape (num_segments, G), added in a fixed order on every device.

    Rows are sorted by segment and summed by a segmented scan (Blelloch 1990), which needs no atomics.
    """
    order = jnp.argsort(segment_N, stable=True)
    sorted_N = segment_N[order]

    def combine(left, right):
        (left_id, left_sum), (right_id, right_sum) = left, right
        return right_id, right_sum + jnp.where((left_id == right_id)[:, None], left_sum, 0)

    _, sums_NG = jax.lax.associative_scan(combine, (sorted_N, values_NG[order]))
    segments = jnp.arange(num_segments)
    last = jnp.searchsorted(sorted_N, segments, side="right") - 1
    present = (last >= 0) & (sorted_N[last] == segments)
    return jnp.where(present[:, None], sums_NG[last], 0)


def unroll(
    cell: Cell, params: Params, W_h_GH: jax.Array, x_proj_TGB: jax.Array, carry: Carry, dtype=jnp.float32
) -> tuple[jax.Array, Carry]:
    """Run a cell over T steps.

    Args:
        cell: from `cells.CELLS`.
        params: the cell's own parameters (`cell.vectors`).
        W_h_GH: the recurrent kernel.
        x_proj_TGB: the input projections (`Inputs.project`).
        carry: the state before the first step, arrays (B, H).
        dtype: of the operands of the products; sums and states stay in the parameters' dtype.

    Returns:
        h_TBH, the outputs, and the state after the last step. Differentiable in everything but `cell` and `dtype`, in
        reverse mode.
    """
    h_THB, carry = _unroll(cell, jnp.dtype(dtype), dict(params), W_h_GH, x_proj_TGB, tuple(each.T for each in carry))
    return jnp.swapaxes(h_THB, 1, 2), tuple(each.T for each in carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _unroll(cell, dtype, params, W_h_GH, x_proj_TGB, carry):
    W_h = W_h_GH.astype(dtype)

    def step(carry, x_proj_GB):
        carry, _ = cell.forward(params, x_proj_GB, _product(W_h, carry[0]), carry)
        return carry, carry[0]

    carry, h_THB = jax.lax.scan(step, carry, x_proj_TGB)
    return h_THB, carry


def _unroll_fwd(cell, dtype, params, W_h_GH, x_proj_TGB, carry):
    """The same, keeping all states (T + 1, H, B) and what the cell saves."""
    W_h = W_h_GH.astype(dtype)
    num_steps, _, batch = x_proj_TGB.shape

    def step(t, state):
        carry, saved, states = state
        carry, blocks = cell.forward(params, _take(saved[0], t), _product(W_h, carry[0]), carry)
        saved = tuple(buffer if each is None else _put(buffer, t, each) for buffer, each in zip(saved, blocks))
        states = tuple(_put(buffer, t + 1, (each,)) for buffer, each in zip(states, carry))
        return carry, saved, states

    _, (_, *second) = jax.eval_shape(cell.forward, params, x_proj_TGB[0], x_proj_TGB[0], carry)
    rows = [sum(block.shape[0] for block in blocks) for blocks in second]
    saved = x_proj_TGB, *(jnp.zeros((num_steps, each, batch), x_proj_TGB.dtype) for each in rows)
    states = tuple(jnp.zeros((num_steps + 1, *each.shape), each.dtype).at[0].set(each) for each in carry)
    last, saved, states = jax.lax.fori_loop(0, num_steps, step, (carry, saved, states))
    return (states[0][1:], last), (params, W_h_GH, saved, states)


def _unroll_bwd(cell, dtype, residuals, grads):
    """Back through the steps; each step's gradient at its projections takes the place of what was saved of it."""
    params, W_h_GH, saved, states = residuals
    dh_THB, dcarry = grads
    num_steps, num_rows, _ = saved[0].shape
    # The rows whose gradient at h_proj is that at x_proj, and those with one of their own.
    shared = num_rows - sum(buffer.shape[1] for buffer in saved[1:])
    W_h_HK = [_as_it_stands(W_KH.T.astype(dtype)) for W_KH in (W_h_GH[:shared], W_h_GH[shared:]) if len(W_KH)]

    def at_h(dx, *dh):
        """The gradient at h_proj, in one part or two."""
        return [part for part in (dx[..., :shared, :], *dh) if part.shape[-2]]

    def step(k, state):
        t = num_steps - 1 - k
        dcarry, dparams, read, saved = state
        before, after = (tuple(_take(buffer, t + i) for buffer in states) for i in (0, 1))
        dcarry = dcarry[0] + _take(dh_THB, t), *dcarry[1:]
        dp, *blocks, dcarry = cell.backward(params, read, before, after, dcarry)
        saved = tuple(_put(buffer, t, each) for buffer, each in zip(saved, blocks))
        parts = at_h(*(_take(buffer, t) for buffer in saved))
        dh_HB = sum(_product(W, part) for W, part in zip(W_h_HK, parts))
        read = tuple(_take(buffer, jnp.maximum(t - 1, 0)) for buffer in saved)
        return (dcarry[0] + dh_HB, *dcarry[1:]), jax.tree.map(jnp.add, dparams, dp), read, saved

    zeros = jax.tree.map(jnp.zeros_like, params)
    read = tuple(buffer[-1] for buffer in saved)
    dcarry, dparams, _, grads = jax.lax.fori_loop(0, num_steps, step, (dcarry, zeros, read, saved))
    dW_h_GH = jnp.concatenate([_sum_of_products(part, states[0][:-1], dtype) for part in at_h(*grads)])
    return dparams, dW_h_GH, grads[0], dcarry


_unroll.defvjp(_unroll_fwd, _unroll_bwd)


def _product(W: jax.Array, x: jax.Array, out_dtype=None) -> jax.Array:
    """W @ x with x cast to the dtype of W, summed up in that of x unless another is given."""
    return jnp.matmul(W, x.astype(W.dtype), preferred_element_type=out_dtype or x.dtype)


def _sum_of_products(grad_TGB: jax.Array, x_TIB: jax.Array, dtype) -> jax.Array:
    """The sum over all steps of grad @ x.T, shape (G, I), with the operands in `dtype`.

    All steps side by side are one product. A CPU has to turn both operands around in memory for it; where they do not stay
    in its caches meanwhile, parts of them that do are taken one after another.
    """
    num_steps, _, batch = grad_TGB.shape

    def at_once(grad, x):
        return _product(_flat(grad).astype(dtype), _flat(x).T, grad.dtype)

    def by_parts(grad, x):
        steps = max(1, _COLUMNS_OF_A_PART // batch)
        first = num_steps % steps

        def add(k, total):
            return total + at_once(*(jax.lax.dynamic_slice_in_dim(each, first + k * steps, steps) for each in (grad, x)))

        return jax.lax.fori_loop(0, num_steps // steps, add, at_once(grad[:first], x[:first]))

    on_cpu = by_parts if grad_TGB.size > _NUMBERS_AT_ONCE else at_once
    return jax.lax.platform_dependent(grad_TGB, x_TIB, cpu=on_cpu, default=at_once)


def _as_it_stands(x: jax.Array) -> jax.Array:
    """x, laid out in memory as its axes say. XLA would leave a transposition to those who read it, at every reading."""
    return jax.lax.optimization_barrier(x)


def _put(buffer_TKB: jax.Array, t, blocks: Blocks) -> jax.Array:
    """A buffer with the rows of step t replaced, the last block first: when cells save, it is the one that needs the others."""
    start = buffer_TKB.shape[1]
    for block in reversed(blocks):
        start -= len(block)
        buffer_TKB = jax.lax.dynamic_update_slice(buffer_TKB, block[None], (t, start, 0))
    return buffer_TKB


def _take(buffer_TKB: jax.Array, t) -> jax.Array:
    """The rows of step t."""
    return jax.lax.dynamic_index_in_dim(buffer_TKB, t, 0, keepdims=False)


def _flat(x_TKB: jax.Array) -> jax.Array:
    """All steps side by side, (K, T * B)."""
    return jnp.swapaxes(x_TKB, 0, 1).reshape(x_TKB.shape[1], -1)
