"""Unroll any cell over time: input projections, one loop over the steps, and a hand-written gradient.

Four measures make this faster than differentiating a plain `jax.lax.scan`. All of them are exact.

- The input of the first layer is a character id. Its projection is therefore a lookup in a table with V columns (`from_ids`),
  which needs V products instead of B * T.
- The backward loop does not accumulate the gradient of W_h. It returns the gradient with respect to `h_proj` of every step, and
  one large product after the loop computes dW_h (`unroll`). On a CPU these are a few products that fit into its caches.
- Arrays inside the loop are feature-major, with the batch last, so W_h is the left operand of its product. A CPU reads the left
  operand in place and repacks the right one in every product. The right operand is the hidden state, which is much smaller.
- One buffer of the size of all input projections is enough. The forward loop overwrites the projection of a step with what the
  step saves, and the backward loop overwrites that with the gradient. XLA does this in place only if all reads of a step's rows
  come before the first write to them; otherwise it copies the whole buffer. This determines the order of the writes in
  `_write_rows`. It is also why the backward loop reads the rows of a step one iteration early and passes them on.

Letters: B batch, T time, H hidden, V vocabulary, E embedding, I input features, G gates times hidden, K any number of rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from charlm.nn.cells import Blocks, Carry, Cell, Params

# For a table of at most this many symbols the gradient is computed as a product with one-hot vectors.
_MAX_ONE_HOT_SYMBOLS = 512

# On a CPU the gradient of a kernel is one product if the gradient of all steps has at most this many elements. A larger one is
# split into products of about this many columns.
_MAX_ELEMENTS_IN_ONE_PRODUCT = 2**22
_COLUMNS_PER_PRODUCT = 1024


def matmul(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return x @ w with both operands cast to `dtype`. Sums and result have the dtype of x."""
    return jnp.matmul(x.astype(dtype), w.astype(dtype), preferred_element_type=x.dtype)


class Inputs(NamedTuple):
    """The inputs of a layer at all steps (`from_ids`, `from_layer`).

    Attributes:
        size: I, the number of features.
        features: () -> x_TIB.
        project: (W_x_IG, finish, dtype) -> finish(W_x.T @ x) for all steps, shape (T, G, B). `finish` adds the bias, and for
            some cells normalises the product before that. It must treat each column of the product separately.
    """

    size: int
    features: Callable[[], jax.Array]
    project: Callable[[jax.Array, Callable[[jax.Array], jax.Array], DTypeLike], jax.Array]


def from_layer(x_TIB: jax.Array) -> Inputs:
    """Return the inputs of a layer that reads the outputs of another layer."""

    def project(W_x_IG, finish, dtype=jnp.float32):
        return finish(_project_steps(jnp.dtype(dtype), W_x_IG.T, x_TIB))

    return Inputs(x_TIB.shape[1], lambda: x_TIB, project)


def from_ids(ids_TB: jax.Array, embedding_VE: jax.Array | None, num_symbols: int) -> Inputs:
    """Return the inputs of a layer that reads character ids.

    Args:
        ids_TB: the ids.
        embedding_VE: the embedding of each symbol; None for one-hot vectors.
        num_symbols: V.
    """

    def features():
        return jax.nn.one_hot(ids_TB, num_symbols, axis=1) if embedding_VE is None else lookup(embedding_VE.T, ids_TB)

    def project(W_x_IG, finish, dtype=jnp.float32):
        if num_symbols < ids_TB.size:  # Projecting all symbols once is cheaper than projecting all inputs.
            table_VG = W_x_IG if embedding_VE is None else matmul(embedding_VE, W_x_IG, dtype)
            # XLA must not fold the transpose into the product: a CPU has no bfloat16 product with a transposed result.
            return lookup(finish(_materialize(table_VG).T), ids_TB)
        if embedding_VE is None:
            return finish(lookup(W_x_IG.T, ids_TB))
        return from_layer(features()).project(W_x_IG, finish, dtype)

    return Inputs(num_symbols if embedding_VE is None else embedding_VE.shape[1], features, project)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project_steps(dtype: DTypeLike, W_GI: jax.Array, x_TIB: jax.Array) -> jax.Array:
    """Return W @ x for every step, shape (T, G, B), with the operands in `dtype`.

    A CPU computes one product for each step, because one product for all steps would need transposes in memory before and
    after it. A GPU needs one large product to be fully used.
    """

    def step_by_step(W, x):
        W = _materialize(W)
        return jax.lax.map(lambda x_IB: _product(W, x_IB), x)

    return jax.lax.platform_dependent(W_GI.astype(dtype), x_TIB, cpu=step_by_step, default=_product)


