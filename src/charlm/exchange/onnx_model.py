"""A model as an ONNX graph of ONNX's own operators: RNN, LSTM or GRU, with the states as inputs and outputs.

ONNX orders the gates of its LSTM i, o, f, c and those of its GRU z, r, h. With `linear_before_reset` its GRU resets after the
product, as charlm's does. ONNX's layouts: X (T, B, I), W (1, G, I), R (1, G, H), B (1, 2G), states (1, B, H).

Letters: B batch, T time, H hidden, V vocabulary, E embedding, I input features, G gates times hidden.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from charlm.exchange.files import new_path, require
from charlm.exchange.torch_names import TORCH_MODULES, check_counterpart, to_torch
from charlm.nn.cells import find_cell
from charlm.runs.language_model import LanguageModel

# ONNX's order of the gates, in terms of PyTorch's.
_GATES = {"rnn": (0,), "lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}
_OPSET = 17


def write_onnx(model: LanguageModel, path: Path) -> None:
    """Write a model as an ONNX file.

    Inputs: `ids` (T, B), int64, and for each layer k the state `h_k` (1, B, H), for an LSTM `c_k` too, float32. Outputs:
    `logits` (T, B, V) and the states after the last symbol, `h_k_out` and `c_k_out`. T and B are free. The metadata of the
    file hold the vocabulary as JSON under the key `vocab`. For a model of documents they hold the id of the boundary under
    `boundary`, where the graph does not reset the states.

    Raises:
        ConfigError: a part of the model has no counterpart in ONNX, or onnx is not installed.
    """
    onnx = require("onnx", "export")
    check_counterpart(model.config.model, "ONNX")
    proto = _make_model(onnx, model)
    proto.metadata_props.add(key="vocab", value=json.dumps(model.vocab.to_json()))
    if model.boundary is not None:
        proto.metadata_props.add(key="boundary", value=str(model.boundary))
    onnx.checker.check_model(proto, full_check=True)
    with new_path(path) as partial:
        partial.write_bytes(proto.SerializeToString())


def _make_model(onnx: Any, model: LanguageModel) -> Any:
    config, arrays = model.config.model, to_torch(model.config.model, model.params)
    make, kind = onnx.helper, onnx.TensorProto
    hidden, vocab_size, carries = config.hidden_size, model.vocab.size, find_cell(config.cell).carries
    table_VE = arrays.get("embedding.weight", np.eye(vocab_size, dtype=np.float32))  # One-hot vectors are a table too.
    weights = {"table": table_VE, "head_W": np.ascontiguousarray(arrays["head.weight"].T), "head_b": arrays["head.bias"]}
    weights["direction"] = np.array([1], np.int64)
    inputs = [make.make_tensor_value_info("ids", kind.INT64, ["T", "B"])]
    outputs = [make.make_tensor_value_info("logits", kind.FLOAT, ["T", "B", vocab_size])]
    nodes = [make.make_node("Gather", ["table", "ids"], ["x_0"], axis=0)]
    for k in range(config.num_layers):
        W_ih, W_hh, first, second = (arrays[f"rnn.{name}_l{k}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        weights[f"W_{k}"], weights[f"R_{k}"] = _reorder(config.cell, W_ih)[None], _reorder(config.cell, W_hh)[None]
        weights[f"B_{k}"] = np.concatenate([_reorder(config.cell, first), _reorder(config.cell, second)])[None]
        states = [f"{name}_{k}" for name in carries]
        inputs += [make.make_tensor_value_info(name, kind.FLOAT, [1, "B", hidden]) for name in states]
        outputs += [make.make_tensor_value_info(f"{name}_out", kind.FLOAT, [1, "B", hidden]) for name in states]
        options = {"linear_before_reset": 1} if config.cell == "gru" else {}
        nodes += [
            make.make_node(
                TORCH_MODULES[config.cell][0],
                [f"x_{k}", f"W_{k}", f"R_{k}", f"B_{k}", "", *states],
                [f"y_{k}", *(f"{name}_out" for name in states)],
                hidden_size=hidden,
                **options,
            ),
            make.make_node("Squeeze", [f"y_{k}", "direction"], [f"x_{k + 1}"]),  # (T, 1, B, H) -> (T, B, H)
        ]
    nodes += [
        make.make_node("MatMul", [f"x_{config.num_layers}", "head_W"], ["product"]),
        make.make_node("Add", ["product", "head_b"], ["logits"]),
    ]
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = make.make_graph(nodes, "charlm", inputs, outputs, constants)
    return make.make_model(graph, opset_imports=[make.make_opsetid("", _OPSET)], ir_version=8, producer_name="charlm")


def _reorder(cell: str, array: np.ndarray) -> np.ndarray:
    """Return an array whose rows are blocks of gates in PyTorch's order, with the blocks in ONNX's order."""
    blocks = np.split(array, TORCH_MODULES[cell][1])
    return np.concatenate([blocks[gate] for gate in _GATES[cell]])
