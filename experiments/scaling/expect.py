"""Calculate the efficiency of data parallelism on many GPUs from the time of a step and the size of the gradient.

    python experiments/scaling/expect.py [--step_ms MS ...] [--hidden H ...]

A step on N devices takes as long as a step on one device with the same number of rows on each device, plus one all-reduce of
the gradient. The all-reduce starts when the whole gradient is computed (README.md says why). It is assumed to be hierarchical:
a ring over NVLink within a node, and between nodes eight rings at a time, one for each GPU with its own link.
"""

import argparse
import math
from typing import NamedTuple

import jax

from charlm.config import default_config
from charlm.nn.model import CharLM


class Links(NamedTuple):
    """The links between GPUs: bytes per second in one direction for each GPU, and seconds of latency for each message.

    The bandwidths are those of a DGX H100 in the data sheets of NVIDIA: 18 links of NVLink 4 with 25 GB/s in each direction,
    and one port of 400 Gb/s InfiniBand for each GPU. The latencies have the order of magnitude that NVIDIA's collectives show
    for small messages.

    Attributes:
        per_node: GPUs in a node.
        nvlink: bandwidth within a node.
        network: bandwidth between nodes.
        nvlink_latency: latency within a node.
        network_latency: latency between nodes.
    """

    per_node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    nvlink_latency: float = 3e-6
    network_latency: float = 10e-6


def all_reduce_seconds(size: float, gpus: int, links: Links) -> float:
    """Return the time to all-reduce `size` bytes: reduce-scatter and all-gather within a node, all-reduce between nodes."""
    inside, nodes = min(gpus, links.per_node), math.ceil(gpus / links.per_node)
    within = 2 * (inside - 1) / inside * size / links.nvlink + 2 * (inside - 1) * links.nvlink_latency
    # Each GPU sends its share of the node's sum. Trees replace long rings, so the number of messages grows with log N.
    share = size / inside
    between = 2 * (nodes - 1) / nodes * share / links.network + 2 * math.log2(nodes) * links.network_latency
    return within + between


def gradient_bytes(hidden: int, embedding: int = 256, symbols: int = 65) -> int:
    """Return the bytes of the float32 gradient of one LSTM layer between an embedding and a head."""
    config = default_config().model
    config.update(cell="lstm", hidden_size=hidden, embedding_size=embedding)
    shapes = jax.eval_shape(CharLM.from_config(config, symbols).initial_params, jax.random.key(0))
    return sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--step_ms", type=float, nargs="+", default=[2.0, 10.0, 50.0], help="time of a step on one GPU")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024, 4096], help="units of the LSTM")
    arguments = parser.parse_args()
    counts = (2, 8, 16, 64, 256, 1024)
    print("| LSTM | gradient | a step of one GPU |", " | ".join(f"{n} GPUs" for n in counts), "|")
    print("| --- " * (3 + len(counts)) + "|")
    for hidden in arguments.hidden:
        size = gradient_bytes(hidden)
        for step in arguments.step_ms:
            seconds = [all_reduce_seconds(size, n, Links()) for n in counts]
            efficiencies = [step / (step + 1e3 * each) for each in seconds]
            print(f"| {hidden} | {size / 1e6:.1f} MB | {step:g} ms |", " | ".join(f"{each:.0%}" for each in efficiencies), "|")


if __name__ == "__main__":
    main()
