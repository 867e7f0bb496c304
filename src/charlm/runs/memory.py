"""Estimate the memory that a config needs, before anything is compiled, and refuse what cannot fit.

The estimate is a lower bound, so a config that fits is never refused. A config that is not refused may still need too much.

Letters: B batch, T time, H hidden, V vocabulary, E embedding, G gates times hidden, L layers.
"""

import contextlib
import math
import os
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from charlm.nn.cells import find_cell
from charlm.system.errors import ConfigError

_FLOAT_BYTES = 4


class Need(NamedTuple):
    """A part of the memory that a config needs.

    Attributes:
        what: what the memory holds.
        size: bytes.
        keys: the config keys to lower.
    """

    what: str
    size: int
    keys: str


def check_memory(config: ConfigDict, vocab_size: int, training: bool) -> None:
    """Check that a config may fit into the memory of the devices.

    Args:
        config: a config that breaks no rule.
        vocab_size: V.
        training: whether the run is to be trained; otherwise it is only scored and sampled.

    Raises:
        ConfigError: it needs more memory than there is. The message says how much, how much there is, and which keys to lower.
    """
    needs = estimate_memory(config, vocab_size, training)
    available, where = available_memory()
    # The devices of a CPU share its memory.
    several = training and jax.default_backend() != "cpu"
    devices = config.mesh.data or len(jax.devices()) if several else jax.process_count()
    largest = max(needs, key=lambda need: need.size)
    if largest.size > available * devices:
        raise ConfigError(
            f"the config needs at least {_gigabytes(largest.size)} GB for {largest.what}, and {where} has "
            f"{_gigabytes(available)} GB; lower {largest.keys}"
        )


def estimate_memory(config: ConfigDict, vocab_size: int, training: bool) -> list[Need]:
    """Return lower bounds of the largest parts of the memory that a config needs."""
    model, batching, sample = config.model, config.batching, config.sample
    hidden, layers, cell = model.hidden_size, model.num_layers, find_cell(model.cell)
    inputs = {"embedding": model.embedding_size, "one_hot": vocab_size, "scalar": 1}[model.encoding]
    of_layers = [cell.shapes(hidden, inputs if layer == 0 else hidden) for layer in range(min(layers, 2))]
    sizes_of_layers = [sum(math.prod(shape) for shape in shapes.values()) for shapes in of_layers]
    weights = sizes_of_layers[0] + (layers - 1) * sizes_of_layers[-1]
    weights += vocab_size * model.embedding_size if model.encoding == "embedding" else 0
    weights += 0 if model.tie_weights else vocab_size * hidden
    copies = 2 if training else 1  # Training also holds the gradient.
    sizes = "model.hidden_size, model.num_layers or model.embedding_size"
    drawn = sample.num_samples * (layers * hidden + vocab_size)
    needs = [
        Need("the parameters", copies * weights * _FLOAT_BYTES, sizes),
        Need("the samples that are drawn at the same time", drawn * _FLOAT_BYTES, "sample.num_samples"),
    ]
    if training:
        rows = batching.batch_size // config.optimizer.accumulation_steps
        activations = rows * batching.seq_len * layers * len(cell.gates) * hidden
        activations += rows * vocab_size * (1 if batching.loss_on == "last" else batching.seq_len)
        keys = "batching.batch_size, batching.seq_len or model.hidden_size, or raise optimizer.accumulation_steps"
        needs.append(Need("the activations of a batch", activations * _FLOAT_BYTES, keys))
        carries = batching.batch_size * batching.seq_len
        needs.append(Need("the windows of a batch", carries, "batching.batch_size or batching.seq_len"))
    return needs


def available_memory() -> tuple[int, str]:
    """Return (bytes of memory of a device, name of the device). A CPU uses the memory of the host."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"], f"a device ({device.device_kind})"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # The limit of a container. Without one, the file says "max".
            total = min(total, int(Path(limit).read_text()))
    return total, "this machine"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f}"
