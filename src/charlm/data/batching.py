"""Batch layouts: host functions (seed, step) -> where each window of a batch starts, and which states to reset.

A window is `ids[start : start + T + 1]`: T inputs and, one to the right, T targets. Nothing here remembers anything:
step k of a resumed run is step k of a whole one. The two gathers turn a layout into what a dispatch of steps reads.

Letters: B batch, T time (`seq_len`), N ids of the text, K steps in a dispatch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from charlm.parallel import mesh as meshes
from charlm.system.errors import CorpusError

LAYOUTS = ("stream", "windows", "random", "sliding")
LOSSES_ON = ("all", "last")
# The host gather's windows in memory ahead of their use, and the threads that read them.
_PREFETCH_BYTES = 64 << 20
_READERS = 4


class Batch(NamedTuple):
    """Where the B windows of one step start, and which of the B carried states begin anew."""

    starts_B: np.ndarray  # int64
    reset_B: np.ndarray  # bool


class Layout(NamedTuple):
    """A layout bound to a text.

    Attributes:
        batch: step -> Batch.
        seq_len: T.
        steps_per_epoch: steps that read the text once; not a whole number where batches straddle epochs.
        carries_state: whether the state at the end of a window is where the next one starts.
    """

    batch: Callable[[int], Batch]
    seq_len: int
    steps_per_epoch: float
    carries_state: bool


def make_layout(batching, seed: int, num_chars: int) -> Layout:
    """The layout that `config.batching` names, on a text of `num_chars` symbols.

    Raises:
        CorpusError: the text is shorter than one batch (`stream`, `windows`) or one window (`random`, `sliding`).
    """
    batch_size, seq_len = batching.batch_size, batching.seq_len
    if batching.layout in ("stream", "windows"):
        needed, what = batch_size * seq_len + 1, f"one batch: batching.batch_size {batch_size} x batching.seq_len {seq_len} + 1"
    else:
        needed, what = seq_len + 1, f"one window: batching.seq_len {seq_len} + 1"
    if num_chars < needed:
        raise CorpusError(
            f"the training text has {num_chars} characters, fewer than {what} = {needed}; lower it, or train on more text"
        )
    if batching.layout == "stream":
        return Layout(
            lambda step: stream_batch(seed, step, num_chars, batch_size, seq_len, batching.reset_prob),
            seq_len,
            float((num_chars - 1) // (batch_size * seq_len)),
            True,
        )
    if batching.layout == "random":
        # As many windows as there are adjacent ones: an epoch reads as much as the text holds.
        return Layout(
            lambda step: random_batch(seed, step, num_chars, batch_size, seq_len),
            seq_len,
            (num_chars - 1) / seq_len / batch_size,
            False,
        )
    stride = seq_len if batching.layout == "windows" else 1
    return Layout(
        lambda step: windows_batch(seed, step, num_chars, batch_size, seq_len, stride, batching.shuffle),
        seq_len,
        num_windows(num_chars, seq_len, stride) / batch_size,
        False,
    )


def num_windows(num_chars: int, seq_len: int, stride: int) -> int:
    """How many windows of T characters and their targets begin at 0, stride, 2 stride, ... within a text."""
    return (num_chars - 1 - seq_len) // stride + 1


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


def windows_batch(seed: int, step: int, num_chars: int, batch_size: int, seq_len: int, stride: int, shuffle: bool) -> Batch:
    """Windows of T characters, each `stride` after the one before, in text order or shuffled anew for every epoch.

    With a stride of T they are adjacent, with one of 1 they are all that there are (`sliding`). The windows of all
    epochs form one endless sequence and a step takes the next B of it, so that every window comes exactly once an epoch
    whatever B is. (Grain's permutation of exactly 2^32 + 1 indices is none: two of them collide.)
    """
    windows = num_windows(num_chars, seq_len, stride)
    nth = np.arange(batch_size, dtype=np.int64) + step * batch_size
    epochs, index_B = np.divmod(nth, windows)
    if shuffle:
        # A pseudorandom permutation evaluated index by index: no memory, whatever the length of the text.
        from grain.experimental import index_shuffle

        seeds = {epoch: _shuffle_seed(seed, epoch) for epoch in set(epochs.tolist())}
        index_B = np.array(
            [
                index_shuffle(index, max_index=windows - 1, seed=seeds[epoch], rounds=4)
                for index, epoch in zip(index_B.tolist(), epochs.tolist())
            ],
            np.int64,
        )
    return Batch(index_B * stride, np.ones(batch_size, bool))


def random_batch(seed: int, step: int, num_chars: int, batch_size: int, seq_len: int) -> Batch:
    """Windows of T characters at random places, each as likely as any other, drawn with replacement."""
    # A remainder favours some places over others by less than one part in 2^64 / N.
    starts_B = _draws(seed, step, batch_size) % np.uint64(num_windows(num_chars, seq_len, 1))
    return Batch(starts_B.astype(np.int64), np.ones(batch_size, bool))


def uniform(seed: int, step: int, size: int) -> np.ndarray:
    """`size` draws from [0, 1), float64: a pure function of (seed, step)."""
    return (_draws(seed, step, size) >> np.uint64(11)) * 2.0**-53


def _draws(seed: int, step: int, size: int) -> np.ndarray:
    """`size` times 64 random bits, uint64: a pure function of (seed, step).

    The raw output of a counter-based generator (Philox 4x64-10, Salmon et al. 2011), whose stream NumPy guarantees
    to stay the same; that of its distributions it does not.
    """
    return np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(size)


def _shuffle_seed(seed: int, epoch: int) -> int:
    """A 32-bit seed for the permutation of one epoch."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


class Chunk(NamedTuple):
    """What a dispatch of up to K steps reads: the windows `ids_N[start : start + T + 1]` of each step.

    On a mesh they are global arrays (`charlm.mesh`), the last two split by rows.

    Attributes:
        ids_N: ids, in the vocabulary's dtype.
        starts_KB: int32.
        reset_KB: bool.
    """

    ids_N: jax.Array | np.ndarray
    starts_KB: jax.Array | np.ndarray
    reset_KB: jax.Array | np.ndarray


class WindowSource(NamedTuple):
    """A way from a layout and a text to chunks. Both ways give the same windows, and so the same training to the bit.

    Attributes:
        ids_N: shape, dtype and sharding of every chunk's.
        take: (step, n) -> the Chunk of the n <= K steps from `step` on; called for steps in order, none left out.
        close: ends what works in the background.
    """

    ids_N: jax.ShapeDtypeStruct
    take: Callable[[int, int], Chunk]
    close: Callable[[], None]


def device_windows(ids_N: np.ndarray, layout: Layout, capacity: int, mesh: Mesh | None = None) -> WindowSource:
    """The whole text lies on the device, of fewer than 2^31 ids, and the chunks say where in it their windows are.

    On a mesh every device has the whole text.
    """
    on_device_N = np.asarray(ids_N)
    on_device_N = jnp.asarray(on_device_N) if mesh is None else meshes.put(mesh, on_device_N)

    def take(step: int, n: int) -> Chunk:
        starts_and_resets = stacked([layout.batch(step + k) for k in range(n)], capacity)
        return Chunk(on_device_N, *(meshes.put(mesh, each, meshes.STEPS_BATCH_SHARDED) for each in starts_and_resets))

    return WindowSource(meshes.shape(mesh, on_device_N.shape, on_device_N.dtype), take, lambda: None)


def prefetched_windows(
    ids_N: np.ndarray, layout: Layout, capacity: int, first_step: int, num_steps: int, mesh: Mesh | None = None
) -> WindowSource:
    """The text stays in its memory map, however long; Grain reads windows ahead and a chunk holds only its own.

    The windows lie end to end, so that a chunk is a small text, with the starts that belong to it, for the same
    compiled step. On a mesh each device has such a text of its own rows, and a process reads those of its devices alone.
    """
    import grain  # Over half a second, and only large texts need it.

    ids_N = np.asarray(ids_N)  # No longer as a memmap, whose every slice costs as much as reading it.
    width = layout.seq_len + 1

    class Windows:
        """Grain's view of the steps to come: step -> (windows (B, T + 1), reset_B)."""

        def __len__(self) -> int:
            return num_steps

        def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
            starts_B, reset_B = layout.batch(int(step))
            return np.stack([ids_N[start : start + width] for start in starts_B[own].tolist()]), reset_B

    batch_size = len(layout.batch(first_step).starts_B)
    rows = meshes.local_rows(mesh, batch_size)  # Of each device here.
    own = np.concatenate([np.arange(batch_size)[each] for each in rows])
    batch_bytes = len(own) * width * ids_N.dtype.itemsize
    ahead = max(2, min(2 * capacity, _PREFETCH_BYTES // batch_bytes))
    options = grain.ReadOptions(num_threads=min(_READERS, ahead), prefetch_buffer_size=ahead)
    batches = iter(grain.MapDataset.source(Windows())[first_step:].to_iter_dataset(options))
    share = len(own) // len(rows)
    starts_KB = np.arange(capacity * share, dtype=np.int32).reshape(capacity, share) * width
    starts_KB = np.tile(starts_KB, batch_size // share)

    expected = first_step

    def take(step: int, n: int) -> Chunk:
        nonlocal expected
        assert step == expected, f"step {step} was taken, and {expected} comes next"
        expected += n
        ids = np.zeros((len(rows), capacity, share, width), ids_N.dtype)
        reset_KB = np.zeros((capacity, batch_size), bool)
        for k in range(n):
            windows, reset_KB[k] = next(batches)
            ids[:, k] = windows.reshape(len(rows), share, width)
        whens = (meshes.put(mesh, each, meshes.STEPS_BATCH_SHARDED) for each in (starts_KB, reset_KB))
        return Chunk(meshes.put_local(mesh, ids.reshape(-1)), *whens)

    return WindowSource(meshes.shape(mesh, (starts_KB.size * width,), ids_N.dtype, meshes.BATCH_SHARDED), take, batches.close)


def stacked(batches: Sequence[Batch], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches of consecutive steps, padded to `capacity`: starts_KB (int32), reset_KB (bool)."""
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
