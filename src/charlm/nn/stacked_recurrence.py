"""Unroll any cell over time on an accelerator: the loops of `recurrence` with few kernels in a step.

A GPU launches the kernels of a step one after another, and a launch takes microseconds, about as long as the product of a step.
So the loops here do as little as they can, in as few kernels as they can:

- The forward loop stacks the products and the carry of a step into one array, which it writes at once.
- The backward loop computes only the gradient with respect to the carry. Everything else follows after the loop, for all steps
  at once: the gradients of the input, of the vectors and of the matrices. It repeats elementwise work, and for a cell with
  dependent products also products; of all steps together they cost little.
- Arrays inside the loops are batch-major. The hidden state is then contiguous along the axis that a product sums over, and so
  is the matrix. Tensor cores read both operands like that, and a TPU pads the last axis to 128.

The cells are feature-major (`cell`), so each step transposes what it hands to them. The compiler makes these transposes part of
the kernels.

Letters: B batch, T time, H hidden, I input features, G gates times hidden, K any number of rows.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from charlm.nn.cell import Carry, Cell, Params
from charlm.nn.products import materialize
from charlm.nn.replay import Product, known_product, products_of, update
from charlm.nn.resets import Resets, cotangent, start_gradient, start_step, step_numbers, zero_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def unroll(
    cell: Cell,
    dtype: DTypeLike,
    params: Params,
    matrices: Mapping[str, jax.Array],
    x_TKB: jax.Array,
    carry: Carry,
    noise_TKB: jax.Array | None,
    resets: Resets | None,
) -> tuple[jax.Array, Carry]:
    """Return what `recurrence.unroll` returns, with feature-major arrays: the outputs h_THB and the last carry."""

    def step(params, x_KB, carry, noise_KB, dot):
        carry = update(cell, params, x_KB, carry, dot, noise_KB)
        return carry, carry[0]

    h_TBH, last = _run(step, dtype, params, matrices, x_TKB, carry, noise_TKB, resets)
    return turned(h_TBH), last


def _run(
    step: Callable[..., tuple[Carry, jax.Array]], dtype, params, matrices, x_TKB, carry, noise_TKB, resets
) -> tuple[jax.Array, Carry]:
    """Return what every step yields, shape (T, B, K), and the last carry, feature-major.

    `step` is (params, x_KB, carry, noise_KB, dot) -> (carry, rows_KB).
    """
    matrices = {name: W.astype(dtype) for name, W in matrices.items()}
    following = resets and resets._replace(before_TB=jnp.roll(resets.before_TB, -1, 0).at[-1].set(False))

    def handed_on(carry_BH):
        # What a product reads is rounded by the kernel that computes it. Otherwise rounding would be a kernel of its own.
        return carry_BH, carry_BH[0].astype(dtype) if dtype != carry_BH[0].dtype else None

    def one_step(state, inputs):
        (carry_BH, rounded_BH), (x_BK, noise_BK, t) = state, inputs
        carry = turned(carry_BH)

        def dot(name, operand):
            if operand is carry[0] and rounded_BH is not None:
                return _product(matrices[name], rounded_BH.T, operand.dtype)
            return _product(matrices[name], operand)

        carry, rows_KB = step(params, x_BK.T, carry, turned(noise_BK), dot)
        # The reset before a step belongs to the kernel of the step before it.
        return handed_on(turned(start_step(following, t, carry))), rows_KB.T

    first = handed_on(turned(start_step(resets, 0, carry)))
    (last, _), rows_TBK = jax.lax.scan(one_step, first, (turned(x_TKB), turned(noise_TKB), step_numbers(resets)))
    return rows_TBK, turned(last)


def turned(tree: Any) -> Any:
    """Return the arrays of a tree with their last two axes swapped."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2), tree)


