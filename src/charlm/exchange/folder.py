"""A model as a folder without Orbax, as the Hugging Face Hub expects one.

It holds model.safetensors, config.json, vocab.json and README.md, the model card.
"""

import json
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from charlm.config import to_json
from charlm.config.rules import from_json
from charlm.exchange.files import new_path, read_metadata, read_safetensors, write_safetensors
from charlm.exchange.torch_names import (
    TORCH_MODULES,
    ImportFailed,
    StateDict,
    check_counterpart,
    from_torch,
    to_torch,
    torch_shapes,
)
from charlm.nn.model import CharLM, num_params
from charlm.runs.flat_state import flatten_state, sha256
from charlm.runs.language_model import LanguageModel
from charlm.runs.load import load_model
from charlm.runs.memory import check_memory
from charlm.runs.workdir import read_result, read_vocab
from charlm.system.arguments import check_arguments
from charlm.system.errors import ConfigError
from charlm.system.files import read_text, write_text
from charlm.system.modules import import_module

WEIGHTS = "model.safetensors"


def write_folder(model: LanguageModel, path: Path) -> None:
    """Write a model into a new folder. On an error, nothing is left behind.

    Raises:
        ConfigError: safetensors is not installed.
        WorkdirError: the folder holds something.
    """
    arrays = _to_arrays(model.config.model, model.params)
    card = model_card(model)
    with new_path(path) as partial:
        partial.mkdir()
        write_safetensors(partial / WEIGHTS, arrays, model.vocab, model.num_steps)
        write_text(partial / "config.json", to_json(model.config))
        write_text(partial / "vocab.json", json.dumps(model.vocab.to_json()) + "\n")
        write_text(partial / "README.md", card)


@check_arguments
def load(path: str | Path, checkpoint: str | int = "best", cell_module: str | None = None) -> LanguageModel:
    """Load a trained model from a workdir, or from a folder that `charlm.export --format safetensors` wrote.

        model = charlm.load("runs/quickstart")

    No code from the folder is executed, and no module that only the folder names is imported.

    Args:
        path: the folder.
        checkpoint: `best`, `latest` or a step. An exported folder has one set of parameters, so it ignores this.
        cell_module: the module to import for a cell from outside the package (`model.cell` is `module:name`).

    Raises:
        WorkdirError: the folder is not a run, there is no such checkpoint, or it is damaged.
        ConfigError: config.json breaks a rule, or the model does not fit into memory.
        ImportFailed: model.safetensors is damaged, or does not fit config.json.
    """
    import_module(cell_module, "cell")
    path = Path(path)
    if (path / WEIGHTS).exists() and not (path / "checkpoints").exists():
        return read_folder(path)
    return load_model(path, checkpoint)


def read_folder(path: Path) -> LanguageModel:
    """Return the model of a folder that `write_folder` wrote. Raises as `load` does."""
    config = from_json(read_text(path / "config.json"), str(path / "config.json")).lock()
    vocab = read_vocab(path / "vocab.json", config, None)
    check_memory(config, vocab.size, training=False)
    arrays = read_safetensors(path / WEIGHTS, _shapes(config.model, vocab.size))
    metadata = read_metadata(path / WEIGHTS)
    if metadata.get("params_sha256") not in (None, sha256(arrays)):
        raise ImportFailed(f"{path / WEIGHTS} is damaged: its sha256 does not match")
    if metadata.get("vocab_sha256") not in (None, vocab.sha256()):
        raise ImportFailed(f"{path / 'vocab.json'} was changed: it is another vocabulary than the one of {WEIGHTS}")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ImportFailed(f"{path / WEIGHTS}: {name} has values that are not finite")
    tied = config.model.tie_weights and has_torch_names(config.model)
    if tied and not np.array_equal(arrays["head.weight"], arrays["embedding.weight"]):
        raise ImportFailed(f"{path}: model.tie_weights is True in config.json, but head.weight is not embedding.weight")
    step = metadata.get("step", "")
    num_steps = int(step) if step.isdecimal() and len(step) <= 10 else 0
    return LanguageModel(config, vocab, jax.device_put(_from_arrays(config.model, arrays)), num_steps)


def has_torch_names(model: ConfigDict) -> bool:
    """Return whether the arrays have PyTorch's names; otherwise they have charlm's, such as `layer_0.W_x`."""
    try:
        check_counterpart(model, "PyTorch")
    except ConfigError:
        return False
    return True


def _to_arrays(model: ConfigDict, params: Any) -> StateDict:
    """Return the parameters of a model under the names of the file."""
    if has_torch_names(model):
        return to_torch(model, params)
    return flatten_state(params)


def _shapes(model: ConfigDict, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of `_to_arrays` for a model over V symbols."""
    if has_torch_names(model):
        return torch_shapes(model, vocab_size)
    params = CharLM.from_config(model, vocab_size).param_shapes()
    return {name: leaf.shape for name, leaf in flatten_dict(params, sep=".").items()}


def _from_arrays(model: ConfigDict, arrays: StateDict) -> Any:
    """Return the parameters of a model from the arrays of the file."""
    return from_torch(model, arrays) if has_torch_names(model) else unflatten_dict(arrays, sep=".")


def model_card(model: LanguageModel) -> str:
    """Return the README.md of an exported model: what it is, its loss, how it was trained and loaded, and a sample."""
    config, result = model.config.model, (read_result(model.path) if model.path else None) or {}
    layers = "layer" if config.num_layers == 1 else "layers"
    text = model.manifest.get("corpus", "unknown")
    names = "charlm"
    if has_torch_names(config):
        names = f"PyTorch's `nn.Embedding`, `nn.{TORCH_MODULES[config.cell][0]}` and `nn.Linear`"
    rows = [
        ("model", f"{config.num_layers} {config.cell.upper()} {layers} of {config.hidden_size} units"),
        ("parameters", f"{num_params(model.params):,}"),
        ("symbols", f"{model.vocab.size} {'bytes' if model.vocab.kind == 'bytes' else 'characters'}"),
        ("text", f"`{text}`, sha256 `{model.manifest.get('corpus_sha256', 'unknown')}`"),
        ("training steps", f"{model.num_steps:,}"),
    ]
    for split in ("val", "test"):
        if (loss := result.get(f"{split}_nats_per_char")) is not None:
            rows.append((f"{'validation' if split == 'val' else split} loss", f"{loss:.4f} nats per character"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    sample = textwrap.indent(model.sample(length=min(300, model.config.sample.length), window=0, random_prompt=None), "    ")
    return f"""---
library_name: charlm
pipeline_tag: text-generation
tags: [charlm, character-level, {config.cell}]
---

# A character-level language model

| | |
| --- | --- |
{table}

`model.safetensors` has the parameters under the names of {names}.
`config.json` has every key of the run, and `vocab.json` the symbols in the order of their ids.

```python
import charlm

model = charlm.load("PATH OF THIS FOLDER")
print(model.sample(length=300, temperature=0.8, seed=1))
```

The run is trained again from `config.json` by `charlm.fit(model.config, "runs/again")`.

A sample:

{sample}
"""
