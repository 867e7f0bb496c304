import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlm.config import default_config, flatten
from charlm.config.rules import set_key
from charlm.data.batching import LAYOUTS, Layout, device_windows, make_layout, prefetched_windows
from charlm.nn.model import CharLM
from charlm.runs.flat_state import flatten_state, sha256
from charlm.training.chunk import MAX_STEPS_PER_DISPATCH, compile_train_chunk, train_chunk_of_runs
from charlm.training.state import TRACED_HYPERPARAMETERS, Program, compute_first_state, init_state, init_state_of_runs
from charlm.training.step import train_step as train_step_of

V, N = 11, 2000
IDS = np.random.default_rng(0).integers(0, V, N).astype(np.uint8)
EXACT = {"model__dropout": 0.0}
SGD = {"optimizer__name": "sgd", "optimizer__learning_rate": 1.0}


class Setup(NamedTuple):
    """A small run. `first` returns its first state. `one` is the jitted step: (state, windows, reset_B) -> (state, metrics)."""

    program: Program
    model: CharLM
    layout: Layout
    hyperparameters: dict
    first: Callable
    one: Callable


@functools.cache
def build(**changes) -> Setup:
    """Return a small run with some keys changed. In the names of keys a dot is written as two underscores."""
    config = default_config()
    small = {"batching.batch_size": 4, "batching.seq_len": 6, "batching.reset_prob": 0.3}
    small |= {"model.hidden_size": 8, "model.embedding_size": 5, "model.dropout": 0.2}
    for key, value in (small | {name.replace("__", "."): value for name, value in changes.items()}).items():
        set_key(config, key, value, "test")
    layout = make_layout(config.batching, config.seed, N)
    program = Program(config, V, 100, layout.carries_state)
    hyperparameters = {"seed": np.uint32(config.seed)}
    drawn = functools.cache(lambda: compute_first_state(init_state, program, hyperparameters))
    one = jax.jit(functools.partial(train_step_of, program))
    model = CharLM.from_config(config.model, V)
    # `first` returns a copy, because a chunk donates its state.
    return Setup(
        program,
        model,
        layout,
        hyperparameters,
        lambda: jax.tree.map(jnp.copy, drawn()),
        functools.partial(one, hyperparameters),
    )


def run(sizes, layout, on_device=True):
    setup = build(batching__layout=layout)
    capacity = MAX_STEPS_PER_DISPATCH
    if on_device:
        source = device_windows(IDS, setup.layout, capacity)
    else:
        source = prefetched_windows(IDS, setup.layout, capacity, 0, sum(sizes))
    state, at, losses = setup.first(), 0, []
    compiled = compile_train_chunk(setup.program, state, setup.hyperparameters, source.ids_N)
    for n in sizes:
        state, metrics_K, finite = compiled(state, setup.hyperparameters, *source.take(at, n), np.int32(n))
        losses += np.asarray(metrics_K["loss"])[:n].tolist()
        assert finite
        at += n
    source.close()
    return sha256(flatten_state(state)), losses


@pytest.mark.parametrize(
    "layout", [each if each == "stream" else pytest.param(each, marks=pytest.mark.slow) for each in LAYOUTS]
)
def test_the_size_of_a_dispatch_and_the_source_of_windows_do_not_change_the_state(layout):
    whole = run([24], layout)
    assert run([1] * 3 + [7, 14], layout) == whole and run([20, 4], layout) == whole
    assert run([24], layout, on_device=False) == whole and run([1, 9, 14], layout, on_device=False) == whole


def test_a_run_depends_only_on_its_seed():
    first = run([5], "stream")
    build.cache_clear()
    assert run([5], "stream") == first


