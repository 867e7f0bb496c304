"""Train a recorded run again and compare the results."""

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from charlm.config.rules import from_json
from charlm.runs import flat_state, warm_start, workdir
from charlm.runs.checkpoint import Checkpoints
from charlm.runs.devices import request_devices
from charlm.runs.flat_state import FlatState, state_shapes
from charlm.runs.loop import train
from charlm.runs.run_corpus import RUN_TEXT, load_run_corpus
from charlm.runs.tracking import read_metrics
from charlm.system.errors import RunFailed, WorkdirError
from charlm.system.files import read_text
from charlm.system.progress import say

# The keys of a line of metrics and of a result that are compared. Times are not.
_LINE_KEYS = ("nats_per_char", "grad_norm")
_RESULT_KEYS = ("status", "steps", "best_step", "val_nats_per_char", "test_nats_per_char")


class Record(NamedTuple):
    """The record of a run that was trained before.

    Attributes:
        name: the name of the run, for messages.
        config: the config of the run.
        manifest: the manifest of the run (`workdir.make_manifest`).
        steps: the number of steps to repeat.
        result: the content of `result.json`; {} if the run is not finished.
        sha256: the sha256 of the parameters after these steps; None if it is unknown.
        params: these parameters, without the prefix `params.`; None if no checkpoint holds them.
        lines: (step, split) -> line of metrics.jsonl.
    """

    name: str
    config: ConfigDict
    manifest: Mapping[str, Any]
    steps: int
    result: Mapping[str, Any]
    sha256: str | None
    params: FlatState | None
    lines: Mapping[tuple[int, str], Mapping[str, Any]]


def record_from_workdir(path: Path) -> Record:
    """Return the record of a run from its folder.

    Raises:
        WorkdirError: the folder is not a run, or the run has neither ended nor saved a checkpoint.
    """
    run = workdir.load_run(path)
    if origin := run.manifest.get("origin"):
        source = origin.get("from") if isinstance(origin, dict) else None
        raise WorkdirError(
            f"{path} began with the parameters of {source or 'another model'}, not with those that its seed draws, so it "
            "cannot be trained again from its config"
        )
    result = workdir.read_result(path) or {}
    checkpoints = Checkpoints(path, lambda: state_shapes(run.config, run.vocab.size))
    steps, params = result.get("steps"), None
    request_devices(run.config)  # Before the restored checkpoint makes JAX initialise its devices.
    if steps is None or steps in checkpoints.steps():
        flat, meta = checkpoints.find("latest" if steps is None else str(steps), say)
        steps = meta["step"]
        params = {name.removeprefix("params."): each for name, each in flat.items() if name.startswith("params.")}
    sha256 = flat_state.sha256(params) if params else result.get("params_sha256")
    lines = {(line["step"], line["split"]): line for line in read_metrics(path / "metrics.jsonl")}
    return Record(str(path), run.config, run.manifest, steps, result, sha256, params, lines)


