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
LENGTHS = st.integers(2, 400)


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
@given(LENGTHS, SIZES, SIZES, st.booleans(), st.integers(0, 3))
def test_every_window_comes_once_an_epoch_whatever_the_batch(name, num_chars, batch_size, seq_len, shuffle, seed):
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


@given(LENGTHS, SIZES, SIZES, st.integers(0, 3))
def test_random_windows_lie_in_the_text_and_reach_all_of_it(num_chars, batch_size, seq_len, seed):
    assume(num_chars > seq_len)
    layout = layout_of("random", num_chars, batch_size, seq_len, seed=seed)
    assert layout.steps_per_epoch * batch_size * seq_len == pytest.approx(num_chars - 1)
    starts = np.concatenate([layout.batch(step).starts_B for step in range(20 * num_chars // batch_size + 1)])
    assert set(starts.tolist()) <= set(range(num_chars - seq_len))
    # That one of n places is missed in 20 n draws has the chance of n e^-20.
    assert set(starts.tolist()) == set(range(num_chars - seq_len))


@pytest.mark.parametrize("name", LAYOUTS)
@given(LENGTHS, SIZES, SIZES, st.integers(0, 3), st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_a_batch_depends_on_nothing_but_seed_and_step(name, num_chars, batch_size, seq_len, seed, steps):
    assume(num_chars > batch_size * seq_len)
    whole = layout_of(name, num_chars, batch_size, seq_len, seed=seed)
    for step in steps:  # In any order, from a layout made anew.
        starts_B, reset_B = layout_of(name, num_chars, batch_size, seq_len, seed=seed).batch(step)
        assert (starts_B == whole.batch(step).starts_B).all() and (reset_B == whole.batch(step).reset_B).all()
        assert starts_B.dtype == np.int64 and starts_B.shape == reset_B.shape == (batch_size,)
        assert 0 <= starts_B.min() and starts_B.max() + seq_len + 1 <= num_chars
        assert whole.carries_state or reset_B.all()


def test_random_windows_are_evenly_spread():
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


def test_resets_come_at_the_stated_rate_and_only_where_they_should():
    resets = np.stack([stream_batch(3, step, 10**6, 20, 10, 0.1).reset_B for step in range(1, 2001)])
    assert abs(resets.mean() - 0.1) < 0.005
    never = np.stack([stream_batch(3, step, 10**6, 20, 10, 0.0).reset_B for step in range(1, 200)])
    assert not never.any()


def test_draws_are_the_same_for_ever():
    # Philox 4x64-10 with key (7, 11).
    raw = np.random.Philox(key=np.array([7, 11], np.uint64)).random_raw(3)
    assert uniform(7, 11, 3).tolist() == [(int(r) >> 11) / 2**53 for r in raw]
    assert np.allclose(uniform(7, 11, 3), [0.31363218, 0.15886538, 0.7884324])


def test_a_text_shorter_than_what_a_layout_needs_is_refused():
    with pytest.raises(
        CorpusError, match="has 12 characters, fewer than one batch: batching.batch_size 3 x batching.seq_len 4"
    ):
        layout_of("stream", 12, 3, 4)
    layout_of("stream", 13, 3, 4)
    for name in ("random", "sliding"):
        with pytest.raises(CorpusError, match="has 4 characters, fewer than one window: batching.seq_len 4"):
            layout_of(name, 4, 3, 4)
        layout_of(name, 5, 3, 4)


def windows_of(gather, step, n, seq_len):
    """The windows and resets that a chunk holds, as a dispatch reads them."""
    ids_N, starts_KB, reset_KB = gather.take(step, n)
    assert ids_N.shape == gather.ids_N.shape and starts_KB.dtype == np.int32
    return [np.asarray(cut_windows(jnp.asarray(ids_N), starts_B, seq_len)) for starts_B in starts_KB[:n]], reset_KB[:n]


@pytest.mark.parametrize("name", LAYOUTS)
@given(first=st.integers(0, 50), sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4))
@settings(max_examples=10)
def test_both_gathers_give_the_windows_of_the_layout(name, first, sizes):
    text = np.random.default_rng(0).integers(0, 300, 500).astype(np.uint16)
    layout = layout_of(name, len(text), 3, 5)
    device = device_windows(text, layout, 8)
    host = prefetched_windows(text, layout, 8, first, first + sum(sizes))
    step = first
    for n in sizes:
        (ours, our_resets), (theirs, their_resets) = (windows_of(gather, step, n, 5) for gather in (device, host))
        for k in range(n):
            starts_B, reset_B = layout.batch(step + k)
            expected = np.stack([text[start : start + 6] for start in starts_B])
            assert (ours[k] == expected).all() and (theirs[k] == expected).all()
            assert (our_resets[k] == reset_B).all() and (their_resets[k] == reset_B).all()
        step += n
    host.close()


@pytest.mark.parametrize("name", LAYOUTS)
def test_windows_beyond_two_and_four_gigabytes(tmp_path, name):
    size = 5 * 2**30 + 12_345
    path = tmp_path / "ids.bin"
    with open(path, "wb") as file:
        file.truncate(size)  # Sparse: it takes no room.
    text = np.memmap(path, np.uint8, "r+")
    layout = layout_of(name, size, 16, 8)
    starts = np.concatenate([layout.batch(step).starts_B for step in range(40)])
    assert (
        starts.min() >= 0 and starts.max() + 9 <= size and (starts > 2**32).any() and len(set(starts.tolist())) == len(starts)
    )
    for i, start in enumerate(starts.tolist()):
        text[start : start + 9] = i % 251
    expected = [[text[start : start + 9].tolist() for start in layout.batch(step).starts_B] for step in range(36, 40)]
    gather = prefetched_windows(text, layout, 8, 36, 40)
    windows, _ = windows_of(gather, 36, 4, 8)
    gather.close()
    assert np.stack(windows).tolist() == expected


def test_windows_are_cut_where_they_start():
    ids = jnp.arange(200, dtype=jnp.uint8)
    windows = cut_windows(ids, jnp.array([0, 17, 195]), 4)
    assert windows.dtype == jnp.int32
    assert windows.tolist() == [list(range(0, 5)), list(range(17, 22)), list(range(195, 200))]
