"""Measure what the recurrence of charlm saves: forward pass and gradient of a layer, compared with two simpler ways.

    pip install -c constraints.txt -e .
    python experiments/recurrence/run.py [--rounds N] [CELL WIDTH ...]

For each cell and width, the script times three ways that compute the same numbers for a batch of 64 x 100:

- charlm: `charlm.nn.recurrence.unroll`;
- autodiff: the same without the cell's hand-written derivative, if the cell has one;
- plain scan: JAX's own derivative of `jax.lax.scan` over the cell's update.

The ways take turns. The script prints medians of the ratios within a round, and appends a line for each cell to results.jsonl.
Without arguments it takes about five minutes.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from charlm.nn.cell import Cell  # noqa: E402
from charlm.nn.cells import CELLS  # noqa: E402
from charlm.nn.recurrence import unroll  # noqa: E402
from experiments import records  # noqa: E402

HERE = Path(__file__).parent
BATCH, SEQ_LEN = 64, 100
TASKS = (("lstm", 512), ("gru", 512), ("mlstm", 256), ("mlstm", 512), ("cifg_lstm", 512), ("mgu", 512), ("slstm", 512))
SECTION_SECONDS = 0.5


def plain_scan(cell: Cell, params: Any, matrices: Any, x_TKB: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
    """Run a cell over T steps with `jax.lax.scan`, which JAX differentiates."""

    def step(carry: Any, x_KB: jax.Array) -> tuple[Any, jax.Array]:
        carry = cell.update(params, x_KB, carry, lambda name, operand_HB: matrices[name] @ operand_HB)
        return carry, carry[0]

    last, h_THB = jax.lax.scan(step, tuple(each.T for each in carry), x_TKB)
    return jnp.swapaxes(h_THB, 1, 2), tuple(each.T for each in last)


def contenders(name: str, width: int) -> dict[str, Callable[[], Any]]:
    """Return {way: a function that computes the forward pass and all gradients once}."""
    cell, keys = CELLS[name], iter(jax.random.split(jax.random.key(0), 100))
    arrays = {key: 0.05 * jax.random.normal(next(keys), shape) for key, shape in cell.shapes(width, width).items()}
    matrices = {each.name: arrays[each.name] for each in cell.matrices}
    vectors = {each.name: arrays[each.name] for each in cell.vectors}
    x_TKB = jax.random.normal(next(keys), (SEQ_LEN, len(cell.gates) * width, BATCH))
    carry = tuple(jnp.zeros((BATCH, width)) for _ in cell.carries)
    weights_TBH = jax.random.normal(next(keys), (SEQ_LEN, BATCH, width))
    ways = {"charlm": functools.partial(unroll, cell), "plain scan": functools.partial(plain_scan, cell)}
    if cell.derivative is not None:
        ways["autodiff"] = functools.partial(unroll, cell._replace(derivative=None))

    def bind(way: Callable[..., Any]) -> Callable[[], Any]:
        loss = lambda *inputs: (way(*inputs)[0] * weights_TBH).sum()  # noqa: E731
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
        return lambda: jax.block_until_ready(compiled(vectors, matrices, x_TKB, carry))

    return {label: bind(way) for label, way in ways.items()}


def measure(name: str, width: int, rounds: int) -> dict[str, Any]:
    """Return the record of a cell: milliseconds of each way, and the ratios to charlm, as medians over the rounds."""
    ways = contenders(name, width)
    values = {label: float(way()[0]) for label, way in ways.items()}
    if max(values.values()) - min(values.values()) > 1e-3 * abs(values["charlm"]):
        raise SystemExit(f"{name} {width}: the ways differ: {values}")
    seconds: dict[str, list[float]] = {label: [] for label in ways}
    for k in range(rounds):
        for label in sorted(ways, reverse=k % 2 == 1):
            ways[label]()  # Untimed, because the previous way has left its data in the caches.
            start, repeats = time.perf_counter(), 0
            while time.perf_counter() - start < SECTION_SECONDS or repeats < 2:
                ways[label]()
                repeats += 1
            seconds[label].append((time.perf_counter() - start) / repeats)
    milliseconds = {label: round(1e3 * statistics.median(found), 1) for label, found in seconds.items()}
    ratio = {
        label: round(statistics.median(b / a for a, b in zip(seconds["charlm"], found)), 3) for label, found in seconds.items()
    }
    return {"cell": name, "width": width, "rounds": rounds, "milliseconds": milliseconds, "ratio": ratio}


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="how often each way is timed")
    parser.add_argument("tasks", nargs="*", help="cells and widths, such as: lstm 512 mlstm 256")
    flags = parser.parse_args()
    tasks = list(zip(flags.tasks[::2], map(int, flags.tasks[1::2]))) or TASKS
    for name, width in tasks:
        print(records.append(HERE, measure(name, width, flags.rounds)), flush=True)


if __name__ == "__main__":
    main()
