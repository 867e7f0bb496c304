"""The weights of a model as the page reads them, and what the page cannot compute.

Letters: V vocabulary, I input features, H hidden, G gates times hidden.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from charlm.data.vocab import utf8_transitions
from charlm.nn.cells import find_cell, layer_norm
from charlm.runs.language_model import LanguageModel
from charlm.system.errors import ConfigError

# The cells of page/engine/cells.js.
CELLS = ("rnn", "lstm", "gru", "ln_lstm", "ln_gru")
DTYPES = ("float32", "float16")


def check_supported(config: ConfigDict) -> None:
    """Raise ConfigError if the page cannot compute the model of a config."""
    cell = config.model.cell
    if cell not in CELLS:
        raise ConfigError(f"model.cell is {cell!r}, which the page cannot compute; it computes {', '.join(CELLS)}")
    if config.data.documents:
        raise ConfigError(f"data.documents is {config.data.documents!r}; the page only computes models of one text")


def describe_model(model: LanguageModel) -> dict[str, Any]:
    """Return what the page needs besides the weights to compute the model."""
    config = model.config.model
    return {
        "cell": config.cell,
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "residual": config.residual,
        "window": model.config.sample.window,
    }


def describe_vocab(model: LanguageModel) -> dict[str, Any]:
    """Return the vocabulary, and whether texts are lower-cased."""
    return {**model.vocab.to_json(), "lowercase": model.config.data.lowercase}


def page_weights(model: LanguageModel, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return the arrays from which the page computes the model.

    The first layer has a table (V, G) of the input projections of all symbols, with the bias. The other layers have W_x (G, I).
    The head has head_W (V, H). Vectors stay float32.

    Args:
        model: the model.
        dtype: that of the matrices, one of `DTYPES`.

    Raises:
        ConfigError: the page cannot compute the cell.
    """
    check_supported(model.config)
    cell = find_cell(model.config.model.cell)
    params = model.module.fold_params(model.params, "float32")
    arrays = {}
    for layer in range(model.config.model.num_layers):
        weights = dict(params[f"layer_{layer}"])
        if layer == 0:
            table_VG, bias, scale = weights.pop("W_x"), weights.pop("b"), weights.pop("scale_x", None)
            if scale is not None:
                table_VG = scale * layer_norm(table_VG, cell.norm_groups, axis=-1)
            weights["table"] = table_VG + bias
        else:
            weights["W_x"] = weights["W_x"].T
        arrays |= {f"layer_{layer}.{name}": array for name, array in weights.items()}
    arrays |= {"head_W": params["head_W"].T, "head_b": params["head_b"]}
    with np.errstate(over="ignore"):
        packed = {name: np.asarray(array, dtype if jnp.ndim(array) == 2 else "float32") for name, array in arrays.items()}
    if not all(np.isfinite(array).all() for array in packed.values()):
        raise ConfigError(f"--dtype {dtype} cannot hold all weights of the model; use float32")
    if model.vocab.kind == "bytes":
        packed["utf8"] = utf8_transitions().astype(np.uint8)  # -1 becomes 255.
    return packed
