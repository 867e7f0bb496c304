"""Several devices: which of them share a batch, and what lies where.

A batch is shared out among the devices of a mesh with one axis, `data`. Parameters lie whole on each of them, or with
`mesh.shard_params` in parts that are put together where a step needs them. On one device there is no mesh (None), and
nothing here stands in the way.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from charlm.errors import ConfigError

# Where an array lies: whole on every device; split by the rows of a batch; the same where its second axis is the batch.
WHOLE, ROWS, OF_STEPS = P(), P("data"), P(None, "data")
# Smaller arrays are not worth splitting.
_LEAST_SPLIT = 1 << 12


def make_mesh(config) -> Mesh | None:
    """The devices that share a batch, those of each process side by side.

    Raises:
        ConfigError: there are not as many as `mesh.data` wants, or they cannot share a batch equally.
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


def size(mesh: Mesh | None) -> int:
    """How many devices share a batch."""
    return 1 if mesh is None else mesh.size


def shared_equally(mesh: Mesh | None, rows: int) -> int:
    """So many rows, or a few more, so that each device has as many as the others."""
    return -(-rows // size(mesh)) * size(mesh)


def own_rows(mesh: Mesh | None, batch_size: int) -> list[slice]:
    """The rows of a batch that this process works on, a slice for each of its devices."""
    if mesh is None:
        return [slice(0, batch_size)]
    each = batch_size // mesh.size
    here = [k for k, device in enumerate(mesh.devices) if device.process_index == jax.process_index()]
    return [slice(k * each, (k + 1) * each) for k in here]


def split_spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """How an array of a sharded state is split: along its longest axis that the devices can share equally."""
    axes = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
    if not axes or np.prod(shape) < _LEAST_SPLIT:
        return WHOLE
    longest = max(axes, key=lambda axis: shape[axis])
    return P(*[None] * longest, "data")


def sharding(mesh: Mesh | None, spec: P) -> NamedSharding | None:
    """How an array lies on a mesh."""
    return None if mesh is None else NamedSharding(mesh, spec)


def shape(mesh: Mesh | None, shape: tuple[int, ...], dtype, spec: P = WHOLE) -> jax.ShapeDtypeStruct:
    """What `put` makes of an array of this shape."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, spec))


def put(mesh: Mesh | None, x: np.ndarray, spec: P = WHOLE) -> jax.Array | np.ndarray:
    """An array that every process has, spread over the devices; each process copies only what lies on its own."""
    if mesh is None:
        return x
    # Copies, for on a CPU the device's array could be the host's, which may be written over.
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: np.array(x[index]))


def put_read(mesh: Mesh | None, ids_N: np.ndarray, at_BT: np.ndarray) -> jax.Array | np.ndarray:
    """`ids_N[at_BT]` split by rows; each process reads only those of its own devices."""
    if mesh is None:
        return ids_N[at_BT]
    return jax.make_array_from_callback(at_BT.shape, NamedSharding(mesh, ROWS), lambda index: ids_N[at_BT[index]])


def put_own(mesh: Mesh | None, x: np.ndarray) -> jax.Array | np.ndarray:
    """An array of which each process has the part for its own devices, along the first axis."""
    return x if mesh is None else jax.make_array_from_process_local_data(NamedSharding(mesh, ROWS), x)


def put_tree(mesh: Mesh | None, tree: Any, shardings: Any) -> Any:
    """A tree that every process has, on the devices as the shardings say; a copy in any case."""
    if mesh is None:
        return jax.tree.map(jnp.array, tree)
    return jax.tree.map(lambda x, sharding: put(mesh, np.asarray(x), sharding.spec), tree, shardings)


def on_each(mesh: Mesh | None, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """The function as each device runs it on its own part; itself where there is one device."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def mean_over(mesh: Mesh | None, tree: Any) -> Any:
    """Within `on_each`: the mean over the devices."""
    if mesh is None:
        return tree
    if mesh.devices.flat[0].platform != "cpu":
        return jax.lax.pmean(tree, "data")
    # Between processes on CPUs every collective costs milliseconds, whatever its size, and XLA does not put them together.
    numbers, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(numbers, "data"))


def joined(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Within `on_each`: the parts of all devices, one after another."""
    return x if mesh is None else jax.lax.all_gather(x, "data", tiled=True)


def on_host(tree: Any) -> Any:
    """The tree as whole NumPy arrays, parts that lie with other processes too. All processes have to ask for it."""

    def fetched(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetched, tree)


def whole(mesh: Mesh | None, tree: Any) -> Any:
    """The tree with every array whole on this process's first device. All processes have to ask for it."""
    if mesh is None:
        return tree
    gathered = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, WHOLE))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), gathered)
