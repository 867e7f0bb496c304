"""Resets inside a window: before some steps the carry is replaced by the initial carry, and the gradient is cut there.

A text of separate documents needs them, because its windows contain the ends of documents. Without resets (None) every function
here returns what it got, so the program is the one that knows no resets.

Arrays are feature-major, with the batch last; `recurrence` explains why.

Letters: B batch, T time, H hidden.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from charlm.nn.cell import Carry


class Resets(NamedTuple):
    """The steps before which the carry is replaced.

    Attributes:
        before_TB: whether the carry is replaced before each step, bool.
        initial: the carry that replaces it, arrays of shape (H, 1).
    """

    before_TB: jax.Array
    initial: Carry


def step_numbers(resets: Resets | None) -> jax.Array | None:
    """Return the numbers of the steps, shape (T,), which a loop needs only for the resets."""
    return None if resets is None else jnp.arange(len(resets.before_TB))


def start_step(resets: Resets | None, t: Any, carry: Carry) -> Carry:
    """Return the carry from which step t starts, where `carry` is that after the step before."""
    if resets is None:
        return carry
    before_B = jax.lax.dynamic_index_in_dim(resets.before_TB, t, 0, keepdims=False)
    return tuple(jnp.where(before_B, initial, each) for initial, each in zip(resets.initial, carry))


def start_product(resets: Resets | None, t: Any, product_GB: jax.Array, initial_G1: jax.Array | None) -> jax.Array:
    """Return the product of a matrix with carry 0 of `start_step`, from the products with its two sources.

    The product with the carry after the step before need not wait for the reset, so the reset becomes a part of the loop over
    the elements that reads the product.

    Args:
        resets: the resets.
        t: the step.
        product_GB: the product with the carry after the step before.
        initial_G1: the product with the initial carry; None without resets.
    """
    if resets is None:
        return product_GB
    return jnp.where(jax.lax.dynamic_index_in_dim(resets.before_TB, t, 0, keepdims=False), initial_G1, product_GB)


def start_all_steps(resets: Resets | None, carries: Carry, k: int) -> jax.Array:
    """Return carry k at the start of every step, shape (T, H, B).

    Args:
        resets: the resets.
        carries: the carry before the first step and after every step, arrays of shape (T + 1, H, B).
        k: the index of the array.
    """
    before_THB = carries[k][:-1]
    return before_THB if resets is None else jnp.where(resets.before_TB[:, None], resets.initial[k], before_THB)


def start_gradient(resets: Resets | None, t: Any, dcarry: Carry, dinitial: Carry) -> tuple[Carry, Carry]:
    """Return the gradients with respect to the arguments of `start_step`: the carry, and the initial carry summed up.

    Args:
        resets: the resets.
        t: the step.
        dcarry: the gradient with respect to the carry from which step t starts.
        dinitial: the gradient with respect to the initial carry of each row, (H, B), from the steps after t; () without resets.
    """
    if resets is None:
        return dcarry, dinitial
    before_B = jax.lax.dynamic_index_in_dim(resets.before_TB, t, 0, keepdims=False)
    dinitial = tuple(total + jnp.where(before_B, each, 0) for total, each in zip(dinitial, dcarry))
    return tuple(jnp.where(before_B, 0, each) for each in dcarry), dinitial


def zero_gradient(resets: Resets | None, dcarry: Carry) -> Carry:
    """Return the first value of the sum `dinitial` of `start_gradient`."""
    return () if resets is None else tuple(map(jnp.zeros_like, dcarry))


def cotangent(resets: Resets | None, dinitial: Carry) -> Resets | None:
    """Return the cotangent of the resets, for a custom derivative. The flags have none."""
    return None if resets is None else Resets(None, tuple(each.sum(axis=1, keepdims=True) for each in dinitial))


def reset_coefficients(resets: Resets | None, decay_THB: jax.Array, added_THB: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the coefficients of a linear recurrence with resets: a step after a reset ignores the state before it."""
    if resets is None:
        return decay_THB, added_THB
    before_T1B, (initial_H1,) = resets.before_TB[:, None], resets.initial
    return jnp.where(before_T1B, 0, decay_THB), jnp.where(before_T1B, decay_THB * initial_H1 + added_THB, added_THB)
