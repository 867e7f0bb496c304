"""What data parallelism can be expected to give on many GPUs, worked out from a step's time and a gradient's size.

    python experiments/scaling/expect.py [--step_ms MS ...] [--hidden H ...]

A step on N devices takes the step of one, with as many rows of the batch for each, and one all-reduce of the gradient, which
begins when the gradient is whole (README.md says why). The all-reduce is taken to be hierarchical: within a node a ring over
NVLink, between nodes eight rings at once, one for each GPU and its own link.
"""

import argparse
import math
from typing import NamedTuple

import jax

from charlm.config import default_config
from charlm.nn.model import CharLM


class Links(NamedTuple):
    """What lies between GPUs: bytes a second in one direction for each GPU, and seconds for a message to begin.

    Those of a DGX H100 (NVIDIA's data sheets): 18 links of NVLink 4 with 25 GB/s each way, and one port of 400 Gb/s
    InfiniBand a GPU. Latencies are of the order that NVIDIA's collectives show for small messages.
    """

    per_node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    nvlink_latency: float = 3e-6
    network_latency: float = 10e-6


def all_reduce_seconds(size: float, gpus: int, links: Links) -> float:
    """Of `size` bytes on each of so many GPUs: reduce-scatter and all-gather within nodes, all-reduce between them."""
    inside, nodes = min(gpus, links.per_node), math.ceil(gpus / links.per_node)
    within = 2 * (inside - 1) / inside * size / links.nvlink + 2 * (inside - 1) * links.nvlink_latency
    # Each GPU of a node carries its share of the node's sum; long rings are cut short by trees, so log N messages.
    share = size / inside
    between = 2 * (nodes - 1) / nodes * share / links.network + 2 * math.log2(nodes) * links.network_latency
    return within + between


def gradient_bytes(hidden: int, embedding: int = 256, symbols: int = 65) -> int:
    """Of one layer of LSTM between an embedding and a head, float32."""
    config = default_config().model
    config.update(cell="lstm", hidden_size=hidden, embedding_size=embedding)
    shapes = jax.eval_shape(CharLM.from_config(config, symbols).initial_params, jax.random.key(0))
    return sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--step_ms", type=float, nargs="+", default=[2.0, 10.0, 50.0], help="of one GPU, without the others")
    arguments.add_argument("--hidden", type=int, nargs="+", default=[512, 1024, 4096])
    given = arguments.parse_args()
    counts = (2, 8, 16, 64, 256, 1024)
    print("| LSTM | gradient | a step of one GPU |", " | ".join(f"{n} GPUs" for n in counts), "|")
    print("| --- " * (3 + len(counts)) + "|")
    for hidden in given.hidden:
        size = gradient_bytes(hidden)
        for step in given.step_ms:
            seconds = [all_reduce_seconds(size, n, Links()) for n in counts]
            efficiencies = [step / (step + 1e3 * each) for each in seconds]
            print(f"| {hidden} | {size / 1e6:.1f} MB | {step:g} ms |", " | ".join(f"{each:.0%}" for each in efficiencies), "|")


if __name__ == "__main__":
    main()