def _project_steps_fwd(dtype, W_GI, x_TIB):
    return _project_steps(dtype, W_GI, x_TIB), (W_GI, x_TIB)


def _project_steps_bwd(dtype, residuals, grad_TGB):
    W_GI, x_TIB = residuals
    return _kernel_gradient(grad_TGB, x_TIB, dtype), _project_steps(dtype, W_GI.T, grad_TGB)


_project_steps.defvjp(_project_steps_fwd, _project_steps_bwd)


@jax.custom_vjp
def lookup(table_GV: jax.Array, ids_TB: jax.Array) -> jax.Array:
    """Return the columns of a table at some ids, shape (T, G, B). The gradient is deterministic on every device.

    The gradient of plain indexing is a scatter-add. A GPU adds its terms in an arbitrary order, so the bits would vary.
    """
    (T, B), (G, V) = ids_TB.shape, table_GV.shape
    if ids_TB.size <= V:
        return jnp.swapaxes(table_GV.T[ids_TB], 1, 2)
    # With many ids, indexing and a transpose would be two passes over the result. This is one pass.
    columns = jnp.broadcast_to(table_GV, (T, G, V)), jnp.broadcast_to(ids_TB[:, None], (T, G, B))
    return jnp.take_along_axis(*columns, axis=2, mode="clip")


def _lookup_fwd(table_GV, ids_TB):
    return lookup(table_GV, ids_TB), (ids_TB, table_GV.shape[1])


def _lookup_bwd(residuals, grad_TGB):
    ids_TB, num_symbols = residuals
    if num_symbols <= _MAX_ONE_HOT_SYMBOLS:
        one_hot_TVB = jax.nn.one_hot(ids_TB, num_symbols, dtype=grad_TGB.dtype, axis=1)
        return _materialize(_kernel_gradient(grad_TGB, one_hot_TVB, grad_TGB.dtype)), None
    # A CPU adds one row after another, so its scatter-add has a fixed order and needs no sorting.
    grad_VG = jax.lax.platform_dependent(
        ids_TB.reshape(-1),
        _flatten_steps(grad_TGB).T,
        cpu=lambda i, g: jnp.zeros((num_symbols, g.shape[-1]), g.dtype).at[i].add(g),
        default=lambda i, g: segment_sum(g, i, num_symbols),
    )
    return grad_VG.T, None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


