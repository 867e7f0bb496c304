"""Measure checkpoints of a sharded state in a job of several processes: peak memory of a host, seconds to save and to restore.

    pip install -c constraints.txt -e '.[shakespeare]'
    python experiments/sharded_checkpoints/measure.py [--form gathered|sharded] [--hidden H] [--processes N] [--folder DIR]

The state is that of two LSTM layers with Adam; its values are random. `sharded` is what a run with `mesh.shard_params` does:
each process writes and reads its own shards. `gathered` is what a run without it does, on the same state: every process gathers
the complete state, process 0 writes it, and every process reads it.

The script prints a row of a Markdown table and appends it to results.jsonl. It runs on Linux, writes two checkpoints to a
temporary folder in DIR and deletes them. With the default size, `gathered` needs 12 GB of memory.
"""

import argparse
import gc
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

HERE = Path(__file__).parent
LAYERS, EMBEDDING, SYMBOLS = 2, 256, 96


def resident_bytes(which: str) -> int:
    """Return the resident memory of this process: `VmRSS` now, or `VmHWM` at its peak."""
    return int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return the result of a function, its duration, and the peak of resident memory meanwhile."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts again from what is resident now.
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    found = work()
    return found, {"seconds": time.perf_counter() - start, "before": before, "peak": resident_bytes("VmHWM")}


def worker(form: str, hidden: int, folder: Path) -> dict[str, Any]:
    """Save two checkpoints and restore the second, in one process of a job; return what it measured."""
    import jax
    import numpy as np

    from charlm.config import default_config
    from charlm.parallel import mesh as meshes
    from charlm.runs import checkpoint, flat_state
    from charlm.training.state import Program, shapes_of_state, state_shardings

    config = default_config()
    config.model.update(cell="lstm", hidden_size=hidden, num_layers=LAYERS, embedding_size=EMBEDDING)
    config.batching.batch_size = 2 * jax.process_count()
    config.mesh.shard_params = True
    mesh = meshes.make_mesh(config)
    program = Program(config, SYMBOLS, 1000, True, mesh)
    shapes = shapes_of_state(program)
    shardings = state_shardings(program, shapes)
    draw = np.random.default_rng(jax.process_index())

    def random_array(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            size = np.empty(shape.shape, np.bool_)[index].shape
            # A small array may be replicated, so its values are the same in all processes.
            values = draw.standard_normal(size, np.float32) if len(size) == 2 else np.ones(size)
            return np.asarray(values, shape.dtype)

        return jax.make_array_from_callback(shape.shape, sharding, part)

    state = jax.tree.map(random_array, shapes, shardings)
    own = (flat_state.name_leaves(shardings),) if form == "sharded" else ()
    checkpoints = checkpoint.Checkpoints(folder, None, *own)

    def save(step: int) -> float:
        start = time.perf_counter()
        checkpoints.save(step, state, {}, None)
        waits = time.perf_counter() - start
        checkpoints.wait()
        return waits

    # The first save also imports Orbax and compiles what gathers the arrays.
    _, first = measured(lambda: save(1))
    waits, saved = measured(lambda: save(2))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    jax.tree.map(lambda leaf: leaf.delete(), state)
    del state

    def restore() -> Any:
        flat, _ = checkpoint.read_on_all_processes(checkpoints, lambda: checkpoints.restore_latest(print))
        return meshes.put_tree(mesh, flat_state.unflatten_state(shapes, flat), shardings)

    state, restored = measured(restore)
    jax.block_until_ready(state)
    checkpoints.close()
    return {"state_bytes": size, "first": first, "waits": waits, "save": saved, "restore": restored}


def measure(form: str, hidden: int, num_processes: int, folder: str | None) -> dict[str, Any]:
    """Run a job; return the record of one row."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=folder) as root:
        command = [sys.executable, __file__, f"--form={form}", f"--hidden={hidden}", f"--processes={num_processes}"]
        job = []
        for i in range(num_processes):
            more = [f"--folder={root}", f"--worker={i}", f"--port={port}"]
            job.append(subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True))
        found = []
        for process in job:
            out, _ = process.communicate()
            if process.returncode:
                raise SystemExit(f"a process of the job ended with {process.returncode}")
            found.append(json.loads(out.splitlines()[-1]))
    primary = found[0]
    record = {"form": form, "processes": num_processes, "hidden": hidden, "state_bytes": primary["state_bytes"]}
    record |= {"save_waits_seconds": primary["waits"]}
    for work in ("first", "save", "restore"):
        record |= {f"{work}_seconds": max(each[work]["seconds"] for each in found)}
        record |= {f"{work}_peak_bytes": primary[work]["peak"], f"{work}_before_bytes": primary[work]["before"]}
        record |= {f"{work}_peak_bytes_of_others": max((each[work]["peak"] for each in found[1:]), default=None)}
    return record


def row(record: dict[str, Any]) -> str:
    """Return a record as a row of the table."""
    gigabytes = [f"{record[f'{name}_bytes'] / 1e9:.2f}" for name in ("state", "save_before", "save_peak", "restore_peak")]
    seconds = [f"{record[f'{name}_seconds']:.1f}" for name in ("save_waits", "save", "restore")]
    return f"| {record['form']} | {' | '.join(gigabytes + seconds)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--form", choices=("gathered", "sharded"), default="sharded", help="how the state is saved")
    parser.add_argument("--hidden", type=int, default=3584, help="units of a layer")
    parser.add_argument("--processes", type=int, default=4, help="processes of the job")
    parser.add_argument("--folder", help="where the temporary folder is created")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    form, hidden, count, folder = arguments.form, arguments.hidden, arguments.processes, arguments.folder
    if arguments.worker is not None:
        import jax

        jax.distributed.initialize(f"localhost:{arguments.port}", count, arguments.worker)
        print(json.dumps(worker(form, hidden, Path(folder))))
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    record = measure(form, hidden, count, folder)
    from experiments import records

    records.append(HERE, record)
    print(row(record))


if __name__ == "__main__":
    main()
