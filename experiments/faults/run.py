"""Kill the training command at random times again and again, and check that nothing is lost.

    python experiments/faults/run.py [--kills 100] [--seed 0]

One run is trained undisturbed. Each further run is killed at random steps and in random phases (victim.py). It is started again
after each kill, is killed up to ten times, and is then left to finish. It must end with the same parameters as the undisturbed
run, to the bit, and with the same metrics and samples, without repetitions. A kill counts only if it hit a live process. The
script appends a line to results.jsonl.
"""

import argparse
import collections
import json
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from charlm.runs.tracking import read_metrics

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

from experiments import records  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KILLS_PER_RUN = 10
# A small model that logs, evaluates, saves and samples often.
FLAGS = (
    "--config=configs/quickstart.py", "--config.model.hidden_size=32", "--config.model.embedding_size=16",
    "--config.model.dropout=0.2", "--config.batching.batch_size=8", "--config.batching.seq_len=32",
    "--config.eval.max_chars=1000", "--config.eval.num_streams=512", "--config.eval.batch_size=512",
    "--config.train.steps=600", "--config.train.log_every=20", "--config.train.eval_every=100",
    "--config.train.checkpoint_every=50", "--config.train.sample_every=150", "--config.train.steps_per_dispatch=10",
    "--config.sample.length=100",
)  # fmt: skip


class Phase(NamedTuple):
    """A phase of a run in which a kill can happen.

    Attributes:
        weight: relative probability of this phase.
        times: the kill happens after the first to the `times`-th entry into the phase, counted from the start of the process.
        seconds: the longest delay between that entry and the kill.
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
    """The part of a run's results that must not depend on kills."""

    params_sha256: str
    metrics: list[tuple]
    samples: str


def outcome_of(workdir: Path) -> Outcome:
    """Return the outcome of a finished run."""
    keys = ("step", "split", "nats_per_char", "grad_norm", "learning_rate")
    metrics = [tuple(line.get(key) for key in keys) for line in read_metrics(workdir / "metrics.jsonl")]
    sha256 = json.loads((workdir / "result.json").read_text())["params_sha256"]
    return Outcome(sha256, metrics, (workdir / "samples.txt").read_text(encoding="utf-8"))


def train(workdir: Path, flags: tuple[str, ...], trap: tuple[str, int, float] | None = None) -> int:
    """Run the training command until it ends or is killed. Return its exit code.

    `trap` is the phase, the number of the entry and the delay of a kill (victim.py).
    """
    program = ["-m", "charlm.train"] if trap is None else [str(HERE / "victim.py"), *map(str, trap)]
    command = [sys.executable, *program, *flags, f"--workdir={workdir}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{command} ended with {found.returncode}:\n{found.stderr}")
    return found.returncode


def disturb(workdir: Path, flags: tuple[str, ...], kills: int, draw: random.Random, phases: dict[str, Phase]) -> list[str]:
    """Train a run to its end, with up to `kills` kills. Return the phases in which they happened."""
    hit = []
    while len(hit) < kills:
        created = (workdir / "config.json").exists()
        possible = {name: each for name, each in phases.items() if name != "begin" or not created}
        (phase,) = draw.choices(list(possible), [each.weight for each in possible.values()])
        trap = phase, draw.randint(1, phases[phase].times), draw.uniform(0, phases[phase].seconds)
        if train(workdir, flags, trap) == -signal.SIGKILL:
            hit.append(phase)
        else:  # The run finished before the kill.
            break
    assert train(workdir, flags) == 0
    return hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="total number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random kills")
    arguments = parser.parse_args()
    draw, hits, differ, runs = random.Random(arguments.seed), collections.Counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder, "undisturbed"), FLAGS)
        expected = outcome_of(Path(folder, "undisturbed"))
        while hits.total() < arguments.kills:
            runs += 1
            workdir = Path(folder, str(runs))
            hit = disturb(workdir, FLAGS, min(KILLS_PER_RUN, arguments.kills - hits.total()), draw, PHASES)
            hits.update(hit)
            same = outcome_of(workdir) == expected
            differ += not same
            print(f"run {runs}: kills in {', '.join(hit) or 'no phase'}; {'same' if same else 'DIFFERENT'} outcome", flush=True)
    print("\n| phase | kills |\n| --- | --- |\n" + "\n".join(f"| {phase} | {hits[phase]} |" for phase in PHASES))
    print(f"\n{hits.total()} kills in {runs} runs; {differ} runs differ from the undisturbed run")
    found = {"kills": dict(hits), "runs": runs, "differ": differ, "params_sha256": expected.params_sha256}
    records.append(HERE, {"seed": arguments.seed, **found})
    if differ:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
