"""The state of a run as a flat dict from dotted path to array, as it is saved in a checkpoint."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from charlm.nn.model import CharLM
from charlm.parallel import processes
from charlm.parallel.mesh import fetch, needs_gathering
from charlm.system.errors import WorkdirError
from charlm.training.state import Program, shapes_of_state

# Dotted path -> array.
FlatState = dict[str, np.ndarray]
# Dotted path -> shape and dtype.
FlatShapes = dict[str, jax.ShapeDtypeStruct]


def name_leaves(tree: Any) -> dict[str, Any]:
    """Return {dotted path: leaf} of a tree."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def flatten_state(tree: Any) -> FlatState:
    """Return {dotted path: array} of a tree, copied to the host. All processes of a job must call it."""
    # Copies, because on a CPU a NumPy view shares its memory with the array, and a donated array is soon overwritten.
    return {name: np.array(fetch(leaf)) for name, leaf in name_leaves(tree).items()}


def state_shapes(config: ConfigDict, vocab_size: int) -> FlatShapes:
    """Return {dotted path: shape and dtype} of the state of a run with this config."""
    # The length of the run changes no shape.
    program = Program(config, vocab_size, 1000, carries_state=config.batching.layout == "stream")
    return name_leaves(shapes_of_state(program))


def _name(path: tuple[Any, ...]) -> str:
    """Return the dotted path of a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def unflatten_state(like: Any, flat: FlatState) -> Any:
    """Return the tree that `flatten_state` flattened.

    Args:
        like: a tree with the structure, shapes and dtypes of the result.
        flat: the flat state. Arrays that `like` does not name are ignored.

    Raises:
        WorkdirError: an array is missing, or has another shape or dtype, because another model wrote the flat state.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    values = []
    for path, leaf in leaves:
        name = _name(path)
        if name not in flat or flat[name].shape != leaf.shape or flat[name].dtype != leaf.dtype:
            found = f"{flat[name].dtype}{list(flat[name].shape)}" if name in flat else "nothing"
            raise WorkdirError(
                f"the checkpoint does not fit the config: {name} should be {leaf.dtype}{list(leaf.shape)}, found {found}"
            )
        values.append(flat[name])
    return jax.tree_util.tree_unflatten(treedef, values)


def eval_params(flat: FlatState, model: CharLM) -> Any:
    """Return the parameters for scoring and sampling (`TrainState.eval_params`) of a flat state, on the device.

    Raises:
        WorkdirError: the flat state does not hold parameters of this model.
    """
    name = "ema" if any(path.startswith("ema.") for path in flat) else "params"
    like = {name: model.param_shapes()}
    return jax.device_put(unflatten_state(like, flat)[name])


def sha256(flat: Mapping[str, np.ndarray | jax.Array], meta: Mapping[str, Any] | None = None) -> str:
    """Return the sha256 of the paths, dtypes, shapes and bytes, sorted by path, and of JSON metadata if given.

    It does not depend on how the arrays are sharded. If the devices of several processes hold them, all processes of the job
    must call this. Then only process 0 computes the sha256, and the others return "". No process copies more than one complete
    array at a time to its host.
    """
    hashes = processes.is_primary() or not any(map(needs_gathering, flat.values()))
    digest = hashlib.sha256()
    for name in sorted(flat):
        value = fetch(flat[name])
        if hashes:
            value = np.ascontiguousarray(value)
            digest.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
            digest.update(value.reshape(-1).view(np.uint8).data)
    if meta is not None:
        digest.update(json.dumps(meta, sort_keys=True).encode())
    return digest.hexdigest() if hashes else ""
