import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlm.config import default_config
from charlm.config.rules import set_key
from charlm.data.batching import make_layout
from charlm.data.vocab import Vocab
from charlm.inference.scorer import make_scorer
from charlm.nn.model import CharLM
from charlm.training.metrics import GRADIENT_METRICS, TARGET_METRICS, accuracy, grad_norm_by_layer, measure_gradient
from charlm.training.state import Program, init_state
from charlm.training.step import train_step

V, B, T = 9, 4, 6
ALL_METRICS = (*TARGET_METRICS, *GRADIENT_METRICS)
IDS = np.random.default_rng(0).integers(0, V, 501).astype(np.uint8)
WINDOWS = np.random.default_rng(1).integers(0, V, (3, B, T + 1)).astype(np.int32)


def make_config(**changes):
    """Return a small config with some keys changed. In the names of keys a dot is written as two underscores."""
    config = default_config()
    small = {"batching__batch_size": B, "batching__seq_len": T}
    small |= {"model__cell": "rnn", "model__hidden_size": 8, "model__embedding_size": 5}
    for name, value in (small | changes).items():
        set_key(config, name.replace("__", "."), value, "test")
    return config


@functools.cache
def take_steps(**changes):
    """Take three steps; return (state, metrics of each step)."""
    config = make_config(**changes)
    program = Program(config, V, 100, make_layout(config.batching, config.seed, len(IDS)).carries_state)
    hyperparameters = {"seed": np.uint32(config.seed)}
    state = jax.jit(functools.partial(init_state, program))(hyperparameters)
    step = jax.jit(functools.partial(train_step, program))
    found = []
    for windows in WINDOWS:
        state, metrics = step(hyperparameters, state, windows, jnp.array([True, False, False, True]))
        found.append({name: float(value) for name, value in metrics.items()})
    return state, found


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_accuracy_is_1_where_the_largest_logit_is_the_target():
    draw = np.random.default_rng(2)
    logits, targets = draw.normal(size=(T, B, V)).astype(np.float32), draw.integers(0, V, (T, B))
    logits[0, np.arange(B), targets[0]] = 9.0
    found = accuracy(jnp.asarray(logits), jnp.asarray(targets))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(
        found, [[float(np.argmax(logits[t, b]) == targets[t, b]) for b in range(B)] for t in range(T)]
    )
    assert 0 < found[1:].mean() < 1 and (found[0] == 1).all()


def test_grad_norm_by_layer_is_the_norm_of_each_layers_gradient():
    model = CharLM.from_config(make_config(model__num_layers=2).model, V)
    params = jax.eval_shape(model.initial_params, jax.random.key(0))
    draw = np.random.default_rng(3)
    grads = jax.tree.map(lambda p: draw.normal(size=p.shape).astype(np.float32), params)
    layers = {name: {"head": ["head_W", "head_b"]}.get(name, [name]) for name in ("embedding", "layer_0", "layer_1", "head")}
    expected = {
        layer: np.sqrt(sum(np.square(leaf).sum() for name in names for leaf in jax.tree.leaves(grads[name])))
        for layer, names in layers.items()
    }
    found = grad_norm_by_layer(grads, params)
    assert found.keys() == expected.keys()
    for layer, norm in expected.items():
        np.testing.assert_allclose(found[layer], norm, rtol=1e-6)
    named = measure_gradient(("accuracy", "grad_norm_by_layer"), grads, params)
    assert named == {f"grad_norm_by_layer/{layer}": norm for layer, norm in found.items()}


LAST_TARGET = {"batching__layout": "sliding", "batching__loss_on": "last", "model__dropout": 0.3}


@pytest.mark.parametrize(
    "changes",
    [{"optimizer__accumulation_steps": 1}, {"optimizer__accumulation_steps": 2}, LAST_TARGET],
    ids=["whole batch", "two parts", "last target"],
)
def test_selected_metrics_do_not_change_a_step(changes):
    without, plain = take_steps(**changes)
    selected, measured = take_steps(train__metrics=ALL_METRICS, **changes)
    assert_equal(without, selected)
    for before, metrics in zip(plain, map(dict, measured), strict=True):
        assert before.keys() == {"loss", "grad_norm"}
        assert {name: metrics.pop(name) for name in before} == before
        assert 0 <= metrics.pop("accuracy") <= 1
        assert metrics.keys() == {f"grad_norm_by_layer/{layer}" for layer in ("embedding", "layer_0", "head")}
        np.testing.assert_allclose(np.sqrt(sum(norm**2 for norm in metrics.values())), before["grad_norm"], rtol=1e-5)


def test_the_accuracy_of_a_batch_in_parts_is_that_of_the_whole_batch():
    (_, whole), (_, parts) = (take_steps(train__metrics=ALL_METRICS, optimizer__accumulation_steps=n) for n in (1, 2))
    assert any(metrics["accuracy"] > 0 for metrics in whole)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(other["accuracy"], one["accuracy"], rtol=1e-6)
        np.testing.assert_allclose(
            [other[name] for name in sorted(other)], [one[name] for name in sorted(one)], rtol=1e-4, atol=1e-6
        )


@functools.cache
def model_and_params():
    model = CharLM.from_config(make_config().model, V)
    # Large weights, so that the predictions depend on the context.
    return model, jax.tree.map(lambda p: 3 * np.asarray(p), jax.jit(model.initial_params)(jax.random.key(0)))


def options(**changes):
    return make_config(**{f"eval__{name}": value for name, value in changes.items()}).eval


@pytest.mark.parametrize("num_streams", [1, 3, 64, 1000])
def test_a_scored_text_has_the_same_nats_and_the_accuracy_of_a_plain_computation(num_streams):
    model, params = model_and_params()
    vocab, batching = Vocab.from_chars("abcdefghi"), make_config().batching
    # The context covers the whole text, so every stream predicts as if it read the text from its beginning.
    settings = options(num_streams=num_streams, context=len(IDS), batch_size=7)
    logits, _ = jax.jit(model.apply)({"params": params}, IDS[:-1, None].astype(np.int32), model.initial_carry(params, 1))
    expected = np.mean(np.argmax(np.asarray(logits[:, 0]), axis=-1) == IDS[1:])
    plain = make_scorer(model, vocab, batching)(params, IDS, settings)
    measured = make_scorer(model, vocab, batching, metrics=("accuracy",))(params, IDS, settings)
    assert plain.metrics == {} and measured._replace(metrics={}) == plain
    assert 0 < expected < 1
    np.testing.assert_allclose(measured.metrics["accuracy"], expected, rtol=1e-9)


def test_a_many_to_one_model_has_the_accuracy_of_the_scored_windows():
    model, params = model_and_params()
    vocab, batching = Vocab.from_chars("abcdefghi"), make_config(batching__layout="sliding", batching__loss_on="last").batching
    settings = options(max_chars=50, batch_size=7)
    starts = np.arange(50) * (len(IDS) - T) // 50
    windows = np.stack([IDS[start : start + T] for start in starts]).astype(np.int32)
    logits, _ = jax.jit(model.apply)({"params": params}, windows.T, model.initial_carry(params, 50))
    expected = np.mean(np.argmax(np.asarray(logits[-1]), axis=-1) == IDS[starts + T])
    plain = make_scorer(model, vocab, batching)(params, IDS, settings)
    measured = make_scorer(model, vocab, batching, metrics=("accuracy",))(params, IDS, settings)
    assert measured._replace(metrics={}) == plain
    assert measured.count == 50 and 0 < expected < 1
    np.testing.assert_allclose(measured.metrics["accuracy"], expected, rtol=1e-9)
