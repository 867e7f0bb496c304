import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlm import optim, step
from charlm.batching import LAYOUTS, device_gather, host_gather, make_layout
from charlm.checkpoint import flatten_state, sha256
from charlm.config import default_config
from charlm.model import CharLM

V, N = 11, 2000
IDS = np.random.default_rng(0).integers(0, V, N).astype(np.uint8)
EXACT = (("dropout", 0.0),)


@functools.cache
def build(layout="stream", loss_on="all", num_parts=1, ema_decay=0.0, model_changes=(), **changes):
    """(model, layout, a function that makes the first state, train_step, train_chunk), compiled once for all tests."""
    config = default_config().unlock()
    config.batching.update(layout=layout, batch_size=4, seq_len=6, reset_prob=0.3, loss_on=loss_on)
    config.model.update({"hidden_size": 8, "embedding_size": 5, "dropout": 0.2, **dict(model_changes)})
    config.optimizer.update(changes)
    model = CharLM.from_config(config.model, V)
    optimizer = optim.make_optimizer(config.optimizer, 100)
    bound = make_layout(config.batching, config.seed, N)
    first = step.init_state(model, optimizer, config.seed, 4, bound.carries_state, averages=ema_decay > 0)
    train_step = step.make_train_step(
        model, optimizer, step.Objective.from_config(config), step.run_keys(0)[1], num_parts=num_parts, ema_decay=ema_decay
    )
    # A copy for each test, as train_chunk donates what it gets.
    return model, bound, lambda: jax.tree.map(jnp.copy, first), jax.jit(train_step), step.make_train_chunk(train_step, 6)


def run(sizes, layout, on_device=True):
    _, bound, init, _, train_chunk = build(layout)
    capacity = step.MAX_STEPS_PER_DISPATCH
    gather = device_gather(IDS, bound, capacity) if on_device else host_gather(IDS, bound, capacity, 0, sum(sizes))
    state, at, losses = init(), 0, []
    compiled = step.compile_train_chunk(train_chunk, state, gather.num_ids, IDS.dtype, 4)
    for n in sizes:
        state, losses_K, _, finite = compiled(state, *gather.take(at, n), np.int32(n))
        losses += np.asarray(losses_K)[:n].tolist()
        assert finite
        at += n
    gather.close()
    return sha256(flatten_state(state)), losses


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neither_the_size_of_a_dispatch_nor_the_gather_changes_a_bit(layout):
    whole = run([24], layout)
    assert run([1] * 3 + [7, 14], layout) == whole and run([20, 4], layout) == whole
    assert run([24], layout, on_device=False) == whole and run([1, 9, 14], layout, on_device=False) == whole


def test_the_seed_is_all_that_a_run_depends_on():
    first = run([5], "stream")
    build.cache_clear()
    assert run([5], "stream") == first


@pytest.mark.parametrize("layout", ["stream", "windows"])
def test_a_reset_is_a_fresh_start_and_a_carried_state_is_not(layout):
    _, _, init, train_step, _ = build(layout)
    state = init()
    windows = jnp.asarray(np.random.default_rng(1).integers(0, V, (4, 7)))
    carried = jax.tree.map(lambda c: c + 0.7, state.carry)
    other = state.replace(carry=carried)
    fresh = train_step(state, windows, jnp.ones(4, bool))[1]
    assert train_step(other, windows, jnp.ones(4, bool))[1] == fresh
    if layout == "stream":
        assert train_step(other, windows, jnp.zeros(4, bool))[1] != fresh
        after = train_step(other, windows, jnp.array([True, False, False, False]))[0].carry
        zero = train_step(state, windows, jnp.ones(4, bool))[0].carry
        assert np.allclose(after[0][0][0], zero[0][0][0]) and not np.allclose(after[0][0][1], zero[0][0][1])


def test_the_sum_over_time_is_the_mean_times_the_window():
    windows = jnp.asarray(np.random.default_rng(1).integers(0, V, (4, 7)))
    moved = {}
    for reduction in ("mean", "sum_over_time"):
        _, _, init, train_step, _ = build(name="sgd", learning_rate=0.1, loss_reduction=reduction)
        state = init()
        after, loss, norm = train_step(state, windows, jnp.ones(4, bool))
        moved[reduction] = jax.tree.map(lambda a, b: a - b, after.params, state.params), loss, norm
    (mean, mean_loss, mean_norm), (total, sum_loss, sum_norm) = moved["mean"], moved["sum_over_time"]
    assert mean_loss == sum_loss
    np.testing.assert_allclose(sum_norm, 6 * mean_norm, rtol=1e-5)
    jax.tree.map(lambda s, m: np.testing.assert_allclose(s, 6 * m, rtol=1e-3, atol=1e-6), total, mean)


def test_the_loss_is_the_mean_cross_entropy_of_the_next_characters():
    model = build(model_changes=EXACT)[0]
    optimizer = optim.make_optimizer(default_config().optimizer, 9)
    state = step.init_state(model, optimizer, 0, 4, False)
    windows = jnp.asarray(np.random.default_rng(1).integers(0, V, (4, 7)))
    logits, _ = model.apply({"params": state.params}, windows[:, :-1].T, model.initial_carry(state.params, 4))
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    expected = -np.mean([log_probs[t, b, windows[b, t + 1]] for t in range(6) for b in range(4)])
    train_step = jax.jit(step.make_train_step(model, optimizer, step.Objective(), jax.random.key(0)))
    np.testing.assert_allclose(train_step(state, windows, jnp.ones(4, bool))[1], expected, rtol=1e-6)


