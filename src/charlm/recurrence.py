"""Unroll any cell over time: hoisted input projections, one scan, and a gradient without products that can wait.

Two things make this faster than differentiating a plain scan, both exact:

- The input of the first layer is a character id, so its projection is a row of a table with V rows: V rows of work in
  place of B * T (`project_ids`).
- The gradient of W_h is not summed up inside the backward scan. The scan returns the gradient at `h_proj` for every
  step and dW_h is one large product at the end (`unroll`).

Letters: B batch, T time, H hidden, V vocabulary, E embedding, I input features, G gates times hidden.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from charlm.cells import Carry, Cell, Params

# Up to this many rows the gradient of a table is a product with one-hot vectors.
_ONE_HOT_ROWS = 512


def matmul(x: jax.Array, w: jax.Array, dtype) -> jax.Array:
    """x @ w with the operands cast to `dtype`, summed up and returned in the dtype of `w` (the parameters')."""
    return jnp.matmul(x.astype(dtype), w.astype(dtype), preferred_element_type=w.dtype)


def project(x_TBI: jax.Array, W_x_IG: jax.Array, finish: Callable[[jax.Array], jax.Array], dtype=jnp.float32) -> jax.Array:
    """The input projection of all time steps, finish(x @ W_x), shape (T, B, G).

    `finish` is what is done to each row of the product by itself: the bias, for some cells a normalisation before it.
    """
    return finish(matmul(x_TBI, W_x_IG, dtype))


def project_ids(
    ids_TB: jax.Array,
    embedding_VE: jax.Array | None,
    W_x_IG: jax.Array,
    finish: Callable[[jax.Array], jax.Array],
    dtype=jnp.float32,
) -> jax.Array:
    """The input projection of character ids, shape (T, B, G): embedded, or one-hot if `embedding_VE` is None.

    Equal to embedding every id and projecting it: rows of finish(E @ W_x) where that table is smaller than the batch.
    """
    if embedding_VE is None:
        return lookup(finish(W_x_IG), ids_TB)
    if embedding_VE.shape[0] < ids_TB.size:
        return lookup(project(embedding_VE, W_x_IG, finish, dtype), ids_TB)
    return project(lookup(embedding_VE, ids_TB), W_x_IG, finish, dtype)


@jax.custom_vjp
def lookup(table_VG: jax.Array, ids: jax.Array) -> jax.Array:
    """table_VG[ids], shape (*ids.shape, G), with a gradient that is the same to the bit every time.

    The gradient of plain indexing is a scatter-add, which on a GPU adds in the order in which threads arrive.
    """
    return table_VG[ids]


def _lookup_fwd(table_VG, ids):
    return table_VG[ids], (ids, table_VG.shape[0])


def _lookup_bwd(residuals, grad):
    ids, rows = residuals
    ids_N, grad_NG = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
    if rows <= _ONE_HOT_ROWS:
        one_hot_NV = jax.nn.one_hot(ids_N, rows, dtype=grad.dtype)
        return jnp.einsum("nv,ng->vg", one_hot_NV, grad_NG), None
    # A CPU scatters one row after another, so that the order is fixed without sorting.
    return (
        jax.lax.platform_dependent(
            ids_N,
            grad_NG,
            cpu=lambda i, g: jnp.zeros((rows, g.shape[-1]), g.dtype).at[i].add(g),
            default=lambda i, g: segment_sum(g, i, rows),
        ),
        None,
    )


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
    cell: Cell, params: Params, W_h_HG: jax.Array, x_proj_TBG: jax.Array, carry: Carry, dtype=jnp.float32
) -> tuple[jax.Array, Carry]:
    """Run a cell over T steps.

    Args:
        cell: from `cells.CELLS`.
        params: the cell's own parameters (`cell.own`).
        W_h_HG: the recurrent kernel.
        x_proj_TBG: the input projections (`project`, `project_ids`).
        carry: the state before the first step.
        dtype: of the operands of the products; sums and states stay in the parameters' dtype.

    Returns:
        h_TBH, the outputs, and the state after the last step. Differentiable in everything but `cell` and `dtype`, in
        reverse mode.
    """
    return _unroll(cell, jnp.dtype(dtype), dict(params), W_h_HG, x_proj_TBG, carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _unroll(cell, dtype, params, W_h_HG, x_proj_TBG, carry):
    W_h = W_h_HG.astype(dtype)

    def step(carry, x_proj_BG):
        h_proj_BG = jnp.matmul(carry[0].astype(dtype), W_h, preferred_element_type=W_h_HG.dtype)
        carry = cell.update(params, x_proj_BG, h_proj_BG, carry)
        return carry, carry[0]

    carry, h_TBH = jax.lax.scan(step, carry, x_proj_TBG)
    return h_TBH, carry


def _unroll_fwd(cell, dtype, params, W_h_HG, x_proj_TBG, carry):
    """The same, keeping what `update` read at every step."""
    W_h = W_h_HG.astype(dtype)

    def step(carry, x_proj_BG):
        h_proj_BG = jnp.matmul(carry[0].astype(dtype), W_h, preferred_element_type=W_h_HG.dtype)
        if cell.additive:
            x_proj_BG, h_proj_BG = x_proj_BG + h_proj_BG, None
        new_carry = cell.update(params, x_proj_BG, 0.0 if cell.additive else h_proj_BG, carry)
        read = x_proj_BG if cell.additive else h_proj_BG
        return new_carry, (new_carry[0], read, carry[1:])

    last, (h_TBH, read_TBG, rest_TBH) = jax.lax.scan(step, carry, x_proj_TBG)
    # For an additive cell x_proj is not needed again: only the sum is.
    x_proj_TBG = None if cell.additive else x_proj_TBG
    return (h_TBH, last), (params, W_h_HG, x_proj_TBG, read_TBG, carry[0], h_TBH, rest_TBH)


def _unroll_bwd(cell, dtype, residuals, grads):
    params, W_h_HG, x_proj_TBG, read_TBG, h_first_BH, h_TBH, rest_TBH = residuals
    dh_TBH, dcarry = grads
    h_before_TBH = jnp.concatenate([h_first_BH[None], h_TBH[:-1]])
    # A transposed copy, made once: the product in the scan reads it faster than it reads W_h against the grain.
    W_h_GH = jax.lax.optimization_barrier(W_h_HG.astype(dtype).T)

    def step(state, step_inputs):
        dcarry, dparams = state
        dh_BH, x_proj_BG, read_BG, h_BH, rest = step_inputs
        carry = (h_BH, *rest)
        if cell.additive:
            _, pullback = jax.vjp(lambda p, a, c: cell.update(p, a, 0.0, c), params, read_BG, carry)
        else:
            _, pullback = jax.vjp(cell.update, params, x_proj_BG, read_BG, carry)
        dp, *dproj, dcarry = pullback((dcarry[0] + dh_BH, *dcarry[1:]))
        dx_proj_BG, dh_proj_BG = dproj[0], dproj[-1]
        dh_BH = jnp.matmul(dh_proj_BG.astype(dtype), W_h_GH, preferred_element_type=W_h_HG.dtype)
        dcarry = (dcarry[0] + dh_BH, *dcarry[1:])
        dparams = jax.tree.map(jnp.add, dparams, dp)
        return (dcarry, dparams), (dx_proj_BG, None if cell.additive else dh_proj_BG)

    zeros = jax.tree.map(jnp.zeros_like, params)
    inputs = (dh_TBH, x_proj_TBG, read_TBG, h_before_TBH, rest_TBH)
    (dcarry, dparams), (dx_proj_TBG, dh_proj_TBG) = jax.lax.scan(step, (dcarry, zeros), inputs, reverse=True)
    dh_proj_TBG = dx_proj_TBG if cell.additive else dh_proj_TBG
    dW_h_HG = jnp.einsum(
        "tbh,tbg->hg", h_before_TBH.astype(dtype), dh_proj_TBG.astype(dtype), preferred_element_type=W_h_HG.dtype
    )
    return dparams, dW_h_HG, dx_proj_TBG, dcarry


_unroll.defvjp(_unroll_fwd, _unroll_bwd)
