"""Train a recorded run again and compare the results."""

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import config_dict

from charlm.config.rules import from_json
from charlm.data.corpus import load_corpus
from charlm.runs import checkpoint, workdir
from charlm.runs.loop import train
from charlm.runs.tracking import read_metrics
from charlm.system.errors import RunFailed, WorkdirError
from charlm.system.machine import request_determinism
from charlm.system.progress import say

# What is compared of a line of metrics, and of a result. Times are not.
_LINE, _RESULT = ("nats_per_char", "grad_norm"), ("status", "steps", "best_step", "val_nats_per_char", "test_nats_per_char")


class Record(NamedTuple):
    """What is known of a run that was trained before.

    Attributes:
        name: for people.
        config: its own.
        manifest: what it was trained on and with (`workdir.make_manifest`).
        steps: how many there are to do again.
        result: of `result.json`; {} for a run that is not finished.
        sha256: of the parameters after these steps.
        params: those parameters; None where they were not kept.
        lines: of metrics, by (step, split).
    """

    name: str
    config: config_dict.ConfigDict
    manifest: Mapping[str, Any]
    steps: int
    result: Mapping[str, Any]
    sha256: str | None
    params: checkpoint.Flat | None
    lines: Mapping[tuple[int, str], Mapping[str, Any]]


def of_workdir(path: Path) -> Record:
    """The record that a run left in its folder.

    Raises:
        WorkdirError: the folder is not a run, or one that has neither ended nor saved anything yet.
    """
    run = workdir.load_run(path)
    result = workdir.read_result(path) or {}
    kept = checkpoint.Checkpoints(path)
    steps, params = result.get("steps"), None
    if steps is None or steps in kept.steps():
        flat, meta = kept.find("latest" if steps is None else str(steps), say)
        steps = meta["step"]
        params = {name.removeprefix("params."): each for name, each in flat.items() if name.startswith("params.")}
    sha256 = checkpoint.sha256(params) if params else result.get("params_sha256")
    lines = {(line["step"], line["split"]): line for line in read_metrics(path / "metrics.jsonl")}
    return Record(str(path), run.config, run.manifest, steps, result, sha256, params, lines)


def of_line(file: Path, name: str) -> Record:
    """The record of one run among those of an experiment: a line of JSON with `run`, `config`, `manifest` and `result`.

    Raises:
        WorkdirError: there is no such file or line, or not all of this stands in it.
    """
    found = {}
    for number, text in enumerate(workdir.read_text(file).splitlines(), 1):
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
    """The run of a record, trained anew in an empty folder for as many steps.

    Raises:
        UserError: its corpus is not there, or is another one by now.
        RunFailed: it diverges, and the recorded one did not.
    """
    again = copy.deepcopy(record.config)
    again.train.seconds = None  # That limit depends on the machine; where it ended the run is known.
    try:
        train(again, into, until=record.steps)
    except RunFailed:
        if record.result.get("status") != "diverged":
            raise
    return of_workdir(into)


def compare(old: Record, new: Record) -> dict[str, Any]:
    """By how much two records of a run differ: 0 where they agree to the bit."""
    common = sorted(old.lines.keys() & new.lines.keys())
    worst, where = 0.0, None
    for key in common:
        for name in _LINE:
            a, b = old.lines[key].get(name), new.lines[key].get(name)
            if a is not None and b is not None and a != b and (difference := abs(a - b) / max(abs(a), 1e-30)) > worst:
                worst, where = difference, f"{name} of step {key[0]}, {key[1]}"
    found = {
        "same_params": None if old.sha256 is None else old.sha256 == new.sha256,
        "params_sha256": [old.sha256, new.sha256],
        "lines": len(common),
        "metrics_differ_by": worst,
        "metrics_differ_at": where,
        "result": {name: [old.result[name], new.result.get(name)] for name in _RESULT if _differs(old, new, name)},
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
    return name in old.result and bool(new.result) and old.result[name] != new.result.get(name)


def reproduce(record: Record, into: Path | None = None) -> dict[str, Any]:
    """Train a recorded run again and return how the results differ (`compare`); `machine` lists what differs of the machine.

    Args:
        record: from `of_workdir` or `of_line`.
        into: the folder to train in; None: a temporary one.

    Raises:
        UserError: the corpus is missing or is not the recorded one.
        RunFailed: the run diverges, and the recorded run did not.
    """
    if record.config.train.deterministic:
        request_determinism()
    corpus = load_corpus(record.config.data)
    workdir.check_corpus(record.name, record.manifest, corpus)
    changed = workdir.manifest_differences(record.manifest, workdir.make_manifest(corpus))
    with tempfile.TemporaryDirectory() as folder:
        return {"machine": changed, **compare(record, train_again(record, into or Path(folder)))}
