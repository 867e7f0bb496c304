"""What a sweep leaves on record: results.jsonl, summary.csv, sweep.png."""

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from charlm.config import flatten
from charlm.config.rules import differing_keys, parse_json
from charlm.runs.tracking import read_metrics
from charlm.runs.workdir import read_result, read_text, write_text
from charlm.system.errors import UserError, WorkdirError

_MEASURED = ("val_nats_per_char", "best_step", "steps", "train_seconds", "params_sha256", "status")


def is_finished(path: Path, config: config_dict.ConfigDict) -> bool:
    """Whether a folder holds this run, completed, or ended by a limit of its own."""
    result = read_result(path)
    if result is None or result["status"] not in ("completed", "stopped_early"):
        return False
    try:
        there, _ = parse_json(read_text(path / "config.json"), str(path))
    except UserError:
        return False
    return not differing_keys(there, config)


def write(runs: Sequence[Any], workdir: Path, failed: Mapping[str, str]) -> list[dict[str, Any]]:
    """Write the records of a sweep's runs (`sweep.Run`), as far as they have come; returns their rows.

    Args:
        runs: in the order of the rows.
        workdir: of the sweep; the runs' are in it.
        failed: name -> why, of those that failed just now.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    records = [_record(run, workdir / run.name, failed.get(run.name)) for run in runs]
    write_text(workdir / "results.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    keys = swept_keys(records)
    rows = [row_of(record, keys) for record in records]
    table = io.StringIO()
    writer = csv.DictWriter(table, [*keys, *_MEASURED, "run", "reason"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(workdir / "summary.csv", table.getvalue())
    draw(records, keys, {run.name: read_metrics(workdir / run.name / "metrics.jsonl") for run in runs}, workdir / "sweep.png")
    return rows


def _record(run: Any, path: Path, reason: str | None) -> dict[str, Any]:
    """All that there is to know of a run, for `charlm.reproduce` too."""
    record = {"run": run.name, "overrides": run.overrides, "config": None, "manifest": None}
    record |= {"result": read_result(path), "status": "not_started", "reason": reason}
    for name in ("config", "manifest"):
        if (path / f"{name}.json").is_file():
            record[name] = json.loads((path / f"{name}.json").read_text(encoding="utf-8"))
    if record["result"]:
        record["status"] = record["result"]["status"]
    elif record["config"]:
        record["status"] = "unfinished"
    if reason and record["status"] != "diverged":
        record["status"] = "failed"
    return record


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a results.jsonl. Raises WorkdirError if it cannot be read."""
    try:
        records = [json.loads(line) for line in read_text(path).splitlines()]
    except (ValueError, RecursionError) as error:
        raise WorkdirError(f"{path} cannot be read: {error}") from None
    if not records or not all(isinstance(record, dict) and {"run", "overrides"} <= record.keys() for record in records):
        raise WorkdirError(f"{path} holds no runs of a sweep")
    return records


def swept_keys(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that any of the runs changes."""
    return list(dict.fromkeys(key for record in records for key in record["overrides"]))


def row_of(record: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """What the table shows of a run: the swept keys' values, its result, its name, and why it failed."""
    result, row = record["result"] or {}, {}
    for key in keys:
        value = record["overrides"].get(key, dict(flatten(record["config"])).get(key) if record["config"] else None)
        row[key] = json.dumps(value) if isinstance(value, list | tuple) else value
    row |= {key: result.get(key) for key in _MEASURED}
    return row | {"status": record["status"], "run": record["run"], "reason": record["reason"]}


def draw(records: Sequence[Mapping], keys: Sequence[str], metrics: Mapping[str, list[dict]], path: Path) -> None:
    """Validation losses over characters, and for each swept key the best loss of every run over its value."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row_of(record, keys) for record in records]
    scored = [row for row in rows if row["val_nats_per_char"] is not None]
    panels = [key for key in keys if len({str(row[key]) for row in rows}) > 1][:7]
    columns = min(4, 1 + len(panels))
    lines = math.ceil((1 + len(panels)) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.0 * lines), dpi=130, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    order = sorted(scored, key=lambda row: row["val_nats_per_char"])
    shade = {row["run"]: k / max(len(order) - 1, 1) for k, row in enumerate(order)}
    curves = axes[0]
    for row in reversed(order):
        points = [(line["chars"] / 1e6, line["nats_per_char"]) for line in metrics[row["run"]] if line["split"] == "val"]
        # The best are the darkest, and lie above the others.
        curves.plot(*zip(*points), color=_shade(shade[row["run"]]), linewidth=1.2)
    curves.set_xlabel("million characters")
    curves.set_ylabel("validation, nats per character")
    for axis, key in zip(axes[1:], panels):
        _draw_effect(axis, scored, key, shade)
    for axis in axes[1 + len(panels) :]:
        axis.axis("off")
    for axis in axes[: 1 + len(panels)]:
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


def _draw_effect(axis, scored: Sequence[Mapping], key: str, shade: Mapping[str, float]) -> None:
    """A point for each run, and the median of those with the same value."""
    values = in_order(row[key] for row in scored)
    numbers = are_numbers(values)
    place = {value: value if numbers else k for k, value in enumerate(values)}
    for row in scored:
        axis.plot(place[row[key]], row["val_nats_per_char"], "o", color=_shade(shade[row["run"]]), markersize=4)
    medians = [statistics.median(row["val_nats_per_char"] for row in scored if row[key] == value) for value in values]
    if len(values) <= 12:
        style = "-" if numbers else "_"
        axis.plot([place[value] for value in values], medians, style, color="#c2410c", linewidth=1.4, markersize=22)
    if numbers and values and values[0] > 0 and values[-1] / values[0] > 20:
        axis.set_xscale("log")
    elif len(values) <= 12:
        # Labels of values that lie close to each other would cover each other.
        apart, shown = (0.12 * (values[-1] - values[0]) if numbers and values else 0), []
        for value in values:
            if not shown or place[value] - place[shown[-1]] >= apart:
                shown.append(value)
        axis.set_xticks([place[value] for value in shown], [str(value) for value in shown])
    axis.set_xlabel(key)


def are_numbers(values: Iterable[Any]) -> bool:
    """Whether all are numbers, True and False not among them."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def in_order(values: Iterable[Any]) -> list[Any]:
    """The different ones: numbers by size, others by how they are written."""
    different = list(dict.fromkeys(values))
    return sorted(different) if are_numbers(different) else sorted(different, key=str)


def _shade(part: float) -> tuple[float, float, float]:
    """From dark blue, the best, to light grey."""
    dark, light = (0.07, 0.25, 0.45), (0.80, 0.84, 0.88)
    return tuple(a + part * (b - a) for a, b in zip(dark, light))
