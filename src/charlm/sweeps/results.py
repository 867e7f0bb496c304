"""The records of a sweep: results.jsonl, summary.csv, sweep.png."""

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from charlm.config import flatten
from charlm.config.rules import differing_keys, parse_json
from charlm.runs.tracking import read_metrics
from charlm.runs.workdir import read_result
from charlm.sweeps.plan import Run
from charlm.system.errors import UserError, WorkdirError
from charlm.system.files import is_number, read_json, read_text, write_text
from charlm.system.progress import say

# The keys of a result that a row of summary.csv shows.
_RESULT_KEYS = ("val_nats_per_char", "best_step", "steps", "train_seconds", "params_sha256", "status")
_NUMBERS_OF_A_RESULT = _RESULT_KEYS[:4]
_RECORD_TYPES = {
    "run": (str,),
    "overrides": (dict,),
    "status": (str,),
    "config": (dict, type(None)),
    "manifest": (dict, type(None)),
    "result": (dict, type(None)),
    "reason": (str, type(None)),
}


def is_finished(path: Path, config: ConfigDict) -> bool:
    """Return whether a folder holds a run of this config that is completed, or was ended by a limit or by a scheduler."""
    try:
        result = read_result(path)
        if result is None or result["status"] not in ("completed", "stopped_early"):
            return False
        recorded, _ = parse_json(read_text(path / "config.json"), str(path))
    except UserError:
        return False
    return not differing_keys(recorded, config)


def write_records(runs: Sequence[Run], workdir: Path, failed: Mapping[str, str]) -> list[dict[str, Any]]:
    """Write the records of a sweep, whose runs may be unfinished; return the rows of the table.

    Args:
        runs: all runs, in the order of the rows.
        workdir: the sweep's folder, in which each run has its own folder.
        failed: name -> reason of the runs that failed in this start.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    records = [_record(run, workdir / run.name, failed.get(run.name)) for run in runs]
    write_text(workdir / "results.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    keys = swept_keys(records)
    rows = [row_of(record, keys) for record in records]
    table = io.StringIO()
    writer = csv.DictWriter(table, [*keys, *_RESULT_KEYS, "run", "reason"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(workdir / "summary.csv", table.getvalue())
    metrics = {run.name: metrics_of_run(workdir / run.name) for run in runs}
    draw_sweep(records, keys, metrics, workdir / "sweep.png")
    return rows


def metrics_of_run(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl; [], with a message, if the file cannot be read."""
    try:
        return read_metrics(path / "metrics.jsonl")
    except WorkdirError as error:
        say(str(error))
        return []


def _record(run: Run, path: Path, reason: str | None) -> dict[str, Any]:
    """Return the line of results.jsonl of a run, from which `charlm.reproduce` can train the run again."""
    record = {"run": run.name, "overrides": run.overrides, "config": None, "manifest": None}
    record |= {"result": None, "status": "not_started"}
    try:  # A damaged run is a row of the table. It does not hide the others.
        record["result"] = read_result(path)
        for name in ("config", "manifest"):
            if (path / f"{name}.json").exists():
                record[name] = read_json(path / f"{name}.json")
        _check_record(record | {"reason": None}, str(path), path.parent)
    except WorkdirError as error:
        record |= {"result": None, "config": None, "manifest": None}
        reason = reason or str(error)
    record["reason"] = reason
    if record["result"]:
        record["status"] = record["result"]["status"]
    elif record["config"]:
        record["status"] = "unfinished"
    if reason and record["status"] != "diverged":
        record["status"] = "failed"
    return record


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a sweep's results.jsonl.

    Raises:
        WorkdirError: the file cannot be read, or a line is not the record of a run. The message names the line and the field.
    """
    records = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise WorkdirError(f"{where} is not JSON: {' '.join(str(error).split())[:200]}") from None
            records.append(_check_record(record, where, path.parent))
    if not records:
        raise WorkdirError(f"{path} holds no runs of a sweep")
    return records


def _is_file_name(name: str) -> bool:
    """Return whether a file system can have a folder of this name: at most 255 bytes, without a separator and without NUL."""
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:  # Half of a surrogate pair, which JSON can hold.
        return False
    return 0 < size <= 255 and name not in (".", "..") and "/" not in name and "\0" not in name


def _check_record(record: Any, where: str, folder: Path) -> dict[str, Any]:
    """Return a line of results.jsonl, with None for the fields that it lacks. Raises WorkdirError if a field is wrong."""
    if not isinstance(record, dict):
        raise WorkdirError(f"{where} is not a JSON object")
    record = {"result": None, "config": None, "manifest": None, "reason": None, "status": "unknown"} | record
    for key, kinds in _RECORD_TYPES.items():
        if not isinstance(record.get(key), kinds):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise WorkdirError(f"{where}: {key} is {json.dumps(record.get(key))[:100]}; it must be of type {names}")
    # A run's folder lies in the folder of the sweep. A name such as `../secret` would show the files of another folder.
    if not _is_file_name(record["run"]):
        raise WorkdirError(f"{where}: run is {record['run'][:100]!r}; it must be the name of a folder in {folder}")
    for key in record["result"] or {}:
        value = record["result"][key]
        if key in _NUMBERS_OF_A_RESULT and value is not None and not is_number(value):
            raise WorkdirError(f"{where}: result.{key} is {json.dumps(value)[:100]}; it must be a number")
        if key in ("status", "params_sha256") and not isinstance(value, str | None):
            raise WorkdirError(f"{where}: result.{key} is {json.dumps(value)[:100]}; it must be a string")
    for key, value in record["overrides"].items():
        if isinstance(value, dict):
            raise WorkdirError(f"{where}: the override of {key[:100]!r} is not a value of a config key")
    try:
        dict(flatten(record["config"] or {}))
    except RecursionError:
        raise WorkdirError(f"{where}: config is nested too deep") from None
    return record


def swept_keys(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that at least one of the runs changes, in the order of their first appearance."""
    return list(dict.fromkeys(key for record in records for key in record["overrides"]))


