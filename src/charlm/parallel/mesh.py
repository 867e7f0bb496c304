"""Several devices that share a batch: the mesh, the shardings, and collectives within a step.

The rows of a batch are sharded over a mesh with one axis, `data`. Parameters are replicated, or with `mesh.shard_params`
sharded and gathered where a step needs them. One device needs no mesh (None); every function here accepts that.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from charlm.system.errors import ConfigError

# Partition specs: on every device; sharded along the batch, the first axis; sharded along the batch, the second axis.
REPLICATED, BATCH_SHARDED, STEPS_BATCH_SHARDED = P(), P("data"), P(None, "data")
# Smaller arrays are not worth sharding.
_MIN_SHARDED_SIZE = 1 << 12
# Cores of a CPU that share a batch as devices are faster up to these units (experiments/cores). Each needs some rows.
_MAX_SHARED_UNITS, _MIN_ROWS = 256, 8


def make_mesh(config: ConfigDict) -> Mesh | None:
    """Return the mesh of the devices that share a batch, ordered by process; None for one device.

    Raises:
        ConfigError: there are fewer devices than `mesh.data`, or they cannot share a batch equally.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    processes, batch = jax.process_count(), config.batching.batch_size
    count = config.mesh.data
    if count is None:
        count = len(devices) if processes > 1 else 1
    count = count or len(devices)
    if count > len(devices):
        raise ConfigError(f"mesh.data is {count}; there are {len(devices)} devices ({devices[0].device_kind})")
    if processes > 1 and count != len(devices):
        raise ConfigError(f"mesh.data is {count}; the {processes} processes of this job have {len(devices)}: leave it unset")
    if batch % (count * config.optimizer.accumulation_steps):
        parts = f"{config.optimizer.accumulation_steps} parts on each of " if config.optimizer.accumulation_steps > 1 else ""
        raise ConfigError(f"batching.batch_size is {batch}; {parts}{count} devices cannot share it equally: change mesh.data")
    return Mesh(np.array(devices[:count]), ("data",)) if count > 1 else None


def num_sharing_devices(config: ConfigDict, devices: int) -> int:
    """Return how many of some CPU devices should share a batch: more than one if the model is small (`mesh.auto`)."""
    if config.model.hidden_size > _MAX_SHARED_UNITS:
        return 1
    rows = config.batching.batch_size / config.optimizer.accumulation_steps
    return max((n for n in range(1, devices + 1) if rows % n == 0 and rows / n >= _MIN_ROWS), default=1)


def num_devices(mesh: Mesh | None) -> int:
    """Return the number of devices that share a batch."""
    return 1 if mesh is None else mesh.size


def round_up(mesh: Mesh | None, rows: int) -> int:
    """Return the smallest number of rows, at least `rows`, that the devices can share equally."""
    return -(-rows // num_devices(mesh)) * num_devices(mesh)


def local_rows(mesh: Mesh | None, batch_size: int) -> list[slice]:
    """Return the rows of a batch that this process works on: one slice for each of its devices."""
    if mesh is None:
        return [slice(0, batch_size)]
    each = batch_size // mesh.size
    here = [k for k, device in enumerate(mesh.devices) if device.process_index == jax.process_index()]
    return [slice(k * each, (k + 1) * each) for k in here]


def param_spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Return the spec of an array of a sharded state: sharded along its longest axis that the devices can share equally."""
    axes = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
    if not axes or np.prod(shape) < _MIN_SHARDED_SIZE:
        return REPLICATED
    longest = max(axes, key=lambda axis: shape[axis])
    return P(*[None] * longest, "data")


def sharding(mesh: Mesh | None, spec: P) -> NamedSharding | None:
    """Return the sharding of a spec on a mesh; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, spec)


def shape(mesh: Mesh | None, shape: tuple[int, ...], dtype: Any, spec: P = REPLICATED) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and sharding of what `put` makes of such an array."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, spec))


def put(mesh: Mesh | None, x: np.ndarray, spec: P = REPLICATED) -> jax.Array | np.ndarray:
    """Place an array that every process has on the devices; each process copies only the shards of its own devices."""
    if mesh is None:
        return x
    # Copies, because a CPU device's array may share memory with the host's array, which may be overwritten.
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: np.array(x[index]))


def put_rows(mesh: Mesh | None, ids_N: np.ndarray, at_BT: np.ndarray) -> jax.Array | np.ndarray:
    """Return `ids_N[at_BT]`, sharded by rows; each process reads only the rows of its own devices."""
    if mesh is None:
        return ids_N[at_BT]
    return jax.make_array_from_callback(at_BT.shape, NamedSharding(mesh, BATCH_SHARDED), lambda index: ids_N[at_BT[index]])


def put_local(mesh: Mesh | None, x: np.ndarray) -> jax.Array | np.ndarray:
    """Return the global array whose shards on this process's devices are `x`, along the first axis."""
    return x if mesh is None else jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH_SHARDED), x)


def put_tree(mesh: Mesh | None, tree: Any, shardings: Any) -> Any:
    """Place a tree that every process has on the devices: a copy, except of arrays that lie there as `shardings` says."""
    if mesh is None:
        return jax.tree.map(jnp.array, tree)

    def placed(x: Any, sharding: NamedSharding) -> jax.Array:
        return x if isinstance(x, jax.Array) and x.sharding == sharding else put(mesh, np.asarray(x), sharding.spec)

    return jax.tree.map(placed, tree, shardings)


def shard_map(mesh: Mesh | None, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Return `jax.shard_map` of the function: each device runs it on its own shards. Without a mesh: the function."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def pmean(mesh: Mesh | None, tree: Any) -> Any:
    """Within `shard_map`: return the mean over the devices."""
    if mesh is None:
        return tree
    if mesh.devices.flat[0].platform != "cpu":
        return jax.lax.pmean(tree, "data")
    # Between processes on CPUs every collective takes milliseconds, whatever its size, and XLA does not combine them.
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(flat, "data"))


def all_gather(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Within `shard_map`: return the shards of all devices, concatenated along the first axis."""
    return x if mesh is None else jax.lax.all_gather(x, "data", tiled=True)


def needs_gathering(x: Any) -> bool:
    """Return whether only several processes together hold an array."""
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)


def fetch(tree: Any) -> Any:
    """Return the tree as complete NumPy arrays on this host. All processes of a job must call it."""

    def fetched(leaf: Any) -> np.ndarray:
        if needs_gathering(leaf):
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetched, tree)


def gather_locally(mesh: Mesh | None, tree: Any) -> Any:
    """Return the tree with every array complete on this process's first device. All processes of a job must call it."""
    if mesh is None:
        return tree
    replicated = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, REPLICATED))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), replicated)
