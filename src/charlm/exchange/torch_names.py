"""The parameters of a model under the names and in the layout of PyTorch's modules, as NumPy arrays, and back.

The modules are `embedding` (nn.Embedding), `rnn` (nn.RNN, nn.LSTM or nn.GRU) and `head` (nn.Linear). PyTorch adds two biases in
each layer and charlm has one, so the second is 0, except for the GRU's candidate gate, where both have one.

Letters: V vocabulary, E embedding, H hidden, I input features, G gates times hidden.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from charlm.config import default_config
from charlm.system.errors import ConfigError, UserError

# Name in PyTorch -> float32 array.
StateDict = dict[str, np.ndarray]
# The cells that have a counterpart: PyTorch's module, and the number of blocks of H rows.
TORCH_MODULES = {"rnn": ("RNN", 1), "lstm": ("LSTM", 4), "gru": ("GRU", 3)}


class ImportFailed(UserError):
    """A file holds no model that charlm can import."""


def check_counterpart(model: ConfigDict, format: str) -> None:
    """Raise ConfigError if a model has a part without a counterpart in PyTorch and ONNX. The message names its key."""
    if model.cell not in TORCH_MODULES:
        raise ConfigError(f"model.cell is {model.cell!r}, which {format} cannot hold; it can hold {', '.join(TORCH_MODULES)}")
    if model.encoding == "scalar":
        raise ConfigError(f"model.encoding is 'scalar', which {format} cannot hold; it can hold embedding and one_hot")
    for key in ("residual", "learn_initial_state"):
        if model[key]:
            raise ConfigError(f"model.{key} is True, which {format} cannot hold")


def to_torch(model: ConfigDict, params: Any) -> StateDict:
    """Return the state dict of a model for PyTorch.

    Args:
        model: `config.model`.
        params: its parameters.

    Returns:
        `embedding.weight` (V, E), unless the encoding is one_hot; for each layer k `rnn.weight_ih_lk` (G, I),
        `rnn.weight_hh_lk` (G, H), `rnn.bias_ih_lk` and `rnn.bias_hh_lk` (G,); `head.weight` (V, H) and `head.bias` (V,).

    Raises:
        ConfigError: a part of the model has no counterpart.
    """
    check_counterpart(model, "PyTorch")
    arrays = {}
    if model.encoding == "embedding":
        arrays["embedding.weight"] = params["embedding"]
    for k in range(model.num_layers):
        layer = params[f"layer_{k}"]
        second = np.zeros_like(layer["b"])
        if model.cell == "gru":
            second[2 * model.hidden_size :] = layer["b_h"]
        arrays[f"rnn.weight_ih_l{k}"] = np.asarray(layer["W_x"]).T
        arrays[f"rnn.weight_hh_l{k}"] = layer["W_h"]
        arrays[f"rnn.bias_ih_l{k}"] = layer["b"]
        arrays[f"rnn.bias_hh_l{k}"] = second
    arrays["head.weight"] = params["embedding"] if model.tie_weights else np.asarray(params["head_W"]).T
    arrays["head.bias"] = params["head_b"]
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def torch_shapes(model: ConfigDict, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of `to_torch` for a model over V symbols. Raises as `to_torch` does."""
    check_counterpart(model, "PyTorch")
    hidden, rows = model.hidden_size, TORCH_MODULES[model.cell][1] * model.hidden_size
    inputs = model.embedding_size if model.encoding == "embedding" else vocab_size
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (vocab_size, hidden), "head.bias": (vocab_size,)}
    if model.encoding == "embedding":
        shapes["embedding.weight"] = (vocab_size, inputs)
    for k in range(model.num_layers):
        shapes |= {f"rnn.weight_ih_l{k}": (rows, hidden if k else inputs), f"rnn.weight_hh_l{k}": (rows, hidden)}
        shapes |= {f"rnn.bias_ih_l{k}": (rows,), f"rnn.bias_hh_l{k}": (rows,)}
    return shapes


