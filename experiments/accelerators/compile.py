"""Compile charlm's programs for an NVIDIA H100 and a TPU v5e, which need not be present, and record what the compilers make.

    pip install -c constraints.txt -e '.[shakespeare]'
    pip install -c constraints.txt --no-deps --target compilers libtpu jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc \\
        nvidia-nvvm nvidia-cuda-crt
    export CHARLM_COMPILERS=compilers
    python experiments/accelerators/compile.py                       # everything, and the table
    python experiments/accelerators/compile.py --kernels configs/lstm_1024.py configs/gru_512.py

Nothing runs on these devices. `--kernels` prints a line for each config, NAME FORWARD BACKWARD: the kernels of one time step in
the loops of a training step, with the batch, the window and the cell of the config. A kernel is a fusion, a copy, a call of a
library or any other operation that the device launches; the loop's counter counts. Of several layers it shows the one with the
most kernels.
"""

import argparse
import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from experiments.accelerators import hlo, targets  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16")
# The most important configs, which are compiled before the others in the box.
FIRST = ("lstm_1024", "gru_512", "autograd_rnn_100", "quickstart", "tinyshakespeare:gpu")
# Of so many configs everything is compiled before the other configs.
NUM_FIRST = 3


def load(name: str) -> Any:
    """Return the config of a file, `PATH` or `PATH:SETTING`."""
    path, _, setting = name.partition(":")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(setting) if setting else module.get_config()


def measure(target: str, config: Any, program: str, num_devices: int = 1, show: bool = False) -> dict[str, Any]:
    """Compile one program for a target and return what is recorded of it. `show` prints the kernels of every loop."""
    from experiments.accelerators import programs

    setting = programs.Setting(config, targets.devices(target)[:num_devices])
    steps = {"sample": programs.BLOCK, "score": programs.WINDOW}.get(program, config.batching.seq_len)
    start = time.process_time()
    try:
        compiled = programs.PROGRAMS[program](setting)
    except Exception as error:  # What the compiler cannot do belongs into the table.
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    seconds, text, memory = time.process_time() - start, compiled.as_text(), compiled.memory_analysis()
    loops = hlo.loops(text, steps)
    most = [max((len(each.kernels) for each in loops if each.backward == backward), default=0) for backward in (False, True)]
    for each in loops if show else ():
        print("backward" if each.backward else "forward", file=sys.stderr)
        for kernel in each.kernels:
            print(f"    {kernel.opcode} {kernel.name} {kernel.shape}", file=sys.stderr)
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "cpu_seconds": round(seconds, 1),
        "peak_bytes": arrays + memory.temp_size_in_bytes,
        "flops": hlo.flops(text),
        "forward": most[0],
        "backward": most[1],
        "copies": sum(len(each.copies) for each in loops),
    }


def jobs(target: str, names: list[str]) -> list[tuple[str, str, str, int]]:
    """Return (config, program, dtype, devices) of everything that is compiled for a target, the most important first."""
    from experiments.accelerators import programs

    def cell(name):
        return load(name).model.cell

    def of(names):
        single = [(n, "train", dtype, 1) for n in names for dtype in DTYPES]
        peers = [(n, p, dtype, 1) for n in names for p in programs.PEERS for dtype in DTYPES if cell(n) in programs.PEER_CELLS]
        mesh = [(n, "train", dtype, targets.MESH_SIZE) for n in names for dtype in DTYPES]
        rest = [(n, p, dtype, k) for p, k in (("score", 1), ("sample", 1), ("score", 4)) for n in names for dtype in DTYPES]
        return [*single, *peers, *mesh, *rest]

    return [*of(names[:NUM_FIRST]), *of(names[NUM_FIRST:])]


