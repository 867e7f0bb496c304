"""Write report.html, the page of a run or of a sweep. It needs no server and no network.

Bokeh draws the plots and the table. The page contains Bokeh's scripts.
"""

import html
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from charlm.config import flatten
from charlm.runs.curves import COLORS, metric_panels
from charlm.runs.samples import read_samples
from charlm.runs.tracking import read_metrics
from charlm.runs.workdir import load_run, read_result
from charlm.sweeps.results import are_numbers, metrics_of_run, read_records, row_of, sort_distinct, swept_keys
from charlm.system.errors import WorkdirError
from charlm.system.files import write_text
from charlm.system.progress import say

# The number of points of a curve. More cannot be seen.
_MAX_POINTS = 1000
# Numbers with at most this many distinct values are drawn as categories, at equal distances.
_MAX_CATEGORIES = 8
# The number of samples on the page of a sweep, and the number of characters of each.
_NUM_SAMPLES, _SAMPLE_CHARS = 4, 700
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 24px auto; padding: 0 16px; color: #1c2733; }
h1 { font-size: 22px; margin-bottom: 2px; } h2 { font-size: 17px; margin-top: 28px; }
pre { background: #f4f6f8; padding: 10px; overflow: auto; white-space: pre-wrap; font-size: 13px; margin: 0; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 12px; }
.note { color: #5b6b7b; overflow-wrap: anywhere; }
table { border-collapse: collapse; } td { padding: 2px 14px 2px 0; vertical-align: top; }
"""


def write_page(workdir: Path) -> Path:
    """Write report.html into the folder of a run or of a sweep; return the path of the page.

    Raises:
        WorkdirError: the folder is neither a run nor a sweep, or its files cannot be read.
    """
    if (workdir / "results.jsonl").is_file():
        write_page_of_sweep(workdir)
    elif (workdir / "config.json").is_file():
        write_page_of_run(workdir)
    else:
        raise WorkdirError(f"--workdir {workdir} is neither a run nor a sweep: it has no config.json and no results.jsonl")
    return workdir / "report.html"


def write_page_of_sweep(workdir: Path) -> None:
    """Write report.html into the folder of a sweep, from results.jsonl and the folders of the runs.

    Raises:
        WorkdirError: results.jsonl cannot be read.
    """
    from bokeh.layouts import column, row

    records = read_records(workdir / "results.jsonl")
    keys = swept_keys(records)
    rows = sorted((row_of(record, keys) for record in records), key=_best_first)
    source = _source(rows, keys, workdir)
    table, filter_input = _table(source, keys)
    plots = row(_curves(source), _effects(source, rows, keys), sizing_mode="stretch_width")
    page = column(plots, filter_input, table, _commands(source), sizing_mode="stretch_width")
    statuses = [each["status"] for each in rows]
    counts = ", ".join(f"{statuses.count(status)} {status.replace('_', ' ')}" for status in dict.fromkeys(statuses))
    parts = [f"<h1>{html.escape(workdir.name)}</h1><p class=note>{len(rows)} runs: {html.escape(counts)}</p>", page]
    parts.append(
        "<h2>Samples of the best</h2><div class=samples>" + "".join(_last_sample(each, workdir) for each in rows[:_NUM_SAMPLES])
    )
    write_text(workdir / "report.html", _page(workdir.name, [*parts, "</div>"]))


def write_page_of_run(path: Path) -> None:
    """Write report.html into the folder of a run.

    Raises:
        WorkdirError: the folder is not a run, or its files cannot be read.
    """
    run, result = load_run(path), read_result(path) or {}
    lines = read_metrics(path / "metrics.jsonl")
    samples = [f"<div><p class=note>step {step}</p><pre>{html.escape(text)}</pre></div>" for step, text in read_samples(path)]
    # Written by `charlm.explore`.
    inside = "<p><a href='explore.html'>Look inside the model</a></p>" if (path / "explore.html").is_file() else ""
    parts = [f"<h1>{html.escape(path.name)}</h1>{inside}", _curves_of_run(lines), f"<h2>Result</h2>{_pairs(result)}"]
    parts += ["<h2>Samples, the latest first</h2><div class=samples>", *reversed(samples)]
    parts.append(f"</div><h2>Config</h2>{_pairs(dict(flatten(run.config)))}<h2>Manifest</h2>{_pairs(run.manifest)}")
    write_text(path / "report.html", _page(path.name, parts))


def _page(title: str, parts: Sequence[Any]) -> str:
    """Return the HTML of a page. One of the parts is a Bokeh model, the others are HTML."""
    from bokeh.embed import components
    from bokeh.resources import INLINE

    (model,) = (part for part in parts if not isinstance(part, str))
    script, place = components(model)
    body = "\n".join(part if isinstance(part, str) else place for part in parts)
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>{INLINE.render()}"
    return f"<!doctype html><html lang='en'><head>{head}{script}</head><body>{body}</body></html>\n"


def _best_first(row: Mapping[str, Any]) -> tuple[bool, float]:
    """Return the key that sorts rows by their loss. Runs without a loss are last."""
    loss = row["val_nats_per_char"]
    return loss is None, loss or 0.0


def _source(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], workdir: Path) -> Any:
    """Return the data source of the plots and of the table, with one row for each run."""
    from bokeh.models import ColumnDataSource
    from bokeh.palettes import viridis

    xs, ys = [], []
    for each in rows:
        folder = _folder_of_run(each, workdir)
        lines = [line for line in metrics_of_run(folder) if line["split"] == "val"] if folder else []
        lines = lines[:: max(1, len(lines) // _MAX_POINTS)]
        xs.append([line["chars"] / 1e6 for line in lines])
        ys.append([line["nats_per_char"] for line in lines])
    data = {name: [each[name] for each in rows] for name in rows[0]}
    data["reason"] = [each["reason"] or "" for each in rows]
    for key in keys:
        data[f"label {key}"] = [_label(each[key]) for each in rows]
    colors = [viridis(256)[255 * k // max(len(rows) - 1, 1)] for k in range(len(rows))]
    commands = [_command_of_run(each, workdir) for each in rows]
    return ColumnDataSource(data | {"xs": xs, "ys": ys, "color": colors, "command": commands})


def _folder_of_run(row: Mapping[str, Any], workdir: Path) -> Path | None:
    """Return the folder of a run; None, with a message, if it is a link, which may lead to the files of somebody else."""
    path = workdir / row["run"]
    if path.is_symlink():
        say(f"{path} is a link, so its curve and its samples are left out of the page")
        return None
    return path


def _command_of_run(row: Mapping[str, Any], workdir: Path) -> str:
    """Return the command that reproduces a run, quoted for a shell."""
    return f"python -m charlm.reproduce --result {shlex.quote(f'{workdir}/results.jsonl')} --run {shlex.quote(row['run'])}"


def _label(value: Any) -> str:
    """Return a value as the label of a category."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figure(**options: Any) -> Any:
    """Return a Bokeh figure in the style of the page."""
    from bokeh.plotting import figure

    defaults = {"height": 360, "tools": "pan,wheel_zoom,box_zoom,tap,reset,save", "toolbar_location": "above"}
    return figure(**defaults | {"sizing_mode": "stretch_width"} | options)


def _curves(source: Any) -> Any:
    """Return the figure of the validation losses of all runs over characters."""
    from bokeh.models import HoverTool

    plot = _figure(x_axis_label="million characters", y_axis_label="validation, nats per character", name="curves")
    style = {"line_color": "color", "line_width": 1.6, "nonselection_line_alpha": 0.08, "hover_line_width": 4}
    lines = plot.multi_line("xs", "ys", source=source, **style)
    tips = [("run", "@run"), ("best loss", "@val_nats_per_char{0.0000}"), ("here", "$data_x million, $data_y")]
    plot.add_tools(HoverTool(renderers=[lines], tooltips=tips, line_policy="interp"))
    return plot


def _effects(source: Any, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Any:
    """Return the figures of the best loss of every run over the value of a key, with one tab for each key."""
    from bokeh.models import HoverTool, TabPanel, Tabs
    from bokeh.transform import jitter

    panels = []
    for key in keys:
        values = sort_distinct(each[key] for each in rows)
        if len(values) == 1 and len(keys) > 1:
            continue
        if are_numbers(values) and len(values) > _MAX_CATEGORIES:
            wide = values[0] > 0 and values[-1] / values[0] > 20
            plot, x = _figure(x_axis_type="log" if wide else "linear"), key
        else:
            plot = _figure(x_range=[_label(value) for value in values])
            x = jitter(f"label {key}", width=0.2, range=plot.x_range)
        plot.xaxis.axis_label, plot.yaxis.axis_label = key, "validation, nats per character"
        points = plot.scatter(x, "val_nats_per_char", source=source, size=8, color="color", nonselection_alpha=0.1)
        plot.add_tools(HoverTool(renderers=[points], tooltips=[("run", "@run"), ("loss", "@val_nats_per_char{0.0000}")]))
        panels.append(TabPanel(child=plot, title=key))
    return Tabs(tabs=panels, sizing_mode="stretch_width", name="effects")


def _table(source: Any, keys: Sequence[str]) -> tuple[Any, Any]:
    """Return the table of the runs, and the text field whose words filter its rows."""
    from bokeh.models import CDSView, CustomJS, CustomJSFilter, DataTable, NumberFormatter, TableColumn, TextInput

    filter_input = TextInput(
        sizing_mode="stretch_width", placeholder="filter: words that a row must contain, such as gru completed", name="words"
    )
    names = [*keys, "run", "status", "reason"]
    code = """
        const words = field.value.toLowerCase().split(/\\s+/).filter(word => word)
        const rows = []
        for (let i = 0; i < source.get_length(); i++) {
            const text = names.map(name => String(source.data[name][i])).join(" ").toLowerCase()
            if (words.every(word => text.includes(word))) rows.push(i)
        }
        return rows
    """
    view = CDSView(filter=CustomJSFilter(code=code, args={"field": filter_input, "names": names}))
    filter_input.js_on_change("value_input", CustomJS(code="field.value = field.value_input", args={"field": filter_input}))
    filter_input.js_on_change("value", CustomJS(code="source.change.emit()", args={"source": source}))
    loss = NumberFormatter(format="0.0000")
    # The table inserts titles as HTML.
    columns = [TableColumn(field=key, title=html.escape(key)) for key in keys]
    columns.append(TableColumn(field="val_nats_per_char", title="validation", formatter=loss))
    columns += [TableColumn(field=name, title=name.replace("_", " ")) for name in ("best_step", "steps")]
    columns.append(TableColumn(field="train_seconds", title="seconds", formatter=NumberFormatter(format="0.0")))
    columns += [TableColumn(field=name, title=name) for name in ("status", "reason")]
    height = min(480, 60 + 26 * len(source.data["run"]))
    table = DataTable(
        source=source, view=view, columns=columns, height=height, sizing_mode="stretch_width", name="table", index_position=None
    )
    return table, filter_input


def _commands(source: Any) -> Any:
    """Return the element that shows the commands which reproduce the runs selected in the table or in a plot."""
    from bokeh.models import CustomJS, Div

    hint = "<p class=note>Select runs in the table or in a plot to see the commands that reproduce them.</p>"
    shown = Div(text=hint, sizing_mode="stretch_width", name="chosen")
    code = """
        const commands = source.selected.indices.map(i => source.data.command[i])
        const text = commands.join("\\n").replaceAll("&", "&amp;").replaceAll("<", "&lt;")
        shown.text = commands.length ? `<pre>${text}</pre>` : hint
    """
    arguments = {"source": source, "shown": shown, "hint": hint}
    source.selected.js_on_change("indices", CustomJS(code=code, args=arguments))
    return shown


def _last_sample(row: Mapping[str, Any], workdir: Path) -> str:
    """Return the HTML of the last sample that a run drew."""
    text, folder = "", _folder_of_run(row, workdir)
    try:
        if folder and (samples := read_samples(folder)):
            text = samples[-1].text
    except WorkdirError as error:
        say(str(error))
    loss = "" if row["val_nats_per_char"] is None else f", {row['val_nats_per_char']:.4f}"
    return f"<div><p class=note>{html.escape(row['run'])}{loss}</p><pre>{html.escape(text[:_SAMPLE_CHARS])}</pre></div>"


def _curves_of_run(lines: Sequence[Mapping[str, Any]]) -> Any:
    """Return the figures of a run over characters: training and validation loss, and below one for each selected metric."""
    from bokeh.layouts import column
    from bokeh.models import HoverTool
    from bokeh.palettes import Category10_10

    losses = {
        split: [(line["chars"] / 1e6, line["nats_per_char"]) for line in lines if line["split"] == split] for split in COLORS
    }
    plots = []
    for name, curves in {"nats per character": losses, **metric_panels(lines)}.items():
        height = 220 if plots else 360
        plot = _figure(x_axis_label="million characters", y_axis_label=name, height=height, name=name)
        for k, (curve, points) in enumerate(curves.items()):
            xs, ys = zip(*points) if points else ((), ())
            color = COLORS.get(curve, Category10_10[k % 10])
            drawn = plot.line(xs, ys, color=color, line_width=2, legend_label=curve)
            plot.add_tools(HoverTool(renderers=[drawn], tooltips=[(curve, "$y{0.0000}"), ("million characters", "$x{0.00}")]))
        plots.append(plot)
    return column(*plots, sizing_mode="stretch_width")


def _pairs(values: Mapping[str, Any]) -> str:
    """Return the HTML of a table of keys and values."""
    cells = (f"<tr><td>{html.escape(key)}</td><td>{html.escape(json.dumps(value))}</td></tr>" for key, value in values.items())
    return f"<table>{''.join(cells)}</table>"