@pytest.mark.parametrize("layout", ["stream", "windows"])
def test_a_reset_replaces_the_carried_state(layout):
    setup = build(batching__layout=layout)
    train_step, state = setup.one, setup.first()
    windows = np.random.default_rng(1).integers(0, V, (4, 7))
    carried = jax.tree.map(lambda c: c + 0.7, state.carry)
    other = state.replace(carry=carried)
    fresh = train_step(state, windows, np.ones(4, bool))[1]["loss"]
    assert train_step(other, windows, np.ones(4, bool))[1]["loss"] == fresh
    if layout == "stream":
        assert train_step(other, windows, np.zeros(4, bool))[1]["loss"] != fresh
        after = train_step(other, windows, jnp.array([True, False, False, False]))[0].carry
        zero = train_step(state, windows, np.ones(4, bool))[0].carry
        assert np.allclose(after[0][0][0], zero[0][0][0]) and not np.allclose(after[0][0][1], zero[0][0][1])


def test_sum_over_time_multiplies_the_gradient_by_the_window_length():
    windows = np.random.default_rng(1).integers(0, V, (4, 7))
    moved = {}
    for reduction in ("mean", "sum_over_time"):
        setup = build(optimizer__name="sgd", optimizer__learning_rate=0.1, optimizer__loss_reduction=reduction)
        state = setup.first()
        after, metrics = setup.one(state, windows, np.ones(4, bool))
        change = jax.tree.map(np.subtract, after.params, state.params)
        moved[reduction] = change, metrics["loss"], metrics["grad_norm"]
    (mean, mean_loss, mean_norm), (total, sum_loss, sum_norm) = moved["mean"], moved["sum_over_time"]
    assert mean_loss == sum_loss
    np.testing.assert_allclose(sum_norm, 6 * mean_norm, rtol=1e-5)
    jax.tree.map(lambda s, m: np.testing.assert_allclose(s, 6 * m, rtol=1e-3, atol=1e-6), total, mean)


def test_the_loss_is_the_mean_cross_entropy_of_the_next_characters():
    setup = build(batching__layout="random", **EXACT)
    model, state = setup.model, setup.first()
    windows = np.random.default_rng(1).integers(0, V, (4, 7))
    apply = jax.jit(model.apply)
    logits, _ = apply({"params": state.params}, windows[:, :-1].T, model.initial_carry(state.params, 4))
    log_probs = np.asarray(jax.jit(jax.nn.log_softmax)(logits))
    expected = -np.mean([log_probs[t, b, windows[b, t + 1]] for t in range(6) for b in range(4)])
    np.testing.assert_allclose(setup.one(state, windows, np.ones(4, bool))[1]["loss"], expected, rtol=1e-6)


def test_loss_on_last_is_the_loss_of_the_last_target():
    setup = build(batching__layout="sliding", batching__loss_on="last", **EXACT, **SGD)
    model, state = setup.model, setup.first()
    windows = np.random.default_rng(1).integers(0, V, (4, 7))

    def expected(params):
        logits, _ = model.apply({"params": params}, windows[:, :-1].T, model.initial_carry(params, 4))
        return -jnp.mean(jax.nn.log_softmax(logits[-1])[jnp.arange(4), windows[:, -1]])

    after, metrics = setup.one(state, windows, np.ones(4, bool))
    loss, grads = jax.jit(lambda params: (expected(params), jax.grad(expected)(params)))(state.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    jax.tree.map(
        lambda new, old, grad: np.testing.assert_allclose(np.subtract(old, new), grad, rtol=1e-4, atol=1e-6),
        after.params,
        state.params,
        grads,
    )


@pytest.mark.parametrize("layout, loss_on", [("stream", "all"), pytest.param("sliding", "last", marks=pytest.mark.slow)])
def test_gradient_accumulation_gives_the_same_step(layout, loss_on):
    """Dropout too, because the masks of a row depend only on its index in the batch."""
    options = {"batching__layout": layout, "batching__loss_on": loss_on, "model__recurrent_dropout": 0.2, **SGD}
    windows = jnp.asarray(np.random.default_rng(1).integers(0, V, (3, 4, 7)))
    reset_B = jnp.array([True, False, False, True])
    states = []
    for num_parts in (1, 2, 4):
        setup = build(optimizer__accumulation_steps=num_parts, **options)
        state, losses = setup.first(), []
        for k in range(3):
            state, metrics = setup.one(state, windows[k], reset_B)
            losses.append(metrics)
        states.append((state, losses))
    for other in states[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), states[0], other)