def row_of(record: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return the row of a run in the table: the values of the swept keys, the result, the name, and the reason of a failure."""
    result, row = record["result"] or {}, {}
    for key in keys:
        value = record["overrides"].get(key, dict(flatten(record["config"])).get(key) if record["config"] else None)
        plain = not isinstance(value, list | tuple) and (not isinstance(value, int) or abs(value) < 1 << 63)
        row[key] = value if plain else json.dumps(value)
    row |= {key: result.get(key) for key in _RESULT_KEYS}
    return row | {"status": record["status"], "run": record["run"], "reason": record["reason"]}


def draw_sweep(
    records: Sequence[Mapping[str, Any]], keys: Sequence[str], metrics: Mapping[str, list[dict[str, Any]]], path: Path
) -> None:
    """Draw a sweep as a PNG: the validation losses over characters, and for each swept key the best losses over its values.

    Args:
        records: the lines of results.jsonl.
        keys: the swept keys. At most seven of those with different values get a panel.
        metrics: name of a run -> the lines of its metrics.jsonl.
        path: the file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row_of(record, keys) for record in records]
    scored = [row for row in rows if row["val_nats_per_char"] is not None]
    panels = [key for key in keys if len({str(row[key]) for row in rows}) > 1][:7]
    columns = min(4, 1 + len(panels))
    lines = math.ceil((1 + len(panels)) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.0 * lines), dpi=130, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    best_first = sorted(scored, key=lambda row: row["val_nats_per_char"])
    ranks = {row["run"]: k / max(len(best_first) - 1, 1) for k, row in enumerate(best_first)}
    curves = axes[0]
    for row in reversed(best_first):  # The curves of the best runs are drawn last, above the others.
        points = [(line["chars"] / 1e6, line["nats_per_char"]) for line in metrics[row["run"]] if line["split"] == "val"]
        curves.plot(*zip(*points), color=_color(ranks[row["run"]]), linewidth=1.2)
    curves.set_xlabel("million characters")
    curves.set_ylabel("validation, nats per character")
    for axis, key in zip(axes[1:], panels):
        _draw_effect(axis, scored, key, ranks)
    for axis in axes[1 + len(panels) :]:
        axis.axis("off")
    for axis in axes[: 1 + len(panels)]:
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


def _draw_effect(axis: Any, scored: Sequence[Mapping[str, Any]], key: str, ranks: Mapping[str, float]) -> None:
    """Draw a point for each run, and the median of the runs with the same value of a key."""
    values = sort_distinct(row[key] for row in scored)
    numeric = are_numbers(values)
    position = {value: value if numeric else k for k, value in enumerate(values)}
    for row in scored:
        axis.plot(position[row[key]], row["val_nats_per_char"], "o", color=_color(ranks[row["run"]]), markersize=4)
    medians = [statistics.median(row["val_nats_per_char"] for row in scored if row[key] == value) for value in values]
    if len(values) <= 12:
        style = "-" if numeric else "_"
        axis.plot([position[value] for value in values], medians, style, color="#c2410c", linewidth=1.4, markersize=22)
    if numeric and values and values[0] > 0 and values[-1] / values[0] > 20:
        axis.set_xscale("log")
    elif len(values) <= 12:
        # The labels of values that are close to each other would overlap, so some of them are left out.
        distance, labelled = (0.12 * (values[-1] - values[0]) if numeric and values else 0), []
        for value in values:
            if not labelled or position[value] - position[labelled[-1]] >= distance:
                labelled.append(value)
        axis.set_xticks([position[value] for value in labelled], [str(value) for value in labelled])
    axis.set_xlabel(key)


def are_numbers(values: Iterable[Any]) -> bool:
    """Return whether all values are numbers. Booleans are not numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def sort_distinct(values: Iterable[Any]) -> list[Any]:
    """Return the distinct values in ascending order: by size if all are numbers, else as strings."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct) if are_numbers(distinct) else sorted(distinct, key=str)


def _color(rank: float) -> tuple[float, ...]:
    """Return the colour of a run: dark blue for rank 0, the best, to light grey for rank 1."""
    dark, light = (0.07, 0.25, 0.45), (0.80, 0.84, 0.88)
    return tuple(a + rank * (b - a) for a, b in zip(dark, light))
