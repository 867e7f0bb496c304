import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.config import default_config
from charlm.data.vocab import Vocab
from charlm.inference.scorer import cut_documents, cut_streams, make_scorer, min_text_length
from charlm.inference.text_score import document_scores
from charlm.nn.model import CharLM

V = 9
VOCAB = Vocab.from_chars("abcdefghi")
BATCHING = default_config().batching
IDS = np.random.default_rng(0).integers(0, V, 1503).astype(np.uint8)


@functools.cache
def model_and_params(hidden=12):
    config = default_config().model
    config.update(hidden_size=hidden, embedding_size=6)
    model = CharLM.from_config(config, V)
    # Large weights, so that the loss depends on the context.
    return model, jax.tree.map(lambda p: 2 * np.asarray(p), jax.jit(model.initial_params)(jax.random.key(0)))


def log_probs_of(model, params, ids):
    """Return the log-probabilities of the symbol after each of some ids, read from a zero state, shape (T, V)."""

    @jax.jit
    def log_probs(params, ids):
        logits, _ = model.apply({"params": params}, ids[:, None], model.initial_carry(params, 1))
        return jax.nn.log_softmax(logits[:, 0])

    return np.asarray(log_probs(params, ids.astype(np.int32)), np.float64)


def options(num_streams=64, context=64, batch_size=64, max_chars=10_000):
    config = default_config().eval
    config.update(num_streams=num_streams, context=context, batch_size=batch_size, max_chars=max_chars)
    return config


@given(st.integers(2, 500), st.integers(1, 80), st.integers(0, 50))
def test_streams_score_every_character_except_the_first_once_with_its_context(num_chars, num_streams, context):
    streams = cut_streams(num_chars, num_streams, context)
    scored = np.concatenate([np.arange(first, end) for _, first, end in zip(*streams)])
    assert (scored == np.arange(1, num_chars)).all()
    assert (streams.end > streams.first).all()
    assert (streams.first - 1 - streams.start == np.minimum(context, streams.first - 1)).all()


@given(st.lists(st.integers(2, 30), min_size=1, max_size=40), st.integers(1, 80))
def test_streams_of_documents_begin_at_boundaries_and_score_every_character_once(sizes, num_streams):
    boundaries = np.cumsum([0, *sizes])
    streams = cut_documents(boundaries, int(boundaries[-1]) + 1, num_streams)
    assert len(streams.start) <= num_streams and np.isin(streams.start, boundaries).all()
    assert (streams.first == streams.start + 1).all()
    scored = np.concatenate([np.arange(first, end) for _, first, end in zip(*streams)])
    assert (scored == np.arange(1, boundaries[-1] + 1)).all()


def test_documents_have_the_loss_of_each_one_scored_alone_from_a_zero_state():
    model, params = model_and_params()
    ids = IDS[:701].copy()
    ids[[0, -1]] = 0  # 0 is the boundary. Two neighbouring boundaries would be an empty document.
    ids = ids[np.append(True, (ids[1:] != 0) | (ids[:-1] != 0))]
    documents = [np.concatenate([[0], each[each != 0], [0]]) for each in np.split(ids, np.flatnonzero(ids == 0)[1:-1])]
    alone = make_scorer(model, VOCAB, BATCHING)
    expected = [alone(params, each.astype(np.uint8), options(num_streams=1)).nats for each in documents]
    together = make_scorer(model.clone(boundary=0), VOCAB, BATCHING)
    for num_streams in (1, 9, 64):
        score = together(params, ids, options(num_streams, context=0), per_symbol=True)
        assert abs(score.nats - sum(expected)) < 1e-5 * sum(expected)
        assert score.count == sum(len(each) - 1 for each in documents)
        found = document_scores(ids, score.nats_N, VOCAB, 0)
        np.testing.assert_allclose([each["nats"] for each in found], expected, rtol=1e-5, atol=1e-5)
        assert [each["text"] for each in found] == [VOCAB.decode(each[1:-1]) for each in documents]
        assert sum(each["count"] for each in found) == score.count


def test_one_stream_reads_the_whole_text_from_a_zero_state():
    model, params = model_and_params()
    log_probs = log_probs_of(model, params, IDS[:-1])
    expected = -log_probs[np.arange(len(IDS) - 1), IDS[1:]].mean()
    score = make_scorer(model, VOCAB, BATCHING)(params, IDS, options(num_streams=1))
    assert abs(score.nats_per_char - expected) < 1e-6
    assert score.count == len(IDS) - 1


