"""The page that holds a model: one HTML file that needs no server, no network and no library.

    text --LanguageModel.states--> activations --packing--> JSON and base64 --+
    parameters --weights--------------------------------------------------------> page.html

The files of the page are in the folder `page`. Those of `engine` compute the model, in a worker; those of `view` and `panels`
show it. They share one scope, in the order of `ENGINE` and `VIEW`. A text, a config or a symbol never becomes markup: all data
are one JSON value without `<`, and the scripts write them as text only. The page's content security policy names the hashes of
its own script and style, so the browser runs no other script and fetches nothing.

Letters: N symbols of the text, H hidden, K symbols back.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from charlm.data.corpus import encode_file
from charlm.data.documents import Documents
from charlm.inference.states import record_states
from charlm.nn.model import num_params
from charlm.runs.language_model import LanguageModel
from charlm.runs.workdir import read_result
from charlm.serving.influence import influence
from charlm.serving.packing import pack, quantise_gate, quantise_signed
from charlm.serving.weights import CELLS, check_supported, describe_model, describe_vocab, page_weights, shown_gates
from charlm.system.errors import ConfigError, CorpusError
from charlm.system.files import write_text
from charlm.system.progress import say

FILES = Path(__file__).parent / "page"
ENGINE = ("numbers", "threefry", "cells", "model", "vocab", "sampler", "reader", "recorder", "worker")
VIEW = (
    "engine/numbers",
    "engine/vocab",
    "view/dom",
    "view/colors",
    "view/engine",
    "view/symbols",
    "view/text",
    "view/activations",
    "view/detectors",
    "view/statistics",
    "view/find",
    "view/charts",
    "panels/write",
    "panels/read",
    "panels/found",
    "panels/inside",
    "panels/matters",
    "main",
)
# How many symbols back the influence reaches, and the steps of its largest value.
REACH, INFLUENCE_STEPS = 50, 31


def write_page(
    model: LanguageModel, output: str | Path, text: str | Path | None = None, length: int = 2000, dtype: str = "float32"
) -> None:
    """Write the page that holds a model.

    Args:
        model: the model.
        output: the HTML file.
        text: the UTF-8 file whose activations the page shows; None: a text of the run (`page_text`).
        length: the number of symbols of the text that the page shows, at most.
        dtype: that of the weights in the page, float32 or float16.

    Raises:
        ConfigError: the page cannot compute the model, `dtype` cannot hold its weights, or `output` is or needs a folder.
        CorpusError: the text cannot be read, is too short, or has a symbol that is not in the vocabulary.
        WorkdirError: there is no `text`, and the corpus of the run has changed.
        OSError: the file cannot be written.
    """
    check_supported(model.config)
    output, text = Path(output), text and Path(text)
    if output.is_dir():  # Building the page takes seconds, so this is checked before.
        raise ConfigError(f"the page cannot be written: {output} is a folder; name a file")
    if not output.parent.is_dir():
        raise ConfigError(f"the page cannot be written: the folder {output.parent} does not exist")
    if text is None:
        shown, source = page_text(model, length)
    else:
        ids_N = encode_file(text, model.vocab, model.config.data.lowercase, Documents.from_config(model.config.data))
        shown, source = model.vocab.decode(ids_N[:length]), text.name
        if len(ids_N) > length:
            say(f"charlm: {text} has {len(ids_N):,} symbols; the page shows the first {length:,} (--length)")
    write_text(output, build_page(model, shown, source, dtype))


def build_page(model: LanguageModel, text: str, source: str, dtype: str = "float32") -> str:
    """Return the HTML of the page that holds a model.

    Args:
        model: the model.
        text: the text whose activations the page shows.
        source: what the text is, in words.
        dtype: that of the weights in the page, float32 or float16.

    Raises:
        ConfigError: the page cannot compute the model, or `dtype` cannot hold its weights.
        CorpusError: the text is empty, or has a symbol that is not in the vocabulary.
    """
    check_supported(model.config)
    ids_N = model.vocab.encode(text)
    if len(ids_N) < 2:
        raise CorpusError(f"{source} has {len(ids_N)} symbols; the page needs at least 2")
    cell = model.config.model.cell
    states = record_states(model.module, gates=bool(shown_gates(cell)))(model.params, ids_N)
    data = {
        "about": _about(model, source, dtype),
        "model": describe_model(model),
        "vocab": describe_vocab(model),
        "sample": _sample_settings(model),
        "text": text,
        "weights": pack(page_weights(model, dtype)),
        "activations": pack(_quantised(states, CELLS[cell])),
        "influence": pack({"influence": _relative(influence(model, ids_N, states, REACH))}),
    }
    return _render(model.path.name if model.path else "charlm", data)


def _about(model: LanguageModel, source: str, dtype: str) -> dict[str, Any]:
    """Return what the page says about its model."""
    config = model.config.model
    result = (read_result(model.path) if model.path else None) or {}
    return {
        "name": model.path.name if model.path else "model",
        "cell": config.cell,
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "symbols": model.vocab.size,
        "parameters": num_params(model.params),
        "steps": model.num_steps,
        "loss": result.get("val_nats_per_char"),
        "source": source,
        "dtype": dtype,
        "lowered": None if config.dtype == "float32" else config.dtype,
    }


def _sample_settings(model: LanguageModel) -> dict[str, Any]:
    """Return the settings of `config.sample` with which the page starts."""
    sample = model.config.sample
    return {name: sample[name] for name in ("prompt", "length", "temperature", "top_k", "top_p", "greedy")}


def _quantised(states: Mapping[str, np.ndarray], logistic: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return activations for the page: uint8 arrays (H, N), and for each signed one its scale (H,) as NAME.scale.

    Args:
        states: from `record_states`.
        logistic: the gates whose values lie between 0 and 1.
    """
    arrays = {}
    for name, values_NH in states.items():
        if name.endswith(tuple(f"gate_{gate}" for gate in logistic)):
            arrays[name] = quantise_gate(values_NH)
        else:
            arrays[name], arrays[f"{name}.scale"] = quantise_signed(values_NH)
    return arrays