def record_all(target: str, names: list[str]) -> None:
    """Compile everything for a target and record it. What is on record already for this commit is left out."""
    from experiments import records

    done = {_key(each) for each in read() if each["commit"] == records.git_commit()}
    for name, program, dtype, num_devices in jobs(target, names):
        key = {
            "target": target,
            "config": Path(name).name.replace(".py", ""),
            "program": program,
            "dtype": dtype,
            "devices": num_devices,
        }
        if _key(key) in done:
            continue
        config = load(name)
        config.model.dtype = dtype
        if config.batching.batch_size % num_devices:
            continue
        found = records.append(Path(__file__).parent, key | measure(target, config, program, num_devices))
        print(*key.values(), *(f"{k} {found[k]}" for k in list(found)[list(found).index("devices") + 1 :]), flush=True)


def _key(found: dict[str, Any]) -> tuple:
    return tuple(found[name] for name in ("target", "config", "program", "dtype", "devices"))


def read() -> list[dict[str, Any]]:
    """Return the records."""
    path = Path(__file__).parent / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table() -> str:
    """Return the table of the README: the last record of each program."""
    last = {_key(each): each for each in read()}
    lines = [
        "| target | config | program | dtype | devices | CPU time | peak memory | GFLOP | forward | backward | copies |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, each in last.items():
        if "error" in each:
            cells = [each["error"], *[""] * 5]
        else:
            memory, work = f"{each['peak_bytes'] / 2**20:,.0f} MiB", f"{each['flops'] / 1e9:,.2f}"
            cells = [f"{each['cpu_seconds']} s", memory, work, each["forward"], each["backward"], each["copies"]]
        lines.append("| " + " | ".join(map(str, (*key, *cells))) + " |")
    return "\n".join(lines)


def print_kernels(target: str, names: list[str], program: str, dtype: str | None, show: bool) -> None:
    """Print NAME FORWARD BACKWARD for each config; with a failure in place of the numbers, if it does not compile."""
    failed = False
    for name in names:
        config = load(name)
        if dtype is not None:
            config.model.dtype = dtype
        found = measure(target, config, program, show=show)
        failed |= "error" in found
        print(Path(name).stem, *([found["error"]] if "error" in found else [found["forward"], found["backward"]]), flush=True)
        if found.get("copies"):
            print(f"{Path(name).stem}: {found['copies']} copies of a whole array in a loop", file=sys.stderr)
    sys.exit(failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="config files; default: all of configs/")
    parser.add_argument("--kernels", nargs="+", metavar="CONFIG", help="only print the kernels of a time step of these configs")
    parser.add_argument("--target", choices=list(targets.NEEDS), help="default: both; for --kernels h100")
    parser.add_argument("--program", default="train", help="for --kernels: train, score, sample, 'plain scan' or nn.RNN")
    parser.add_argument("--dtype", choices=DTYPES, help="for --kernels; default: that of the config")
    parser.add_argument("--show", action="store_true", help="for --kernels: print the kernels of every loop, on stderr")
    parser.add_argument("--table", action="store_true", help="only print the table of what is on record")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    if arguments.kernels:
        target = arguments.target or "h100"
        with prepared(target):
            print_kernels(target, arguments.kernels, arguments.program, arguments.dtype, arguments.show)
        return
    if arguments.target is None:  # A process for each, because JAX reads the environment once.
        for target in targets.NEEDS:
            subprocess.run([sys.executable, __file__, *arguments.configs, "--target", target], check=True)
        print(table())
        return
    names = arguments.configs or [str(ROOT / "configs" / each) for each in box()]
    with prepared(arguments.target):
        record_all(arguments.target, names)


@contextlib.contextmanager
def prepared(target: str) -> Iterator[None]:
    """Compile for a target in this process."""
    targets.prepare(target)
    from charlm.nn.platforms import for_any_platform  # It imports JAX, which reads the environment.

    with for_any_platform():
        yield


def box() -> list[str]:
    """Return the names of the configs in the box."""
    others = sorted(path.name for path in (ROOT / "configs").glob("*.py") if path.stem not in FIRST)
    return [*(f"{stem}.py{colon}{setting}" for stem, colon, setting in (each.partition(":") for each in FIRST)), *others]


if __name__ == "__main__":
    main()
