import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from charlm.batching import cut_windows, make_layout, stack_batches, stream_batch, uniform, windows_batch
from charlm.config import default_config
from charlm.errors import CorpusError

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


@given(LENGTHS, SIZES, SIZES, st.booleans(), st.integers(0, 3))
def test_windows_come_once_an_epoch_whatever_the_batch(num_chars, batch_size, seq_len, shuffle, seed):
    assume(num_chars > batch_size * seq_len)
    layout = layout_of("windows", num_chars, batch_size, seq_len, shuffle, seed=seed)
    windows = (num_chars - 1) // seq_len
    steps = math.ceil(2 * windows / batch_size)
    assert layout.steps_per_epoch == windows / batch_size
    starts = np.concatenate([layout.batch(step).starts_B for step in range(steps)])
    for epoch in (starts[:windows], starts[windows : 2 * windows]):
        assert sorted(epoch.tolist()) == [i * seq_len for i in range(windows)]
        assert shuffle or (np.diff(epoch) > 0).all()
    assert starts.max() + seq_len + 1 <= num_chars


def test_shuffles_differ_between_epochs_and_seeds():
    orders = {
        tuple(np.concatenate([windows_batch(seed, step, 1001, 10, 10, True).starts_B for step in range(10 * e, 10 * e + 10)]))
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


def test_a_text_shorter_than_a_batch_is_refused():
    with pytest.raises(
        CorpusError, match="has 12 characters, fewer than one batch: batching.batch_size 3 x batching.seq_len 4"
    ):
        layout_of("stream", 12, 3, 4)
    layout_of("stream", 13, 3, 4)


@given(st.integers(0, 50), st.integers(1, 6))
def test_stacked_batches_are_those_of_the_layout(step, n):
    layout = layout_of("stream", 1000, 3, 5)
    starts_KB, reset_KB = stack_batches(layout, step, n, 8)
    assert starts_KB.shape == reset_KB.shape == (8, 3)
    for k in range(n):
        assert (starts_KB[k] == layout.batch(step + k).starts_B).all()
        assert (reset_KB[k] == layout.batch(step + k).reset_B).all()


def test_windows_are_cut_where_they_start():
    ids = jnp.arange(200, dtype=jnp.uint8)
    windows = cut_windows(ids, jnp.array([0, 17, 195]), 4)
    assert windows.dtype == jnp.int32
    assert windows.tolist() == [list(range(0, 5)), list(range(17, 22)), list(range(195, 200))]
