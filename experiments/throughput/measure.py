"""Measure how fast charlm trains, samples and starts, compared with other implementations in the same process.

    pip install -c constraints.txt -e '.[shakespeare,throughput]'
    python experiments/throughput/measure.py [--rounds N] [runs|steps|large_batches|sampling|prompt|command|startup|memory ...]

The implementations take turns, in another order in each round, so that a slow minute of the machine affects all of them. The
script reports medians of rates, and medians of the ratios within a round. It prints tables in Markdown and appends a line for
each row to results.jsonl. With nine rounds on two cores, `steps` takes half an hour, `large_batches` an hour, and each other
section some minutes.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
# JAX shares the memory of a GPU with PyTorch and with the processes that this script starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from charlm.__main__ import COMMANDS  # noqa: E402
from charlm.config import default_config  # noqa: E402
from charlm.data.vocab import Vocab  # noqa: E402
from charlm.inference.sampler import Settings, generate, make_sampler, sample_keys  # noqa: E402
from charlm.inference.scorer import make_scorer  # noqa: E402
from charlm.nn.cells import CELLS  # noqa: E402
from charlm.system.machine import num_cores, request_cores_as_devices  # noqa: E402
from experiments import records  # noqa: E402
from experiments.throughput.peers import (  # noqa: E402
    TRAINERS,
    Task,
    charlm_model,
    charlm_params,
    side_by_side,
    torch_device,
    torch_model,
    trainers_of,
)

request_cores_as_devices()  # As `mesh.auto` does.
ON_GPU = jax.devices()[0].platform == "gpu"
SHAPES = [(cell, hidden, 1) for cell in ("lstm", "gru") for hidden in (128, 512, 1024)]
TASKS = [Task(*shape, 64) for shape in (*SHAPES, ("lstm", 512, 2), ("gru", 512, 2))]
LARGE_BATCHES = [Task(*shape, 256) for shape in SHAPES]
# float32 is TF32 on a GPU. On a CPU, products in bfloat16 are no faster.
DTYPES = ("float32", "bfloat16") if ON_GPU else ("float32",)
# Seconds of work in one timed section.
SECTION_SECONDS = 1.0


def record(kind: str, **values) -> None:
    """Append a record to results.jsonl."""
    records.append(HERE, {"kind": kind, **values})


def interleave(contenders: dict[str, Callable[[int], object]], rounds: int, min_units: int = 1) -> dict[str, list[float]]:
    """Time functions that take turns.

    Args:
        contenders: {name: a function of n that does n units of work}.
        rounds: how often each function is timed.
        min_units: the smallest n in a timed call.

    Returns:
        {name: seconds for one unit of work in each round}.
    """
    units = {}
    for name, work in contenders.items():
        work(1)  # Compiles, and fills caches.
        start = time.perf_counter()
        work(1)
        units[name] = max(min_units, int(SECTION_SECONDS / (time.perf_counter() - start)))
    times = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        order = order[1:] + order[:1]
        for name in order:
            contenders[name](1)  # Untimed, because the previous function has left its data in caches and thread pools.
            start = time.perf_counter()
            contenders[name](units[name])
            times[name].append((time.perf_counter() - start) / units[name])
    return times


def median_ratio(times: dict[str, list[float]], name: str) -> float:
    """Return how many times as long as charlm a contender takes, as the median over the rounds."""
    return statistics.median(theirs / ours for theirs, ours in zip(times[name], times["charlm"]))


def spread(values: list[float]) -> float:
    """Return half the interquartile range, as a fraction of the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


