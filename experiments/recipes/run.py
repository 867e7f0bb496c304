"""Train the recipes of five notebooks, and record the losses beside those that the notebooks print.

    pip install -c constraints.txt -e '.[shakespeare]'
    python experiments/recipes/run.py [--fraction X] [--seeds 0,1,2] [NAME ...]
    python experiments/recipes/run.py --report

The first command trains configs/NAME.py for each NAME, in runs/recipes. The default is all recipes, which takes most of a day
on two cores. A run takes the fraction X of the recipe's length (default 1). There is one run for each seed (default 0), and
each run appends a line to results.jsonl. A run that was stopped is resumed. A run that is finished is only measured again.

The second command prints the table of all records and draws curves.png.
"""

import argparse
import json
import runpy
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from charlm.config import default_config
from charlm.data.batching import make_layout
from charlm.data.corpus import load_corpus
from charlm.inference.scorer import make_scorer
from charlm.nn.model import CharLM
from charlm.runs.checkpoint import Checkpoints
from charlm.runs.flat_state import eval_params
from charlm.runs.tracking import read_metrics
from charlm.runs.workdir import load_run

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

from experiments.records import append as append_record  # noqa: E402
from experiments.records import machine_of  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def fixed_window(workdir: Path, lines: list[dict]) -> float:
    """Return the loss of the trained model on the sixth window of each stream of the training text, from a zero state."""
    run = load_run(workdir)
    corpus = load_corpus(run.config.data)
    layout = make_layout(run.config.batching, run.config.seed, len(corpus.train))
    model = CharLM.from_config(run.config.model, corpus.vocab.size)
    params = eval_params(Checkpoints(workdir).find("latest", print)[0], model)
    score = make_scorer(model, corpus.vocab, run.config.batching)
    evaluation = default_config().eval
    evaluation.num_streams = 1  # A single stream starts at the first character of the window.
    losses = [
        score(params, corpus.train[start : start + layout.seq_len + 1], evaluation).nats_per_char
        for start in layout.batch(5).starts_B.tolist()
    ]
    return float(np.mean(losses))


def window_700(workdir: Path, lines: list[dict]) -> float:
    """Return the loss on window 700, counted from 0, before the step that learns from it."""
    (line,) = [line for line in lines if line["split"] == "train" and line["step"] == 701]
    return line["nats_per_char"]


def mean_of_last_2000(workdir: Path, lines: list[dict]) -> float:
    """Return the mean loss on the last 2,000 training windows, each before the step that learns from it."""
    return statistics.fmean([line["nats_per_char"] for line in lines if line["split"] == "train"][-2000:])


def first_epoch(workdir: Path, lines: list[dict]) -> float:
    """Return the held-out loss at the end of the first epoch."""
    return min((line for line in lines if line["split"] == "val"), key=lambda line: abs(line["epoch"] - 1))["nats_per_char"]


class Recipe(NamedTuple):
    """The loss that a source prints, and the measurements of charlm that are compared with it.

    Attributes:
        source: the loss that the source prints, in nats per character; None if it prints none.
        source_what: what that loss is measured on, or why there is none.
        measures: {what is measured: a function (workdir, lines of metrics) that returns the loss in nats per character}.
        flags: further flags of the training command.
    """

    source: float | None
    source_what: str
    measures: dict[str, Callable[[Path, list[dict]], float]]
    flags: tuple[str, ...] = ()


_OF_AUTOGRAD = (
    {"training window 700": window_700, "mean of the last 2,000 training windows": mean_of_last_2000},
    ("--config.train.log_every=1",),
)
RECIPES = {
    "flux_lstm_128x2": Recipe(1.834, "one fixed training window, lowest legible", {"a fixed training window": fixed_window}),
    "lstm_1024": Recipe(2.356, "held-out windows, after one epoch", {"held-out text, after one epoch": first_epoch}),
    "autograd_rnn_100": Recipe(2.706, "training window 700", *_OF_AUTOGRAD),
    "autograd_rnn_100_stable": Recipe(2.706, "training window 700", *_OF_AUTOGRAD),
    "autograd_lstm_100": Recipe(2.884, "training window 700", *_OF_AUTOGRAD),
    "autograd_gru_100": Recipe(None, "a heading without code", *_OF_AUTOGRAD),
    "keras_lstm_256": Recipe(None, "prints no loss", {}),
    "keras_lstm_256_all": Recipe(None, "prints no loss", {}),
    "torch_gru_512": Recipe(None, "prints no loss", {}),
}


