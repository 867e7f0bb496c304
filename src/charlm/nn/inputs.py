"""The inputs of a layer at all time steps: symbols or the outputs of another layer, and their projection.

The input of the first layer is a character id. Its projection is therefore a lookup in a table with V columns (`from_ids`),
which needs V products instead of B * T.

Letters: B batch, T time, V vocabulary, I input features, G rows of the projection.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from charlm.nn.products import flatten_steps, kernel_gradient, materialize, matmul, product

# For a table of at most this many symbols the gradient is computed as a product with one-hot vectors.
_MAX_ONE_HOT_SYMBOLS = 512


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
            return lookup(finish(materialize(table_VG).T), ids_TB)
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
        W = materialize(W)
        return jax.lax.map(lambda x_IB: product(W, x_IB), x)

    return jax.lax.platform_dependent(W_GI.astype(dtype), x_TIB, cpu=step_by_step, default=product)


def _project_steps_fwd(dtype, W_GI, x_TIB):
    return _project_steps(dtype, W_GI, x_TIB), (W_GI, x_TIB)


def _project_steps_bwd(dtype, residuals, grad_TGB):
    W_GI, x_TIB = residuals
    return kernel_gradient(grad_TGB, x_TIB, dtype), _project_steps(dtype, W_GI.T, grad_TGB)


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
        return materialize(kernel_gradient(grad_TGB, one_hot_TVB, grad_TGB.dtype)), None
    # A CPU adds one row after another, so its scatter-add has a fixed order and needs no sorting.
    grad_VG = jax.lax.platform_dependent(
        ids_TB.reshape(-1),
        flatten_steps(grad_TGB).T,
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
