"""List the operations of a training step by the time that they take, from JAX's profiler.

    python experiments/throughput/operations.py [--cell lstm] [--hidden 512] [--layers 1] [--batch 64] [--top 25]

The names are those of XLA. XLA_FLAGS="--xla_dump_to=DIR --xla_dump_hlo_as_text" writes the definition of each name to DIR.
Operations can run at the same time, so their sum can exceed the time of the step.
"""

import argparse
import collections
import os
import sys
import tempfile
import time
from pathlib import Path

# A CPU traces single operations only with this flag. It must be set before JAX starts.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_enable_xprof_traceme=true"
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from experiments.throughput.peers import TRAINERS, Task, torch_model  # noqa: E402

# Names of events that are not operations: the executor, loops that contain operations, and waiting.
_NO_OPERATIONS = ("Execute", "while", "Await", "end: ")
_TRIES, _STEPS = 4, 8


def trace_steps(train) -> tuple[float, bytes]:
    """Trace some steps. Return their seconds and the trace."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with jax.profiler.trace(folder):
            train(_STEPS)
            seconds = time.perf_counter() - start
        (file,) = Path(folder).rglob("*.xplane.pb")
        return seconds, file.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", default="lstm")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--top", type=int, default=25, help="number of operations to list")
    arguments = parser.parse_args()
    task = Task(arguments.cell, arguments.hidden, arguments.layers, arguments.batch)
    windows = np.random.default_rng(0).integers(0, task.vocab, (task.batch, task.seq_len + 1))
    train = TRAINERS["charlm"](task, torch_model(task), windows)
    train(_STEPS)
    # Other programs interfere least with the fastest try.
    seconds, trace = min((trace_steps(train) for _ in range(_TRIES)), key=lambda seconds_and_trace: seconds_and_trace[0])
    milliseconds, calls = collections.Counter(), collections.Counter()
    for plane in jax.profiler.ProfileData.from_serialized_xspace(trace).planes:
        for line in plane.lines:
            for event in line.events:
                if "python" not in line.name and not any(word in event.name for word in _NO_OPERATIONS):
                    milliseconds[event.name] += event.duration_ns / 1e6 / _STEPS
                    calls[event.name] += 1 / _STEPS
    total = sum(milliseconds.values())
    print(f"a step takes {seconds / _STEPS * 1e3:.1f} ms; the sum of its operations is {total:.1f} ms")
    print("\n| operation | calls | ms |\n| --- | --- | --- |")
    for name, each in milliseconds.most_common(arguments.top):
        print(f"| {name} | {calls[name]:.0f} | {each:.2f} |")


if __name__ == "__main__":
    main()
