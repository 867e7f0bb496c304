import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.config import default_config
from charlm.training.averaging import opt_state_from, updated_average
from charlm.training.optimizers import make_optimizer, make_schedule, schedule_spans_run


def options(**changes):
    optimizer = default_config().optimizer
    optimizer.update(changes)
    return optimizer


def test_warmup_cosine_rises_linearly_and_falls_to_the_final_rate():
    schedule = make_schedule(
        options(schedule="warmup_cosine", learning_rate=1.0, warmup_steps=10, final_learning_rate=0.1), num_steps=110
    )
    rates = np.array([float(schedule(step)) for step in range(130)])
    assert rates[0] > 0 and np.argmax(rates) == 10 and rates[10] == 1.0
    np.testing.assert_allclose(np.diff(rates[:11]), rates[1] - rates[0], rtol=1e-4)
    np.testing.assert_allclose(rates[60], 0.55, rtol=1e-5)
    np.testing.assert_allclose(rates[110:], 0.1, rtol=1e-5)


@given(st.integers(1, 50), st.floats(0.1, 0.9), st.integers(0, 500))
def test_step_decay_falls_at_intervals_but_not_below_the_final_rate(every, factor, at):
    decaying = options(
        schedule="step_decay", learning_rate=0.5, decay_every=every, decay_factor=factor, final_learning_rate=0.01
    )
    expected = max(0.5 * factor ** (at // every), 0.01)
    np.testing.assert_allclose(float(make_schedule(decaying, 7)(at)), expected, rtol=1e-4)
    assert not schedule_spans_run(decaying)


def test_schedule_steps_makes_the_schedule_independent_of_the_run():
    free = options(schedule="warmup_cosine", schedule_steps=50)
    assert not schedule_spans_run(free) and schedule_spans_run(options(schedule="warmup_cosine"))
    assert [float(make_schedule(free, n)(30)) for n in (40, 400)] == [float(make_schedule(free, 1)(30))] * 2


def update(optimizer, grad, params=None, steps=1):
    params = jnp.zeros_like(grad) if params is None else params
    chain = make_optimizer(optimizer, 10)
    state = chain.init(params)
    for _ in range(steps):
        step, state = chain.update(grad, state, params)
    return jax.tree.map(np.asarray, step)


GRAD = jnp.array([3.0, -4.0, 0.5])


def test_sgd_and_its_momentum():
    np.testing.assert_allclose(update(options(name="sgd", learning_rate=0.1), GRAD), -0.1 * GRAD, rtol=1e-6)
    moved = update(options(name="sgd", learning_rate=0.1, momentum=0.9), GRAD, steps=2)
    np.testing.assert_allclose(moved, -0.1 * 1.9 * GRAD, rtol=1e-6)


def test_rmsprop_and_its_momentum():
    options_ = {"name": "rmsprop", "learning_rate": 0.1, "mean_square_decay": 0.6, "eps": 1e-12}
    np.testing.assert_allclose(update(options(**options_), GRAD), -0.1 * np.sign(GRAD) / np.sqrt(0.4), rtol=1e-5)
    second = -0.1 * np.sign(GRAD) / np.sqrt(0.4 * 0.6 + 0.4)
    np.testing.assert_allclose(update(options(**options_), GRAD, steps=2), second, rtol=1e-5)
    first = -0.1 * np.sign(GRAD) / np.sqrt(0.4)
    np.testing.assert_allclose(update(options(**options_, momentum=0.9), GRAD, steps=2), 0.9 * first + second, rtol=1e-5)


def test_clipping_by_value_and_by_norm():
    sgd = {"name": "sgd", "learning_rate": 1.0}
    np.testing.assert_allclose(update(options(**sgd, clip_value=1.0), GRAD), [-1.0, 1.0, -0.5])
    clipped = update(options(**sgd, clip_norm=1.0), GRAD)
    np.testing.assert_allclose(clipped, -GRAD / np.linalg.norm(GRAD), rtol=1e-6)
    np.testing.assert_allclose(update(options(**sgd, clip_norm=100.0), GRAD), -GRAD)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_first_step_of_adam_is_the_learning_rate(name):
    np.testing.assert_allclose(update(options(name=name, learning_rate=0.01), GRAD), -0.01 * np.sign(GRAD), rtol=1e-4)


def test_weight_decay_is_decoupled():
    params = jnp.array([10.0, 20.0, -5.0])
    without = update(options(name="adamw", learning_rate=0.01), GRAD, params)
    decayed = update(options(name="adamw", learning_rate=0.01, weight_decay=0.1), GRAD, params)
    np.testing.assert_allclose(decayed - without, -0.01 * 0.1 * params, rtol=1e-3)


def test_lion_moves_every_parameter_by_the_learning_rate():
    np.testing.assert_allclose(update(options(name="lion", learning_rate=0.01), GRAD), -0.01 * np.sign(GRAD), rtol=1e-5)


def test_the_average_of_schedule_free_adamw_is_its_own():
    """The average x and the sequence z satisfy the recursion of the paper, with a constant rate: x is the mean of all z."""
    config = default_config()
    config.optimizer.update(name="schedule_free_adamw", learning_rate=0.1, b1=0.7, clip_norm=100.0)
    chain, params = make_optimizer(config.optimizer, 10), jnp.zeros(3)
    opt_state = opt_state_from(params + 1.0, chain.init(params))
    params, found = params + 1.0, []
    for step in range(4):
        updates, opt_state = chain.update(GRAD * (step + 1), opt_state, params)
        params = params + updates
        found.append(optax.tree.get(opt_state, "z"))
    average = updated_average(config, (), params, opt_state, jnp.asarray(3))
    np.testing.assert_allclose(found[0], 1.0 - 0.1 * np.sign(GRAD), rtol=1e-4)
    np.testing.assert_allclose(average, np.mean(found, axis=0), rtol=1e-4)


def test_muon_orthogonalises_the_block_of_each_gate():
    """Every block of the update is close to a scaled orthogonal matrix. Adam updates what belongs to symbols."""
    draw, hidden = np.random.default_rng(0), 8
    shapes = {"layer_0": {"W_x": (5, 32), "W_h": (32, 8), "b": (32,)}, "layer_1": {"W_x": (8, 32), "W_h": (32, 8), "b": (32,)}}
    shapes |= {"head_W": (8, 5), "embedding": (5, 5)}
    is_shape = {"is_leaf": lambda each: isinstance(each, tuple)}
    grads = jax.tree.map(lambda shape: jnp.asarray(draw.normal(size=shape), jnp.float32), shapes, **is_shape)
    updates = update(options(name="muon", learning_rate=0.01, newton_schulz_steps=10), grads, grads)
    assert jax.tree.map(jnp.shape, updates) == shapes
    blocks = np.split(updates["layer_0"]["W_h"], 4) + np.split(updates["layer_1"]["W_x"], 4, axis=1)
    sources = np.split(grads["layer_0"]["W_h"], 4) + np.split(grads["layer_1"]["W_x"], 4, axis=1)
    for block, grad in zip(blocks, sources):
        singular = np.linalg.svd(block, compute_uv=False) / (0.01 * 0.2 * np.sqrt(hidden))
        assert 0.6 < singular.min() and singular.max() < 1.3, singular
        assert np.sum(block * grad) < 0
    symbols = {"W_x": grads["layer_0"]["W_x"], "head_W": grads["head_W"], "embedding": grads["embedding"]}
    nadam = optax.nadamw(0.01, eps=options().eps, weight_decay=0.0)
    expected, _ = nadam.update(symbols, nadam.init(symbols), symbols)
    for name, found in {
        "W_x": updates["layer_0"]["W_x"],
        "head_W": updates["head_W"],
        "embedding": updates["embedding"],
    }.items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-4)
