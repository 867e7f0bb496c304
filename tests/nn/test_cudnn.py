"""cuDNN's LSTM. A CPU has no cuDNN, so JAX's reference implementation replaces it: `lstm_ref`, which JAX's tests compare with
cuDNN. The tests here check the arguments that charlm passes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn

from charlm.config import default_config
from charlm.nn import cudnn
from charlm.nn.model import CharLM
from charlm.training.chunk import MAX_STEPS_PER_DISPATCH, train_chunk_of_runs
from charlm.training.state import Program, compute_first_state, init_state_of_runs

T, B, V = 9, 3, 13


@pytest.fixture
def reference_cudnn(monkeypatch):
    """Replace cuDNN by JAX's reference implementation and return the list of its calls: (shape of the input, hidden size)."""
    calls = []

    def lstm(x, h_0, c_0, weights, seq_lengths, input_size, hidden_size, num_layers, dropout, bidirectional):
        calls.append((x.shape, hidden_size))
        matrices = rnn.unpack_lstm_weights(weights, input_size, hidden_size, num_layers, bidirectional)
        shape = input_size, hidden_size, num_layers, dropout, bidirectional
        return rnn.lstm_ref(x, h_0, c_0, *matrices, seq_lengths, *shape)

    monkeypatch.setattr(cudnn.rnn, "lstm", lstm)
    monkeypatch.setattr(cudnn, "is_available", lambda: True)
    return calls


def model_of(**changes):
    config = default_config().model
    config.update(hidden_size=6, embedding_size=4, num_layers=2)
    config.update(changes)
    return CharLM.from_config(config, V)


@pytest.mark.parametrize(
    "encoding", ["embedding", *(pytest.param(each, marks=pytest.mark.slow) for each in ("one_hot", "scalar"))]
)
def test_outputs_carries_and_gradients_equal_those_of_the_scan(x64, reference_cudnn, encoding):
    draw = np.random.default_rng(0)
    options = {"encoding": encoding, "recurrent_dropout": 0.3, "residual": True, "learn_initial_state": True}
    models = [model_of(recurrence=name, **options).clone(dtype="float64") for name in ("scan", "cudnn")]
    params = jax.tree.map(
        lambda p: np.asarray(p) + draw.normal(size=p.shape) / 5, jax.jit(models[0].initial_params)(jax.random.key(0))
    )
    ids_TB = jnp.asarray(draw.integers(0, V, (T, B)))
    weights_TBV = jnp.asarray(draw.normal(size=(T, B, V)))

    def loss(model, params):
        carry = model.initial_carry(params, B)
        logits, last = model.apply({"params": params}, ids_TB, carry, train=True, rngs={"dropout": jax.random.key(1)})
        return jnp.sum(jnp.sin(logits) * weights_TBV) + sum(jnp.sum(jnp.cos(each)) for each in jax.tree.leaves(last))

    scan, fast = (jax.jit(jax.value_and_grad(lambda p, m=model: loss(m, p)))(params) for model in models)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), scan, fast)
    size = {"embedding": 4, "one_hot": V, "scalar": 1}[encoding]
    assert set(reference_cudnn) == {((B, T, size), 6), ((B, T, 6), 6)}


def test_auto_selects_cudnn_only_where_cudnn_supports_the_model(reference_cudnn, monkeypatch):
    def selected(**changes):
        return model_of(**changes).recurrence

    assert selected() == selected(recurrence="cudnn") == "cudnn"
    for changes in ({"recurrence": "scan"}, {"cell": "gru"}, {"cell": "ln_lstm"}, {"dtype": "bfloat16"}):
        assert selected(**changes) == "scan"
    # A model that was trained with cuDNN can be scored and sampled on any machine.
    monkeypatch.setattr(cudnn, "is_available", lambda: False)
    assert selected() == selected(recurrence="cudnn") == "scan"


def test_cudnn_is_not_available_on_a_cpu():
    assert not cudnn.is_available()


def test_the_first_state_and_runs_side_by_side_do_not_use_cudnn(reference_cudnn):
    """The first state needs no loop over time. Runs side by side are vmapped, which cuDNN does not support."""
    config = default_config()
    config.batching.update(batch_size=2, seq_len=4)
    config.model.update(hidden_size=6, embedding_size=4)
    program = Program(config, V, 10, carries_state=True)
    hyperparameters_R = {"seed": np.arange(2, dtype=np.uint32)}
    states = compute_first_state(init_state_of_runs, program, hyperparameters_R)
    text = jnp.arange(100, dtype=jnp.uint8) % V
    starts = np.zeros((2, MAX_STEPS_PER_DISPATCH, 2), np.int32)
    chunk = functools.partial(train_chunk_of_runs, program, jax.devices(), True)  # Tracing it calls what it would run.
    _, metrics_RK, _ = jax.eval_shape(chunk, states, hyperparameters_R, text, starts, np.zeros(starts.shape, bool), np.int32(2))
    assert metrics_RK["loss"].shape[0] == 2 and not reference_cudnn


def test_a_run_that_requires_cudnn_is_refused_where_it_is_not_available(run, small_config, tmp_path):
    argv = f"--config={small_config}", f"--workdir={tmp_path / 'w'}", "--config.model.recurrence=cudnn"
    code, _, err = run("train", *argv)
    assert code == 2
    assert err == "charlm: model.recurrence is 'cudnn', which needs an NVIDIA GPU; found cpu; auto chooses what works\n"
    assert not (tmp_path / "w").exists()
    code, _, err = run("train", *argv, "--config.model.cell=gru")
    assert code == 2 and "it needs model.cell lstm and model.dtype float32, not gru and float32" in err


def test_a_run_that_was_trained_with_cudnn_is_scored_and_sampled_without_it(run, small_config, tmp_path):
    workdir = tmp_path / "w"
    assert run("train", f"--config={small_config}", f"--workdir={workdir}", "--config.train.steps=10")[0] == 0
    commands = [("evaluate", f"--workdir={workdir}"), ("sample", f"--workdir={workdir}")]
    before = [run(*command)[1] for command in commands]
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["recurrence"] = "cudnn"
    (workdir / "config.json").write_text(json.dumps(config))
    assert [run(*command)[1] for command in commands] == before and all(before)