def matrix_rate(dtype: str) -> float:
    """Return the highest rate of a product of two square matrices, in floating-point operations per second."""
    best = 0.0
    for n in (4096, 8192, 16384) if ON_GPU else (512, 1024, 2048, 4096):
        a = jax.random.normal(jax.random.key(0), (n, n), dtype)  # A product of equal numbers can be faster.
        product = jax.jit(lambda a: a @ a)
        product(a).block_until_ready()
        for _ in range(8):
            start = time.perf_counter()
            product(a).block_until_ready()
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def product_work(task: Task) -> float:
    """Return the floating-point operations per character in the products that a training step requires.

    A step computes three products (forward, and the gradient of each operand) with each recurrent kernel, with each input
    kernel above the first layer, and with the head. The first layer needs no product, because its input is a row of a table.
    """
    gates = len(CELLS[task.cell].gates)
    kernels = task.layers * task.hidden**2 * gates + (task.layers - 1) * task.hidden**2 * gates
    return 6 * (kernels + task.hidden * task.vocab)


def label(task: Task) -> str:
    """Return the name of a task in the tables."""
    layers = f"{task.layers} x " if task.layers > 1 else ""
    dtype = f", {task.dtype}" if len(DTYPES) > 1 else ""
    return f"{layers}{task.cell.upper()} {task.hidden}, batch {task.batch}{dtype}"


def steps(rounds: int, tasks: Sequence[Task] = TASKS) -> None:
    """Measure the training steps of the tasks in all implementations."""
    names = list(dict.fromkeys(name for task in tasks for name in trainers_of(task) if name != "charlm"))
    for dtype in DTYPES:
        rate = matrix_rate(dtype) / 1e9
        print(f"\nproduct of square matrices in {dtype}: {rate:,.0f} billion floating-point operations per second")
    columns = ["", "charlm, chars/s", "of the limit", *(f"x {name}" for name in names), "spread"]
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    for task in (task._replace(dtype=dtype) for dtype in DTYPES for task in tasks):
        model = torch_model(task)
        windows = np.random.default_rng(0).integers(0, task.vocab, (task.batch, task.seq_len + 1))
        contenders = {name: trainer(task, model, windows) for name, trainer in trainers_of(task).items()}
        losses = {name: [train(1) for _ in range(3)] for name, train in contenders.items()}
        tolerance = 1e-1 if task.dtype == "bfloat16" else 1e-2
        for name, found in losses.items():
            # PyTorch and Keras have two biases where one is enough, and Adam then moves their sum twice as fast.
            differences = np.abs(np.subtract(found, losses["charlm"]))
            if differences[0] > (tolerance / 10 if ON_GPU else tolerance / 100) or differences.max() > tolerance:
                raise SystemExit(f"{label(task)}: the losses of {name} differ: {found}; those of charlm are {losses['charlm']}")
        limit = matrix_rate(task.dtype)
        # charlm dispatches many steps at once, and each dispatch lays out its memory again.
        times = interleave(contenders, rounds, min_units=4)
        ours = statistics.median(times["charlm"])
        fraction = product_work(task) * task.chars / ours / limit
        ratios = {name: median_ratio(times, name) for name in contenders if name != "charlm"}
        cells = [f"{task.chars / ours:,.0f}", f"{fraction:.0%}", *(f"{ratios[n]:.2f}" if n in ratios else "" for n in names)]
        print(f"| {label(task)} | {' | '.join(cells)} | {spread(times['charlm']):.0%} |", flush=True)
        rates = {name: round(task.chars / statistics.median(found)) for name, found in times.items()}
        spreads = {name: round(spread(found), 3) for name, found in times.items()}
        record("steps", **task._asdict(), chars_per_second=rates, spread=spreads, ratio=ratios, limit=limit, fraction=fraction)


def torch_loop(model, task: Task) -> Callable[[int], None]:
    """PyTorch: a loop over torch.nn.LSTM or GRU that draws one character of N texts at a time."""
    model = model.to(torch_device())

    @torch.inference_mode()
    def draw(n: int) -> None:
        ids_1N, state = torch.zeros(1, task.batch, dtype=torch.long, device=torch_device()), None
        for _ in range(n):
            logits, state = model(ids_1N, state)
            ids_1N = torch.multinomial(logits[0].softmax(-1), 1).T
        ids_1N.cpu()  # Waits for the device.

    return draw


