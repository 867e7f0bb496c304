"""Measure which models train faster if the cores of a CPU are devices that share each batch.

    python experiments/cores/measure.py [--rounds N]

For each shape, one process times training steps on one device, which uses all cores for each operation, on a mesh with one
device for each core, and in PyTorch if it has the layer. They take turns. The script prints a table in Markdown and appends a
line for each row to results.jsonl.
The rule of `mesh.auto` (charlm.parallel.mesh.num_sharing_devices) follows these measurements.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from charlm.config import default_config  # noqa: E402
from charlm.parallel import mesh as meshes  # noqa: E402
from charlm.system.machine import request_cores_as_devices  # noqa: E402
from charlm.training.chunk import MAX_STEPS_PER_DISPATCH, compile_train_chunk  # noqa: E402
from charlm.training.state import Program, compute_first_state, init_state, shapes_of_state, state_shardings  # noqa: E402
from experiments import records  # noqa: E402
from experiments.throughput.peers import Task, torch_model, torch_nn  # noqa: E402

# (cell, hidden units, layers, rows of a batch).
SHAPES = [("lstm", hidden, 1, batch) for hidden in (64, 128, 192, 256, 320, 384) for batch in (16, 64)]
SHAPES += [("lstm", 192, 1, 32)]  # The quickstart.
SHAPES += [("lstm", 128, 2, 64), ("lstm", 256, 2, 64), ("gru", 128, 1, 32), ("gru", 256, 1, 32), ("min_gru", 256, 1, 32)]
SEQ_LEN, EMBEDDING_SIZE, NUM_SYMBOLS, TEXT_LENGTH = 64, 64, 76, 1_000_000
# Seconds of work in one timed section.
SECTION_SECONDS = 0.5


def trainer(cell: str, hidden: int, layers: int, batch: int, mesh: Mesh | None) -> Callable[[int], None]:
    """Return a function that takes n training steps."""
    config = default_config()
    config.model.update(cell=cell, hidden_size=hidden, num_layers=layers, embedding_size=EMBEDDING_SIZE)
    config.batching.update(batch_size=batch, seq_len=SEQ_LEN)
    config.optimizer.clip_norm = 1.0
    program, hyperparameters = Program(config, NUM_SYMBOLS, 1, True, mesh), {"seed": np.uint32(0)}
    shardings = state_shardings(program, shapes_of_state(program))
    state = compute_first_state(init_state, program, hyperparameters, shardings)
    text_N = np.random.default_rng(0).integers(0, NUM_SYMBOLS, TEXT_LENGTH).astype(np.uint8)
    text_N = jax.numpy.asarray(text_N) if mesh is None else meshes.put(mesh, text_N)
    compiled = compile_train_chunk(program, state, hyperparameters, meshes.shape(mesh, text_N.shape, text_N.dtype))
    starts_KB = np.arange(MAX_STEPS_PER_DISPATCH * batch, dtype=np.int32).reshape(-1, batch) * 100 % (TEXT_LENGTH - SEQ_LEN - 1)
    starts_KB = meshes.put(mesh, starts_KB, meshes.STEPS_BATCH_SHARDED)
    reset_KB = meshes.put(mesh, np.zeros(starts_KB.shape, bool), meshes.STEPS_BATCH_SHARDED)

    def train(n: int) -> None:
        nonlocal state
        while n > 0:
            state, _, finite = compiled(state, hyperparameters, text_N, starts_KB, reset_KB, np.int32(min(n, 64)))
            finite.block_until_ready()
            n -= 64

    return train


def torch_trainer(cell: str, hidden: int, layers: int, batch: int) -> Callable[[int], float]:
    """Return a function that takes n training steps with torch.nn.LSTM or GRU."""
    task = Task(cell, hidden, layers, batch, SEQ_LEN, NUM_SYMBOLS, EMBEDDING_SIZE)
    return torch_nn(task, torch_model(task), np.random.default_rng(0).integers(0, NUM_SYMBOLS, (batch, SEQ_LEN + 1)))


def seconds_of(train: Callable[[int], object], steps: int) -> float:
    """Return the seconds that a step takes."""
    start = time.perf_counter()
    train(steps)
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    request_cores_as_devices()
    mesh = Mesh(np.array(jax.devices()), ("data",))
    print("| model | rows of a batch | one device, chars/s | a device for each core, chars/s | ratio | x torch.nn |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for shape in SHAPES:
        cell, hidden, layers, batch = shape
        trains = [trainer(*shape, None), trainer(*shape, mesh)]
        trains += [torch_trainer(*shape)] if cell in ("lstm", "gru") else []
        steps = []
        for train in trains:
            train(1)
            steps.append(max(2, min(64, int(SECTION_SECONDS / seconds_of(train, 2)))))
        times = []
        for _ in range(rounds):
            times.append([])
            for train, n in zip(trains, steps):
                train(1)  # Untimed, because the previous one has left its data in caches and thread pools.
                times[-1].append(seconds_of(train, n))
        rates = [batch * SEQ_LEN / statistics.median(column) for column in zip(*times)]
        ratio, *to_torch = (statistics.median(each[i] / each[1] for each in times) for i in range(len(trains)) if i != 1)
        label = f"{cell} {hidden}" + (f", {layers} layers" if layers > 1 else "")
        cells = f"{ratio:.2f} | {'; '.join(f'{each:.2f}' for each in to_torch)}"
        print(f"| {label} | {batch} | {rates[0]:,.0f} | {rates[1]:,.0f} | {cells} |", flush=True)
        values = {"cell": cell, "hidden": hidden, "layers": layers, "batch": batch, "rounds": rounds}
        values |= {"one_device": round(rates[0]), "device_for_each_core": round(rates[1]), "ratio": round(ratio, 3)}
        if to_torch:
            values |= {"torch_nn": round(rates[2]), "ratio_to_torch": round(to_torch[0], 3)}
        records.append(HERE, values)


if __name__ == "__main__":
    main()
