"""The weights of a model as the page reads them, and what the page cannot compute.

Letters: V vocabulary, I input features, H hidden, G gates times hidden.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from charlm.data.documents import Documents
from charlm.data.vocab import utf8_transitions
from charlm.nn.cells import find_cell, layer_norm
from charlm.runs.language_model import LanguageModel
from charlm.system.errors import ConfigError

# The cells of page/engine/cells.js, and for each the gates whose values lie between 0 and 1.
CELLS: Mapping[str, tuple[str, ...]] = {
    "rnn": (),
    "lstm": ("i", "f", "o"),
    "gru": ("r", "z"),
    "ln_lstm": ("i", "f", "o"),
    "ln_gru": ("r", "z"),
    "mlstm": ("i", "f", "o"),
    "mogrifier_lstm": ("i", "f", "o"),
    "slstm": ("i", "f", "o"),
    "cifg_lstm": ("f", "o"),
    "mgu": ("f",),
    "indrnn": (),
    "min_gru": ("z",),
    "min_lstm": ("f", "i"),
}


def check_supported(config: ConfigDict) -> None:
    """Raise ConfigError if the page cannot compute the model of a config."""
    cell = config.model.cell
    if cell not in CELLS:
        raise ConfigError(f"model.cell is {cell!r}, which the page cannot compute; it computes {', '.join(CELLS)}")


def shown_gates(name: str) -> tuple[str, ...]:
    """Return the gates of a cell that the page shows: those that are not a part of the carry, as the gate of the RNN is."""
    cell = find_cell(name)
    return tuple(gate for gate in cell.gates if gate not in cell.carries)


def describe_model(model: LanguageModel) -> dict[str, Any]:
    """Return what the page needs besides the weights to compute the model."""
    config = model.config.model
    cell = find_cell(config.cell)
    return {
        "cell": {
            "name": config.cell,
            "gates": shown_gates(config.cell),
            "logistic": CELLS[config.cell],
            "carries": cell.carries,
            "normGroups": cell.norm_groups,
            "readsFeatures": cell.reads_features,
        },
        "boundary": model.boundary,
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "residual": config.residual,
        "window": model.config.sample.window,
    }


def describe_vocab(model: LanguageModel) -> dict[str, Any]:
    """Return the vocabulary, whether texts are lower-cased, and how they are split into documents."""
    data = model.config.data
    documents = Documents.from_config(data)
    return {**model.vocab.to_json(), "lowercase": data.lowercase, "documents": documents and documents._asdict()}


def page_weights(model: LanguageModel, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return the arrays from which the page computes the model.

    The array `table` holds what the first layer reads of each symbol: the input projection with the bias (V, G), or for a cell
    that reads features the features (V, I). W_x has the shape (G, I). Each layer has its initial carry as first_0 (H,) and so
    on. The head has head_W (V, H). Vectors stay float32.

    Args:
        model: the model.
        dtype: that of the matrices, float32 or float16.

    Raises:
        ConfigError: the page cannot compute the cell.
    """
    check_supported(model.config)
    cell = find_cell(model.config.model.cell)
    params = model.module.fold_params(model.params, "float32")
    arrays = {}
    for layer, carry in enumerate(model.initial_state()):
        weights = dict(params[f"layer_{layer}"]) | {f"first_{k}": each_1H[0] for k, each_1H in enumerate(carry)}
        if layer == 0 and not cell.reads_features:
            table_VG, bias, scale = weights.pop("W_x"), weights.pop("b"), weights.pop("scale_x", None)
            if scale is not None:
                table_VG = scale * layer_norm(table_VG, cell.norm_groups, axis=-1)
            arrays["table"] = table_VG + bias
        else:
            weights["W_x"] = weights["W_x"].T
        arrays |= {f"layer_{layer}.{name}": array for name, array in weights.items()}
    if cell.reads_features:
        arrays["table"] = model.module.features(params, jnp.arange(model.vocab.size)[None])[0].T
    # With tied weights only the features' embedding is there (`CharLM.fold_params`).
    arrays |= {"head_W": params["head_W"].T if "head_W" in params else params["embedding"], "head_b": params["head_b"]}
    with np.errstate(over="ignore"):
        packed = {name: np.asarray(array, dtype if jnp.ndim(array) == 2 else "float32") for name, array in arrays.items()}
    if not all(np.isfinite(array).all() for array in packed.values()):
        raise ConfigError(f"--dtype {dtype} cannot hold all weights of the model; use float32")
    if model.vocab.kind == "bytes":
        packed["utf8"] = utf8_transitions().astype(np.uint8)  # -1 becomes 255.
    return packed
