"""Measure the models of a sweep on lines that none of them has seen, and draw the shares of right answers.

    python experiments/tasks/measure.py [--workdir runs/tasks] [--draw]

The script scores 500 new lines for each task: `parity` with 32 bits and with 128, which is four times as long as any line in
training, and `recall`. It counts an answer as right if the model gives it a probability of more than one half. The script
appends a line for each run to results.jsonl and draws tasks.png. `--draw` only draws.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import charlm

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

from experiments import records  # noqa: E402
from experiments.tasks import texts  # noqa: E402

HERE = Path(__file__).parent
NUM_LINES = 500
# {name of the test: (task, a new line)}.
TESTS = {
    "parity of 32 bits": ("parity", lambda draw: texts.parity_line(draw, texts.MAX_BITS)),
    "parity of 128 bits": ("parity", lambda draw: texts.parity_line(draw, 4 * texts.MAX_BITS)),
    "recall": ("recall", lambda draw: texts.recall_line(draw, texts.NUM_PAIRS)),
}


def share_of_right_answers(model: charlm.LanguageModel, lines: list[str]) -> float:
    """Return the share of the answers in some lines to which a model gives a probability of more than one half."""
    nats = model.score("".join(lines)).nats
    starts = np.cumsum([0, *map(len, lines[:-1])])
    at = np.concatenate([start + np.array(texts.answers(line)) for start, line in zip(starts, lines)])
    return float(np.mean(nats[at] < np.log(2)))


def measure(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a record for each run and test."""
    for result in sorted(folder.glob("*/result.json")):
        model, manifest = charlm.load(result.parent), json.loads((result.parent / "manifest.json").read_text())
        config = model.config
        values = {"machine": records.machine_of(manifest), "cell": config.model.cell, "width": config.model.hidden_size}
        values |= {"num_params": json.loads(result.read_text())["num_params"]}
        values |= {"rate": config.optimizer.learning_rate, "seed": config.seed, "steps": config.train.steps}
        for test, (task, make_line) in TESTS.items():
            if config.data.corpus.endswith(f":{task}"):
                draw = random.Random(2)
                lines = [make_line(draw) for _ in range(NUM_LINES)]
                yield values | {"test": test, "right": round(share_of_right_answers(model, lines), 4)}


def best() -> dict[str, dict[str, list[float]]]:
    """Return {cell: {test: the shares of all seeds at the cell's best rate on this test}}, from the latest records."""
    latest: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
    for line in (HERE / "results.jsonl").read_text().splitlines():
        each = json.loads(line)
        latest.setdefault((each["cell"], each["test"]), {}).setdefault(each["rate"], {})[each["seed"]] = each["right"]
    found: dict[str, dict[str, list[float]]] = {}
    for (cell, test), of_rates in latest.items():
        shares = [list(of_seeds.values()) for of_seeds in of_rates.values()]
        found.setdefault(cell, {})[test] = max(shares, key=statistics.fmean)
    return found


def draw() -> None:
    """Draw the mean share of right answers of each cell on record for all tests, with a dot for each seed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = {cell: shares for cell, shares in best().items() if len(shares) == len(TESTS)}
    cells = sorted(found, key=lambda cell: sum(map(statistics.fmean, found[cell].values())))
    figure, axes = plt.subplots(1, len(TESTS), figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, test in zip(axes, TESTS):
        axis.barh(cells, [statistics.fmean(found[cell][test]) for cell in cells], color="#9ecae1")
        for cell in cells:
            axis.plot(found[cell][test], [cell] * len(found[cell][test]), "k.", markersize=4)
        axis.set(title=test, xlim=(0, 1.02), xlabel="share of right answers")
    figure.savefig(HERE / "tasks.png", dpi=110)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/tasks", help="the folder of the sweep")
    parser.add_argument("--draw", action="store_true", help="only draw tasks.png")
    flags = parser.parse_args()
    for record in () if flags.draw else measure(Path(flags.workdir)):
        print(records.append(HERE, record), flush=True)
    draw()


if __name__ == "__main__":
    main()
