"""Measure how fast documents are trained, compared with the same text as one stream, at the shape of the quickstart.

    pip install -c constraints.txt -e '.[shakespeare]'
    python experiments/names/speed.py [ROUNDS]

The training loop runs on the built-in plays: as one text, and with each line as a document, so that the state is reset every 40
characters. Each of them runs with the text on the device, and with the text in the memory map, from which threads on the host
read the windows ahead (data.device_bytes). The four runs take turns for ROUNDS rounds (default 3), in another order in each
round. The rate is that of the steps 51 to 250, without compilation. The script appends a line to results.jsonl.
"""

import json
import runpy
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))  # So that the script finds the other experiments.

import charlm  # noqa: E402
from experiments import records  # noqa: E402

SHORT = {"train.steps": 250, "train.log_every": 50, "train.eval_every": 0, "train.sample_every": 0}
RUNS = {
    "stream, device": {},
    "documents, device": {"data.documents": "lines"},
    "stream, host": {"data.device_bytes": 0},
    "documents, host": {"data.documents": "lines", "data.device_bytes": 0},
}


def rate(keys: dict[str, Any]) -> float:
    """Return the characters per second of a run of the quickstart with these keys."""
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.update_from_flattened_dict(SHORT | keys)
    with tempfile.TemporaryDirectory() as folder:
        lines = [line for line in charlm.fit(config, folder).metrics() if line["split"] == "train"]
    chars, seconds = (lines[-1][key] - lines[0][key] for key in ("chars", "seconds"))
    return chars / seconds


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    rates: dict[str, list[float]] = {name: [] for name in RUNS}
    order = list(RUNS)
    for _ in range(rounds):
        for name in order:
            rates[name].append(rate(RUNS[name]))
        order = order[1:] + order[:1]
    found = {}
    for place in ("device", "host"):
        ratios = [one / other for one, other in zip(rates[f"stream, {place}"], rates[f"documents, {place}"])]
        found[place] = {"ratios": [round(ratio, 3) for ratio in ratios], "median": round(statistics.median(ratios), 3)}
        print(f"text on the {place}: documents take {found[place]['median']} times as long as one stream")
    medians = {name: round(statistics.median(each)) for name, each in rates.items()}
    print(json.dumps(records.append(HERE, {"kind": "speed", "chars_per_second": medians, "seconds_ratio": found}), indent=2))


if __name__ == "__main__":
    main()