def record_from_results(file: Path, name: str) -> Record:
    """Return the record of one run from the results.jsonl of an experiment or of a sweep.

    Args:
        file: one JSON object a line. That of a run has the keys `run`, `config`, `manifest` and `result`.
        name: the value of `run`.

    Raises:
        WorkdirError: the file or the run does not exist, or a key is missing.
        ConfigError: the config is not valid.
    """
    found = {}
    for number, text in enumerate(read_text(file).splitlines(), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            raise WorkdirError(f"{file}, line {number} is not JSON") from None
        if isinstance(line, dict) and isinstance(line.get("run"), str):
            found[line["run"]] = line
    if name not in found:
        raise WorkdirError(f"{file} has no run {name!r}; it has {', '.join(sorted(found)) or 'none that can be reproduced'}")
    line = found[name]
    for key in ("config", "manifest", "result"):
        if not isinstance(line.get(key), dict):
            raise WorkdirError(f"{file}: run {name!r} has no {key}, so it cannot be reproduced")
    result = line["result"]
    if not isinstance(result.get("steps"), int):
        raise WorkdirError(f"{file}: the result of run {name!r} has no steps, so it cannot be reproduced")
    run_config = from_json(json.dumps(line["config"]), f"{file}: run {name!r}").lock()
    return Record(name, run_config, line["manifest"], result["steps"], result, result.get("params_sha256"), None, {})


def train_again(record: Record, into: Path) -> Record:
    """Train the run of a record again, for as many steps, and return the new record.

    Args:
        record: the record of the run.
        into: the folder to train in.

    Raises:
        UserError: the corpus is missing or is not the recorded one, or the folder holds a finished run, or other files.
        RunFailed: the run diverges, and the recorded run did not.
    """
    ended = workdir.read_result(into)
    itself = (into / "config.json").exists() and into.resolve() == Path(record.name).resolve()
    if itself or (ended and ended["status"] != "failed"):
        raise WorkdirError(f"--into {into} holds a run already, so nothing would be trained again; name a new folder")
    again = copy.deepcopy(record.config)
    again.train.seconds = None  # This limit depends on the machine. The record says where it ended the run.
    try:
        text = read_text(Path(record.name) / workdir.TEXT_FILE) if again.data.path == RUN_TEXT else None
        train(again, into, until=record.steps, text=text)
    except RunFailed:
        if record.result.get("status") != "diverged":
            raise
    return record_from_workdir(into)


def compare(old: Record, new: Record) -> dict[str, Any]:
    """Return how two records of a run differ, as a dict of JSON values.

    Returns:
        same: whether everything that was compared is equal to the bit.
        same_params: whether the parameters are; None if their sha256 is not on record.
        params_sha256: the two sha256.
        params_differ_at, params_differ_by: the parameter that differs most, and its largest difference relative to its largest
            value. Present if the parameters differ and those of the old record are known.
        lines: the number of lines of metrics that were compared.
        metrics_differ_at, metrics_differ_by: the metric that differs most, and its relative difference; None and 0 if equal.
        result: key -> (old value, new value), for the keys of the result that differ.
    """
    common = sorted(old.lines.keys() & new.lines.keys())
    worst, where = 0.0, None
    for key in common:
        for name in _LINE_KEYS:
            a, b = old.lines[key].get(name), new.lines[key].get(name)
            if a is not None and b is not None and a != b and (difference := abs(a - b) / max(abs(a), 1e-30)) > worst:
                worst, where = difference, f"{name} of step {key[0]}, {key[1]}"
    found = {
        "same_params": None if old.sha256 is None else old.sha256 == new.sha256,
        "params_sha256": [old.sha256, new.sha256],
        "lines": len(common),
        "metrics_differ_by": worst,
        "metrics_differ_at": where,
        "result": {name: [old.result[name], new.result.get(name)] for name in _RESULT_KEYS if _differs(old, new, name)},
    }
    if old.params is not None and not found["same_params"]:
        errors = {
            name: float(np.abs(value - new.params[name]).max() / max(np.abs(value).max(), 1e-30))
            for name, value in old.params.items()
        }
        found["params_differ_at"] = max(errors, key=errors.get)
        found["params_differ_by"] = errors[found["params_differ_at"]]
    found["same"] = found["same_params"] is not False and not worst and not found["result"]
    return found


def _differs(old: Record, new: Record, name: str) -> bool:
    """Return whether a key of the results differs. Unfinished runs have no results to compare."""
    return name in old.result and bool(new.result) and old.result[name] != new.result.get(name)


def reproduce(record: Record, into: Path | None = None) -> dict[str, Any]:
    """Train a recorded run again and return how the results differ.

    The result is that of `compare`, and under `machine` the differences between the machines and the package versions.

    Args:
        record: from `record_from_workdir` or `record_from_results`.
        into: the folder to train in; None: a temporary folder.

    Raises:
        UserError: the corpus is missing or is not the recorded one.
        RunFailed: the run diverges, and the recorded run did not.
    """
    request_devices(record.config)
    corpus = load_run_corpus(record.config, Path(record.name), record.manifest)
    warm_start.load_source(record.config, corpus.vocab, record.manifest.get("init_from"))  # It must not have changed.
    workdir.check_corpus(record.name, record.manifest, corpus)
    changed = workdir.manifest_differences(record.manifest, workdir.make_manifest(corpus))
    with tempfile.TemporaryDirectory() as folder:
        return {"machine": changed, **compare(record, train_again(record, into or Path(folder)))}