def _relative(influence_NK: np.ndarray) -> np.ndarray:
    """Return the square root of the influence, in steps of its largest value on the same symbol, uint8.

    The influence falls quickly with the distance. The square root makes more of it visible.
    """
    largest_N1 = influence_NK.max(axis=1, keepdims=True)
    return np.rint(np.sqrt(influence_NK / np.where(largest_N1 > 0, largest_N1, 1)) * INFLUENCE_STEPS).astype(np.uint8)


def _render(title: str, data: Mapping[str, Any]) -> str:
    """Return the HTML of the page with these data."""
    style, engine = _read("style.css"), "\n".join(_read(f"engine/{name}.js") for name in ENGINE)
    view = '"use strict";\n(() => {\n' + "\n".join(_read(f"{name}.js") for name in VIEW) + "})()\n"
    parts = {
        "title": html.escape(title),
        "style": style,
        "engine": f'"use strict";\n{engine}',
        "view": view,
        "data": json.dumps(data).replace("<", "\\u003c"),
        "policy": f"default-src 'none'; script-src {_hash(view)}; style-src {_hash(style)}; worker-src blob:",
    }
    # One pass, so that a part is never searched for the names of other parts.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def _read(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    """Return the hash of an inline script or style, as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def page_text(model: LanguageModel, length: int) -> tuple[str, str]:
    """Return a text for the page and what it is: the beginning of the validation text of the run, or else of its training text.

    Args:
        model: the model.
        length: the number of symbols, at most.

    Raises:
        WorkdirError: the corpus of the run has changed.
        CorpusError: the corpus cannot be read.
    """
    corpus = model.corpus()
    split = "val" if len(corpus.split("val")) >= 2 else "train"
    name = "validation" if split == "val" else "training"
    return model.vocab.decode(corpus.split(split)[:length]), f"the beginning of the {name} text"
