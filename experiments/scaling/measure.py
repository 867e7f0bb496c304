"""Measure weak scaling: one, two and four processes on one machine, with the same share of a batch for each process.

    pip install -c constraints.txt -e '.[shakespeare]'
    python experiments/scaling/measure.py [--rounds N]

The script runs the training command on `configs/quickstart.py` with 32 streams for each process. Each process runs on one core.
The jobs take turns, in another order in each round. The script prints a table in Markdown and appends a line for each row to
results.jsonl. It runs on Linux. Five rounds take about six minutes on two cores.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from charlm.system.machine import num_cores

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

from experiments import records  # noqa: E402

HERE = Path(__file__).parent
CONFIG = HERE.parent.parent / "configs" / "quickstart.py"
PROCESSES = (1, 2, 4)
STREAMS, STEPS = 32, 300


def chars_per_second(num_processes: int) -> float:
    """Return the rate of a job of `num_processes` processes, without compilation."""
    cores = sorted(os.sched_getaffinity(0))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        off = [f"--config.train.{key}=0" for key in ("eval_every", "checkpoint_every", "sample_every")]
        sizes = [f"--config.batching.batch_size={STREAMS * num_processes}", f"--config.train.steps={STEPS}"]
        command = [sys.executable, "-m", "charlm.train", f"--config={CONFIG}", f"--workdir={workdir}", *off, *sizes]
        if num_processes > 1:
            command += [f"--coordinator=localhost:{port}", f"--num_processes={num_processes}"]
        job = []
        for i in range(num_processes):
            more = [f"--process_id={i}"] if num_processes > 1 else []
            pin = {cores[i % len(cores)]}
            job.append(
                subprocess.Popen(
                    [*command, *more],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    preexec_fn=lambda pin=pin: os.sched_setaffinity(0, pin),
                )
            )
        for process in job:
            _, err = process.communicate()
            if process.returncode:
                raise SystemExit(err)
        return json.loads((workdir / "result.json").read_text())["chars_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each job is timed")
    rounds = parser.parse_args().rounds
    rates = {count: [] for count in PROCESSES}
    for k in range(rounds):
        for count in PROCESSES[k % len(PROCESSES) :] + PROCESSES[: k % len(PROCESSES)]:
            rates[count].append(chars_per_second(count))
    print("| processes | characters in a step | chars/s | x one process | of what its cores could do |")
    print("| --- | --- | --- | --- | --- |")
    for count, found in rates.items():
        rate = statistics.median(found)
        speedup = statistics.median(a / b for a, b in zip(found, rates[1]))
        efficiency = speedup / min(count, num_cores())
        print(f"| {count} | {STREAMS * 64 * count:,} | {rate:,.0f} | {speedup:.2f} | {efficiency:.0%} |")
        line = {"processes": count, "rounds": rounds, "chars_per_second": rate, "speedup": speedup, "efficiency": efficiency}
        records.append(HERE, line)


if __name__ == "__main__":
    main()
