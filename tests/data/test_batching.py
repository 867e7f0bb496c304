import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from charlm.config import default_config
from charlm.data.batching import (
    LAYOUTS,
    cut_windows,
    device_windows,
    make_layout,
    prefetched_windows,
    random_batch,
    stream_batch,
    uniform,
    windows_batch,
)
from charlm.system.errors import CorpusError

SIZES = st.integers(1, 7)
LENGTHS = st.integers(2, 150)


def layout_of(name, num_chars, batch_size, seq_len, shuffle=True, reset_prob=0.1, seed=0):
    batching = default_config().batching
    batching.update(layout=name, batch_size=batch_size, seq_len=seq_len, shuffle=shuffle, reset_prob=reset_prob)
    return make_layout(batching, seed, num_chars)


@given(LENGTHS, SIZES, SIZES, st.integers(0, 3))
def test_stream_reads_each_character_of_each_stream_once_an_epoch_and_in_order(num_chars, batch_size, seq_len, seed):
    assume(num_chars > batch_size * seq_len)
    layout = layout_of("stream", num_chars, batch_size, seq_len, seed=seed)
    windows = int(layout.steps_per_epoch)
    starts = np.stack([layout.batch(step).starts_B for step in range(2 * windows)])
    assert (starts[:windows] == starts[windows:]).all()
    epoch = starts[:windows]
    assert (np.diff(epoch, axis=0) == seq_len).all()
    read = (epoch.T.reshape(-1, 1) + np.arange(seq_len)).ravel()
    assert (read == np.arange(windows * batch_size * seq_len)).all()
    assert read[-1] + 1 < num_chars <= read[-1] + 2 + batch_size * seq_len
    assert layout.batch(0).reset_B.all() and layout.batch(windows).reset_B.all()


@pytest.mark.parametrize("name", ["windows", "sliding"])
@settings(max_examples=50)
@given(LENGTHS, SIZES, SIZES, st.booleans(), st.integers(0, 3))
def test_every_epoch_contains_every_window_once_for_every_batch_size(name, num_chars, batch_size, seq_len, shuffle, seed):
    assume(num_chars > (batch_size * seq_len if name == "windows" else seq_len))
    layout = layout_of(name, num_chars, batch_size, seq_len, shuffle, seed=seed)
    stride = seq_len if name == "windows" else 1
    expected = list(range(0, num_chars - seq_len, stride))
    windows = len(expected)
    steps = math.ceil(2 * windows / batch_size)
    assert layout.steps_per_epoch == windows / batch_size
    starts = np.concatenate([layout.batch(step).starts_B for step in range(steps)])
    for epoch in (starts[:windows], starts[windows : 2 * windows]):
        assert sorted(epoch.tolist()) == expected
        assert shuffle or (np.diff(epoch) > 0).all()
    assert starts.max() + seq_len + 1 <= num_chars