def from_torch(model: ConfigDict, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the parameters of a model from a state dict with the names and shapes of `to_torch`."""
    params: dict[str, Any] = {"head_b": arrays["head.bias"]}
    if model.encoding == "embedding":
        params["embedding"] = arrays["embedding.weight"]
    if not model.tie_weights:
        params["head_W"] = np.ascontiguousarray(arrays["head.weight"].T)
    for k in range(model.num_layers):
        W_ih, W_hh, first, second = (arrays[f"rnn.{name}_l{k}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        shared = len(first)  # The rows whose two biases only ever occur as a sum.
        layer = {"W_x": np.ascontiguousarray(W_ih.T), "W_h": W_hh}
        if model.cell == "gru":
            shared = 2 * model.hidden_size
            layer["b_h"] = second[shared:]
        # A sum with 0 would change the bits of -0.
        with np.errstate(over="ignore"):  # The caller checks that all is finite.
            added = np.where(second[:shared] == 0, first[:shared], first[:shared] + second[:shared])
        params[f"layer_{k}"] = layer | {"b": np.concatenate([added, first[shared:]])}
    return params


class Imported(NamedTuple):
    """A model that was recognised in a state dict.

    Attributes:
        config: the default config with the model's keys.
        arrays: the state dict under the names of `to_torch`, float32.
        vocab_size: V.
        notes: what was changed to make it a model of charlm, for messages.
    """

    config: ConfigDict
    arrays: StateDict
    vocab_size: int
    notes: list[str]


def recognise(state: Mapping[str, np.ndarray], embedding: str | None = None, head: str | None = None) -> Imported:
    """Recognise the model in a state dict, whatever its modules are called.

    Args:
        state: name -> array. One module must be an nn.RNN (with tanh), nn.LSTM or nn.GRU.
        embedding: the name of the embedding's module; None: recognised by its shape.
        head: the name of the linear head's module; None: recognised by its shape.

    Raises:
        ImportFailed: there is no such model, or more than one. The message names what was found.
    """
    state, notes = dict(state), []
    for name, array in state.items():
        if array.ndim not in (1, 2):
            raise ImportFailed(f"{name} has shape {array.shape}; the parameters of such a model are vectors and matrices")
    prefixes = sorted({match[1] for name in state if (match := re.fullmatch(r"(.*)weight_ih_l0", name))})
    if len(prefixes) != 1:
        found = f"{len(prefixes)} of them" if prefixes else f"only {_listed(state)}"
        raise ImportFailed(f"the state dict must hold one nn.RNN, nn.LSTM or nn.GRU; found {found}")
    prefix = prefixes[0]
    names = [name for name in state if re.match(re.escape(prefix) + r"(weight|bias)_[a-z]+_l\d", name)]
    of_rnn = {name.removeprefix(prefix): state.pop(name) for name in names}
    for name in of_rnn:
        if not re.fullmatch(r"(weight|bias)_[ih]h_l\d+", name):
            what = "a bidirectional layer" if name.endswith("_reverse") else "a layer with a projection"
            raise ImportFailed(f"{prefix}{name} belongs to {what}, which charlm does not have")
    arrays, num_layers, cell, hidden, inputs = _layers(prefix, of_rnn, notes)
    others = {name: array for name, array in state.items() if name != f"{embedding}.weight"}
    head_name = _module(others, head, "head", lambda shape: shape[1] == hidden)
    W_head = state.pop(f"{head_name}.weight")
    vocab_size = W_head.shape[0]
    b_head = state.pop(f"{head_name}.bias", None)
    if b_head is None:
        notes.append("the head has no bias, so it is 0")
        b_head = np.zeros(vocab_size, np.float32)
    if b_head.shape != (vocab_size,):
        raise ImportFailed(f"{head_name}.bias has shape {b_head.shape}; {head_name}.weight asks for {(vocab_size,)}")
    arrays |= {"head.weight": W_head, "head.bias": b_head}
    encoding = "embedding"
    if embedding is None and not any(array.shape == (vocab_size, inputs) for array in state.values()):
        if inputs != vocab_size:
            raise ImportFailed(
                f"no embedding of {vocab_size} symbols and {inputs} features was found, and {inputs} inputs are no one-hot "
                f"vectors of {vocab_size} symbols; the other arrays are {_listed(state) or 'none'}"
            )
        encoding = "one_hot"
    else:
        name = _module(state, embedding, "embedding", lambda shape: shape == (vocab_size, inputs))
        arrays["embedding.weight"] = state.pop(f"{name}.weight")
    if state:
        raise ImportFailed(f"the state dict holds more than an embedding, {prefix or 'rnn.'} and a head: {_listed(state)}")
    config = default_config()
    config.model.cell, config.model.hidden_size, config.model.num_layers = cell, hidden, num_layers
    config.model.encoding = encoding
    if encoding == "embedding":
        config.model.embedding_size = inputs
    return Imported(config, {name: _as_float32(name, array, notes) for name, array in arrays.items()}, vocab_size, notes)


def _layers(prefix: str, of_rnn: Mapping[str, np.ndarray], notes: list[str]) -> tuple[StateDict, int, str, int, int]:
    """Return (arrays, number of layers, cell, H, I) of the recurrent module."""
    num_layers = 1 + max(int(name.rpartition("_l")[2]) for name in of_rnn)
    if num_layers > len(of_rnn):
        raise ImportFailed(f"{prefix}: there is no layer 0 to {num_layers - 1}; found {_listed(of_rnn)}")
    first = of_rnn.get("weight_hh_l0")
    if first is None or first.ndim != 2 or not first.shape[1]:
        raise ImportFailed(f"{prefix}weight_hh_l0 is missing or is no matrix")
    rows, hidden = first.shape
    cells = [name for name, (_, blocks) in TORCH_MODULES.items() if rows == blocks * hidden]
    if not cells:
        raise ImportFailed(
            f"{prefix}weight_hh_l0 has shape {first.shape}; it must have 1, 3 or 4 times as many rows as columns"
        )
    inputs = of_rnn["weight_ih_l0"].shape[-1]
    arrays = {}
    for k in range(num_layers):
        shapes = {"weight_ih": (rows, inputs if k == 0 else hidden), "weight_hh": (rows, hidden)}
        shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        for name, shape in shapes.items():
            array = of_rnn.get(f"{name}_l{k}")
            if array is None and name.startswith("bias"):
                notes.append(f"{prefix}{name}_l{k} is missing, so it is 0")
                array = np.zeros(shape, np.float32)
            if array is None or array.shape != shape:
                found = "nothing" if array is None else array.shape
                raise ImportFailed(f"{prefix}{name}_l{k} should have shape {shape}, found {found}")
            arrays[f"rnn.{name}_l{k}"] = array
    return arrays, num_layers, cells[0], hidden, inputs


def _module(state: Mapping[str, np.ndarray], given: str | None, what: str, fits: Callable[[tuple[int, ...]], bool]) -> str:
    """Return the name of the module with a matrix `weight` that fits."""
    found = {name: array for name, array in state.items() if name.endswith(".weight") and array.ndim == 2}
    if given is not None:
        if f"{given}.weight" not in found:
            raise ImportFailed(f"--{what} is {given!r}, which has no matrix; there are {_listed(found) or 'none'}")
        return given
    # With a bias, a matrix is that of a linear layer.
    if what == "head" and len(named := [name for name in found if f"{name.removesuffix('.weight')}.bias" in state]) == 1:
        found = {named[0]: found[named[0]]}
    names = [name.removesuffix(".weight") for name, array in found.items() if fits(array.shape)]
    if len(names) != 1:
        found = f"found several candidates: {', '.join(names)}" if names else f"found only {_listed(state) or 'nothing'}"
        raise ImportFailed(f"the {what} was not recognised: {found}; name its module with --{what}")
    return names[0]


def _as_float32(name: str, array: np.ndarray, notes: list[str]) -> np.ndarray:
    if array.dtype != np.float32:
        notes.append(f"{name} is {array.dtype} and becomes float32")
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ImportFailed(f"{name} has values that are not finite")
    return array


def _listed(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the names and shapes of some arrays as one line."""
    named = [f"{name} {list(array.shape)}" for name, array in arrays.items()]
    return ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
