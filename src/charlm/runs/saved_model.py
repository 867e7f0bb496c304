"""Write the parameters of a model into a new workdir."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from charlm.config import to_json
from charlm.data.vocab import Vocab
from charlm.nn.model import CharLM
from charlm.runs import workdir
from charlm.runs.checkpoint import Checkpoints
from charlm.runs.flat_state import flatten_state, sha256
from charlm.runs.outcome import Progress
from charlm.system.errors import WorkdirError
from charlm.system.files import write_text
from charlm.training.state import Program, compute_first_state, init_state


def write_model(
    path: Path,
    config: ConfigDict,
    vocab: Vocab,
    params: Any,
    manifest: Mapping[str, Any],
    origin: Mapping[str, Any],
    source: Path | None = None,
) -> None:
    """Write a model into a new workdir, as a run that has not taken a step. On an error, nothing is left behind.

    Args:
        path: the folder; it must not exist, or be empty.
        config: its config.
        vocab: its vocabulary, of V symbols.
        params: its parameters, of the shapes that the config and V ask for. They become float32.
        manifest: the manifest of the run that trained it; {} if none is known.
        origin: where the parameters come from. The manifest keeps it with the sha256 of the parameters.
        source: the folder of the run that trained it, whose text.txt is copied if it has one.

    Raises:
        WorkdirError: the folder holds something, or the parameters do not fit the config or are not finite.
    """
    params = _checked(config, vocab, params)
    is_new = not path.exists()
    with workdir.lock(path):
        if (path / "config.json").exists():
            raise WorkdirError(f"{path} holds a run already; choose another folder")
        with contextlib.ExitStack() as undo:
            for name in ("checkpoints", "vocab.json", "manifest.json", "config.json"):
                undo.callback(_remove, path / name)
            if is_new:
                undo.callback(_remove, path)
            _write_checkpoint(path, config, vocab, params)
            if source is not None and (source / workdir.TEXT_FILE).is_file() and not (path / workdir.TEXT_FILE).exists():
                shutil.copyfile(source / workdir.TEXT_FILE, path / workdir.TEXT_FILE)
            manifest = {**manifest, "origin": {**origin, "params_sha256": sha256(flatten_state(params))}}
            manifest["vocab_sha256"] = vocab.sha256()
            write_text(path / "vocab.json", json.dumps(vocab.to_json()) + "\n")
            write_text(path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            write_text(path / "config.json", to_json(config))
            undo.pop_all()


def _checked(config: ConfigDict, vocab: Vocab, params: Any) -> Any:
    """Return the parameters as float32 arrays. Raises WorkdirError if they do not fit the config or are not finite."""
    like = CharLM.from_config(config.model, vocab.size).param_shapes()
    if jax.tree.structure(like) != jax.tree.structure(params):
        raise WorkdirError("the parameters have other names than those of the config's model")
    arrays = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    for (path, expected), found in zip(jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(arrays)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if expected.shape != found.shape:
            raise WorkdirError(f"the parameter {name} has shape {found.shape}; the config asks for {expected.shape}")
        if not np.isfinite(found).all():
            raise WorkdirError(f"the parameter {name} has values that are not finite")
    return arrays


def _write_checkpoint(path: Path, config: ConfigDict, vocab: Vocab, params: Any) -> None:
    """Write a checkpoint of step 0 with these parameters and a new state of the optimizer."""
    # The length of the run changes no shape of the state.
    program = Program(config, vocab.size, 1000, carries_state=config.batching.layout == "stream")
    state = compute_first_state(init_state, program, {"seed": np.uint32(config.seed)})
    carry = program.bind({})[1].initial_carry(params, config.batching.batch_size) if program.carries_state else ()
    state = state.started_from(params, carry)
    checkpoints = Checkpoints(path)
    try:
        checkpoints.save(0, state, dataclasses.asdict(Progress()), None)
        checkpoints.wait()
    finally:
        checkpoints.close()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