def segment_sum(values_NG: jax.Array, segment_N: jax.Array, num_segments: int) -> jax.Array:
    """Return the sum of the rows of each segment, shape (num_segments, G), added in a fixed order on every device.

    The rows are sorted by segment and summed by a segmented scan (Blelloch 1990), which needs no atomic operations.

    Args:
        values_NG: N rows.
        segment_N: the segment of each row, from 0 to num_segments - 1.
        num_segments: the number of segments. A segment without rows has the sum 0.
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
    cell: Cell, params: Params, W_h_GH: jax.Array, x_proj_TGB: jax.Array, carry: Carry, dtype: DTypeLike = jnp.float32
) -> tuple[jax.Array, Carry]:
    """Run a cell over T steps.

    The result is differentiable in reverse mode with respect to all arguments except `cell` and `dtype`.

    Args:
        cell: an entry of `cells.CELLS`.
        params: the vector parameters of the cell (`cell.vectors`).
        W_h_GH: the recurrent kernel.
        x_proj_TGB: the input projections (`Inputs.project`).
        carry: the carry before the first step, arrays of shape (B, H).
        dtype: the dtype of the operands of the products. Sums and carries keep the dtype of the parameters.

    Returns:
        The outputs h_TBH and the carry after the last step.
    """
    h_THB, carry = _unroll(cell, jnp.dtype(dtype), dict(params), W_h_GH, x_proj_TGB, tuple(each.T for each in carry))
    return jnp.swapaxes(h_THB, 1, 2), tuple(each.T for each in carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _unroll(cell, dtype, params, W_h_GH, x_proj_TGB, carry):
    """Return `unroll` with feature-major arrays: the outputs h_THB and the last carry, arrays of shape (H, B)."""
    W_h = W_h_GH.astype(dtype)

    def step(carry, x_proj_GB):
        carry, _ = cell.forward(params, x_proj_GB, _product(W_h, carry[0]), carry)
        return carry, carry[0]

    carry, h_THB = jax.lax.scan(step, carry, x_proj_TGB)
    return h_THB, carry


def _unroll_fwd(cell, dtype, params, W_h_GH, x_proj_TGB, carry):
    """Return `_unroll` and its residuals: all carries, shape (T + 1, H, B), and what the cell saves of each step."""
    W_h = W_h_GH.astype(dtype)
    num_steps, _, batch = x_proj_TGB.shape

    def step(t, state):
        carry, saved, carries = state
        carry, blocks = cell.forward(params, _read_rows(saved[0], t), _product(W_h, carry[0]), carry)
        saved = tuple(buffer if each is None else _write_rows(buffer, t, each) for buffer, each in zip(saved, blocks))
        carries = tuple(_write_rows(buffer, t + 1, (each,)) for buffer, each in zip(carries, carry))
        return carry, saved, carries

    _, (_, *second) = jax.eval_shape(cell.forward, params, x_proj_TGB[0], x_proj_TGB[0], carry)
    rows = [sum(block.shape[0] for block in blocks) for blocks in second]
    saved = x_proj_TGB, *(jnp.zeros((num_steps, each, batch), x_proj_TGB.dtype) for each in rows)
    carries = tuple(jnp.zeros((num_steps + 1, *each.shape), each.dtype).at[0].set(each) for each in carry)
    last, saved, carries = jax.lax.fori_loop(0, num_steps, step, (carry, saved, carries))
    return (carries[0][1:], last), (params, W_h_GH, saved, carries)


def _unroll_bwd(cell, dtype, residuals, grads):
    """Return the gradients of `_unroll`. The gradient of each step overwrites what the step saved."""
    params, W_h_GH, saved, carries = residuals
    dh_THB, dcarry = grads
    num_steps, num_rows, _ = saved[0].shape
    # For the first rows the gradient with respect to h_proj is that with respect to x_proj. The last rows have a separate one.
    num_shared = num_rows - sum(buffer.shape[1] for buffer in saved[1:])
    W_h_HK = [_materialize(W_KH.T.astype(dtype)) for W_KH in (W_h_GH[:num_shared], W_h_GH[num_shared:]) if len(W_KH)]

    def h_proj_gradient(dx, *dh):
        """Return the gradient with respect to h_proj, in one or two parts."""
        return [part for part in (dx[..., :num_shared, :], *dh) if part.shape[-2]]

    def step(k, state):
        t = num_steps - 1 - k
        dcarry, dparams, rows, saved = state
        before, after = (tuple(_read_rows(buffer, t + i) for buffer in carries) for i in (0, 1))
        dcarry = dcarry[0] + _read_rows(dh_THB, t), *dcarry[1:]
        dp, *blocks, dcarry = cell.backward(params, rows, before, after, dcarry)
        saved = tuple(_write_rows(buffer, t, each) for buffer, each in zip(saved, blocks))
        parts = h_proj_gradient(*(_read_rows(buffer, t) for buffer in saved))
        dh_HB = sum(_product(W, part) for W, part in zip(W_h_HK, parts))
        rows = tuple(_read_rows(buffer, jnp.maximum(t - 1, 0)) for buffer in saved)
        return (dcarry[0] + dh_HB, *dcarry[1:]), jax.tree.map(jnp.add, dparams, dp), rows, saved

    zeros = jax.tree.map(jnp.zeros_like, params)
    rows = tuple(buffer[-1] for buffer in saved)
    dcarry, dparams, _, grads = jax.lax.fori_loop(0, num_steps, step, (dcarry, zeros, rows, saved))
    dW_h_GH = jnp.concatenate([_kernel_gradient(part, carries[0][:-1], dtype) for part in h_proj_gradient(*grads)])
    return dparams, dW_h_GH, grads[0], dcarry


_unroll.defvjp(_unroll_fwd, _unroll_bwd)


def first_gate_values(
    cell: Cell, params: Params, W_h_GH: jax.Array, x_proj_TGB: jax.Array, carry: Carry, dtype: DTypeLike = jnp.float32
) -> tuple[jax.Array, ...]:
    """Return the values of a cell's gates in the first of T steps, one array (B, H) for each name in `cell.gates`.

    The arguments are those of `unroll`. `cell.gate_values` must not be None.
    """
    carry = tuple(each.T for each in carry)
    h_proj_GB = _product(W_h_GH.astype(dtype), carry[0])
    return tuple(gate.T for gate in cell.gate_values(dict(params), x_proj_TGB[0], h_proj_GB, carry))


def _product(W: jax.Array, x: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """Return W @ x with x cast to the dtype of W. Sums and result have `out_dtype`, by default the dtype of x."""
    return jnp.matmul(W, x.astype(W.dtype), preferred_element_type=out_dtype or x.dtype)


def _kernel_gradient(grad_TGB: jax.Array, x_TIB: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return the sum of grad @ x.T over all steps, shape (G, I), with the operands in `dtype`.

    This is one product over the columns of all steps. A CPU must transpose both operands in memory for it. If they do not stay
    in its caches meanwhile, a CPU sums up smaller products whose operands do.
    """
    num_steps, _, batch = grad_TGB.shape

    def one_product(grad, x):
        return _product(_flatten_steps(grad).astype(dtype), _flatten_steps(x).T, grad.dtype)

    def sum_of_products(grad, x):
        steps = max(1, _COLUMNS_PER_PRODUCT // batch)
        first = num_steps % steps

        def add(k, total):
            return total + one_product(*(jax.lax.dynamic_slice_in_dim(each, first + k * steps, steps) for each in (grad, x)))

        return jax.lax.fori_loop(0, num_steps // steps, add, one_product(grad[:first], x[:first]))

    on_cpu = sum_of_products if grad_TGB.size > _MAX_ELEMENTS_IN_ONE_PRODUCT else one_product
    return jax.lax.platform_dependent(grad_TGB, x_TIB, cpu=on_cpu, default=one_product)


def _materialize(x: jax.Array) -> jax.Array:
    """Return x, stored in memory in the order of its axes. Otherwise XLA may leave a transpose to every use of x."""
    return jax.lax.optimization_barrier(x)


def _write_rows(buffer_TKB: jax.Array, t: Any, blocks: Blocks) -> jax.Array:
    """Return the buffer with the rows of step t replaced by the blocks.

    The last block is written first, because in the cells its computation also reads the old rows of the other blocks.
    """
    start = buffer_TKB.shape[1]
    for block in reversed(blocks):
        start -= len(block)
        buffer_TKB = jax.lax.dynamic_update_slice(buffer_TKB, block[None], (t, start, 0))
    return buffer_TKB


def _read_rows(buffer_TKB: jax.Array, t: Any) -> jax.Array:
    """Return the rows of step t, shape (K, B)."""
    return jax.lax.dynamic_index_in_dim(buffer_TKB, t, 0, keepdims=False)


def _flatten_steps(x_TKB: jax.Array) -> jax.Array:
    """Return the columns of all steps side by side, shape (K, T * B)."""
    return jnp.swapaxes(x_TKB, 0, 1).reshape(x_TKB.shape[1], -1)