@settings(max_examples=50)
@given(LENGTHS, SIZES, SIZES, st.integers(0, 3))
def test_random_windows_cover_exactly_the_text(num_chars, batch_size, seq_len, seed):
    assume(num_chars > seq_len)
    layout = layout_of("random", num_chars, batch_size, seq_len, seed=seed)
    assert layout.steps_per_epoch * batch_size * seq_len == pytest.approx(num_chars - 1)
    starts = np.concatenate([layout.batch(step).starts_B for step in range(20 * num_chars // batch_size + 1)])
    assert set(starts.tolist()) <= set(range(num_chars - seq_len))
    # The probability that 20 n draws miss one of n positions is n e^-20.
    assert set(starts.tolist()) == set(range(num_chars - seq_len))


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=25)
@given(LENGTHS, SIZES, SIZES, st.integers(0, 3), st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_a_batch_depends_only_on_seed_and_step(name, num_chars, batch_size, seq_len, seed, steps):
    assume(num_chars > batch_size * seq_len)
    layout = layout_of(name, num_chars, batch_size, seq_len, seed=seed)
    for step in steps:  # In any order, with a new layout for each step.
        starts_B, reset_B = layout_of(name, num_chars, batch_size, seq_len, seed=seed).batch(step)
        assert (starts_B == layout.batch(step).starts_B).all() and (reset_B == layout.batch(step).reset_B).all()
        assert starts_B.dtype == np.int64 and starts_B.shape == reset_B.shape == (batch_size,)
        assert 0 <= starts_B.min() and starts_B.max() + seq_len + 1 <= num_chars
        assert layout.carries_state or reset_B.all()


def test_random_windows_are_uniformly_distributed():
    starts = np.concatenate([random_batch(5, step, 10_001, 100, 1).starts_B for step in range(1000)])
    counts = np.bincount(starts * 20 // 10_000)
    assert counts.shape == (20,) and abs(counts / 5000 - 1).max() < 0.06


def test_shuffles_differ_between_epochs_and_seeds():
    orders = {
        tuple(
            np.concatenate([windows_batch(seed, step, 1001, 10, 10, 10, True).starts_B for step in range(10 * e, 10 * e + 10)])
        )
        for seed in (0, 1)
        for e in (0, 1)
    }
    assert len(orders) == 4


def test_resets_have_the_configured_probability():
    resets = np.stack([stream_batch(3, step, 10**6, 20, 10, 0.1).reset_B for step in range(1, 2001)])
    assert abs(resets.mean() - 0.1) < 0.005
    never = np.stack([stream_batch(3, step, 10**6, 20, 10, 0.0).reset_B for step in range(1, 200)])
    assert not never.any()


def test_draws_never_change():
    # Philox 4x64-10 with key (7, 11).
    raw = np.random.Philox(key=np.array([7, 11], np.uint64)).random_raw(3)
    assert uniform(7, 11, 3).tolist() == [(int(r) >> 11) / 2**53 for r in raw]
    assert np.allclose(uniform(7, 11, 3), [0.31363218, 0.15886538, 0.7884324])


def test_a_text_that_is_too_short_for_a_layout_is_refused():
    with pytest.raises(
        CorpusError, match="has 12 characters, fewer than one batch: batching.batch_size 3 x batching.seq_len 4"
    ):
        layout_of("stream", 12, 3, 4)
    layout_of("stream", 13, 3, 4)
    for name in ("random", "sliding"):
        with pytest.raises(CorpusError, match="has 4 characters, fewer than one window: batching.seq_len 4"):
            layout_of(name, 4, 3, 4)
        layout_of(name, 5, 3, 4)


def windows_of(source, step, n, seq_len):
    """Return the windows and the resets of a chunk, as a dispatch reads them."""
    ids_N, starts_KB, reset_KB = source.take(step, n)
    assert ids_N.shape == source.ids_N.shape and starts_KB.dtype == np.int32
    return [np.asarray(cut_windows(jnp.asarray(ids_N), starts_B, seq_len)) for starts_B in starts_KB[:n]], reset_KB[:n]


@pytest.mark.parametrize("name", LAYOUTS)
@given(first=st.integers(0, 50), sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4))
@settings(max_examples=10)
def test_both_window_sources_return_the_windows_of_the_layout(name, first, sizes):
    text = np.random.default_rng(0).integers(0, 300, 500).astype(np.uint16)
    layout = layout_of(name, len(text), 3, 5)
    device = device_windows(text, layout, 8)
    host = prefetched_windows(text, layout, 8, first, first + sum(sizes))
    step = first
    for n in sizes:
        (on_device, device_resets), (on_host, host_resets) = (windows_of(source, step, n, 5) for source in (device, host))
        for k in range(n):
            starts_B, reset_B = layout.batch(step + k)
            expected = np.stack([text[start : start + 6] for start in starts_B])
            assert (on_device[k] == expected).all() and (on_host[k] == expected).all()
            assert (device_resets[k] == reset_B).all() and (host_resets[k] == reset_B).all()
        step += n
    host.close()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_text_may_be_larger_than_two_and_four_gigabytes(tmp_path, name):
    size = 5 * 2**30 + 12_345
    path = tmp_path / "ids.bin"
    with open(path, "wb") as file:
        file.truncate(size)  # A sparse file occupies no disk space.
    text = np.memmap(path, np.uint8, "r+")
    layout = layout_of(name, size, 16, 8)
    starts = np.concatenate([layout.batch(step).starts_B for step in range(40)])
    assert (
        starts.min() >= 0 and starts.max() + 9 <= size and (starts > 2**32).any() and len(set(starts.tolist())) == len(starts)
    )
    for i, start in enumerate(starts.tolist()):
        text[start : start + 9] = i % 251
    expected = [[text[start : start + 9].tolist() for start in layout.batch(step).starts_B] for step in range(36, 40)]
    source = prefetched_windows(text, layout, 8, 36, 40)
    windows, _ = windows_of(source, 36, 4, 8)
    source.close()
    assert np.stack(windows).tolist() == expected


def test_cut_windows_starts_each_window_at_its_position():
    ids = jnp.arange(200, dtype=jnp.uint8)
    windows = cut_windows(ids, jnp.array([0, 17, 195]), 4)
    assert windows.dtype == jnp.int32
    assert windows.tolist() == [list(range(0, 5)), list(range(17, 22)), list(range(195, 200))]