def test_each_stream_reads_its_context_first():
    model, params = model_and_params()
    expected = 0.0
    for start, first, end in zip(*cut_streams(len(IDS), 3, 20)):
        log_probs = log_probs_of(model, params, IDS[start : end - 1])
        expected -= log_probs[np.arange(first - 1 - start, end - 1 - start), IDS[first:end]].sum()
    score = make_scorer(model, VOCAB, BATCHING)(params, IDS, options(num_streams=3, context=20))
    assert abs(score.nats_per_char - expected / (len(IDS) - 1)) < 1e-6


@pytest.mark.parametrize("num_streams", [64, 10])
def test_the_batch_size_does_not_change_the_score(num_streams):
    model, params = model_and_params()
    score = make_scorer(model, VOCAB, BATCHING)
    scores = [score(params, IDS, options(num_streams, batch_size=size)) for size in (1, 7, 64)]
    assert max(s.nats_per_char for s in scores) - min(s.nats_per_char for s in scores) <= 1e-5
    assert {s.count for s in scores} == {len(IDS) - 1}


@pytest.mark.parametrize("length", [2, 3, 65])
def test_a_text_may_have_fewer_characters_than_streams(length):
    model, params = model_and_params()
    score = make_scorer(model, VOCAB, BATCHING)
    whole = score(params, IDS[:length], options(num_streams=1))
    many = score(params, IDS[:length], options(num_streams=64, context=1000))
    assert many.count == whole.count == length - 1
    assert abs(many.nats_per_char - whole.nats_per_char) < 1e-5


def test_a_uniform_model_has_the_loss_log_v_in_every_unit():
    model, params = model_and_params()
    score = make_scorer(model, VOCAB, BATCHING)(jax.tree.map(jnp.zeros_like, params), IDS, options())
    np.testing.assert_allclose(score.nats_per_char, np.log(V), rtol=1e-6)
    np.testing.assert_allclose(score.bits_per_char, np.log2(V), rtol=1e-6)
    np.testing.assert_allclose(score.perplexity, V, rtol=1e-5)


def last_only(seq_len):
    batching = default_config().batching
    batching.update(layout="sliding", loss_on="last", seq_len=seq_len)
    return batching


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_many_to_one_model_is_scored_on_evenly_spaced_windows(batch_size):
    model, params = model_and_params()
    batching = last_only(20)
    assert min_text_length(batching) == 21
    apply = jax.jit(
        lambda windows: model.apply({"params": params}, windows.T, model.initial_carry(params, len(windows)))[0][-1]
    )
    for max_chars, length in ((10_000, 150), (37, 1503), (5, 21)):
        score = make_scorer(model, VOCAB, batching)(params, IDS[:length], options(batch_size=batch_size, max_chars=max_chars))
        windows = length - 20
        starts = [i * windows // min(max_chars, windows) for i in range(min(max_chars, windows))]
        log_probs = np.asarray(jax.nn.log_softmax(apply(np.stack([IDS[s : s + 20] for s in starts]).astype(np.int32))))
        expected = -np.mean([log_probs[i, IDS[s + 20]] for i, s in enumerate(starts)])
        assert score.count == score.chars == len(starts)
        np.testing.assert_allclose(score.nats_per_char, expected, rtol=1e-5)
    with pytest.raises(ValueError):
        make_scorer(model, VOCAB, batching)(params, IDS[:20], options())


def test_bytes_are_scored_in_nats_per_byte_and_per_character():
    config = default_config().model
    config.update(hidden_size=4, embedding_size=4)
    vocab = Vocab.all_bytes()
    model = CharLM.from_config(config, vocab.size)
    params = jax.tree.map(jnp.zeros_like, jax.jit(model.initial_params)(jax.random.key(0)))
    text = "aé漢🙂" * 30
    ids = vocab.encode(text)
    score = make_scorer(model, vocab, BATCHING)(params, ids, options())
    assert score.count == 300 - 1 and score.chars == 120 - 1
    np.testing.assert_allclose(score.nats_per_symbol, np.log(256), rtol=1e-6)
    np.testing.assert_allclose(score.nats_per_char, np.log(256) * 299 / 119, rtol=1e-6)
    score = make_scorer(model, vocab, last_only(10))(params, ids, options(max_chars=50))
    assert score.count == 50
    np.testing.assert_allclose(score.nats_per_char, np.log(256) * 299 / 119, rtol=1e-6)
