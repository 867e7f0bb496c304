"""Many training steps in one dispatch, for one run or for several runs side by side.

Letters: B batch, T time, N characters of the text, K steps in a dispatch, R runs.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from charlm.data.batching import cut_windows
from charlm.parallel import mesh as meshes
from charlm.parallel.mesh import BATCH_SHARDED, REPLICATED, STEPS_BATCH_SHARDED
from charlm.training.state import Hyperparameters, Program, TrainState, jit_program
from charlm.training.step import Metrics, train_step

# K, the capacity of the metrics buffers. It is part of the compiled program, so it is not a config key. The number of steps in
# a dispatch is `train.steps_per_dispatch`.
MAX_STEPS_PER_DISPATCH = 128


def train_chunk(
    program: Program,
    state: TrainState,
    hyperparameters: Hyperparameters,
    ids_N: jax.Array,
    starts_KB: jax.Array,
    reset_KB: jax.Array,
    n: jax.Array,
    ids_spec: P = REPLICATED,
) -> tuple[TrainState, Metrics, jax.Array]:
    """Take the first n of K steps and return (state, metrics of shape (K,), finite).

    The windows are cut out of the text on the device. n is traced, so one compiled program serves every cadence of logging,
    evaluation and saving, with the same bits. `finite` says whether all parameters are finite; the losses cannot show it,
    because each loss is computed before its own update. On a mesh `ids_spec` says whether every device has all of `ids_N`, or
    a part of it that contains the windows of its own rows.
    """
    cut = functools.partial(cut_windows, seq_len=program.config.batching.seq_len)
    cut = meshes.shard_map(program.mesh, cut, (ids_spec, BATCH_SHARDED), BATCH_SHARDED)

    # Inlined, so it leaves no trace in the program. It lets the step be traced once, for its shapes and for the loop.
    @functools.partial(jax.jit, inline=True)
    def one_step(state, hyperparameters, starts_B, reset_B):
        return train_step(program, hyperparameters, state, cut(ids_N, starts_B), reset_B)

    def body(k, carried):
        state, metrics_K = carried
        state, metrics = one_step(state, hyperparameters, starts_KB[k], reset_KB[k])
        return state, jax.tree.map(lambda buffer_K, value: buffer_K.at[k].set(value), metrics_K, metrics)

    _, shapes = jax.eval_shape(one_step, state, hyperparameters, starts_KB[0], reset_KB[0])
    buffers = jax.tree.map(lambda value: jnp.zeros(starts_KB.shape[0], value.dtype), shapes)
    state, metrics_K = jax.lax.fori_loop(0, n, body, (state, buffers))
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]).all()
    return state, metrics_K, finite


def compile_train_chunk(
    program: Program, state: TrainState, hyperparameters: Hyperparameters, ids_N: jax.ShapeDtypeStruct
) -> Callable[..., tuple[TrainState, Metrics, jax.Array]]:
    """Return `train_chunk` compiled for such ids, so no step waits for the compiler. It donates the state."""
    mesh, batching = program.mesh, program.config.batching
    shape_KB = MAX_STEPS_PER_DISPATCH, batching.batch_size
    starts_shape = shape_KB if program.boundary is None else (*shape_KB, batching.seq_len + 1)
    starts_KB = meshes.shape(mesh, starts_shape, jnp.int32, STEPS_BATCH_SHARDED)
    reset_KB = meshes.shape(mesh, shape_KB, bool, STEPS_BATCH_SHARDED)
    options: dict[str, Any] = {"donate_argnums": 0, "static_argnames": ("ids_spec",)}
    ids_spec = REPLICATED
    if mesh is not None:
        ids_spec, replicated = ids_N.sharding.spec, meshes.sharding(mesh, REPLICATED)
        options["out_shardings"] = (jax.tree.map(lambda leaf: leaf.sharding, state), replicated, replicated)
    jitted, n = jit_program(train_chunk, program, **options), jax.ShapeDtypeStruct((), jnp.int32)
    return jitted.lower(state, hyperparameters, ids_N, starts_KB, reset_KB, n, ids_spec=ids_spec).compile()


def train_chunk_of_runs(
    program: Program,
    devices: Sequence[jax.Device],
    vectorised: bool,
    state: TrainState,
    hyperparameters_R: Hyperparameters,
    ids_N: jax.Array,
    starts_RKB: jax.Array,
    reset_RKB: jax.Array,
    n: jax.Array,
) -> tuple[TrainState, Metrics, jax.Array]:
    """Return `train_chunk` of R runs side by side over the same text, with a leading axis of R.

    Each run has its own hyperparameters, windows and resets. The runs are distributed over the devices, whose number divides
    R; no device waits for another within a chunk. A device processes its runs with `jax.vmap` if `vectorised`, which suits a
    GPU, whose products are too small for single runs; or one after another, which suits the core of a CPU. The results are
    those of R separate runs, up to rounding.
    """
    if vectorised:  # cuDNN cannot be vmapped.
        config = copy.deepcopy(program.config)
        config.model.recurrence = "scan"
        program = program._replace(config=config)

    def on_device(state, hyperparameters_R, ids_N, starts_RKB, reset_RKB, n):
        def one(run: Any):
            state, hyperparameters, starts_KB, reset_KB = run
            return train_chunk(program, state, hyperparameters, ids_N, starts_KB, reset_KB, n)

        over_runs = jax.vmap(one) if vectorised else functools.partial(jax.lax.map, one)
        return over_runs((state, hyperparameters_R, starts_RKB, reset_RKB))

    mesh, runs, replicated = Mesh(np.array(devices), ("run",)), P("run"), P()
    specs = (runs, runs, replicated, runs, runs, replicated)
    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=runs, check_vma=False)
    return sharded(state, hyperparameters_R, ids_N, starts_RKB, reset_RKB, n)