def _product(W_GK: jax.Array, x_KB: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """Return W @ x as `products.product` does, computed with the batch first."""
    x_BK, out_dtype = x_KB.T.astype(W_GK.dtype), out_dtype or x_KB.dtype
    return jax.lax.dot_general(x_BK, W_GK, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype).T


class _Differentiation(NamedTuple):
    """How a step is differentiated.

    Attributes:
        forward: (params, x_KB, carry, noise_KB, dot) -> (carry, what is saved besides the carry, as arrays (K, B)).
        backward: (params, x_KB, noise_KB, saved, before, after, dcarry, dot) -> the gradients with respect to (params, x_KB,
            carry before, products). `dot` multiplies with the transpose of a matrix.
        saved: the numbers of rows of what is saved.
        operands: for each product (name of its matrix, index of its operand among the carries, else among what is saved).
        reads_x: whether `backward` reads x_KB and noise_KB.
    """

    forward: Callable[..., tuple[Carry, tuple[jax.Array, ...]]]
    backward: Callable[..., tuple[Params, jax.Array, Carry, tuple[jax.Array, ...]]]
    saved: list[int]
    operands: list[tuple[str, int | None, int | None]]
    reads_x: bool


def _by_hand(cell: Cell, params: Params, x_KB: jax.Array, carry: Carry) -> _Differentiation:
    """Return the hand-written derivative of a cell, whose only product is that of W_h with carry 0."""

    def forward(params, x_KB, carry, noise_KB, dot):
        carry, saved = cell.derivative.forward(params, x_KB, dot("W_h", carry[0]), carry)
        return carry, tuple(map(jnp.concatenate, saved))

    _, shapes = jax.eval_shape(lambda *args: forward(*args, None, lambda name, h_HB: x_KB), params, x_KB, carry)
    num_shared = len(x_KB) - sum(len(each) for each in shapes[1:])

    def backward(params, x_KB, noise_KB, saved, before, after, dcarry, dot):
        dparams, dx, dh, dbefore = cell.derivative.backward(params, saved, before, after, dcarry)
        dx_KB = jnp.concatenate(dx)
        # For the first rows the gradient with respect to the product is that with respect to x. The others have their own.
        dout_KB = jnp.concatenate([dx_KB[:num_shared], *dh])
        return dparams, dx_KB, (dbefore[0] + dot("W_h", dout_KB), *dbefore[1:]), (dout_KB,)

    return _Differentiation(forward, backward, [len(each) for each in shapes], [("W_h", 0, None)], False)


def _by_replay(cell: Cell, products: Sequence[Product]) -> _Differentiation:
    """Return the derivative of a cell that JAX computes: it takes the step again, with the products that are known."""
    computed = [k for k, each in enumerate(products) if each.carry is None]

    def forward(params, x_KB, carry, noise_KB, dot):
        found = []

        def noting(name, operand):
            found.append((dot(name, operand), operand))
            return found[-1][0]

        carry = update(cell, params, x_KB, carry, noting, noise_KB)
        return carry, (*(out for out, _ in found), *(found[k][1] for k in computed))

    def backward(params, x_KB, noise_KB, saved, before, after, dcarry, dot):
        def replay(params, x_KB, carry, outs):
            remaining = iter(outs)

            def known(name, operand):
                return known_product(functools.partial(dot, name), operand, next(remaining))

            return update(cell, params, x_KB, carry, known, noise_KB)

        return jax.vjp(replay, params, x_KB, before, saved[: len(products)])[1](dcarry)

    sizes = [each.rows for each in products] + [products[k].columns for k in computed]
    places = {k: len(products) + i for i, k in enumerate(computed)}
    operands = [(each.matrix, each.carry, places.get(k)) for k, each in enumerate(products)]
    return _Differentiation(forward, backward, sizes, operands, True)


def _differentiation(cell, dtype, params, matrices, x_KB, carry, noise_KB) -> _Differentiation:
    if cell.derivative is not None:
        return _by_hand(cell, params, x_KB, carry)
    return _by_replay(cell, products_of(cell, dtype, params, matrices, x_KB, carry, noise_KB))


def _unroll_fwd(cell, dtype, params, matrices, x_TKB, carry, noise_TKB, resets):
    """Return `unroll` and its residuals: the rows of every step, shape (T, B, K): what a step saves, and its carry."""
    by = _differentiation(cell, dtype, params, matrices, _at(x_TKB, 0), carry, _at(noise_TKB, 0))

    def step(*args):
        carry, saved = by.forward(*args)
        return carry, jnp.concatenate([*saved, *carry])

    rows_TBK, last = _run(step, dtype, params, matrices, x_TKB, carry, noise_TKB, resets)
    _, carries = _split(by, carry, rows_TBK)
    return (turned(carries[0]), last), (params, matrices, x_TKB, carry, noise_TKB, resets, rows_TBK)


def _at(tree: Any, t: Any) -> Any:
    """Return step t of the arrays of a tree."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, t, 0, keepdims=False), tree)


def _split(by: _Differentiation, carry: Carry, rows: jax.Array) -> tuple[tuple[jax.Array, ...], Carry]:
    """Return (what is saved, carry) of the rows of a step, shape (B, K), or of all steps, shape (T, B, K)."""
    sizes = [*by.saved, *map(len, carry)]
    ends = list(itertools.accumulate(sizes))
    parts = tuple(rows[..., end - size : end] for end, size in zip(ends, sizes))
    return parts[: len(by.saved)], parts[len(by.saved) :]


def _unroll_bwd(cell, dtype, residuals, grads):
    """Return the gradients of `unroll`."""
    params, matrices, x_TKB, carry, noise_TKB, resets, rows_TBK = residuals
    dh_THB, dlast = grads
    dh_TBH, x_TBK, noise_TBK = turned(dh_THB), turned(x_TKB), turned(noise_TKB)
    by = _differentiation(cell, dtype, params, matrices, _at(x_TKB, 0), carry, _at(noise_TKB, 0))
    transposed = {name: materialize(W.T.astype(dtype)) for name, W in matrices.items()}
    inputs_TBK = (x_TBK, noise_TBK) if by.reads_x else (x_TBK[:, :, :0], None)

    num_steps, low = len(x_TKB), dtype

    def pull(inputs_BK, saved, before, after, dcarry, known=None):
        """Return the gradients of a step, all turned. `known` is the gradient of its product, if it is known already."""

        def dot(name, grad_KB):
            grad_KB = grad_KB if known is None else known.T
            return _product(transposed[name], grad_KB, x_TKB.dtype)

        found = by.backward(params, *turned((*inputs_BK, saved, before, after, dcarry)), dot)
        return found[0], *turned(found[1:])

    def pull_at(t, dcarry, known=None):
        """Return `pull` of step t."""
        saved, after = _split(by, carry, _at(rows_TBK, t))
        _, earlier = _split(by, carry, _at(rows_TBK, jnp.maximum(t - 1, 0)))
        before = tuple(jnp.where(t == 0, c, each.T) for c, each in zip(carry, earlier))
        return pull(_at(inputs_TBK, t), saved, turned(start_step(resets, t, before)), after, dcarry, known)

    def before_gradient(t, dcarry, dinitial, known=None):
        """Return the gradients with respect to the carry before step t and to the initial carry."""
        dbefore, dinitial = start_gradient(resets, t, turned(pull_at(t, dcarry, known)[2]), dinitial)
        return turned(dbefore), dinitial

    def step(state, t):
        dcarry, dinitial, known = state
        later = jnp.minimum(t + 1, num_steps - 1)
        dbefore, dinitial_later = before_gradient(later, dcarry, dinitial, known)
        is_last = t == num_steps - 1
        dcarry = tuple(jnp.where(is_last, each, found) for each, found in zip(dcarry, dbefore))
        dinitial = tuple(jnp.where(is_last, each, found) for each, found in zip(dinitial, dinitial_later))
        dcarry = (dcarry[0] + _at(dh_TBH, t), *dcarry[1:])
        (known,) = pull_at(t, dcarry)[3]
        return (dcarry, dinitial, known.astype(low)), jnp.concatenate(dcarry, axis=1)

    def step_at_once(state, t):
        dcarry, dinitial, _ = state
        dcarry = (dcarry[0] + _at(dh_TBH, t), *dcarry[1:])
        return (*before_gradient(t, dcarry, dinitial), None), jnp.concatenate(dcarry, axis=1)

    steps, state = jnp.arange(num_steps), (turned(dlast), zero_gradient(resets, dlast))
    if len(by.operands) == 1:
        rows = matrices[by.operands[0][0]].shape[0]
        known = jnp.zeros((x_TKB.shape[2], rows), low)
        (dcarry, dinitial, known), dcarry_TBK = jax.lax.scan(step, (*state, known), steps, reverse=True)
        dcarry, dinitial = before_gradient(0, dcarry, dinitial, known)
    else:
        (dcarry, dinitial, _), dcarry_TBK = jax.lax.scan(step_at_once, (*state, None), steps, reverse=True)
    saved, carries = _split(by, carry, rows_TBK)
    starts = tuple(jnp.concatenate([c.T[None], each[:-1]]) for c, each in zip(carry, carries))
    if resets is not None:
        starts = tuple(jnp.where(resets.before_TB[..., None], c.T, each) for c, each in zip(resets.initial, starts))
    dcarries = tuple(jnp.split(dcarry_TBK, len(carry), axis=-1))
    dparams, dx_TBK, _, douts = jax.vmap(pull)(inputs_TBK, saved, starts, carries, dcarries)
    dmatrices = jax.tree.map(jnp.zeros_like, matrices)
    for (name, of_carry, of_saved), dout_TBG in zip(by.operands, douts):
        operand_TBK = starts[of_carry] if of_saved is None else saved[of_saved]
        dmatrices[name] += _kernel_gradient(dout_TBG, operand_TBK, dtype)
    dparams = jax.tree.map(lambda each: each.sum(0), dparams)
    return dparams, dmatrices, turned(dx_TBK), turned(dcarry), None, cotangent(resets, dinitial)


def _kernel_gradient(grad_TBG: jax.Array, x_TBK: jax.Array, dtype: Any) -> jax.Array:
    """Return the sum of grad.T @ x over all steps, shape (G, K), as `products.kernel_gradient` does."""
    sums = ((0, 1), (0, 1)), ((), ())
    return jax.lax.dot_general(grad_TBG.astype(dtype), x_TBK.astype(dtype), sums, preferred_element_type=grad_TBG.dtype)


unroll.defvjp(_unroll_fwd, _unroll_bwd)
