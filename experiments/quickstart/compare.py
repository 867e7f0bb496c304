"""How long the quickstart takes, command to sample, against bare PyTorch training steps on as many characters.

    pip install -c constraints.txt '.[shakespeare,parity]'
    python experiments/quickstart/compare.py [--config.KEY=VALUE ...]

PyTorch trains `nn.LSTM` with 256 units (embedding 256, batch 32 x 64, cross-entropy, Adam) on random ids that lie in
memory: steps alone, with nothing imported, compiled, evaluated, saved or sampled in the time. charlm runs its two
commands in fresh processes and a fresh workdir, with the corpus to encode, and everything counts. PyTorch is timed
just before and just after, and the two times are averaged. Appends a line to results.jsonl.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

BATCH, SEQ_LEN, HIDDEN, VOCAB = 32, 64, 256, 76
STEPS = 400


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, HIDDEN)
        self.lstm = torch.nn.LSTM(HIDDEN, HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, VOCAB)

    def forward(self, ids, state):
        h, state = self.lstm(self.embedding(ids), state)
        return self.head(h), state


def torch_chars_per_second() -> float:
    """The rate over STEPS training steps with the state carried, after ten that do not count."""
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    ids = torch.randint(0, VOCAB, (SEQ_LEN + 1, BATCH))
    state = (torch.zeros(1, BATCH, HIDDEN), torch.zeros(1, BATCH, HIDDEN))
    for step in range(STEPS + 10):
        if step == 10:
            start = time.perf_counter()
        logits, state = model(ids[:-1], state)
        state = tuple(s.detach() for s in state)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), ids[1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return STEPS * BATCH * SEQ_LEN / (time.perf_counter() - start)


def charlm_seconds(folder: str, flags: list[str]) -> tuple[float, dict]:
    """Wall-clock seconds of the training and the sampling command, and result.json."""
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
        "date": datetime.date.today().isoformat(),
        "machine": f"{manifest['cpu_cores']} cores, {manifest['cpu_model']}",
        "jax": manifest["packages"]["jax"],
        "torch": torch.__version__,
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
    print(json.dumps(line, indent=2), file=sys.stderr)
    with open(Path(__file__).parent / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
