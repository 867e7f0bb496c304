"""Unroll any cell over time: one loop over the steps, with the gradient of every matrix after the loop.

Three measures make this faster than differentiating a plain `jax.lax.scan`. All of them are exact.

- The backward loop does not accumulate the gradients of the matrices. It stores the gradient with respect to every product of
  every step, and one large product after the loop computes the gradient of each matrix. On a CPU these are a few products that
  fit into its caches.
- Arrays inside the loop are feature-major, with the batch last, so the matrix is the left operand of its product. A CPU reads
  the left operand in place and repacks the right one in every product. The right operand is the hidden state, which is much
  smaller.
- One buffer of the size of all input projections is enough. The forward loop overwrites the projection of a step with what the
  step saves, and the backward loop overwrites that with the gradient. XLA does this in place only if all reads of a step's rows
  come before the first write to them; otherwise it copies the whole buffer. This determines the order of the writes in
  `_write_rows`. It is also why the backward loop reads the rows of a step one iteration early and passes them on.

The carry before a step may be replaced by the initial carry (`resets`). The gradient is cut there, in the products after the
loop too, and continues into the initial carry.

A cell with a hand-written derivative has a loop of its own (`_unroll_by_hand`). All other cells share `_unroll_by_autodiff`,
which differentiates one step at a time. These loops suit a CPU; another device runs those of `stacked_recurrence`, which give
the same values. A linear recurrence needs no loop on an accelerator (`linear_recurrence`).

Letters: B batch, T time, H hidden, I input features, G gates times hidden, K any number of rows.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from charlm.nn import stacked_recurrence
from charlm.nn.cell import Blocks, Carry, Cell, Params
from charlm.nn.linear_recurrence import linear_recurrence
from charlm.nn.platforms import by_platform
from charlm.nn.products import kernel_gradient, materialize, product
from charlm.nn.replay import known_product, products_of, update
from charlm.nn.resets import (
    Resets,
    cotangent,
    reset_coefficients,
    start_all_steps,
    start_gradient,
    start_product,
    start_step,
    step_numbers,
    zero_gradient,
)

# Name -> a matrix of the cell.
Matrices = Mapping[str, jax.Array]


def unroll(
    cell: Cell,
    params: Params,
    matrices: Matrices,
    x_TKB: jax.Array,
    carry: Carry,
    dtype: DTypeLike = jnp.float32,
    noise_TKB: jax.Array | None = None,
    resets: Resets | None = None,
) -> tuple[jax.Array, Carry]:
    """Run a cell over T steps.

    The result is differentiable in reverse mode with respect to `params`, `matrices`, `x_TKB`, `carry` and `resets.initial`.

    Args:
        cell: an entry of `cells.CELLS`.
        params: the vector parameters of the cell (`Cell.vectors`, and b for a cell that reads features).
        matrices: the matrices of the cell (`Cell.matrices`, and W_x (G, I) for a cell that reads features).
        x_TKB: the input projections (`Inputs.project`), or the features for a cell that reads features.
        carry: the carry before the first step, arrays of shape (B, H).
        dtype: the dtype of the operands of the products. Sums and carries keep the dtype of the parameters.
        noise_TKB: the random numbers of a cell with noise in training (`Cell.noise`).
        resets: the steps that start from the initial carry, whose arrays have shape (H, 1); None: all steps continue.

    Returns:
        The outputs h_TBH and the carry after the last step.
    """
    carry, dtype, params = tuple(each.T for each in carry), jnp.dtype(dtype), dict(params)
    if cell.coefficients is not None:
        h_THB, last = linear_recurrence(*reset_coefficients(resets, *cell.coefficients(params, x_TKB)), carry[0])
        carry = (last,)
    else:
        args = params, dict(matrices), x_TKB, carry, noise_TKB, resets
        on_cpu, elsewhere = (functools.partial(form, cell, dtype) for form in (_unroll_in_place, stacked_recurrence.unroll))
        h_THB, carry = by_platform(*args, cpu=on_cpu, elsewhere=elsewhere)
    return jnp.swapaxes(h_THB, 1, 2), tuple(each.T for each in carry)


def first_gate_values(
    cell: Cell, params: Params, matrices: Matrices, x_TKB: jax.Array, carry: Carry, dtype: DTypeLike = jnp.float32
) -> tuple[jax.Array, ...]:
    """Return the values of a cell's gates in the first of T steps, one array (B, H) for each name in `cell.gates`.

    The arguments are those of `unroll`. `cell.gate_values` must not be None.
    """

    def dot(name: str, x: jax.Array) -> jax.Array:
        return product(matrices[name].astype(dtype), x)

    return tuple(gate.T for gate in cell.gate_values(dict(params), x_TKB[0], tuple(each.T for each in carry), dot))


def _unroll_in_place(cell, dtype, params, matrices, x_TKB, carry, noise_TKB, resets):
    """Return `unroll` with feature-major arrays: the outputs h_THB and the last carry."""
    if cell.derivative is not None:
        return _unroll_by_hand(cell, dtype, params, matrices["W_h"], x_TKB, carry, resets)
    return _unroll_by_autodiff(cell, dtype, params, matrices, x_TKB, carry, noise_TKB, resets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _unroll_by_hand(cell, dtype, params, W_h_GH, x_proj_TGB, carry, resets):
    """Return `unroll` with feature-major arrays: the outputs h_THB and the last carry. The derivative is written by hand."""
    h_proj = _recurrent_projection(W_h_GH.astype(dtype), resets)

    def step(carry, inputs):
        x_proj_GB, t = inputs
        carry, _ = cell.derivative.forward(params, x_proj_GB, h_proj(t, carry), start_step(resets, t, carry))
        return carry, carry[0]

    carry, h_THB = jax.lax.scan(step, carry, (x_proj_TGB, step_numbers(resets)))
    return h_THB, carry


def _unroll_by_hand_fwd(cell, dtype, params, W_h_GH, x_proj_TGB, carry, resets):
    """Return `_unroll_by_hand` and its residuals: all carries, shape (T + 1, H, B), and what the cell saves of each step."""
    h_proj = _recurrent_projection(W_h_GH.astype(dtype), resets)
    num_steps, _, batch = x_proj_TGB.shape

    def step(t, state):
        carry, saved, carries = state
        carry, blocks = cell.derivative.forward(params, _read_rows(saved[0], t), h_proj(t, carry), start_step(resets, t, carry))
        saved = tuple(_write_rows(buffer, t, each) for buffer, each in zip(saved, blocks))
        carries = tuple(_write_rows(buffer, t + 1, (each,)) for buffer, each in zip(carries, carry))
        return carry, saved, carries

    _, (_, *second) = jax.eval_shape(cell.derivative.forward, params, x_proj_TGB[0], x_proj_TGB[0], carry)
    rows = [sum(block.shape[0] for block in blocks) for blocks in second]
    saved = x_proj_TGB, *(jnp.zeros((num_steps, each, batch), x_proj_TGB.dtype) for each in rows)
    carries = tuple(jnp.zeros((num_steps + 1, *each.shape), each.dtype).at[0].set(each) for each in carry)
    last, saved, carries = jax.lax.fori_loop(0, num_steps, step, (carry, saved, carries))
    return (carries[0][1:], last), (params, W_h_GH, saved, carries, resets)


def _unroll_by_hand_bwd(cell, dtype, residuals, grads):
    """Return the gradients of `_unroll_by_hand`. The gradient of each step overwrites what the step saved."""
    params, W_h_GH, saved, carries, resets = residuals
    dh_THB, dcarry = grads
    num_steps, num_rows, _ = saved[0].shape
    # For the first rows the gradient with respect to h_proj is that with respect to x_proj. The last rows have a separate one.
    num_shared = num_rows - sum(buffer.shape[1] for buffer in saved[1:])
    W_h_HK = [materialize(W_KH.T.astype(dtype)) for W_KH in (W_h_GH[:num_shared], W_h_GH[num_shared:]) if len(W_KH)]

    def h_proj_gradient(dx, *dh):
        """Return the gradient with respect to h_proj, in one or two parts."""
        return [part for part in (dx[..., :num_shared, :], *dh) if part.shape[-2]]

    def step(k, state):
        t = num_steps - 1 - k
        dcarry, dinitial, dparams, rows, saved = state
        before, after = (tuple(_read_rows(buffer, t + i) for buffer in carries) for i in (0, 1))
        before = start_step(resets, t, before)
        dcarry = dcarry[0] + _read_rows(dh_THB, t), *dcarry[1:]
        dp, *blocks, dcarry = cell.derivative.backward(params, rows, before, after, dcarry)
        saved = tuple(_write_rows(buffer, t, each) for buffer, each in zip(saved, blocks))
        parts = h_proj_gradient(*(_read_rows(buffer, t) for buffer in saved))
        dh_HB = sum(product(W, part) for W, part in zip(W_h_HK, parts))
        rows = tuple(_read_rows(buffer, jnp.maximum(t - 1, 0)) for buffer in saved)
        dcarry, dinitial = start_gradient(resets, t, (dcarry[0] + dh_HB, *dcarry[1:]), dinitial)
        return dcarry, dinitial, jax.tree.map(jnp.add, dparams, dp), rows, saved

    zeros = jax.tree.map(jnp.zeros_like, params)
    rows = tuple(buffer[-1] for buffer in saved)
    state = dcarry, zero_gradient(resets, dcarry), zeros, rows, saved
    dcarry, dinitial, dparams, _, grads = jax.lax.fori_loop(0, num_steps, step, state)
    h_THB = start_all_steps(resets, carries, 0)
    dW_h_GH = jnp.concatenate([kernel_gradient(part, h_THB, dtype) for part in h_proj_gradient(*grads)])
    return dparams, dW_h_GH, grads[0], dcarry, cotangent(resets, dinitial)


_unroll_by_hand.defvjp(_unroll_by_hand_fwd, _unroll_by_hand_bwd)


def _recurrent_projection(W_h_GH: jax.Array, resets: Resets | None) -> Callable[[Any, Carry], jax.Array]:
    """Return a function (t, carry before a reset) -> h_proj_GB of step t."""
    initial_G1 = None if resets is None else product(W_h_GH, resets.initial[0])
    return lambda t, carry: start_product(resets, t, product(W_h_GH, carry[0]), initial_G1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _unroll_by_autodiff(cell, dtype, params, matrices, x_TKB, carry, noise_TKB, resets):
    """Return `unroll` with feature-major arrays: the outputs h_THB and the last carry. JAX differentiates the steps."""
    matrices = {name: W.astype(dtype) for name, W in matrices.items()}

    def step(carry, inputs):
        x_KB, noise_KB, t = inputs
        carry = start_step(resets, t, carry)
        carry = update(cell, params, x_KB, carry, lambda name, x: product(matrices[name], x), noise_KB)
        return carry, carry[0]

    carry, h_THB = jax.lax.scan(step, carry, (x_TKB, noise_TKB, step_numbers(resets)))
    return h_THB, carry


def _unroll_by_autodiff_fwd(cell, dtype, params, matrices, x_TKB, carry, noise_TKB, resets):
    """Return `_unroll_by_autodiff` and its residuals: all carries, shape (T + 1, H, B), all products and their operands."""
    lowered = {name: W.astype(dtype) for name, W in matrices.items()}
    num_steps, _, batch = x_TKB.shape
    first_noise = None if noise_TKB is None else noise_TKB[0]
    products = products_of(cell, dtype, params, matrices, x_TKB[0], carry, first_noise)

    def step(t, state):
        carry, outs, operands, carries = state
        carry, found = start_step(resets, t, carry), []

        def dot(name, operand):
            found.append((product(lowered[name], operand), operand))
            return found[-1][0]

        noise_KB = None if noise_TKB is None else _read_rows(noise_TKB, t)
        carry = update(cell, params, _read_rows(x_TKB, t), carry, dot, noise_KB)
        outs = tuple(_write_rows(buffer, t, (out,)) for buffer, (out, _) in zip(outs, found))
        computed = [operand for each, (_, operand) in zip(products, found) if each.carry is None]
        operands = tuple(_write_rows(buffer, t, (operand,)) for buffer, operand in zip(operands, computed))
        carries = tuple(_write_rows(buffer, t + 1, (each,)) for buffer, each in zip(carries, carry))
        return carry, outs, operands, carries

    def buffers(rows: Sequence[int]):
        return tuple(jnp.zeros((num_steps, each, batch), x_TKB.dtype) for each in rows)

    outs = buffers([each.rows for each in products])
    operands = buffers([each.columns for each in products if each.carry is None])
    carries = tuple(jnp.zeros((num_steps + 1, *each.shape), each.dtype).at[0].set(each) for each in carry)
    last, outs, operands, carries = jax.lax.fori_loop(0, num_steps, step, (carry, outs, operands, carries))
    return (carries[0][1:], last), (params, matrices, x_TKB, noise_TKB, outs, operands, carries, resets)


def _unroll_by_autodiff_bwd(cell, dtype, residuals, grads):
    """Return the gradients of `_unroll_by_autodiff`. The gradients of each step overwrite its input and its products."""
    params, matrices, x_TKB, noise_TKB, outs, operands, carries, resets = residuals
    dh_THB, dcarry = grads
    num_steps = len(x_TKB)
    first_noise = None if noise_TKB is None else noise_TKB[0]
    products = products_of(cell, dtype, params, matrices, x_TKB[0], tuple(each[0] for each in carries), first_noise)
    transposed = {name: materialize(W.T.astype(dtype)) for name, W in matrices.items()}

    def step(k, state):
        t = num_steps - 1 - k
        dcarry, dinitial, dparams, rows, saved = state
        before = start_step(resets, t, tuple(_read_rows(buffer, t) for buffer in carries))
        noise_KB = None if noise_TKB is None else _read_rows(noise_TKB, t)
        dcarry = dcarry[0] + _read_rows(dh_THB, t), *dcarry[1:]

        def replay(params, x_KB, carry, outs):
            remaining = iter(outs)

            def known(name, operand):
                return known_product(functools.partial(product, transposed[name]), operand, next(remaining))

            return update(cell, params, x_KB, carry, known, noise_KB)

        _, pullback = jax.vjp(replay, params, rows[0], before, rows[1:])
        dp, dx_KB, dcarry, douts = pullback(dcarry)
        saved = tuple(_write_rows(buffer, t, (each,)) for buffer, each in zip(saved, (dx_KB, *douts)))
        rows = tuple(_read_rows(buffer, jnp.maximum(t - 1, 0)) for buffer in saved)
        dcarry, dinitial = start_gradient(resets, t, dcarry, dinitial)
        return dcarry, dinitial, jax.tree.map(jnp.add, dparams, dp), rows, saved

    saved = x_TKB, *outs
    rows = tuple(buffer[-1] for buffer in saved)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = dcarry, zero_gradient(resets, dcarry), zeros, rows, saved
    dcarry, dinitial, dparams, _, (dx_TKB, *douts) = jax.lax.fori_loop(0, num_steps, step, state)
    dmatrices, computed = jax.tree.map(jnp.zeros_like, matrices), iter(operands)
    for each, dout_TKB in zip(products, douts):
        operand_TKB = next(computed) if each.carry is None else start_all_steps(resets, carries, each.carry)
        dmatrices[each.matrix] += kernel_gradient(dout_TKB, operand_TKB, dtype)
    return dparams, dmatrices, dx_TKB, dcarry, None, cotangent(resets, dinitial)


_unroll_by_autodiff.defvjp(_unroll_by_autodiff_fwd, _unroll_by_autodiff_bwd)


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
