"""Train every cell with about as many parameters as an LSTM of 128 units, one run at a time.

    pip install -c constraints.txt -e '.[shakespeare]'
    python experiments/cells/run.py [--rates 0.005,0.01,0.02] [--seeds 0,1,2] [--draw]

Every run has the machine to itself, so the times can be compared. The script appends a line for each run to results.jsonl and
draws cells.png. `--draw` only draws.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

from charlm.nn.cells import CELLS  # noqa: E402
from experiments import records  # noqa: E402
from experiments.cells import config  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "runs" / "cells"


def train(cell: str, rate: float, seed: int) -> dict:
    """Train one run alone and return its record."""
    workdir, width = FOLDER / f"{cell}-{rate:g}-{seed}", config.width(cell)
    flags = {"config": HERE / "config.py", "workdir": workdir, "config.model.cell": cell, "config.model.hidden_size": width}
    flags |= {"config.seed": seed, "config.optimizer.learning_rate": rate}
    argv = [sys.executable, "-m", "charlm.train", *(f"--{name}={value}" for name, value in flags.items())]
    subprocess.run(argv, cwd=ROOT, check=True)
    result = json.loads((workdir / "result.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curve = [[line["chars"], line["seconds"], line["nats_per_char"]] for line in lines if line["split"] == "val"]
    values = {"cell": cell, "width": width, "num_params": result["num_params"], "rate": rate, "seed": seed}
    values |= {name: result[name] for name in ("val_nats_per_char", "chars_per_second", "train_seconds")}
    return values | {"curve": curve}


def best(found: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the runs of each cell at its best rate: that with the lowest mean loss."""
    latest: dict[str, dict[float, dict[int, Mapping[str, Any]]]] = {}
    for record in found:
        latest.setdefault(record["cell"], {}).setdefault(record["rate"], {})[record["seed"]] = record
    chosen = {}
    for cell, of_rates in latest.items():
        alike = [list(of_seeds.values()) for of_seeds in of_rates.values()]
        chosen[cell] = min(alike, key=lambda each: statistics.fmean(record["val_nats_per_char"] for record in each))
    return chosen


def draw() -> None:
    """Draw the loss of all cells over characters and over seconds, the mean of the seeds."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import numpy as np

    found = best(json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines())
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for k, (cell, alike) in enumerate(found.items()):
        curves = [np.array(record["curve"]) for record in alike]
        mean, style = np.mean(curves, axis=0), {"color": plt.cm.tab20(k % 20), "marker": "o^s"[k % 3], "markersize": 3}
        axes[0].plot(mean[:, 0] / 1e6, mean[:, 2], label=cell, **style)
        axes[1].plot(mean[:, 1], mean[:, 2], **style)
    axes[0].set(xlabel="million characters", ylabel="validation loss in nats per character")
    axes[1].set(xlabel="seconds since the start, evaluation included", xscale="log")
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(HERE / "cells.png", dpi=110)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="0.005,0.01,0.02", help="learning rates")
    parser.add_argument("--seeds", default="0,1,2", help="seeds")
    parser.add_argument("--draw", action="store_true", help="only draw cells.png")
    flags = parser.parse_args()
    runs = [(float(rate), int(seed)) for seed in flags.seeds.split(",") for rate in flags.rates.split(",")]
    for rate, seed in [] if flags.draw else runs:
        for cell in CELLS:
            print(records.append(HERE, train(cell, rate, seed)), flush=True)
    draw()


if __name__ == "__main__":
    main()
