"""Train a recorded run again, and say whether it comes out the same.

    python -m charlm.reproduce --workdir DIR [--into DIR] [--json]
    python -m charlm.reproduce --result FILE --run ID [--into DIR] [--json]

A run that is not finished is reproduced up to its last checkpoint. Exit codes: 0 it agrees to the bit; 1 it does not.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import config_dict

from charlm import checkpoint, cli, train, workdir
from charlm.corpus import load_corpus
from charlm.errors import ConfigError, RunFailed, WorkdirError
from charlm.machine import ask_for_determinism
from charlm.progress import say
from charlm.rules import from_json
from charlm.tracking import read_metrics

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
        train.train(again, into, until=record.steps)
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


def as_lines(record: Record, changed: Sequence[str], found: Mapping[str, Any]) -> str:
    """What was found, for people."""
    lines = [f"{record.name}: {record.steps} steps, trained again"]
    lines.append(f"  corpus      the same, sha256 {str(record.manifest.get('corpus_sha256'))[:16]}...")
    lines.append(f"  machine     {'; '.join(changed) or 'the same versions, device and cores'}")
    if found["same_params"]:
        lines.append(f"  parameters  the same to the bit, sha256 {found['params_sha256'][0]}")
    elif found["same_params"] is None:
        lines.append("  parameters  not on record")
    else:
        by = (
            f"; by at most {found['params_differ_by']:.1e} of {found['params_differ_at']}"
            if "params_differ_by" in found
            else ""
        )
        old, new = found["params_sha256"]
        lines.append(f"  parameters  differ: sha256 {old[:16]}... then, {new[:16]}... now{by}")
    if found["metrics_differ_by"]:
        lines.append(f"  metrics     differ by at most {found['metrics_differ_by']:.1e} ({found['metrics_differ_at']})")
    elif found["lines"]:
        lines.append(f"  metrics     the same to the bit, {found['lines']} lines")
    for name, (old, new) in found["result"].items():
        lines.append(f"  {name:18}  {old} then, {new} now")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """The command."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the folder of the run", flag_values=values)
    flags.DEFINE_string("result", None, "an experiment's results.jsonl", flag_values=values)
    flags.DEFINE_string("run", None, "which of its runs", flag_values=values)
    flags.DEFINE_string("into", None, "where to train it again; default: a folder that is deleted", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
    cli.parse(values, argv, __doc__)
    if (values.workdir is None) == (values.result is None):
        raise ConfigError("give either --workdir DIR, or --result FILE and --run ID")
    if values.result is not None:
        record = of_line(Path(values.result), cli.required(values, "run"))
    else:
        record = of_workdir(Path(values.workdir))
    if record.config.train.deterministic:
        ask_for_determinism()
    corpus = load_corpus(record.config.data)
    workdir.check_corpus(record.name, record.manifest, corpus)
    changed = workdir.differing(record.manifest, workdir.make_manifest(corpus))
    with tempfile.TemporaryDirectory() as folder:
        found = compare(record, train_again(record, Path(values.into or folder)))
    print(json.dumps({"machine": changed, **found}) if values.json else as_lines(record, changed, found))
    if not found["same"]:
        raise RunFailed(f"{record.name} was not reproduced to the bit")


if __name__ == "__main__":
    sys.exit(cli.run(main))
