import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlm.config import default_config
from charlm.inference.dynamic import gradient_rms, make_dynamic_scorer
from charlm.nn.model import CharLM
from charlm.training.loss import cross_entropy

V, T = 9, 5
DRAW = np.random.default_rng(0)
TRAIN = DRAW.integers(0, V, 400).astype(np.uint8)
# A text that repeats itself, so a model can learn from it.
TEXT = np.tile(DRAW.integers(0, V, 30), 50).astype(np.uint8)[:1473]


@pytest.fixture(scope="module")
def scoring():
    config = default_config().model
    config.update(hidden_size=12, embedding_size=6, dropout=0.5, cell="gru")
    model = CharLM.from_config(config, V)
    params = jax.jit(model.initial_params)(jax.random.key(0))
    rms = gradient_rms(model, params, TRAIN, T, 50)
    score = make_dynamic_scorer(model, T)
    return model, params, rms, lambda ids, rate=0.0, decay=0.0: score(params, rms, ids, rate, decay)


def test_with_rate_0_the_score_is_the_static_score(scoring):
    model, params, _, score = scoring

    @jax.jit
    def losses_of(params, ids):
        logits, _ = model.apply({"params": params}, ids[:-1, None], model.initial_carry(params, 1))
        return cross_entropy(logits, ids[1:, None])[:, 0]

    # No loss depends on the symbols after it, so the losses of a prefix are those of the whole text.
    expected = losses_of(params, TEXT.astype(np.int32))
    for length in (2, T + 1, T + 2, len(TEXT)):
        losses = score(TEXT[:length])
        assert losses.shape == (length - 1,)
        np.testing.assert_allclose(losses, expected[: length - 1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError):
        score(TEXT[:1])


def test_the_model_learns_from_the_text_without_changing_the_parameters(scoring):
    _, params, _, score = scoring
    before = jax.tree.map(np.array, params)
    losses, without = score(TEXT, 0.003, 0.001), score(TEXT)
    assert losses[-200:].mean() < without[-200:].mean() - 0.5
    np.testing.assert_allclose(losses[:T], without[:T], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, before, params)


@pytest.mark.parametrize("position", [7, 203, 1300])
def test_a_symbol_changes_only_its_own_score_and_later_ones(scoring, position):
    score = scoring[3]
    changed = TEXT.copy()
    changed[position] = (changed[position] + 1) % V
    losses, others = score(TEXT, 0.003, 0.001), score(changed, 0.003, 0.001)
    # The loss at index i is that of character i + 1.
    assert (losses[: position - 1] == others[: position - 1]).all()
    assert (losses[position - 1 :] != others[position - 1 :]).all()


def test_the_updates_follow_the_equation(scoring):
    model, params, rms, score = scoring
    rate, decay = 0.002, 0.3

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def gradient(params, ids, carry):
        logits, last = model.apply({"params": params}, jnp.asarray(ids[:-1, None], jnp.int32), carry)
        return cross_entropy(logits, jnp.asarray(ids[1:, None], jnp.int32)).sum(), last

    params, rms = jax.tree.map(np.asarray, (params, rms))
    mean = np.mean(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(rms)]))
    moved, carry, expected = params, model.initial_carry(params, 1), []
    for at in range(0, 4 * T, T):
        ids = TEXT[at : at + T + 1]
        (total, last), grads = gradient(moved, ids, carry)
        moved = jax.tree.map(
            lambda p, g, r, first: p - rate * g / (r + 0.1 * mean) + np.minimum(decay * r / mean, 1) * (first - p),
            moved,
            jax.tree.map(np.asarray, grads),
            rms,
            params,
        )
        carry = last
        expected.append(float(total))
    np.testing.assert_allclose(score(TEXT, rate, decay)[: 4 * T].reshape(4, T).sum(1), expected, rtol=1e-4)


def test_gradient_rms_is_the_root_mean_square_of_the_gradients(scoring):
    model, params, _, _ = scoring
    short = TRAIN[: 2 * T + 3]  # A segment and its predecessor fit at three positions.

    @jax.jit
    @jax.grad
    def gradient(params, ids, carry):
        logits, _ = model.apply({"params": params}, jnp.asarray(ids[:-1, None], jnp.int32), carry)
        return cross_entropy(logits, jnp.asarray(ids[1:, None], jnp.int32)).sum()

    apply, squares = jax.jit(model.apply), []
    for start in range(3):
        before, ids = short[start : start + T], short[start + T : start + 2 * T + 1]
        _, carry = apply({"params": params}, before[:, None].astype(np.int32), model.initial_carry(params, 1))
        squares.append(jax.tree.map(np.square, gradient(params, ids, carry)))
    expected = jax.tree.map(lambda *s: np.sqrt(sum(s) / 3), *squares)
    found = gradient_rms(model, params, short, T, 50)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), found, expected)
