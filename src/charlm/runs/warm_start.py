"""Start a run from the parameters and the vocabulary of another run (`train.init_from`, `data.vocab_from`).

Symbols are matched by value, never by id. A symbol that the other run does not know gets the rows that the seed of the new run
draws.

Letters: V vocabulary, E embedding, H hidden, G gates times hidden.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from charlm.data.vocab import Vocab, preview
from charlm.nn.cell import INPUTS
from charlm.nn.cells import find_cell
from charlm.runs.flat_state import FlatState, flatten_state, sha256
from charlm.runs.load import load_model
from charlm.runs.run_corpus import base_vocab_key
from charlm.runs.workdir import load_run
from charlm.system.errors import ConfigError, WorkdirError

# The keys of `config.model` that two runs must share. The others do not change the meaning of a parameter.
_SHARED_KEYS = ("cell", "hidden_size", "num_layers", "encoding", "residual", "tie_weights", "learn_initial_state")


class Source(NamedTuple):
    """The parameters that a run starts from.

    Attributes:
        path: the folder of the other run.
        step: the step of its checkpoint, the best one.
        vocab: its vocabulary.
        params: {dotted path: array}.
    """

    path: str
    step: int
    vocab: Vocab
    params: FlatState

    def record(self) -> dict[str, Any]:
        """Return what the manifest of the new run keeps."""
        return {"path": self.path, "step": self.step, "params_sha256": sha256(self.params)}


def start_record(config: ConfigDict, source: Source | None) -> dict[str, Any]:
    """Return what the manifest keeps of the run that a new run starts from; {} if there is none."""
    found: dict[str, Any] = {} if source is None else {"init_from": source.record()}
    key, path = base_vocab_key(config)
    return found if path is None else found | {"base_vocab": load_run(path, key).vocab.to_json()}


def load_source(config: ConfigDict, vocab: Vocab, record: Any = None) -> Source | None:
    """Return the parameters that `train.init_from` names; None if it is not set.

    Args:
        config: the config of the new run.
        vocab: its vocabulary.
        record: `manifest["init_from"]` of the new run if it exists already.

    Raises:
        ConfigError: the other run has a model whose parameters do not fit.
        WorkdirError: the other run cannot be read, or has changed since the new run began.
    """
    path = config.train.init_from
    if path is None:
        return None
    model = load_model(path, name="train.init_from")
    for key in (*_SHARED_KEYS, *(["embedding_size"] if config.model.encoding == "embedding" else [])):
        if model.config.model[key] != config.model[key]:
            raise ConfigError(
                f"model.{key} is {config.model[key]!r}, but train.init_from {path} has {model.config.model[key]!r}; set it to "
                "that"
            )
    if config.model.encoding == "scalar" and model.vocab != vocab:
        raise ConfigError(
            f"model.encoding is 'scalar', so train.init_from {path} must have the same vocabulary; it has another"
        )
    source = Source(str(path), model.num_steps, model.vocab, flatten_state(model.params))
    if isinstance(record, Mapping) and record.get("params_sha256") != source.record()["params_sha256"]:
        raise WorkdirError(
            f"train.init_from {path} is not what the run was started from: its parameters have another sha256 now; restore "
            "it, or choose another --workdir"
        )
    return source


def match_params(source: Source, config: ConfigDict, vocab: Vocab, fresh: FlatState) -> tuple[FlatState, list[str]]:
    """Return the first parameters of a run, and lines that say which symbols are new or left out.

    Args:
        source: the parameters to start from.
        config: the config of the new run.
        vocab: its vocabulary.
        fresh: {dotted path: array}, the parameters that its seed draws. Their rows are used for new symbols.
    """
    known = {symbol: id for id, symbol in enumerate(source.vocab.symbols)}
    shared = [id for id, symbol in enumerate(vocab.symbols) if symbol in known]
    theirs = [known[vocab.symbols[id]] for id in shared]
    axes = {"embedding": 0, "head_W": 1, "head_b": 0}
    if config.model.encoding == "one_hot":  # The inputs of the first layer are symbols.
        axes["layer_0.W_x"] = 0
        for matrix in find_cell(config.model.cell).matrices:
            if INPUTS in (matrix.rows, matrix.columns):
                axes[f"layer_0.{matrix.name}"] = 0 if matrix.rows == INPUTS else 1
    params = {}
    for name, array in fresh.items():
        other = source.params[name]
        if name in axes:
            # The axis of the symbols comes first while the rows are moved.
            array, other = np.moveaxis(array.copy(), axes[name], 0), np.moveaxis(other, axes[name], 0)
            array[shared] = other[theirs]
            params[name] = np.ascontiguousarray(np.moveaxis(array, 0, axes[name]))
        else:
            params[name] = other
    lines = [f"starting from {source.path}, step {source.step}: {len(shared)} of {vocab.size} symbols have known rows"]
    if new := "".join(symbol for symbol in vocab.symbols if symbol not in known):
        lines.append(f"new symbols, with fresh rows: {preview(new)}")
    if gone := "".join(symbol for symbol in source.vocab.symbols if symbol not in vocab.symbols):
        lines.append(f"symbols of {source.path} that are left out: {preview(gone)}")
    return params, lines
