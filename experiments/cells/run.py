"""Compare all cells at equal parameters: a sweep of rates, then three seeds of each cell at its best rate, one run at a time.

    pip install -c constraints.txt -e '.[shakespeare]'
    python experiments/cells/run.py

The sweep trains the rates of a cell side by side (`--executor vmap`), in runs/cells. The runs of the seeds have the machine to
themselves, so their times can be compared. The script appends a line for each of them to results.jsonl and draws cells.png.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

from charlm.nn.cells import CELLS  # noqa: E402
from experiments import records  # noqa: E402
from experiments.cells import sweep  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "runs" / "cells"
SEEDS = (0, 1, 2)


def best_rates() -> dict[str, float]:
    """Run the sweep; return the rate with the lowest loss for each cell."""
    argv = [sys.executable, "-m", "charlm.sweep", f"--sweep={HERE / 'sweep.py'}", f"--workdir={FOLDER / 'rates'}"]
    subprocess.run([*argv, "--executor=vmap"], cwd=ROOT, check=True)
    losses: dict[str, dict[float, float]] = {}
    for line in (FOLDER / "rates" / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        loss = (record["result"] or {}).get("val_nats_per_char")
        if loss is not None:
            overrides = record["overrides"]
            losses.setdefault(overrides["model.cell"], {})[overrides["optimizer.learning_rate"]] = loss
    return {cell: min(of_cell, key=of_cell.get) for cell, of_cell in losses.items()}


def train(cell: str, rate: float, seed: int) -> dict:
    """Train one run alone and return its record."""
    workdir, width = FOLDER / f"{cell}-{seed}", sweep.width(cell)
    config = FOLDER / "base.py"
    config.write_text((HERE / "sweep.py").read_text() + "\n\nget_config = base\n")
    flags = {"config.model.cell": cell, "config.model.hidden_size": width, "config.seed": seed}
    flags |= {"config": config, "workdir": workdir, "config.optimizer.learning_rate": rate}
    argv = [sys.executable, "-m", "charlm.train", *(f"--{name}={value}" for name, value in flags.items())]
    subprocess.run(argv, cwd=ROOT, check=True)
    result = json.loads((workdir / "result.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curve = [[line["chars"], line["seconds"], line["nats_per_char"]] for line in lines if line["split"] == "val"]
    values = {"cell": cell, "width": width, "num_params": result["num_params"], "rate": rate, "seed": seed}
    values |= {name: result[name] for name in ("val_nats_per_char", "chars_per_second", "train_seconds")}
    return values | {"curve": curve}


def draw() -> None:
    """Draw the loss of all cells over characters and over seconds, the mean of the seeds."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import numpy as np

    found = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for k, cell in enumerate(CELLS):
        curves = [np.array(record["curve"]) for record in found if record["cell"] == cell]
        if not curves:
            continue
        mean, style = np.mean(curves, axis=0), {"color": plt.cm.tab20(k % 20), "marker": "o^s"[k % 3], "markersize": 3}
        axes[0].plot(mean[:, 0] / 1e6, mean[:, 2], label=cell, **style)
        axes[1].plot(mean[:, 1], mean[:, 2], **style)
    axes[0].set(xlabel="million characters", ylabel="validation loss in nats per character")
    axes[1].set(xlabel="seconds of training", xscale="log")
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(HERE / "cells.png", dpi=110)


def main() -> None:
    """Run the experiment."""
    if "--draw" not in sys.argv:
        rates = best_rates()
        for seed in SEEDS:
            for cell in CELLS:
                print(records.append(HERE, train(cell, rates[cell], seed)), flush=True)
    draw()


if __name__ == "__main__":
    main()
