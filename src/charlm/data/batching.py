"""Batch layouts and window sources: which windows of the text each training step reads, and how the device gets them.

A window is `ids[start : start + T + 1]`: T inputs, and T targets one position to the right. A layout is a pure function from
(seed, step) to the starts of the windows of a batch and to the streams whose state is reset. It has no iterator state, so a
resumed run reads the same batches as an uninterrupted run. A window source supplies the windows of several steps at a time.

The windows of a text of documents are not contiguous in the text, because its documents are shuffled. Such a layout gives the
position of every symbol of a window in place of its start.

Letters: B batch, T time (`seq_len`), N ids of the text, K steps in a dispatch, W = T + 1 symbols of a window.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from charlm.data.document_streams import document_streams
from charlm.parallel import mesh as meshes
from charlm.system.errors import CorpusError

LAYOUTS = ("stream", "windows", "random", "sliding")
LOSSES_ON = ("all", "last")
# How many bytes of windows the host reads ahead of their use, and with how many threads.
_PREFETCH_BYTES = 64 << 20
_NUM_READER_THREADS = 4
# The draws of an epoch have the keys from here on, and those of a step the keys below.
_EPOCH_KEYS = 1 << 63


class Batch(NamedTuple):
    """The windows of one step.

    Attributes:
        starts_B: the position of the first input of each window, int64; for documents, the position of every symbol of each
            window, shape (B, W).
        reset_B: whether each window starts from the initial state instead of the carried state, bool.
    """

    starts_B: np.ndarray
    reset_B: np.ndarray


class Layout(NamedTuple):
    """A layout for one seed and one text.

    Attributes:
        batch: step -> Batch.
        seq_len: T.
        steps_per_epoch: the number of steps that read the text once. It is a fraction if a batch may span two epochs.
        carries_state: whether window b of a step starts from the last state of window b of the step before.
    """

    batch: Callable[[int], Batch]
    seq_len: int
    steps_per_epoch: float
    carries_state: bool


def make_layout(batching: ConfigDict, seed: int, num_chars: int, boundaries: np.ndarray | None = None) -> Layout:
    """Return the layout of `config.batching` for a text of `num_chars` symbols.

    Args:
        batching: `config.batching`.
        seed: the seed of the run.
        num_chars: N.
        boundaries: the positions of the boundaries in a text of documents (`documents.document_positions`), for `stream`; None:
            the text has no documents.

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
            f"the training text has {num_chars} characters, fewer than {what} = {needed}; lower these keys, or train on a "
            "longer text"
        )
    if boundaries is not None:
        return _documents_layout(batching, seed, num_chars, boundaries)
    if batching.layout == "stream":
        return Layout(
            lambda step: stream_batch(seed, step, num_chars, batch_size, seq_len, batching.reset_prob),
            seq_len,
            float((num_chars - 1) // (batch_size * seq_len)),
            True,
        )
    if batching.layout == "random":
        # An epoch reads as many characters as the text has, although the windows overlap.
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


def _documents_layout(batching: ConfigDict, seed: int, num_chars: int, boundaries: np.ndarray) -> Layout:
    """Return the layout of streams that read shuffled documents (`document_streams`).

    The model replaces its state at every boundary, so no window has to be reset. Each epoch has a different order if `shuffle`
    is set.
    """
    batch_size, seq_len, num_documents = batching.batch_size, batching.seq_len, len(boundaries) - 1

    def order(epoch: int) -> np.ndarray:
        if not batching.shuffle:
            return np.arange(num_documents)
        return np.argsort(_draws(seed, _EPOCH_KEYS + epoch, num_documents), kind="stable")

    positions = document_streams(boundaries, batch_size, order)

    def batch(step: int) -> Batch:
        return Batch(positions(step * seq_len, seq_len + 1), np.zeros(batch_size, bool))

    return Layout(batch, seq_len, (num_chars - 1) / seq_len / batch_size, True)


def num_windows(num_chars: int, seq_len: int, stride: int) -> int:
    """Return the number of windows of T characters and their targets that start at 0, stride, 2 stride, ... in a text."""
    return (num_chars - 1 - seq_len) // stride + 1


def stream_batch(seed: int, step: int, num_chars: int, batch_size: int, seq_len: int, reset_prob: float) -> Batch:
    """Return the windows of B parallel streams that carry their state from window to window (truncated BPTT).

    Stream b reads the b-th of B equal, contiguous parts of the text. At most B * T characters at the end of the text remain
    unread. Every state is reset at the start of an epoch. In addition, each state is reset with probability `reset_prob` at
    every window, because a model whose state is always carried never learns to start from the initial state.
    """
    windows = (num_chars - 1) // (batch_size * seq_len)
    index = step % windows
    starts_B = (np.arange(batch_size, dtype=np.int64) * windows + index) * seq_len
    reset_B = uniform(seed, step, batch_size) < reset_prob
    return Batch(starts_B, reset_B | (index == 0))


def windows_batch(seed: int, step: int, num_chars: int, batch_size: int, seq_len: int, stride: int, shuffle: bool) -> Batch:
    """Return B windows of T characters out of those at 0, stride, 2 stride, ..., in text order or shuffled.

    With stride T the windows are adjacent (`windows`). With stride 1 there is one at every position (`sliding`). The windows of
    all epochs form one endless sequence, and each step reads the next B of them. Every epoch therefore contains every window
    exactly once, for every B. Each epoch has a different order if `shuffle` is set. (Grain's permutation has one known defect:
    for exactly 2^32 + 1 indices, two of them collide.)
    """
    windows = num_windows(num_chars, seq_len, stride)
    position_B = np.arange(batch_size, dtype=np.int64) + step * batch_size
    epochs, index_B = np.divmod(position_B, windows)
    if shuffle:
        # Grain evaluates a pseudorandom permutation index by index, so it needs no memory for a long text.
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
    """Return B windows of T characters at positions drawn uniformly with replacement."""
    # The modulo favours some positions over others, by less than one part in 2^64 / N.
    starts_B = _draws(seed, step, batch_size) % np.uint64(num_windows(num_chars, seq_len, 1))
    return Batch(starts_B.astype(np.int64), np.ones(batch_size, bool))


def uniform(seed: int, step: int, size: int) -> np.ndarray:
    """Return `size` uniform draws from [0, 1), float64. They depend only on (seed, step)."""
    return (_draws(seed, step, size) >> np.uint64(11)) * 2.0**-53


def _draws(seed: int, step: int, size: int) -> np.ndarray:
    """Return `size` draws of 64 random bits, uint64. They depend only on (seed, step).

    This is the raw output of a counter-based generator (Philox 4x64-10, Salmon et al. 2011). NumPy guarantees that the raw
    output never changes between versions. It gives no such guarantee for its distributions.
    """
    return np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(size)


def _shuffle_seed(seed: int, epoch: int) -> int:
    """Return a 32-bit seed for the permutation of one epoch."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


class Chunk(NamedTuple):
    """The input of a dispatch of up to K steps: the windows `ids_N[start : start + T + 1]` of each step.

    On a mesh these are global arrays, with `starts_KB` and `reset_KB` sharded along the batch (`charlm.parallel.mesh`).

    Attributes:
        ids_N: ids in the dtype of the vocabulary: the whole text, or only the windows of this chunk.
        starts_KB: the position of each window in `ids_N`, int32; for documents that of each symbol, shape (K, B, W).
        reset_KB: as `Batch.reset_B`, bool.
    """

    ids_N: jax.Array | np.ndarray
    starts_KB: jax.Array | np.ndarray
    reset_KB: jax.Array | np.ndarray


class WindowSource(NamedTuple):
    """A source of chunks. `device_windows` and `prefetched_windows` supply the same windows, so training has the same bits.

    Attributes:
        ids_N: the shape, dtype and sharding of `ids_N` in every chunk.
        take: (step, n) -> the Chunk of the n <= K steps from `step` on. Each call must continue where the last one ended.
        close: stops the threads in the background, if there are any.
    """

    ids_N: jax.ShapeDtypeStruct
    take: Callable[[int, int], Chunk]
    close: Callable[[], None]


def device_windows(ids_N: np.ndarray, layout: Layout, capacity: int, mesh: Mesh | None = None) -> WindowSource:
    """Return a source that copies the whole text to the device once. Its chunks differ only in the starts and the resets.

    Args:
        ids_N: the text, fewer than 2^31 ids.
        layout: the layout.
        capacity: K.
        mesh: the devices that share a batch; each of them gets the whole text.
    """
    on_device_N = np.asarray(ids_N)
    on_device_N = jnp.asarray(on_device_N) if mesh is None else meshes.put(mesh, on_device_N)

    def take(step: int, n: int) -> Chunk:
        starts_and_resets = stack_batches([layout.batch(step + k) for k in range(n)], capacity)
        return Chunk(on_device_N, *(meshes.put(mesh, each, meshes.STEPS_BATCH_SHARDED) for each in starts_and_resets))

    return WindowSource(meshes.shape(mesh, on_device_N.shape, on_device_N.dtype), take, lambda: None)


def prefetched_windows(
    ids_N: np.ndarray, layout: Layout, capacity: int, first_step: int, num_steps: int, mesh: Mesh | None = None
) -> WindowSource:
    """Return a source that leaves the text in its memory map. Grain reads windows ahead; a chunk contains only its windows.

    The `ids_N` of a chunk are its windows, concatenated, and `starts_KB` are their positions there. The same
    compiled step therefore reads both sources. On a mesh each device gets the windows of its own rows, and each process reads
    only the windows of its own devices.

    Args:
        ids_N: the text, of any length.
        layout: the layout.
        capacity: K.
        first_step: the step of the first chunk.
        num_steps: the number of steps of the run.
        mesh: the devices that share a batch.
    """
    import grain  # The import takes over half a second, and only large texts need it.

    ids_N = np.asarray(ids_N)  # Slicing a plain array is much faster than slicing a np.memmap.
    width = layout.seq_len + 1

    class Windows:
        """The steps of the run as a Grain data source: step -> (windows (B, T + 1), reset_B)."""

        def __len__(self) -> int:
            return num_steps

        def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
            starts_B, reset_B = layout.batch(int(step))
            starts_B = starts_B[local_rows]
            if starts_B.ndim == 2:
                return ids_N[starts_B], reset_B
            return np.stack([ids_N[start : start + width] for start in starts_B.tolist()]), reset_B

    first_starts_B = layout.batch(first_step).starts_B
    batch_size = len(first_starts_B)
    rows_by_device = meshes.local_rows(mesh, batch_size)
    local_rows = np.concatenate([np.arange(batch_size)[each] for each in rows_by_device])
    batch_bytes = len(local_rows) * width * ids_N.dtype.itemsize
    ahead = max(2, min(2 * capacity, _PREFETCH_BYTES // batch_bytes))
    options = grain.ReadOptions(num_threads=min(_NUM_READER_THREADS, ahead), prefetch_buffer_size=ahead)
    batches = iter(grain.MapDataset.source(Windows())[first_step:].to_iter_dataset(options))
    rows_per_device = len(local_rows) // len(rows_by_device)
    starts_KB = np.arange(capacity * rows_per_device, dtype=np.int32).reshape(capacity, rows_per_device) * width
    starts_KB = np.tile(starts_KB, batch_size // rows_per_device)
    ids_shape = meshes.shape(mesh, (starts_KB.size * width,), ids_N.dtype, meshes.BATCH_SHARDED)
    if first_starts_B.ndim == 2:
        starts_KB = starts_KB[:, :, None] + np.arange(width, dtype=np.int32)

    expected = first_step

    def take(step: int, n: int) -> Chunk:
        nonlocal expected
        assert step == expected, f"take() was called for step {step}; the next step is {expected}"
        expected += n
        ids = np.zeros((len(rows_by_device), capacity, rows_per_device, width), ids_N.dtype)
        reset_KB = np.zeros((capacity, batch_size), bool)
        for k in range(n):
            windows, reset_KB[k] = next(batches)
            ids[:, k] = windows.reshape(len(rows_by_device), rows_per_device, width)
        starts_and_resets = (meshes.put(mesh, each, meshes.STEPS_BATCH_SHARDED) for each in (starts_KB, reset_KB))
        return Chunk(meshes.put_local(mesh, ids.reshape(-1)), *starts_and_resets)

    return WindowSource(ids_shape, take, batches.close)


def stack_batches(batches: Sequence[Batch], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the batches of consecutive steps as arrays (starts_KB int32, reset_KB bool), padded to K = `capacity` steps."""
    starts_KB = np.zeros((capacity, *batches[0].starts_B.shape), np.int32)
    reset_KB = np.zeros((capacity, len(batches[0].starts_B)), bool)
    for k, batch in enumerate(batches):
        starts_KB[k], reset_KB[k] = batch
    return starts_KB, reset_KB


def cut_windows(ids_N: jax.Array, starts_B: jax.Array, seq_len: int) -> jax.Array:
    """Return the windows of T + 1 ids of a text on the device, int32, shape (B, T + 1).

    Args:
        ids_N: the text.
        starts_B: the position of each window; or the position of each of its symbols, shape (B, W).
        seq_len: T.
    """
    if starts_B.ndim == 2:
        return jnp.take(ids_N, starts_B, mode="clip").astype(jnp.int32)
    cut = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(ids_N, start, seq_len + 1))
    return cut(starts_B).astype(jnp.int32)
