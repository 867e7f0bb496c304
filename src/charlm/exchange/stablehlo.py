"""A model as StableHLO: programs that JAX runs without charlm, on a CPU, on an NVIDIA GPU and on a TPU.

The file is a zip archive. `step` and `score` are serialized `jax.export.Exported`, `params.npz` holds the parameters, and
`about.json` says what the programs take. JAX promises to read a serialized program for six months after it was written (JAX's
documentation of `jax.export`, "Compatibility guarantees").

Letters: B batch, T time, V vocabulary.
"""

import io
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from charlm.exchange.files import new_path, require
from charlm.nn.cells import find_cell
from charlm.nn.platforms import for_any_platform
from charlm.runs.flat_state import flatten_state
from charlm.runs.language_model import LanguageModel
from charlm.training.loss import cross_entropy

PLATFORMS = ("cpu", "cuda", "tpu")


def write_stablehlo(model: LanguageModel, path: Path, batch: int = 1, window: int = 64) -> None:
    """Write a model as a zip archive of StableHLO programs.

    `step`: (params, ids_B, state) -> (logits_BV, state). `score`: (params, ids_TB, state) -> (nats_TB, state), where row t is
    the cross-entropy of symbol t + 1 and T + 1 symbols are read. Both programs have fixed shapes. A state is a list of arrays
    (B, H): for each layer its carry. For a model of documents both programs reset the state before they read the boundary. The
    parameters are a dict from dotted path to array.

    Args:
        model: the model.
        path: the file.
        batch: B, the number of texts at a time.
        window: T, the number of symbols that one call of `score` scores.

    Raises:
        ConfigError: flatbuffers, which JAX needs to serialize, is not installed.
    """
    require("flatbuffers", "export")
    from jax import export

    module = model.module.clone(recurrence="scan")
    flat = {name: jnp.asarray(value) for name, value in flatten_state(model.params).items()}
    # Only shapes: an export of a large batch needs no memory for it.
    treedef = jax.tree.structure(jax.eval_shape(lambda params: module.initial_carry(params, batch), model.params))
    num_arrays = model.config.model.num_layers * len(find_cell(model.config.model.cell).carries)

    def unroll(params, ids_TB, state):
        logits_TBV, state = module.apply(
            {"params": unflatten_dict(params, sep=".")}, ids_TB, jax.tree.unflatten(treedef, state)
        )
        return logits_TBV, jax.tree.leaves(state)

    def step(params, ids_B, state):
        logits_1BV, state = unroll(params, ids_B[None], state)
        return logits_1BV[0], state

    def score(params, ids_TB, state):
        logits_TBV, state = unroll(params, ids_TB[:-1], state)
        return cross_entropy(logits_TBV, ids_TB[1:]), state

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), flat)
    state = [jax.ShapeDtypeStruct((batch, model.config.model.hidden_size), jnp.float32)] * num_arrays
    symbols = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch,), (window + 1, batch))]
    with for_any_platform():
        programs = {
            name: export.export(jax.jit(function), platforms=PLATFORMS)(shapes, ids, state)
            for name, function, ids in zip(("step", "score"), (step, score), symbols)
        }
    about = {
        "programs": {
            "step": "(params, ids_B, state) -> (logits_BV, state)",
            "score": "(params, ids_TB, state) -> (nats_TB, state)",
        },
        "batch": batch,
        "window": window,
        "platforms": PLATFORMS,
        "state": [[batch, model.config.model.hidden_size]] * num_arrays,
        "vocab": model.vocab.to_json(),
        "boundary": model.boundary,
        "jax": jax.__version__,
    }
    with new_path(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name, program in programs.items():
            archive.writestr(name, bytes(program.serialize()))
        buffer = io.BytesIO()
        np.savez(buffer, **{name: np.asarray(value) for name, value in flat.items()})
        archive.writestr("params.npz", buffer.getvalue())
        archive.writestr("about.json", json.dumps(about, indent=2) + "\n")