def torch_cell_loop(model, task: Task) -> Callable[[int], None]:
    """PyTorch: a loop over LSTMCell or GRUCell that draws one character of N texts at a time."""
    cell_class = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell}[task.cell]
    cell = cell_class(task.embedding, task.hidden)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in model.layers.state_dict().items()})
    model, cell = model.to(torch_device()), cell.to(torch_device())

    @torch.inference_mode()
    def draw(n: int) -> None:
        ids_N = torch.zeros(task.batch, dtype=torch.long, device=torch_device())
        zero = torch.zeros(task.batch, task.hidden, device=torch_device())
        state = (zero, zero) if task.cell == "lstm" else zero
        for _ in range(n):
            state = cell(model.embedding(ids_N), state)
            logits = model.head(state[0] if task.cell == "lstm" else state)
            ids_N = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        ids_N.cpu()  # Waits for the device.

    return draw


def charlm_loop(model, task: Task) -> Callable[[int], None]:
    """charlm: the sampler that `charlm.sample` runs."""
    ours, params = charlm_model(task), charlm_params(task, model)
    vocab = Vocab.from_chars("".join(map(chr, range(48, 48 + task.vocab))))
    sampler = make_sampler(ours, vocab)
    keys_N, settings = sample_keys(0, task.batch), Settings(1.0, task.vocab, 1.0, False)

    def draw(n: int) -> None:
        for _ in generate(sampler, params, vocab, np.zeros(1, np.int32), keys_N, n, settings):
            pass

    return draw


def sampling(rounds: int) -> None:
    """Measure sampling from a model of one layer, 1, 32 and 256 texts at a time."""
    columns = ["", "charlm, chars/s", "x a loop over nn.LSTM", "x a loop over nn.LSTMCell", "spread"]
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    length = 256
    for hidden in (128, 512, 1024):
        for batch in (1, 32, 256):
            task = Task("lstm", hidden, 1, batch)
            model = torch_model(task)
            loops = {"charlm": charlm_loop, "layer": torch_loop, "cell": torch_cell_loop}
            draws = {name: loop(model, task) for name, loop in loops.items()}
            times = interleave({name: lambda n, draw=draw: draw(n * length) for name, draw in draws.items()}, rounds)
            ratios = {name: median_ratio(times, name) for name in ("layer", "cell")}
            rate = batch * length / statistics.median(times["charlm"])
            cells = [f"{rate:,.0f}", *(f"{ratio:.1f}" for ratio in ratios.values()), f"{spread(times['charlm']):.0%}"]
            print(f"| LSTM {hidden}, {batch} at a time | {' | '.join(cells)} |", flush=True)
            record("sampling", **task._asdict(), chars_per_second=rate, ratio=ratios)


def prompt(rounds: int) -> None:
    """Measure how fast the sampler reads a prompt, compared with the scorer, which reads 64 parts at the same time."""
    print("\n| | prompt, chars/s | scorer, chars/s | ratio |\n| --- | --- | --- | --- |", flush=True)
    part, config = 1 << 15, default_config()
    for hidden in (128, 192, 512):
        task = Task("lstm", hidden, 1, 1)
        model, params = charlm_model(task), charlm_params(task, torch_model(task))
        vocab = Vocab.from_chars("".join(map(chr, range(48, 48 + task.vocab))))
        sampler, scorer = make_sampler(model, vocab), make_scorer(model, vocab, config.batching)
        ids, settings = np.random.default_rng(0).integers(0, task.vocab, 1 << 20), Settings(1.0, task.vocab, 1.0, False)

        def read(n: int, sampler=sampler, params=params, vocab=vocab, ids=ids, settings=settings) -> None:
            for _ in generate(sampler, params, vocab, ids[: n * part + 1], sample_keys(0, 1), 1, settings):
                pass

        def score(n: int, scorer=scorer, params=params, ids=ids) -> None:
            scorer(params, ids[: n * part + 1], config.eval)

        times = interleave({"charlm": read, "scorer": score}, rounds)
        rates = {name: round(part / statistics.median(found)) for name, found in times.items()}
        ratio = 1 / statistics.median(ours / theirs for ours, theirs in zip(times["charlm"], times["scorer"]))
        print(f"| LSTM {hidden} | {rates['charlm']:,} | {rates['scorer']:,} | {ratio:.2f} |", flush=True)
        record("prompt", **task._asdict(), chars_per_second=rates, ratio=ratio)