def train(name: str, seed: int, fraction: float) -> dict:
    """Train a recipe in its workdir and return the record of the run."""
    recipe = RECIPES[name]
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    if config.train.steps is None:
        length = f"--config.train.epochs={config.train.epochs * fraction}"
    else:
        length = f"--config.train.steps={max(1, round(config.train.steps * fraction))}"
    workdir = ROOT / "runs" / "recipes" / f"{name}-{seed}-{fraction:g}"
    command = [sys.executable, "-m", "charlm.train", "--config", f"configs/{name}.py", "--workdir", str(workdir)]
    subprocess.run([*command, f"--config.seed={seed}", length, *recipe.flags], check=True, cwd=ROOT)
    result, manifest = (json.loads((workdir / f"{file}.json").read_text()) for file in ("result", "manifest"))
    lines = read_metrics(workdir / "metrics.jsonl")
    validation = [(line["chars"], round(line["nats_per_char"], 4)) for line in lines if line["split"] == "val"]
    return {
        "machine": machine_of(manifest),
        "name": name,
        "seed": seed,
        "fraction": fraction,
        "status": result["status"],
        "steps": result["steps"],
        "chars": result["chars"],
        "measures": {what: round(measure(workdir, lines), 4) for what, measure in recipe.measures.items()},
        "held_out": validation[-1][1],
        "held_out_best": min(loss for _, loss in validation),
        "chars_per_second": round(result["chars_per_second"]),
        "train_seconds": round(result["train_seconds"], 1),
        "params_sha256": result["params_sha256"],
        "validation": validation,
    }


def report() -> None:
    """Print a table of the longest runs of each recipe in Markdown, and draw curves.png."""
    records = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    columns = ("config", "source", "charlm, measured as in the source", "held-out text, at the end (best)", "length")
    columns += ("characters per second", "date")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    curves = {}
    for name, recipe in RECIPES.items():
        ours = [record for record in records if record["name"] == name]
        if not ours:
            continue
        longest = max(record["fraction"] for record in ours)
        # The latest run of each seed.
        runs = list({record["seed"]: record for record in ours if record["fraction"] == longest}.values())
        curves[name] = runs[0]

        def mean(values: list[float]) -> str:
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            return f"{statistics.fmean(values):.3f}{spread}"

        measured = "; ".join(f"{mean([run['measures'][what] for run in runs])}: {what}" for what in recipe.measures)
        source = f"{recipe.source}: {recipe.source_what}" if recipe.source else recipe.source_what
        held_out = f"{mean([run['held_out'] for run in runs])} ({mean([run['held_out_best'] for run in runs])})"
        seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
        length = (
            f"{runs[0]['chars'] / 1e6:.1f} million characters{'' if longest == 1 else f' ({longest:g} of the whole)'}{seeds}"
        )
        rate = f"{statistics.median(run['chars_per_second'] for run in runs):,.0f}"
        print(f"| `{name}.py` | {source} | {measured or '-'} | {held_out} | {length} | {rate} | {runs[0]['date']} |")
    draw(curves)


def draw(records: dict[str, dict]) -> None:
    """Draw the held-out loss over the characters trained on, one line for each recipe."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, record in records.items():
        chars, losses = zip(*record["validation"])
        (line,) = axes.plot(np.array(chars) / 1e6, losses, "o-", markersize=3, linewidth=1.4, label=name)
        axes.annotate(
            f"{losses[-1]:.2f}",
            (chars[-1] / 1e6, losses[-1]),
            xytext=(5, 0),
            textcoords="offset points",
            color=line.get_color(),
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("million characters trained on")
    axes.set_ylabel("held-out nats per character")
    axes.grid(alpha=0.25, which="both")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(str(HERE / "curves.png"))


def main() -> None:
    logging.set_verbosity(logging.ERROR)  # Orbax warns about things that are intended.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(RECIPES)}; default: all")
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction of the recipe's length to train for")
    parser.add_argument("--seeds", default="0", help="seeds, for example 0,1,2")
    parser.add_argument("--report", action="store_true", help="only print the table and draw the curves")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(RECIPES):
        parser.error(f"unknown recipe {', '.join(sorted(unknown))}; the recipes are {', '.join(RECIPES)}")
    if not arguments.report:
        for name in arguments.names or RECIPES:
            for seed in map(int, arguments.seeds.split(",")):
                append_record(HERE, train(name, seed, arguments.fraction))
    report()


if __name__ == "__main__":
    main()
