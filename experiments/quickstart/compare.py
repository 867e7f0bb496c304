"""Compare the time of the quickstart's commands with that of bare PyTorch training steps on the same number of characters.

    pip install -c constraints.txt -e '.[shakespeare,parity]'
    python experiments/quickstart/compare.py [--config.KEY=VALUE ...]

PyTorch trains `nn.LSTM` with 256 units (embedding 256, batch 32 x 64, cross-entropy, Adam) on random ids in memory. Only the
training steps are timed, without imports, compilation, evaluation, saving and sampling. charlm runs the training command and
the sampling command in fresh processes, with a fresh workdir and an empty cache, and all of their time counts. PyTorch is timed
just before and just after charlm, and its two times are averaged. The script appends a line to results.jsonl.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

from experiments import records  # noqa: E402

BATCH, SEQ_LEN, HIDDEN, VOCAB = 32, 64, 256, 76
STEPS = 400


class Model(torch.nn.Module):
    """The model in the usual style of PyTorch."""

    def __init__(self, hidden: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, hidden)
        self.lstm = torch.nn.LSTM(hidden, hidden)
        self.head = torch.nn.Linear(hidden, VOCAB)

    def forward(self, ids, state):
        h, state = self.lstm(self.embedding(ids), state)
        return self.head(h), state


def torch_chars_per_second(hidden: int = HIDDEN, steps: int = STEPS) -> float:
    """Return the rate of training steps with a carried state. Ten untimed steps come first."""
    model = Model(hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    ids = torch.randint(0, VOCAB, (SEQ_LEN + 1, BATCH))
    state = (torch.zeros(1, BATCH, hidden), torch.zeros(1, BATCH, hidden))
    for step in range(steps + 10):
        if step == 10:
            start = time.perf_counter()
        logits, state = model(ids[:-1], state)
        state = tuple(s.detach() for s in state)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), ids[1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return steps * BATCH * SEQ_LEN / (time.perf_counter() - start)


def charlm_seconds(folder: str, flags: list[str]) -> tuple[float, dict]:
    """Return the wall-clock seconds of the training command and the sampling command together, and result.json."""
    env = os.environ | {"CHARLM_CACHE": f"{folder}/cache"}
    workdir = f"{folder}/run"
    start = time.perf_counter()
    train = [sys.executable, "-m", "charlm.train", "--config", "configs/quickstart.py", "--workdir", workdir, *flags]
    subprocess.run(train, check=True, env=env)
    subprocess.run([sys.executable, "-m", "charlm.sample", "--workdir", workdir], check=True, env=env)
    return time.perf_counter() - start, json.loads(Path(workdir, "result.json").read_text())


def main() -> None:
    before = torch_chars_per_second()
    with tempfile.TemporaryDirectory() as folder:
        seconds, result = charlm_seconds(folder, sys.argv[1:])
        manifest = json.loads(Path(folder, "run", "manifest.json").read_text())
    after = torch_chars_per_second()
    torch_seconds = result["chars"] * (1 / before + 1 / after) / 2
    line = {
        "machine": records.machine_of(manifest),
        "flags": sys.argv[1:],
        "chars": result["chars"],
        "val_nats_per_char": result["val_nats_per_char"],
        "test_nats_per_char": result["test_nats_per_char"],
        "charlm_seconds": round(seconds, 1),
        "charlm_chars_per_second_in_steps": round(result["chars_per_second"]),
        "torch_chars_per_second": [round(before), round(after)],
        "torch_seconds": round(torch_seconds, 1),
        "ratio": round(seconds / torch_seconds, 3),
    }
    print(json.dumps(records.append(Path(__file__).parent, line), indent=2), file=sys.stderr)


if __name__ == "__main__":
    main()
