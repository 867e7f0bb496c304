"""The products of one step of a cell, and the step again with products that are known already, for its derivative.

Letters: B batch, G rows of a product, K any number of rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike

from charlm.nn.cell import Carry, Cell, Dot, Params
from charlm.nn.products import product


class Product(NamedTuple):
    """A product of a cell's step, in the order of the calls of `dot`.

    Attributes:
        matrix: the name of the matrix.
        rows: the number of rows of the product.
        columns: the number of rows of the operand.
        carry: the index of the carry that is the operand; None if the step computes the operand.
    """

    matrix: str
    rows: int
    columns: int
    carry: int | None


def products_of(cell: Cell, dtype: DTypeLike, *args: Any) -> list[Product]:
    """Return the products of one step. `args` are the parameters, matrices, x_KB, carry and noise of the step."""
    found = []

    def step(params, matrices, x_KB, carry, noise_KB):
        def dot(name, operand):
            out = product(matrices[name].astype(dtype), operand)
            source = [k for k, each in enumerate(carry) if each is operand]
            found.append(Product(name, len(out), len(operand), source[0] if source else None))
            return out

        return update(cell, params, x_KB, carry, dot, noise_KB)

    jax.eval_shape(step, *args)
    return found


def update(cell: Cell, params: Params, x_KB: jax.Array, carry: Carry, dot: Dot, noise_KB: jax.Array | None) -> Carry:
    """Return the carry after one step of a cell, with or without noise."""
    return tuple(cell.update(params, x_KB, carry, dot, *((noise_KB,) if cell.noise else ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def known_product(pull: Callable[[jax.Array], jax.Array], operand: jax.Array, out: jax.Array) -> jax.Array:
    """Return a product that the forward loop saved.

    The gradient with respect to `out` is the gradient with respect to the product. The gradient with respect to the operand is
    `pull` of it, the product with the transpose of the matrix. Nothing asks for the gradient of the matrix.
    """
    return out


def _known_product_fwd(pull, operand, out):
    return out, None


def _known_product_bwd(pull, residuals, grad_GB):
    del residuals
    return pull(grad_GB), grad_GB


known_product.defvjp(_known_product_fwd, _known_product_bwd)