def command(rounds: int) -> None:
    """Measure the rate of 1,000 steps of the quickstart in the training command and in the bare chunk, both with Adam."""
    found = []
    for _ in range(max(1, rounds // 3)):
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--config.train.steps=1000", "--config.train.eval_every=0", "--config.train.sample_every=0"]
            flags += ["--config.optimizer.name=adam", "--config.train.ema_decay=0"]
            run = ["-m", "charlm.train", "--config", "configs/quickstart.py", "--workdir", folder, *flags]
            subprocess.run([sys.executable, *run], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
            lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["split"] == "train"]
        # The time starts at the first record. It excludes compilation and includes logging, drawing and saving.
        chars, seconds = (lines[-1][key] - lines[0][key] for key in ("chars", "seconds"))
        task = Task("lstm", 192, 1, 32, 64, 76, 64)
        bare = TRAINERS["charlm"](task, torch_model(task), np.random.default_rng(0).integers(0, 76, (32, 65)))
        bare(64)
        start = time.perf_counter()
        for _ in range(15):
            bare(64)
        found.append((chars / seconds, 15 * 64 * task.chars / (time.perf_counter() - start)))
    ratio = statistics.median(ours / bare for ours, bare in found)
    print(f"\ntraining command {found[-1][0]:,.0f} chars/s, bare steps {found[-1][1]:,.0f} chars/s; median ratio {ratio:.3f}")
    record("command", chars_per_second=[round(ours) for ours, _ in found], bare=[round(b) for _, b in found], ratio=ratio)


def startup(rounds: int) -> None:
    """Measure how long the commands take to start.

    `cold` and `cached` are the seconds from the training command to the end of the first step of the quickstart, with empty and
    with filled caches; `first character` those from the sampling command to its first character; `help` those of `--help`, of
    the slowest command; `import jax` those of a trivial program, for comparison.
    """
    trivial = ["-c", "import jax; jax.jit(lambda x: x + 1)(1.0).block_until_ready()"]
    train = ["-m", "charlm.train", "--config", "configs/quickstart.py", "--config.train.log_every=1"]
    train += ["--config.train.steps_per_dispatch=1"]
    times: dict[str, list[float]] = {"cold": [], "cached": [], "first character": [], "help": [], "import jax": []}
    with tempfile.TemporaryDirectory() as run:
        _seconds_of([*train, "--config.train.steps=1", f"--workdir={run}/run"], run)
        sample = ["-m", "charlm.sample", f"--workdir={run}/run"]
        _seconds_of(sample, run, "stdout")
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                for name in ("cold", "cached"):
                    times[name].append(_seconds_of([*train, f"--workdir={folder}/{name}"], folder, "stderr", "step 1/"))
            times["first character"].append(_seconds_of(sample, run, "stdout"))
            of_help = [_seconds_of(["-m", f"charlm.{name}", "--help"], run) for name in COMMANDS]
            times["help"].append(max(of_help))
            times["import jax"].append(_seconds_of(trivial, run))
    medians = {name: statistics.median(found) for name, found in times.items()}
    print("\nseconds to start: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in medians.items()))
    record("startup", seconds=times, medians=medians)


def _seconds_of(arguments: Sequence[str], cache: str, stream: str | None = None, beginning: str = "") -> float:
    """Return the seconds from the start of Python until it ends, or until a line of a stream begins so.

    Without a beginning, the first character of the stream ends the time.
    """
    env = os.environ | {"CHARLM_CACHE": f"{cache}/cache"}
    pipes = {each: subprocess.PIPE if each == stream else subprocess.DEVNULL for each in ("stdout", "stderr")}
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env, text=True, **pipes) as process:
        if stream is None:
            if process.wait():
                raise SystemExit(f"{' '.join(arguments)} failed")
        elif not beginning:
            getattr(process, stream).read(1)
        else:
            next(line for line in getattr(process, stream) if line.startswith(beginning))
        seconds = time.perf_counter() - start
        process.kill()
    return seconds


def memory(rounds: int) -> None:
    """Measure the peak memory of a training process (on a GPU: of its arrays there), one process for each implementation."""
    del rounds
    for task in (Task("lstm", 512, 1, 64), Task("lstm", 1024, 1, 256)):
        peaks = {}
        for name in TRAINERS:
            run = [sys.executable, __file__, "--peak_of", name, json.dumps(task)]
            peaks[name] = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
        print(f"\n{label(task)}, peak memory: " + ", ".join(f"{name} {kb / 1024:,.0f} MB" for name, kb in peaks.items()))
        record("memory", **task._asdict(), peak_kb=peaks)


def peak_of(name: str, task: Task) -> int:
    """Return the peak memory of this process in kilobytes, or that of its arrays on a GPU, after three steps."""
    windows = np.random.default_rng(0).integers(0, task.vocab, (task.batch, task.seq_len + 1))
    TRAINERS[name](task, torch_model(task), windows)(3)
    if ON_GPU:
        bytes_of_jax = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
        return (torch.cuda.max_memory_allocated() if name == "torch.nn" else bytes_of_jax) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


RUNS = 16


def runs(rounds: int) -> None:
    """Measure 16 small runs side by side, distributed over one host device for each core, and one after another."""
    hidden = 128 if ON_GPU else 64
    times = {"side by side": [], "one after another": []}
    for _ in range(max(1, rounds // 3)):
        for name, devices in (("side by side", num_cores()), ("one after another", 1)):
            env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}  # No effect on a GPU.
            run = [sys.executable, __file__, "--rate_of", name, str(hidden)]
            times[name].append(float(subprocess.run(run, check=True, capture_output=True, text=True, env=env).stdout))
    ratio = statistics.median(side / alone for side, alone in zip(*times.values()))
    rates = {name: statistics.median(found) for name, found in times.items()}
    print(f"\n{RUNS} runs of LSTM {hidden}: " + ", ".join(f"{name} {rate:,.0f} chars/s" for name, rate in rates.items()))
    print(f"median ratio {ratio:.2f}")
    record("runs", hidden=hidden, runs=RUNS, chars_per_second=rates, ratio=ratio)


def rate_of(name: str, hidden: int, steps: int = 64) -> float:
    """Return the characters per second of 16 runs side by side, or of one run alone."""
    task = Task("lstm", hidden, 1, 32, 64, 65, 64)
    windows = np.random.default_rng(0).integers(0, task.vocab, (task.batch, task.seq_len + 1))
    if name == "side by side":
        train, chars = side_by_side(task, windows, RUNS), RUNS * task.chars
    else:
        train, chars = TRAINERS["charlm"](task, torch_model(task), windows), task.chars
    train(1)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        train(steps)
        rates.append(chars * steps / (time.perf_counter() - start))
    return statistics.median(rates)


def large_batches(rounds: int) -> None:
    """Measure `steps` with four times the batch."""
    steps(rounds, LARGE_BATCHES)


SECTIONS = {each.__name__: each for each in (runs, steps, large_batches, sampling, prompt, command, startup, memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"one of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--rounds", type=int, default=9, help="how often each contender is timed")
    parser.add_argument("--peak_of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rate_of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; the sections are {', '.join(SECTIONS)}")
    if arguments.peak_of:
        name, task = arguments.peak_of
        print(peak_of(name, Task(*json.loads(task))))
        return
    if arguments.rate_of:
        name, hidden = arguments.rate_of
        print(rate_of(name, int(hidden)))
        return
    for section in arguments.sections or SECTIONS:
        SECTIONS[section](arguments.rounds)


if __name__ == "__main__":
    main()
