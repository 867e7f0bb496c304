"""The generated blocks that come from the records experiments/*/results.jsonl. Always the latest record of a kind counts."""

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # For the scripts of the experiments.

PEERS = {"torch.nn": "PyTorch", "flax nn.RNN": "Flax nn.RNN", "plain scan": "plain scan", "Keras on JAX": "Keras on JAX"}

Record = Mapping[str, Any]


class Row(NamedTuple):
    """A row of a table of measurements: its cells, and the records that they come from."""

    cells: Sequence[str]
    records: Sequence[Record]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def read(experiment: str) -> list[Record]:
    """Return the records of an experiment, in the order in which they were written."""
    lines = (ROOT / "experiments" / experiment / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def latest(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, Record]:
    """Return the last record of each key, in the order in which the keys first appear."""
    found = {}
    for record in records:
        found[key(record)] = record
    return found


def machine_of(record: Record) -> str:
    """Return the machine of a record."""
    from experiments import records

    return record["machine"] if "machine" in record else records.machine_of(record["manifest"])


def is_cpu(record: Record) -> bool:
    """Return whether a record was measured on a CPU."""
    return "cores" in machine_of(record)


def measured(columns: Sequence[str], rows: Sequence[Row], experiment: str) -> str:
    """Return a table of measurements with a caption: machine, date, versions and commit, as far as the records have them.

    If the rows come from different machines, each row names its machine.
    """
    records = [record for row in rows for record in row.records]
    machines = _distinct(map(machine_of, records))
    if len(machines) > 1:
        columns = [*columns, "machine"]
        rows = [Row([*row.cells, "; ".join(_distinct(map(machine_of, row.records)))], row.records) for row in rows]
    dates = sorted(_distinct(record.get("date") for record in records))
    packages = [{**record.get("manifest", {}).get("packages", {}), **record} for record in records]
    facts = [*(machines if len(machines) == 1 else []), " to ".join(_distinct([dates[0], dates[-1]]) if dates else [])]
    facts += [f"jax {version}" for version in _distinct(each.get("jax") for each in packages)]
    facts += [f"PyTorch {version.split('+')[0]}" for version in _distinct(each.get("torch") for each in packages)]
    commits = _distinct(record.get("commit") or record.get("manifest", {}).get("git_commit") for record in records)
    facts += [f"commit {commit[:10]}{'-dirty' * commit.endswith('-dirty')}" for commit in commits]
    caption = f"*{'; '.join(filter(None, facts))}. Records: `experiments/{experiment}/results.jsonl`.*"
    return f"{markdown_table(columns, [row.cells for row in rows])}\n\n{caption}"


def _distinct(values: Iterable[Any]) -> list[Any]:
    return [value for value in dict.fromkeys(values) if value]


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return `mean ± standard deviation`, or the only value."""
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def chars(count: float) -> str:
    """Return a number of characters in millions."""
    return f"{count / 1e6:.1f} million"


def headline() -> str:
    """The numbers for the front page, the unfavourable ones among them."""
    quick = latest(read("quickstart"), lambda record: tuple(record["flags"]))
    small, equal = quick[()], quick.get(("--config.model.hidden_size=256",))
    tiny, scaling = _tinyshakespeare()["cpu"], latest(read("scaling"), lambda record: record["processes"])
    steps = [record for record in _steps().values() if is_cpu(record)]
    one = next(r for r in _sampling().values() if is_cpu(r) and (r["hidden"], r["batch"]) == (512, 1))
    start = latest(_throughput("startup"), lambda record: is_cpu(record))[True]
    rows = [
        Row(["quickstart, validation loss", f"{small['val_nats_per_char']:.3f} nats per character", ""], [small]),
        Row(["quickstart, train and sample commands", f"{small['charlm_seconds']:.0f} s", _against(small)], [small]),
        Row(["tiny Shakespeare, validation loss", f"{_mean(tiny, 'val_nats_per_char')} nats per character", ""], tiny),
        Row(["the same with dynamic evaluation", f"{_mean(tiny, 'dynamic_val_nats_per_char')} nats per character", ""], tiny),
        *(
            Row([f"training steps, batch {batch}", *_range(steps, batch)], [each for each in steps if each["batch"] == batch])
            for batch in (64, 256)
        ),
        Row(["sampling one text, LSTM 512", *_speed_of_sampling(one)], [one]),
        Row(["first step after the command, filled cache", f"{start['medians']['cached']:.1f} s", ""], [start]),
        Row(["two processes on two cores", f"{scaling[2]['speedup']:.2f} times one process", ""], [scaling[2]]),
    ]
    if equal:
        with_256 = ["the same with 256 units and Adam", f"{equal['charlm_seconds']:.0f} s", _against(equal)]
        rows.insert(2, Row(with_256, [equal]))
    text = measured(["measurement", "charlm", "compared with"], rows, "NAME")
    return text.replace("Records: `experiments/NAME/results.jsonl`", "Records: `experiments/*/results.jsonl`")


def _against(record: Record) -> str:
    return f"bare steps of PyTorch's LSTM 256 on as many characters: {record['torch_seconds']:.0f} s"


def _speed_of_sampling(record: Record) -> tuple[str, str]:
    times = f"{record['ratio']['cell']:.1f} times the speed of a loop over PyTorch's LSTMCell"
    return f"{record['chars_per_second']:,.0f} characters/s", times


def _range(steps: Sequence[Record], batch: int) -> tuple[str, str]:
    rates = [record["chars_per_second"]["charlm"] for record in steps if record["batch"] == batch]
    ratios = [record["ratio"]["torch.nn"] for record in steps if record["batch"] == batch]
    return f"{min(rates):,} to {max(rates):,} characters/s", f"{min(ratios):.2f} to {max(ratios):.2f} times PyTorch's speed"


def quickstart_minutes() -> str:
    """How long the two commands of the quickstart take."""
    record = latest(read("quickstart"), lambda record: tuple(record["flags"]))[()]
    return f"{max(1, round(record['charlm_seconds'] / 60))}"


def quickstart() -> str:
    """The quickstart beside PyTorch's bare steps."""
    rows = []
    for flags, record in latest(read("quickstart"), lambda record: tuple(record["flags"])).items():
        peer = statistics.fmean(record["torch_chars_per_second"])
        cells = ["`configs/quickstart.py`" + "".join(f" `{flag}`" for flag in flags), chars(record["chars"])]
        cells += [f"{record[f'{split}_nats_per_char']:.3f}" for split in ("val", "test")]
        cells += [f"{record['charlm_chars_per_second_in_steps']:,}", f"{peer:,.0f}"]
        cells += [f"{record['charlm_seconds']:.1f}", f"{record['torch_seconds']:.1f}", f"{record['ratio']:.2f}"]
        rows.append(Row(cells, [record]))
    columns = ["config", "characters", "validation loss", "test loss", "charlm, chars/s", "PyTorch, chars/s"]
    return measured([*columns, "charlm, seconds", "PyTorch, seconds", "charlm / PyTorch"], rows, "quickstart")


def tinyshakespeare() -> str:
    """The settings of the config for tiny Shakespeare beside PyTorch's bare steps; means over seeds."""
    rows = []
    for setting, found in _tinyshakespeare().items():
        torch_chars = found[0].get("torch_chars", 3.5e6)
        cells = [f"`{setting}`", chars(found[0]["chars"]), _mean(found, "val_nats_per_char")]
        cells += [_mean(found, "dynamic_val_nats_per_char"), f"{len(found)}"]
        times = [statistics.fmean(record[name] for record in found) for name in ("charlm_seconds", "torch_seconds", "ratio")]
        rows.append(Row([*cells, f"{times[0]:.0f}", chars(torch_chars), f"{times[1]:.0f}", f"{times[2]:.2f}"], found))
    columns = ["setting", "characters", "validation loss", "with dynamic evaluation", "seeds", "charlm, seconds"]
    columns += ["PyTorch, characters", "PyTorch, seconds", "charlm / PyTorch"]
    return measured(columns, rows, "tinyshakespeare")


def _tinyshakespeare() -> dict[str, list[Record]]:
    """Return the latest records of each setting, one for each seed. The oldest records name neither."""
    found = latest(read("tinyshakespeare"), lambda record: (record.get("setting", "cpu"), record.get("seed", 0)))
    return {setting: [each for key, each in found.items() if key[0] == setting] for setting, _ in found}


def _mean(records: Sequence[Record], name: str) -> str:
    return mean_and_deviation([record[name] for record in records])


def seeds() -> str:
    """The spread of the losses of one config over seeds."""
    records, rows = read("seeds"), []
    for split, name in (("val", "validation"), ("test", "test")):
        losses = [record["result"][f"{split}_nats_per_char"] for record in records]
        found = [statistics.fmean(losses), statistics.stdev(losses), min(losses), max(losses)]
        rows.append(Row([name, f"{len(losses)}", *(f"{value:.4f}" for value in found)], records))
    return measured(["text", "seeds", "mean", "standard deviation", "lowest", "highest"], rows, "seeds")


def seeds_deviation() -> str:
    """The standard deviation of the validation loss of one config over seeds."""
    return f"{statistics.stdev(record['result']['val_nats_per_char'] for record in read('seeds')):.3f}"


def recipes() -> str:
    """The longest runs of each recipe beside what the source printed; mean ± standard deviation over seeds."""
    from experiments.recipes.run import RECIPES

    runs = latest(read("recipes"), lambda record: (record["name"], record["fraction"], record["seed"])).values()
    rows = []
    for name, recipe in RECIPES.items():
        of_name = [run for run in runs if run["name"] == name]
        of_name = [run for run in of_name if run["fraction"] == max(run["fraction"] for run in of_name)]
        ours = [f"{mean_and_deviation([run['measures'][what] for run in of_name])} ({what})" for what in of_name[0]["measures"]]
        ends = [mean_and_deviation([run[key] for run in of_name]) for key in ("held_out", "held_out_best")]
        length = chars(of_name[0]["chars"]) + (f", {of_name[0]['fraction']:.0%}" if of_name[0]["fraction"] < 1 else "")
        printed = recipe.source_what if recipe.source is None else f"{recipe.source} ({recipe.source_what})"
        cells = [f"`{name}.py`", printed, "; ".join(ours), *ends, length, f"{len(of_name)}"]
        rows.append(Row([*cells, f"{statistics.median(run['chars_per_second'] for run in of_name):,.0f}"], of_name))
    columns = ["config", "the source prints", "charlm, measured the same way", "held-out loss at the end", "best held-out loss"]
    return measured([*columns, "characters", "seeds", "chars/s"], rows, "recipes")


def learning_rate() -> str:
    """The median loss of three seeds for each cell and rate, with the range over seeds in brackets."""
    records = read("learning_rate")
    rates = sorted({record["overrides"]["optimizer.learning_rate"] for record in records})
    rows = []
    for cell in _distinct(record["overrides"]["model.cell"] for record in records):
        of_cell, cells = [record for record in records if record["overrides"]["model.cell"] == cell], [cell.upper()]
        for rate in rates:
            alike = [record for record in of_cell if record["overrides"]["optimizer.learning_rate"] == rate]
            losses = [record["result"]["val_nats_per_char"] for record in alike]
            cells.append(f"{statistics.median(losses):.3f} ({max(losses) - min(losses):.3f})")
        rows.append(Row(cells, of_cell))
    return measured(["cell", *(f"{rate:g}" for rate in rates)], rows, "learning_rate")


def width_depth() -> str:
    """The loss for each cell, depth and number of parameters, with the width in brackets."""
    by_shape: dict[tuple[str, int], list[Record]] = {}
    for record in read("width_depth"):
        by_shape.setdefault((record["overrides"]["model.cell"], record["overrides"]["model.num_layers"]), []).append(record)
    cells = _distinct(cell for cell, _ in by_shape)
    rows = []
    for layers in _distinct(layers for _, layers in by_shape):
        columns = [sorted(by_shape[cell, layers], key=lambda record: record["result"]["num_params"]) for cell in cells]
        for alike in zip(*columns, strict=True):
            size = statistics.median(record["result"]["num_params"] for record in alike)
            losses = [(r["result"]["val_nats_per_char"], r["overrides"]["model.hidden_size"]) for r in alike]
            rows.append(Row([f"{layers}", f"{size:,.0f}", *(f"{loss:.3f} ({width})" for loss, width in losses)], alike))
    return measured(["layers", "parameters (median)", *map(str.upper, cells)], rows, "width_depth")


def cells() -> str:
    """The loss, the speed and the best rate of each cell at equal parameters, the best cell first."""
    from experiments.cells.run import best

    rows = []
    for cell, alike in best(read("cells")).items():
        losses = [record["val_nats_per_char"] for record in alike]
        speed = statistics.median(record["chars_per_second"] for record in alike)
        columns = [f"`{cell}`", f"{alike[0]['width']}", f"{alike[0]['num_params']:,}", f"{alike[0]['rate']:g}"]
        rows.append(Row([*columns, mean_and_deviation(losses), f"{len(losses)}", f"{speed:,.0f}"], alike))
    rows.sort(key=lambda row: statistics.fmean(record["val_nats_per_char"] for record in row.records))
    columns = ["cell", "units", "parameters", "rate", "validation loss, nats/char", "seeds", "characters/s"]
    return measured(columns, rows, "cells")


def cores() -> str:
    """Training steps on one CPU device and on a device for each core, for each shape of the model."""
    rows = []
    for record in latest(
        read("cores"), lambda record: tuple(record[key] for key in ("cell", "hidden", "layers", "batch"))
    ).values():
        model = f"{'2 x ' * (record['layers'] == 2)}{record['cell']} {record['hidden']}"
        speeds = f"{record['one_device']:,}", f"{record['device_for_each_core']:,}", f"{record['ratio']:.2f}"
        to_torch = f"{record['ratio_to_torch']:.2f}" if "ratio_to_torch" in record else ""
        rows.append(Row([model, f"{record['batch']}", *speeds, to_torch], [record]))
    names = ["model", "rows of a batch", "one device, chars/s", "a device for each core, chars/s", "ratio", "x torch.nn"]
    return measured(names, rows, "cores")


def ablation() -> str:
    """What one changed key is worth: the best held-out loss, and the difference from the row compared with."""
    from experiments.ablation.run import ROWS, TEXTS

    records = latest(read("ablation"), lambda record: (record["name"], record["text"], record["seed"]))
    seeds, rows = sorted({seed for _, _, seed in records}), []
    for name, (other, _) in ROWS.items():
        cells = [name, other or "", f"{records[name, 'whole', seeds[0]]['num_params']:,}"]
        for text in TEXTS:
            losses = [records[name, text, seed]["best"] for seed in seeds]
            cells.append(mean_and_deviation(losses))
            theirs = statistics.fmean(records[other, text, seed]["best"] for seed in seeds) if other else 0.0
            cells.append(f"{statistics.fmean(losses) - theirs:+.3f}" if other else "")
        rows.append(Row(cells, [records[name, text, seed] for text in TEXTS for seed in seeds]))
    columns = ["change", "compared with", "parameters", "whole text", "difference", "a tenth of the text", "difference"]
    return measured(columns, rows, "ablation")


def faults() -> str:
    """How many killed runs differ from a run that was left alone."""
    record = [each for each in read("faults") if "kills" in each][-1]
    phases = ", ".join(f"{phase} {count}" for phase, count in record["kills"].items())
    cells = [f"{sum(record['kills'].values())}", phases, f"{record['runs']}", f"{record['differ']}"]
    return measured(["kills", "by phase", "runs", "runs that differ"], [Row(cells, [record])], "faults")


def _throughput(kind: str) -> list[Record]:
    return [record for record in read("throughput") if record["kind"] == kind]


def _task(record: Record) -> tuple:
    shape = tuple(record[key] for key in ("layers", "cell", "hidden", "batch"))
    return ("CPU" if is_cpu(record) else machine_of(record), record.get("dtype", "float32"), *shape)


def _shape(record: Record) -> str:
    layers = f"{record['layers']} x " if record["layers"] > 1 else ""
    return f"{layers}{record['cell'].upper()} {record['hidden']}" + ("" if is_cpu(record) else f", {record['dtype']}")


def _steps() -> dict[tuple, Record]:
    return dict(sorted(latest(_throughput("steps"), _task).items(), key=lambda item: item[0][:2]))


def _sampling() -> dict[tuple, Record]:
    return latest(_throughput("sampling"), _task)


def _table_of_steps(batch: int) -> str:
    records = [record for record in _steps().values() if record["batch"] == batch]
    peers = {**PEERS, **{name: name for record in records for name in record["ratio"] if name not in PEERS}}
    rows = []
    for record in records:
        cells = [_shape(record), f"{record['chars_per_second']['charlm']:,}", f"{record['fraction']:.0%}"]
        cells += [f"{record['ratio'][peer]:.2f}" if peer in record["ratio"] else "" for peer in peers]
        rows.append(Row([*cells, f"{record['spread']['charlm']:.0%}"], [record]))
    columns = ["model", "charlm, chars/s", "of the limit", *(f"x {name}" for name in peers.values()), "spread"]
    return measured(columns, rows, "throughput")


def throughput_steps() -> str:
    """Training steps at batch 64, beside other implementations."""
    return _table_of_steps(64)


def throughput_large_batches() -> str:
    """Training steps at batch 256, beside other implementations."""
    return _table_of_steps(256)


def throughput_sampling() -> str:
    """Sampling, beside loops over PyTorch's layers and cells."""
    rows = []
    for record in _sampling().values():
        cells = [_shape(record), f"{record['batch']}", f"{record['chars_per_second']:,.0f}"]
        rows.append(Row([*cells, f"{record['ratio']['layer']:.1f}", f"{record['ratio']['cell']:.1f}"], [record]))
    columns = ["model", "texts at a time", "charlm, chars/s", "x loop over nn.LSTM", "x loop over nn.LSTMCell"]
    return measured(columns, rows, "throughput")


def throughput_prompt() -> str:
    """Reading a long prompt, beside the scorer."""
    rows = []
    for record in latest(_throughput("prompt"), _task).values():
        rates = record["chars_per_second"]
        rows.append(Row([_shape(record), f"{rates['charlm']:,}", f"{rates['scorer']:,}", f"{record['ratio']:.2f}"], [record]))
    return measured(["model", "prompt, chars/s", "scorer, chars/s", "ratio"], rows, "throughput")


def throughput_memory() -> str:
    """The peak memory of a process that trains."""
    rows = []
    for record in latest(_throughput("memory"), _task).values():
        peaks = [record["peak_kb"].get(name) for name in ("charlm", *PEERS)]
        cells = [_shape(record), f"{record['batch']}", *("" if peak is None else f"{peak / 1024:,.0f}" for peak in peaks)]
        rows.append(Row(cells, [record]))
    return measured(["model", "batch", "charlm, MB", *(f"{name}, MB" for name in PEERS.values())], rows, "throughput")


def throughput_command() -> str:
    """What the training command adds to its bare steps, how soon it starts, and what runs side by side gain."""
    rows = []
    for record in latest(_throughput("startup"), is_cpu).values():
        seconds = record["medians"]
        rows.append(Row(["command to first step, empty caches", f"{seconds['cold']:.1f} s"], [record]))
        rows.append(Row(["command to first step, filled caches", f"{seconds['cached']:.1f} s"], [record]))
        for name, what in (("first character", "sampling command to first character"), ("help", "`--help`, slowest command")):
            if name in seconds:
                rows.append(Row([what, f"{seconds[name]:.2f} s"], [record]))
        rows.append(Row(["`import jax` and a trivial jitted call", f"{seconds['import jax']:.1f} s"], [record]))
    for record in latest(_throughput("command"), is_cpu).values():
        rates = [statistics.median(record[key]) for key in ("chars_per_second", "bare")]
        what = "speed of the training command / speed of its bare steps"
        rows.append(Row([what, f"{record['ratio']:.2f} ({rates[0]:,.0f} and {rates[1]:,.0f} chars/s)"], [record]))
    for record in latest(_throughput("runs"), is_cpu).values():
        what = f"{record['runs']} runs of LSTM {record['hidden']}, side by side / one after another"
        side, alone = (record["chars_per_second"][name] for name in ("side by side", "one after another"))
        rows.append(Row([what, f"{record['ratio']:.2f} ({side:,.0f} and {alone:,.0f} chars/s)"], [record]))
    return measured(["measurement", "value"], rows, "throughput")


def scaling() -> str:
    """Weak scaling over the processes of one machine."""
    rows = []
    for count, record in latest(read("scaling"), lambda record: record["processes"]).items():
        cells = [f"{count}", f"{record['chars_per_second']:,.0f}", f"{record['speedup']:.2f}", f"{record['efficiency']:.0%}"]
        rows.append(Row(cells, [record]))
    return measured(["processes", "chars/s", "x one process", "of what the cores could do"], rows, "scaling")


def sharded_checkpoints() -> str:
    """Memory and time of a checkpoint of a sharded state in a job of several processes."""
    rows = []
    for record in latest(
        read("sharded_checkpoints"), lambda record: (record["form"], record["commit"], record["hidden"])
    ).values():
        cells = [f"{record['form']} ({record['commit'][:8]})", f"{record['processes']}", f"{record['state_bytes'] / 1e9:.2f}"]
        cells += [f"{record[f'{name}_bytes'] / 1e9:.2f}" for name in ("save_before", "save_peak", "restore_peak")]
        cells += [f"{record[f'{name}_seconds']:.1f}" for name in ("save_waits", "save", "restore")]
        rows.append(Row(cells, [record]))
    columns = ["checkpoints", "processes", "state, GB", "before, GB", "peak of a save, GB", "peak of a restore, GB"]
    columns += ["training waits, s", "save, s", "restore, s"]
    return measured(columns, rows, "sharded_checkpoints")


def large_text() -> str:
    """How fast a large text is encoded, how much memory it takes, and how soon training starts."""
    rows = []
    for megabytes, record in latest(read("large_text"), lambda record: record["megabytes"]).items():
        size = f"{megabytes / 1000:g} GB"
        for text, found in record["encoding"].items():
            seconds, memory = statistics.median(found["seconds"]), max(found["rss_anon_mb"])
            what = f"encode {size}, {text}, {found['symbols']} symbols"
            rows.append(Row([what, f"{seconds:.1f}", f"{found['mb_per_second']}", f"{memory}"], [record]))
        for cache, found in record["training"].items():
            what = f"training command to first step, {size} of ASCII, {cache}"
            rows.append(Row([what, f"{found['seconds_to_first_step']}", "", f"{found['rss_anon_mb']}"], [record]))
    return measured(["work", "seconds", "MB/s", "memory, MB"], rows, "large_text")


def accelerators() -> str:
    """Which GPUs and TPUs are on record."""
    names = [path.parent.name for path in sorted((ROOT / "experiments").glob("*/results.jsonl"))]
    machines = _distinct(machine_of(record) for name in names for record in read(name) if not is_cpu(record))
    if not machines:
        compiled = "The compilers for an NVIDIA H100 and a TPU v5e were run (`experiments/accelerators`)"
        return f"No measurement on a GPU or a TPU is on record. {compiled}; nothing was run on these devices."
    return f"The records contain measurements on {', '.join(machines)}."


BLOCKS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "quickstart-minutes": quickstart_minutes,
    "quickstart": quickstart,
    "tinyshakespeare": tinyshakespeare,
    "seeds": seeds,
    "seeds-deviation": seeds_deviation,
    "recipes": recipes,
    "learning-rate": learning_rate,
    "width-depth": width_depth,
    "cells": cells,
    "cores": cores,
    "ablation": ablation,
    "faults": faults,
    "throughput-steps": throughput_steps,
    "throughput-large-batches": throughput_large_batches,
    "throughput-sampling": throughput_sampling,
    "throughput-prompt": throughput_prompt,
    "throughput-memory": throughput_memory,
    "throughput-command": throughput_command,
    "scaling": scaling,
    "sharded-checkpoints": sharded_checkpoints,
    "large-text": large_text,
    "accelerators": accelerators,
}