@pytest.mark.parametrize("loss_on", ["all", "last"])
def test_penalties_follow_their_equations_and_are_not_part_of_the_loss(loss_on):
    options = {"batching__layout": "random", "batching__loss_on": loss_on, **EXACT, **SGD}
    without = build(**options)
    with_both = build(optimizer__activation_reg=2.0, optimizer__temporal_reg=3.0, **options)
    windows = np.random.default_rng(1).integers(0, V, (4, 7))
    model, state = without.model, without.first()

    def penalty(params):
        _, sown = model.apply({"params": params}, windows.T[:-1], model.initial_carry(params, 4), mutable=["activations"])
        (h_TBH,) = sown["activations"]["output"]
        read = h_TBH[-1:] if loss_on == "last" else h_TBH
        return 2 * jnp.mean(read**2) + 3 * jnp.mean((h_TBH[1:] - h_TBH[:-1]) ** 2)

    plain, metrics = without.one(state, windows, np.ones(4, bool))
    penalised, same = with_both.one(state, windows, np.ones(4, bool))
    assert metrics["loss"] == same["loss"]
    grads = jax.jit(jax.grad(penalty))(state.params)
    jax.tree.map(
        lambda without, with_, grad: np.testing.assert_allclose(np.subtract(without, with_), grad, rtol=1e-3, atol=1e-6),
        plain.params,
        penalised.params,
        grads,
    )
    assert any(np.abs(grad).max() > 1e-3 for grad in jax.tree.leaves(grads))


def test_the_moving_average_follows_its_equation_and_does_not_change_training():
    setup = build(train__ema_decay=0.5, optimizer__learning_rate=0.1)
    draw = np.random.default_rng(1)
    state = setup.first()
    expected = jax.tree.map(np.asarray, state.params)
    for t in range(9):
        state, _ = setup.one(state, jnp.asarray(draw.integers(0, V, (4, 7))), np.zeros(4, bool))
        decay = min(0.5, (1 + t) / (10 + t))
        expected = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * np.asarray(b), expected, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.ema, expected)
    assert state.eval_params is state.ema
    assert not np.allclose(state.ema["head_W"], state.params["head_W"])
    # The same run without the average has the same parameters.
    other = build(optimizer__learning_rate=0.1)
    plain, draw = other.first(), np.random.default_rng(1)
    for _ in range(9):
        plain, _ = other.one(plain, jnp.asarray(draw.integers(0, V, (4, 7))), np.zeros(4, bool))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), plain.params, state.params)
    assert plain.eval_params is plain.params


def test_a_learned_initial_state_has_a_gradient_only_where_a_text_starts():
    setup = build(model__learn_initial_state=True)
    windows = np.random.default_rng(1).integers(0, V, (4, 7))
    moved = {}
    for reset in (False, True):
        state, _ = setup.one(setup.first(), windows, jnp.full(4, reset))
        moved[reset] = np.abs(state.params["layer_0"]["first_0"]).max() > 0
    assert moved == {False: False, True: True}


GROUPS = {
    "stream": ({}, {}),
    "regularised": (
        {"model__recurrent_dropout": 0.1, "optimizer__schedule": "warmup_cosine", "optimizer__warmup_steps": 3},
        {"model.dropout": (0.1, 0.5), "optimizer.learning_rate": (1e-3, 1e-2), "optimizer.activation_reg": (0.0, 1.0)},
    ),
    "windows": (
        {"batching__layout": "windows", "optimizer__name": "adamw", "optimizer__clip_norm": 1.0, "train__ema_decay": 0.9},
        {"optimizer.weight_decay": (0.0, 0.1), "optimizer.clip_norm": (0.1, 9.0), "model.forget_bias": (0.0, 1.0)},
    ),
}


