"""Train tiny Shakespeare, and compare the time with that of bare PyTorch training steps.

    pip install -c constraints.txt -e '.[shakespeare,parity]'
    python experiments/tinyshakespeare/compare.py [--setting cpu|ten_minutes] [--seeds 0,1,2]

The script trains configs/tinyshakespeare.py in a fresh process and workdir, once for each seed. The time includes imports,
encoding and compilation. It does not include the download, which happens before if the text is not in the cache. The script
then scores the last tenth of the text with the checkpoint of the last step, without and with dynamic evaluation. PyTorch is
timed just before and just after each run on bare training steps of `nn.LSTM`, batch 32 x 64 and Adam
(experiments/quickstart/compare.py). The script appends a line for each run to results.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from charlm.config import default_config  # noqa: E402
from charlm.data.corpus import load_corpus  # noqa: E402
from experiments import records  # noqa: E402
from experiments.quickstart.compare import torch_chars_per_second  # noqa: E402


class Budget(NamedTuple):
    """The time that PyTorch takes: an LSTM of `hidden` units on `chars` characters. `steps` of them are timed."""

    hidden: int
    chars: float
    steps: int


BUDGETS = {"cpu": Budget(256, 3.5e6, 400), "ten_minutes": Budget(512, 8e6, 150)}


def compare(setting: str, seed: int) -> dict[str, Any]:
    """Train one run between two measurements of PyTorch and return its record."""
    budget = BUDGETS[setting]
    before = torch_chars_per_second(budget.hidden, budget.steps)
    with tempfile.TemporaryDirectory() as folder:
        workdir = f"{folder}/run"
        start = time.perf_counter()
        train = [f"--config=configs/tinyshakespeare.py:{setting}", f"--workdir={workdir}", f"--config.seed={seed}"]
        subprocess.run([sys.executable, "-m", "charlm.train", *train], check=True, cwd=ROOT)
        seconds = time.perf_counter() - start
        result, manifest = (json.loads(Path(workdir, f"{name}.json").read_text()) for name in ("result", "manifest"))
        after = torch_chars_per_second(budget.hidden, budget.steps)
        evaluate = [f"--workdir={workdir}", "--checkpoint=latest", "--dynamic", "--json"]
        command = [sys.executable, "-m", "charlm.evaluate", *evaluate]
        score = json.loads(subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout)
    torch_seconds = budget.chars * (1 / before + 1 / after) / 2
    return {
        "machine": records.machine_of(manifest),
        "setting": setting,
        "seed": seed,
        "chars": result["chars"],
        "val_nats_per_char": round(score["nats_per_char"], 4),
        "dynamic_val_nats_per_char": round(score["dynamic_nats_per_char"], 4),
        "charlm_seconds": round(seconds, 1),
        "charlm_chars_per_second_in_steps": round(result["chars_per_second"]),
        "torch_chars_per_second": [round(before), round(after)],
        "torch_chars": budget.chars,
        "torch_seconds": round(torch_seconds, 1),
        "ratio": round(seconds / torch_seconds, 3),
    }


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=BUDGETS, default="cpu", help="the setting of configs/tinyshakespeare.py")
    parser.add_argument("--seeds", default="0,1,2", help="seeds")
    flags = parser.parse_args()
    data = default_config().data
    data.corpus = "tinyshakespeare"
    load_corpus(data)  # Downloads the text if it is not in the cache.
    for seed in map(int, flags.seeds.split(",")):
        print(json.dumps(records.append(Path(__file__).parent, compare(flags.setting, seed)), indent=2), file=sys.stderr)


if __name__ == "__main__":
    main()
