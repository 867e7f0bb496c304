"""Train tiny Shakespeare, and compare the time with that of bare PyTorch training steps on 3.5 million characters.

    pip install -c constraints.txt -e '.[shakespeare,parity]'
    python experiments/tinyshakespeare/compare.py

The script trains configs/tinyshakespeare.py in a fresh process and workdir. The time includes imports, encoding and
compilation. It does not include the download, which happens before if the text is not in the cache. The script then scores the
last tenth of the text, without and with dynamic evaluation. PyTorch is timed just before and just after on bare training steps
of `nn.LSTM` with 256 units, batch 32 x 64 and Adam (experiments/quickstart/compare.py). The script appends a line to
results.jsonl.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from charlm.config import default_config  # noqa: E402
from charlm.data.corpus import load_corpus  # noqa: E402
from experiments import records  # noqa: E402
from experiments.quickstart.compare import torch_chars_per_second  # noqa: E402

TORCH_CHARS = 3.5e6


def main() -> None:
    data = default_config().data
    data.corpus = "tinyshakespeare"
    load_corpus(data)  # Downloads the text if it is not in the cache.
    before = torch_chars_per_second()
    with tempfile.TemporaryDirectory() as folder:
        workdir = f"{folder}/run"
        start = time.perf_counter()
        command = [sys.executable, "-m", "charlm.train", "--config", "configs/tinyshakespeare.py", "--workdir", workdir]
        subprocess.run(command, check=True, cwd=ROOT)
        seconds = time.perf_counter() - start
        result, manifest = (json.loads(Path(workdir, f"{name}.json").read_text()) for name in ("result", "manifest"))
        after = torch_chars_per_second()
        evaluate = [sys.executable, "-m", "charlm.evaluate", "--workdir", workdir, "--dynamic", "--json"]
        score = json.loads(subprocess.run(evaluate, check=True, cwd=ROOT, capture_output=True, text=True).stdout)
    torch_seconds = TORCH_CHARS * (1 / before + 1 / after) / 2
    line = {
        "machine": records.machine_of(manifest),
        "chars": result["chars"],
        "val_nats_per_char": round(score["nats_per_char"], 4),
        "dynamic_val_nats_per_char": round(score["dynamic_nats_per_char"], 4),
        "charlm_seconds": round(seconds, 1),
        "charlm_chars_per_second_in_steps": round(result["chars_per_second"]),
        "torch_chars_per_second": [round(before), round(after)],
        "torch_seconds": round(torch_seconds, 1),
        "ratio": round(seconds / torch_seconds, 3),
    }
    print(json.dumps(records.append(Path(__file__).parent, line), indent=2), file=sys.stderr)


if __name__ == "__main__":
    main()