@pytest.mark.parametrize(
    "name, vectorised",
    [
        ("stream", False),
        pytest.param("regularised", True, marks=pytest.mark.slow),
        pytest.param("windows", True, marks=pytest.mark.slow),
        pytest.param("windows", False, marks=pytest.mark.slow),
    ],
)
def test_runs_side_by_side_equal_separate_runs(name, vectorised):
    """The runs differ in seed and hyperparameters. In a separate run the hyperparameters are constants of the program.

    test_sweep.py tests runs that are distributed over devices.
    """
    changes, swept = GROUPS[name]
    setup = build(**changes)
    seeds = (3, 4_000_000_000)
    hyperparameters_R = {"seed": np.array(seeds, np.uint32)}
    hyperparameters_R |= {key: np.array(values, np.float32) for key, values in swept.items()}
    states = compute_first_state(init_state_of_runs, setup.program, hyperparameters_R)
    layouts = [make_layout(setup.program.config.batching, seed, N) for seed in seeds]
    text, *batches = zip(*(device_windows(IDS, layout, MAX_STEPS_PER_DISPATCH).take(0, 9) for layout in layouts))
    starts_RKB, reset_RKB = (np.stack(batch) for batch in batches)
    compiled = jax.jit(functools.partial(train_chunk_of_runs, setup.program, jax.devices()[: len(seeds)], vectorised))
    states, metrics_RK, finite_R = compiled(states, hyperparameters_R, text[0], starts_RKB, reset_RKB, np.int32(9))
    assert finite_R.all()
    for r, seed in enumerate(seeds):
        alone = build(**(changes | {"seed": seed} | {key.replace(".", "__"): values[r] for key, values in swept.items()}))
        state, losses = alone.first(), []
        for k in range(9):
            windows = np.stack([IDS[start : start + 7] for start in starts_RKB[r, k]]).astype(np.int32)
            state, metrics = alone.one(state, windows, reset_RKB[r, k])
            losses.append(metrics["loss"])
        np.testing.assert_allclose(metrics_RK["loss"][r, :9], losses, rtol=1e-5)
        jax.tree.map(
            lambda side, own, r=r: np.testing.assert_allclose(side[r], own, rtol=1e-3, atol=2e-5), states.params, state.params
        )


def test_every_traced_hyperparameter_is_a_key_of_the_config():
    keys = dict(flatten(default_config()))
    assert set(TRACED_HYPERPARAMETERS) <= keys.keys()


@pytest.mark.parametrize(
    "cell, embedding_size, layers",
    [
        ("lstm", 256, 1),
        pytest.param("rnn", 256, 1, marks=pytest.mark.slow),
        pytest.param("gru", 64, 2, marks=pytest.mark.slow),
    ],
)
def test_a_step_in_bfloat16_differs_from_one_in_float32_only_by_rounding(cell, embedding_size, layers):
    """The products are larger than in the other tests, so XLA uses other kernels for them on a CPU."""
    found, state = [], None
    for dtype in ("float32", "bfloat16"):
        sizes = {"hidden_size": 32, "embedding_size": embedding_size, "num_layers": layers, "dropout": 0.0}
        changes = {f"model__{key}": value for key, value in (sizes | {"cell": cell, "dtype": dtype}).items()}
        setup = build(batching__batch_size=2, batching__seq_len=100, **changes)
        starts_B, reset_B = setup.layout.batch(0)
        windows = np.stack([IDS[start : start + 101] for start in starts_B])
        state = state or setup.first()
        found.append(setup.one(state, windows, reset_B)[1])
    (loss, norm), (low_loss, low_norm) = ((each["loss"], each["grad_norm"]) for each in found)
    assert loss != low_loss
    np.testing.assert_allclose([low_loss, low_norm], [loss, norm], rtol=0.02)


def test_bind_does_not_change_the_config_of_the_program():
    setup = build()
    config, _, _ = setup.program.bind({"seed": 7, "optimizer.learning_rate": 5.0})
    assert config.seed == 7 and config.optimizer.learning_rate == 5.0
    assert dict(flatten(setup.program.config)) == dict(flatten(build().program.config)) and setup.program.config.seed == 0
    assert setup.program.config.optimizer.learning_rate == default_config().optimizer.learning_rate
