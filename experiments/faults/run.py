"""Kill the training command again and again, at random places, and see that nothing is lost.

    python experiments/faults/run.py [--kills 100] [--seed 0]

One run is left alone. The others are killed at random steps and phases (victim.py), started again, killed again, up to ten
times, and then left to end. Each must end with the parameters of the first one to the bit, and with its metrics and its
samples, none of them twice. A kill counts if it hit a live process. Appends a line to results.jsonl.
"""

import argparse
import collections
import datetime
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax

from charlm.runs.tracking import read_metrics
from charlm.system.machine import cpu_model, num_cores

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KILLS_A_RUN = 10
# A small model, which does everything often.
FLAGS = (
    "--config=configs/quickstart.py", "--config.model.hidden_size=32", "--config.model.embedding_size=16",
    "--config.model.dropout=0.2", "--config.batching.batch_size=8", "--config.batching.seq_len=32",
    "--config.eval.max_chars=1000", "--config.eval.num_streams=512", "--config.eval.batch_size=512",
    "--config.train.steps=600", "--config.train.log_every=20", "--config.train.eval_every=100",
    "--config.train.checkpoint_every=50", "--config.train.sample_every=150", "--config.train.steps_per_dispatch=10",
    "--config.sample.length=100",
)  # fmt: skip


class Phase(NamedTuple):
    """Where a kill can fall.

    Attributes:
        weight: how often it does.
        times: in which entry into the phase at most, counted from a start.
        seconds: how long after that at most.
    """

    weight: float
    times: int
    seconds: float


PHASES = {
    "begin": Phase(2, 1, 0.01),
    "steps": Phase(4, 12, 0.02),
    "evaluation": Phase(2, 1, 0.2),
    "sample": Phase(1, 1, 0.1),
    "save": Phase(4, 2, 0.1),
    "end": Phase(0.3, 1, 0),
}


class Outcome(NamedTuple):
    """What a run leaves that must not depend on what happened to it."""

    params_sha256: str
    metrics: list[tuple]
    samples: str


def outcome_of(workdir: Path) -> Outcome:
    keys = ("step", "split", "nats_per_char", "grad_norm", "learning_rate")
    metrics = [tuple(line.get(key) for key in keys) for line in read_metrics(workdir / "metrics.jsonl")]
    sha256 = json.loads((workdir / "result.json").read_text())["params_sha256"]
    return Outcome(sha256, metrics, (workdir / "samples.txt").read_text(encoding="utf-8"))


def train(workdir: Path, flags: tuple[str, ...], trap: tuple[str, int, float] | None = None) -> int:
    """Run the command to its end or to its death; its exit code."""
    begin = ["-m", "charlm.train"] if trap is None else [str(HERE / "victim.py"), *map(str, trap)]
    command = [sys.executable, *begin, *flags, f"--workdir={workdir}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{command} ended with {found.returncode}:\n{found.stderr}")
    return found.returncode


def disturb(workdir: Path, flags: tuple[str, ...], kills: int, draw: random.Random, phases: dict[str, Phase]) -> list[str]:
    """Train with so many kills in between; the phases that they fell in."""
    hit = []
    while len(hit) < kills:
        begun = (workdir / "config.json").exists()
        possible = {name: each for name, each in phases.items() if name != "begin" or not begun}
        (phase,) = draw.choices(list(possible), [each.weight for each in possible.values()])
        trap = phase, draw.randint(1, phases[phase].times), draw.uniform(0, phases[phase].seconds)
        if train(workdir, flags, trap) == -signal.SIGKILL:
            hit.append(phase)
        else:  # It was over before the trap was reached.
            break
    assert train(workdir, flags) == 0
    return hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, hits, differ, runs = random.Random(arguments.seed), collections.Counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder, "undisturbed"), FLAGS)
        expected = outcome_of(Path(folder, "undisturbed"))
        while hits.total() < arguments.kills:
            runs += 1
            workdir = Path(folder, str(runs))
            hit = disturb(workdir, FLAGS, min(KILLS_A_RUN, arguments.kills - hits.total()), draw, PHASES)
            hits.update(hit)
            same = outcome_of(workdir) == expected
            differ += not same
            print(f"run {runs}: killed in {', '.join(hit) or 'none'}; {'the same' if same else 'DIFFERS'}", flush=True)
    print("\n| phase | kills |\n| --- | --- |\n" + "\n".join(f"| {phase} | {hits[phase]} |" for phase in PHASES))
    print(f"\n{hits.total()} kills in {runs} runs; {differ} runs differ from the undisturbed one")
    line = {"date": datetime.date.today().isoformat(), "machine": f"{num_cores()} cores, {cpu_model()}"}
    line |= {"jax": jax.__version__, "python": platform.python_version(), "seed": arguments.seed}
    line |= {"kills": dict(hits), "runs": runs, "differ": differ, "params_sha256": expected.params_sha256}
    with open(HERE / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    if differ:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