def test_the_loss_on_the_last_is_that_of_the_last_target_alone():
    model, _, init, train_step, _ = build("sliding", "last", model_changes=EXACT, name="sgd", learning_rate=1.0)
    windows = jnp.asarray(np.random.default_rng(1).integers(0, V, (4, 7)))
    state = init()

    def expected(params):
        logits, _ = model.apply({"params": params}, windows[:, :-1].T, model.initial_carry(params, 4))
        return -jnp.mean(jax.nn.log_softmax(logits[-1])[jnp.arange(4), windows[:, -1]])

    after, loss, _ = train_step(state, windows, jnp.ones(4, bool))
    np.testing.assert_allclose(loss, expected(state.params), rtol=1e-6)
    grads = jax.jit(jax.grad(expected))(state.params)
    jax.tree.map(
        lambda new, old, grad: np.testing.assert_allclose(old - new, grad, rtol=1e-4, atol=1e-6),
        after.params,
        state.params,
        grads,
    )


@pytest.mark.parametrize("layout, loss_on", [("stream", "all"), ("sliding", "last")])
def test_a_batch_in_parts_is_the_same_step(layout, loss_on):
    options = {"layout": layout, "loss_on": loss_on, "model_changes": EXACT, "name": "sgd", "learning_rate": 1.0}
    windows = jnp.asarray(np.random.default_rng(1).integers(0, V, (3, 4, 7)))
    reset_B = jnp.array([True, False, False, True])
    states = []
    for num_parts in (1, 2, 4):
        _, _, init, train_step, _ = build(num_parts=num_parts, **options)
        state, losses = init(), []
        for k in range(3):
            state, loss, norm = train_step(state, windows[k], reset_B)
            losses += [loss, norm]
        states.append((state, losses))
    for other in states[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), states[0], other)


@pytest.mark.parametrize("loss_on", ["all", "last"])
def test_penalties_are_those_of_their_equations_and_no_part_of_the_loss(loss_on):
    options = {"layout": "random", "loss_on": loss_on, "model_changes": EXACT, "name": "sgd", "learning_rate": 1.0}
    model, _, init, plain_step, _ = build(**options)
    _, _, _, penalised_step, _ = build(activation_reg=2.0, temporal_reg=3.0, **options)
    windows = jnp.asarray(np.random.default_rng(1).integers(0, V, (4, 7)))
    state = init()

    def penalty(params):
        _, sown = model.apply({"params": params}, windows.T[:-1], model.initial_carry(params, 4), mutable=["activations"])
        (h_TBH,) = sown["activations"]["output"]
        read = h_TBH[-1:] if loss_on == "last" else h_TBH
        return 2 * jnp.mean(read**2) + 3 * jnp.mean((h_TBH[1:] - h_TBH[:-1]) ** 2)

    plain, loss, _ = plain_step(state, windows, jnp.ones(4, bool))
    penalised, same_loss, _ = penalised_step(state, windows, jnp.ones(4, bool))
    assert loss == same_loss
    grads = jax.jit(jax.grad(penalty))(state.params)
    jax.tree.map(
        lambda without, with_, grad: np.testing.assert_allclose(without - with_, grad, rtol=1e-3, atol=1e-6),
        plain.params,
        penalised.params,
        grads,
    )
    assert any(np.abs(grad).max() > 1e-3 for grad in jax.tree.leaves(grads))


def test_the_average_of_the_parameters():
    _, _, init, train_step, _ = build(ema_decay=0.5, learning_rate=0.1)
    draw = np.random.default_rng(1)
    state = init()
    expected = jax.tree.map(np.asarray, state.params)
    for t in range(9):
        state, _, _ = train_step(state, jnp.asarray(draw.integers(0, V, (4, 7))), jnp.zeros(4, bool))
        decay = min(0.5, (1 + t) / (10 + t))
        expected = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, expected, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.ema, expected)
    assert state.eval_params is state.ema
    assert not np.allclose(state.ema["head_W"], state.params["head_W"])
    # An average changes nothing of the training.
    _, _, plain_init, plain_step, _ = build(learning_rate=0.1)
    plain, draw = plain_init(), np.random.default_rng(1)
    for _ in range(9):
        plain, _, _ = plain_step(plain, jnp.asarray(draw.integers(0, V, (4, 7))), jnp.zeros(4, bool))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), plain.params, state.params)
    assert plain.eval_params is plain.params


def test_a_learned_first_state_moves_with_the_texts_that_start():
    _, _, init, train_step, _ = build(model_changes=(("learn_initial_state", True),))
    windows = jnp.asarray(np.random.default_rng(1).integers(0, V, (4, 7)))
    moved = {}
    for reset in (False, True):
        state, _, _ = train_step(init(), windows, jnp.full(4, reset))
        moved[reset] = np.abs(state.params["layer_0"]["first_0"]).max() > 0
    assert moved == {False: False, True: True}
