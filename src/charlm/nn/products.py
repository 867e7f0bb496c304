"""Products of a matrix with a vector for each sequence, in the dtype of `model.dtype`, and their gradients.

Arrays are feature-major, with the batch last, so the matrix is the left operand. A CPU reads the left operand in place and
repacks the right one in every product.

Letters: B batch, T time, I input features, G rows of a matrix, K any number of rows.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# On a CPU the gradient of a kernel is one product if the gradient of all steps has at most this many elements. A larger one is
# split into products of about this many columns.
_MAX_ELEMENTS_IN_ONE_PRODUCT = 2**22
_COLUMNS_PER_PRODUCT = 1024


def matmul(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return x @ w with both operands cast to `dtype`. Sums and result have the dtype of x."""
    return jnp.matmul(x.astype(dtype), w.astype(dtype), preferred_element_type=x.dtype)


def product(W: jax.Array, x: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """Return W @ x with x cast to the dtype of W. Sums and result have `out_dtype`, by default the dtype of x."""
    return jnp.matmul(W, x.astype(W.dtype), preferred_element_type=out_dtype or x.dtype)


def kernel_gradient(grad_TGB: jax.Array, x_TIB: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return the sum of grad @ x.T over all steps, shape (G, I), with the operands in `dtype`.

    This is one product over the columns of all steps. A CPU must transpose both operands in memory for it. If they do not stay
    in its caches meanwhile, a CPU sums up smaller products whose operands do.
    """
    num_steps, _, batch = grad_TGB.shape

    def one_product(grad, x):
        return product(flatten_steps(grad).astype(dtype), flatten_steps(x).T, grad.dtype)

    def sum_of_products(grad, x):
        steps = max(1, _COLUMNS_PER_PRODUCT // batch)
        first = num_steps % steps

        def add(k, total):
            return total + one_product(*(jax.lax.dynamic_slice_in_dim(each, first + k * steps, steps) for each in (grad, x)))

        return jax.lax.fori_loop(0, num_steps // steps, add, one_product(grad[:first], x[:first]))

    on_cpu = sum_of_products if grad_TGB.size > _MAX_ELEMENTS_IN_ONE_PRODUCT else one_product
    return jax.lax.platform_dependent(grad_TGB, x_TIB, cpu=on_cpu, default=one_product)


def materialize(x: jax.Array) -> jax.Array:
    """Return x, stored in memory in the order of its axes. Otherwise XLA may leave a transpose to every use of x."""
    return jax.lax.optimization_barrier(x)


def flatten_steps(x_TKB: jax.Array) -> jax.Array:
    """Return the columns of all steps side by side, shape (K, T * B)."""
    return jnp.swapaxes(x_TKB, 0, 1).reshape(x_TKB.shape[1], -1)
