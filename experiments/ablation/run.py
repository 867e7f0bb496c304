"""Measure what each config key is worth: one change at a time, on two texts, with three seeds and equal numbers of steps.

    pip install -c constraints.txt -e .
    python experiments/ablation/run.py [--seeds 0,1,2] [--texts whole,tenth] [NAME ...]
    python experiments/ablation/run.py --report

The base is an LSTM of 128 units. Adam has a peak learning rate of 1e-2 and a cosine schedule. A run takes 1,300 steps of 32 x
64 characters. NAME is a row of the table. The default is all rows, which takes about an hour and a half on two cores.

The text `whole` is tiny Shakespeare as nanoGPT splits it; a run reads its training part 2.7 times. The text `tenth` is the
first tenth of this training part; a run reads it 26 times, so regularisation can help. Both are scored on the last tenth of the
whole text every 100 steps. Each run appends a line to results.jsonl. `--report` prints the table and draws ablation.png.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from absl import logging

from charlm.config import default_config
from charlm.config.rules import set_key
from charlm.data.corpus import load_corpus
from charlm.runs.loop import train
from charlm.runs.tracking import read_metrics
from charlm.system.machine import num_cores

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

from experiments.records import append as append_record  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUNS = ROOT / "runs" / "ablation"

TEXTS = {"whole": "the whole text, read 2.7 times", "tenth": "a tenth of it, read 26 times"}
# {row: (row that it is compared with, keys of the base that it changes)}. The names are in results.jsonl.
ROWS: dict[str, tuple[str | None, dict]] = {
    "base": (None, {}),
    "recurrent kernels not orthogonal": ("base", {"model.recurrent_init": "lecun_normal"}),
    "forget bias 0": ("base", {"model.forget_bias": 0.0}),
    "dropout 0.2": ("base", {"model.dropout": 0.2}),
    "variational dropout 0.2": ("base", {"model.dropout": 0.2, "model.variational_dropout": True}),
    "recurrent dropout 0.2": ("base", {"model.recurrent_dropout": 0.2}),
    "activation_reg 2": ("base", {"optimizer.activation_reg": 2.0}),
    "temporal_reg 1": ("base", {"optimizer.temporal_reg": 1.0}),
    "embedding 128": ("base", {"model.embedding_size": 128}),
    "tied weights": ("embedding 128", {"model.embedding_size": 128, "model.tie_weights": True}),
    "ln_lstm": ("base", {"model.cell": "ln_lstm"}),
    "GRU": ("base", {"model.cell": "gru"}),
    "ln_gru": ("GRU", {"model.cell": "ln_gru"}),
    "2 layers": ("base", {"model.num_layers": 2}),
    "2 layers, residual": ("2 layers", {"model.num_layers": 2, "model.residual": True}),
    "learned first state": ("base", {"model.learn_initial_state": True}),
    "average of parameters": ("base", {"train.ema_decay": 0.98}),
    "constant rate": ("base", {"optimizer.schedule": "constant"}),
    "constant rate, average": ("constant rate", {"optimizer.schedule": "constant", "train.ema_decay": 0.98}),
}


def config_of(overrides: dict, text: str, seed: int):
    """Return the config of the base on one of the texts, with some keys changed."""
    config = default_config()
    config.seed = seed
    config.data.corpus = "tinyshakespeare"
    config.model.hidden_size = 128
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.clip_norm = 1.0
    config.train.steps = 1300
    config.train.eval_every = config.train.checkpoint_every = 100
    config.train.sample_every = 0
    if text == "tenth":
        corpus = load_corpus(config.data)
        parts = [corpus.vocab.decode(ids) for ids in (corpus.train[: len(corpus.train) // 10], corpus.val)]
        config.data.path = str(RUNS / "tenth.txt")
        (RUNS / "tenth.txt").write_text("".join(parts), encoding="utf-8")
        share = len(parts[0]) / sum(map(len, parts))
        config.data.split = (share, 1 - share, 0.0)
    for key, value in overrides.items():
        set_key(config, key, value, "the ablation")
    return config


def run(name: str, text: str, seed: int) -> dict:
    """Train a row on a text with a seed, and return the record of the run."""
    workdir = RUNS / f"{name.replace(' ', '_')}-{text}-{seed}"
    train(config_of(ROWS[name][1], text, seed), workdir)
    result, manifest = (json.loads((workdir / f"{file}.json").read_text()) for file in ("result", "manifest"))
    validation = [line["nats_per_char"] for line in read_metrics(workdir / "metrics.jsonl") if line["split"] == "val"]
    return {
        "machine": f"{num_cores()} of {manifest['cpu_cores']} cores, {manifest['cpu_model']}"
        if manifest["device_kind"] == "cpu"
        else manifest["device_kind"],
        "name": name,
        "text": text,
        "seed": seed,
        "num_params": result["num_params"],
        "steps": result["steps"],
        "best": round(min(validation), 4),
        "last": round(validation[-1], 4),
        "chars_per_second": round(result["chars_per_second"]),
        "params_sha256": result["params_sha256"],
    }


def read_records() -> dict[tuple[str, str], list[dict]]:
    """Return {(row, text): the latest record of each seed}."""
    latest = {}
    for line in (HERE / "results.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        latest[record["name"], record["text"], record["seed"]] = record
    records = {}
    for (name, text, _), record in latest.items():
        records.setdefault((name, text), []).append(record)
    return records


def report() -> None:
    """Print the table in Markdown and draw ablation.png, if every row is on record."""
    records = read_records()
    if missing := [name for name in ROWS if not {(name, text) for text in TEXTS} <= records.keys()]:
        print(f"no table yet; these rows are not on record: {', '.join(missing)}")
        return
    columns = ("", "compared with", "parameters", "whole text", "difference", "a tenth of it", "difference")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name, (other, _) in ROWS.items():
        cells = [name, other or "", f"{records[name, 'whole'][0]['num_params']:,}"]
        for text in TEXTS:
            best = [run["best"] for run in records[name, text]]
            spread = f" ± {statistics.stdev(best):.3f}" if len(best) > 1 else ""
            cells.append(f"{statistics.fmean(best):.3f}{spread}")
            cells.append(f"{statistics.fmean(differences(records, name, other, text)):+.3f}" if other else "")
        print(f"| {' | '.join(cells)} |")
    draw(records)


def differences(records, name: str, other: str, text: str) -> list[float]:
    """Return the losses of a row minus those of the row `other`, seed by seed."""
    theirs = {run["seed"]: run["best"] for run in records[other, text]}
    return [run["best"] - theirs[run["seed"]] for run in records[name, text]]


def label(name: str) -> str:
    """Return the name of a row, with the row that it is compared with unless that is the base."""
    other, _ = ROWS[name]
    return name if other == "base" else f"{name} (against {other})"


def draw(records) -> None:
    """Draw the differences, one line for each row and one point for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name, (other, _) in ROWS.items() if other]
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    for axes, (text, title) in zip(figure.subplots(1, 2, sharey=True), TEXTS.items()):
        axes.axvline(0, color="black", linewidth=0.8)
        for y, name in enumerate(names):
            found = differences(records, name, ROWS[name][0], text)
            colour = "tab:blue" if statistics.fmean(found) < 0 else "tab:red"
            axes.barh(y, statistics.fmean(found), color=colour, alpha=0.35)
            axes.plot(found, [y] * len(found), "o", color=colour, markersize=3.5)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("held-out nats per character, difference")
        axes.grid(axis="x", alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    axes.set_yticks(range(len(names)), [label(name) for name in names], fontsize=8)
    axes.invert_yaxis()
    FigureCanvasAgg(figure).print_png(str(HERE / "ablation.png"))


def main() -> None:
    logging.set_verbosity(logging.ERROR)  # Orbax warns about things that are intended.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(map(repr, ROWS))}; default: all")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, for example 0,1,2")
    parser.add_argument("--texts", default=",".join(TEXTS), help="texts, for example whole,tenth")
    parser.add_argument("--report", action="store_true", help="only print the table and draw the figure")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ROWS):
        parser.error(f"unknown row {', '.join(sorted(unknown))}; the rows are {', '.join(ROWS)}")
    if not arguments.report:
        RUNS.mkdir(parents=True, exist_ok=True)
        for name in arguments.names or ROWS:
            for text in arguments.texts.split(","):
                for seed in map(int, arguments.seeds.split(",")):
                    append_record(HERE, run(name, text, seed))
    report()


if __name__ == "__main__":
    main()
