"""Batch layouts: host functions (seed, step) -> where each window of a batch starts, and which states to reset.

A window is `ids[start : start + T + 1]`: T inputs and, one to the right, T targets. Nothing here remembers anything:
step k of a resumed run is step k of a whole one.

Letters: B batch, T time (`seq_len`), N characters in the text, K steps in a dispatch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charlm.errors import CorpusError

LAYOUTS = ("stream", "windows")


class Batch(NamedTuple):
    """Where the B windows of one step start, and which of the B carried states begin anew."""

    starts_B: np.ndarray  # int64
    reset_B: np.ndarray  # bool


class Layout(NamedTuple):
    """A layout bound to a text.

    Attributes:
        batch: step -> Batch.
        steps_per_epoch: steps that read the text once; not a whole number where batches straddle epochs.
        carries_state: whether the state at the end of a window is where the next one starts.
    """

    batch: Callable[[int], Batch]
    steps_per_epoch: float
    carries_state: bool


def make_layout(batching, seed: int, num_chars: int) -> Layout:
    """The layout that `config.batching` names, on a text of `num_chars` characters.

    Raises:
        CorpusError: the text is shorter than one batch.
    """
    batch_size, seq_len = batching.batch_size, batching.seq_len
    needed = batch_size * seq_len + 1
    if num_chars < needed:
        raise CorpusError(
            f"the training text has {num_chars} characters, fewer than one batch: batching.batch_size {batch_size} x "
            f"batching.seq_len {seq_len} + 1 = {needed}; lower one of them, or train on more text"
        )
    if batching.layout == "stream":
        windows = (num_chars - 1) // (batch_size * seq_len)
        return Layout(
            lambda step: stream_batch(seed, step, num_chars, batch_size, seq_len, batching.reset_prob),
            float(windows),
            True,
        )
    windows = (num_chars - 1) // seq_len
    return Layout(
        lambda step: windows_batch(seed, step, num_chars, batch_size, seq_len, batching.shuffle),
        windows / batch_size,
        False,
    )


def stream_batch(seed: int, step: int, num_chars: int, batch_size: int, seq_len: int, reset_prob: float) -> Batch:
    """B parallel streams through the text, read window by window with the state carried along (truncated BPTT).

    Stream b covers the b-th of B equal, contiguous parts; at most B * T characters at the end of the text are left
    over. Each state is reset at the start of an epoch and, besides, with `reset_prob` at every window: a model whose
    state is always carried never learns to start from nothing.
    """
    windows = (num_chars - 1) // (batch_size * seq_len)
    index = step % windows
    starts_B = (np.arange(batch_size, dtype=np.int64) * windows + index) * seq_len
    reset_B = uniform(seed, step, batch_size) < reset_prob
    return Batch(starts_B, reset_B | (index == 0))


def windows_batch(seed: int, step: int, num_chars: int, batch_size: int, seq_len: int, shuffle: bool) -> Batch:
    """Adjacent windows of T characters, in text order or shuffled anew for every epoch, each from a zero state.

    The windows of all epochs form one endless sequence and a step takes the next B of it, so that every window comes
    exactly once an epoch whatever B is.
    """
    windows = (num_chars - 1) // seq_len
    nth = np.arange(batch_size, dtype=np.int64) + step * batch_size
    epochs, index_B = np.divmod(nth, windows)
    if shuffle:
        # A pseudorandom permutation evaluated index by index: no memory, whatever the length of the text.
        from grain.experimental import index_shuffle

        index_B = np.array(
            [
                index_shuffle(int(i), max_index=windows - 1, seed=_shuffle_seed(seed, int(e)), rounds=4)
                for i, e in zip(index_B, epochs)
            ],
            np.int64,
        )
    return Batch(index_B * seq_len, np.ones(batch_size, bool))


def uniform(seed: int, step: int, size: int) -> np.ndarray:
    """`size` draws from [0, 1), float64: a pure function of (seed, step).

    The raw output of a counter-based generator (Philox 4x64-10, Salmon et al. 2011), whose stream NumPy guarantees
    to stay the same; that of its distributions it does not.
    """
    raw = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(size)
    return (raw >> np.uint64(11)) * 2.0**-53


def _shuffle_seed(seed: int, epoch: int) -> int:
    """A 32-bit seed for the permutation of one epoch."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def stack_batches(layout: Layout, step: int, n: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """The batches of steps `step` .. `step + n - 1`, padded to `capacity`: starts_KB (int32), reset_KB (bool)."""
    batches = [layout.batch(step + k) for k in range(n)]
    batch_size = len(batches[0].starts_B)
    starts_KB = np.zeros((capacity, batch_size), np.int32)
    reset_KB = np.zeros((capacity, batch_size), bool)
    for k, batch in enumerate(batches):
        starts_KB[k], reset_KB[k] = batch
    return starts_KB, reset_KB


def cut_windows(ids_N: jax.Array, starts_B: jax.Array, seq_len: int) -> jax.Array:
    """Windows of T + 1 ids cut out of a text that lies on the device, int32, shape (B, T + 1)."""
    cut = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(ids_N, start, seq_len + 1))
    return cut(starts_B).astype(jnp.int32)
