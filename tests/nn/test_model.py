import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from charlm.config import default_config
from charlm.nn.cells import CELLS
from charlm.nn.model import ENCODINGS, CharLM, num_params
from charlm.runs.flat_state import flatten_state

V = 13


def model_of(**changes):
    config = default_config().model
    config.update(hidden_size=6, embedding_size=4, num_layers=2)
    config.update(changes)
    return CharLM.from_config(config, V)


def build(**changes):
    model = model_of(**changes)
    return model, jax.jit(model.initial_params)(jax.random.key(0))


def build_with_random_params(**changes):
    """Return a float64 model and parameters where no scale is 1 and no bias is 0."""
    model, draw = model_of(**changes), np.random.default_rng(5)
    shapes = jax.eval_shape(model.initial_params, jax.random.key(0))
    return model.clone(dtype="float64"), jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) / 2), shapes)


def ids(time, batch, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (time, batch)))


# A cell reads a projection of its input, normalises it, or reads the features. The others share the code of one of these.
KINDS_OF_INPUT = ("lstm", "ln_lstm", "mogrifier_lstm")


@pytest.mark.parametrize(
    "cell, encoding",
    [
        pytest.param(cell, encoding, marks=() if encoding == "embedding" or cell in KINDS_OF_INPUT else pytest.mark.slow)
        for cell in CELLS
        for encoding in ENCODINGS
    ],
)
def test_logits_equal_the_equations_of_the_model(x64, cell, encoding):
    model, params = build_with_random_params(cell=cell, encoding=encoding)
    ids_TB = ids(9, 3)
    carry = model.initial_carry(params, 3)

    @jax.jit
    def equations(params):
        x = jax.nn.one_hot(ids_TB, V, dtype=jnp.float64)
        if encoding == "embedding":
            x = x @ params["embedding"]
        elif encoding == "scalar":
            x = ids_TB[:, :, None] / V
        for layer in range(2):
            x, _ = layer_of(cell, params[f"layer_{layer}"], x, carry[layer])
        return x @ params["head_W"] + params["head_b"]

    logits, _ = jax.jit(model.apply)({"params": params}, ids_TB, carry)
    np.testing.assert_allclose(logits, equations(params), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "cell, encoding, tied",
    [
        pytest.param(
            cell, encoding, tied, marks=() if cell == "lstm" or (encoding, tied) == ("embedding", False) else pytest.mark.slow
        )
        for cell in KINDS_OF_INPUT
        for encoding, tied in [("embedding", False), ("embedding", True), ("one_hot", False), ("scalar", False)]
    ],
)
def test_a_folded_model_computes_the_same_function(x64, cell, encoding, tied):
    model, params = build_with_random_params(cell=cell, encoding=encoding, tie_weights=tied, embedding_size=6)
    folded, weights = model.folded("float64"), model.fold_params(params, "float64")
    assert ("embedding" in weights) == (cell == "mogrifier_lstm" and encoding == "embedding")
    for length, batch in ((1, 2), (9, 3)):  # Fewer ids than symbols, then more ids than symbols.
        ids_TB = ids(length, batch)
        pairs = ((model, params), (folded, weights))
        outputs = [jax.jit(m.apply)({"params": p}, ids_TB, m.initial_carry(p, batch)) for m, p in pairs]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), *outputs)


def layer_of(cell, p, x, carry):
    """Return the outputs and the last carry of a layer, computed from its equations."""
    matrices = {matrix.name: p[matrix.name] for matrix in CELLS[cell].matrices}
    if CELLS[cell].reads_features:
        return reference.unroll(reference.CELLS[cell], p, matrices | {"W_x": p["W_x"].T}, jnp.swapaxes(x, 1, 2), carry)
    x_proj = x @ p["W_x"]
    if cell in reference.NORMALISE_X:
        x_proj = p["scale_x"] * reference.NORMALISE_X[cell](x_proj)
    return reference.unroll(reference.CELLS[cell], p, matrices, jnp.swapaxes(x_proj + p["b"], 1, 2), carry)


def test_residual_connections_and_tied_weights_follow_their_equations(x64):
    model, params = build_with_random_params(num_layers=3, residual=True, tie_weights=True, embedding_size=6)
    assert "head_W" not in params
    ids_TB = ids(9, 3)
    carry = model.initial_carry(params, 3)
    x, _ = layer_of("lstm", params["layer_0"], params["embedding"][ids_TB], carry[0])
    for layer in (1, 2):
        x = x + layer_of("lstm", params[f"layer_{layer}"], x, carry[layer])[0]
    expected = x @ params["embedding"].T + params["head_b"]
    logits, _ = jax.jit(model.apply)({"params": params}, ids_TB, carry)
    np.testing.assert_allclose(logits, expected, rtol=1e-12, atol=1e-12)
    last, _ = jax.jit(model.apply, static_argnames="only_last")({"params": params}, ids_TB, carry, only_last=True)
    np.testing.assert_allclose(last, expected[-1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_the_initial_carry_is_zero_or_comes_from_the_parameters(cell):
    for learned in (False, True):
        model = model_of(cell=cell, learn_initial_state=learned)
        shapes = jax.eval_shape(model.initial_params, jax.random.key(0))
        params = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), shapes)
        carry = model.initial_carry(params, 3)
        assert len(carry) == 2 and [len(layer) for layer in carry] == [len(CELLS[cell].carries)] * 2
        for layer in carry:
            for k, state in enumerate(layer):
                assert state.tolist() == [list(range(6)) if learned else [CELLS[cell].initial_value(k)] * 6] * 3


def test_a_learned_initial_carry_starts_at_zero():
    model, params = build(learn_initial_state=True)
    assert not any(state.any() for layer in model.initial_carry(params, 3) for state in layer)


def test_recurrent_dropout_drops_the_same_weights_at_every_step_of_a_window():
    model, params = build(num_layers=1, recurrent_dropout=0.5, cell="rnn", hidden_size=V)
    # The head is the identity, and the outputs are so small that tanh is almost linear.
    params = {**params, "head_W": jnp.eye(V), "layer_0": {**params["layer_0"], "W_h": jnp.eye(V), "b": jnp.zeros(V)}}
    params["layer_0"]["W_x"] = jnp.zeros_like(params["layer_0"]["W_x"])
    carry = ((jnp.full((4, V), 1e-3),),)
    apply = jax.jit(model.apply, static_argnames="train")

    def logits(train):
        rngs = {"dropout": jax.random.key(3)}
        return np.asarray(apply({"params": params}, ids(4, 4), carry, train=train, rngs=rngs)[0])

    # Dropout turns the recurrent weight 1 of each unit into 2 or 0, the same at every step and in every sequence.
    kept_V = logits(True)[0, 0] > 0
    assert 0 < kept_V.sum() < V
    doubled_T = 1e-3 * 2.0 ** np.arange(1, 5)
    np.testing.assert_allclose(logits(True), kept_V * doubled_T[:, None, None] * np.ones((4, 4, 1)), rtol=1e-3)
    np.testing.assert_allclose(logits(False), 1e-3, rtol=1e-3)


@pytest.mark.parametrize("cell, blocks", [("rnn", 1), ("lstm", 4), ("gru", 3)])
def test_the_number_of_parameters(cell, blocks):
    params = jax.eval_shape(model_of(cell=cell).initial_params, jax.random.key(0))
    biases = 2 * 6 if cell == "gru" else 0
    layers = blocks * 6 * (4 + 6 + 1) + blocks * 6 * (6 + 6 + 1) + biases
    assert num_params(params) == V * 4 + layers + 6 * V + V


def test_initial_values():
    _, params = build(num_layers=1, forget_bias=1.0)
    layer = params["layer_0"]
    assert layer["b"].tolist() == [0.0] * 6 + [1.0] * 6 + [0.0] * 12
    for block in np.split(np.asarray(layer["W_h"]), 4):
        np.testing.assert_allclose(block.T @ block, np.eye(6), atol=1e-5)
    blocks = np.split(np.asarray(layer["W_h"]), 4)
    assert not np.allclose(blocks[0], blocks[1])


def test_init_std_gives_all_weights_the_same_distribution():
    _, params = build(init_std=0.01, forget_bias=0.0, hidden_size=40, embedding_size=40)
    for name, value in flatten_state(params).items():
        if value.ndim == 1:
            assert not value.any(), name
        else:
            assert abs(value.std() / 0.01 - 1) < 0.1 and abs(value.mean()) < 0.001, name


def test_dropout_acts_only_in_training_and_depends_only_on_its_key():
    model, params = build(dropout=0.5)
    ids_TB, carry = ids(5, 2), model.initial_carry(params, 2)

    apply = jax.jit(model.apply, static_argnames="train")

    def logits(train, key=0):
        rngs = {"dropout": jax.random.key(key)}
        return np.asarray(apply({"params": params}, ids_TB, carry, train=train, rngs=rngs)[0])

    assert (logits(False, 0) == logits(False, 1)).all()
    assert (logits(True, 0) == logits(True, 0)).all()
    assert not np.allclose(logits(True, 0), logits(True, 1))
    assert not np.allclose(logits(True, 0), logits(False))


def test_the_masks_of_a_row_depend_only_on_its_index():
    """All rows read the same text, so only their masks distinguish them."""
    model, params = build(dropout=0.5)
    ids_TB, key = jnp.tile(ids(5, 1), (1, 4)), jax.random.key(2)

    def logits(rows):
        carry, options = model.initial_carry(params, 2), {"first_row": rows.start, "rngs": {"dropout": key}}
        return model.apply({"params": params}, ids_TB[:, rows], carry, train=True, **options)[0]

    whole, _ = model.apply({"params": params}, ids_TB, model.initial_carry(params, 4), train=True, rngs={"dropout": key})
    parts = jnp.concatenate([logits(slice(0, 2)), logits(slice(2, 4))], axis=1)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)
    assert all(not np.allclose(whole[:, i], whole[:, j]) for i in range(4) for j in range(i))


def test_variational_dropout_drops_the_same_units_at_every_step():
    masks = {}
    for variational in (False, True):
        # The head is the identity and no output of the cell is near 0, so a logit is 0 exactly where a unit was dropped.
        model, params = build(num_layers=1, dropout=0.5, variational_dropout=variational, cell="rnn", hidden_size=V)
        params = {**params, "head_W": jnp.eye(V), "layer_0": {**params["layer_0"], "b": jnp.full(V, 9.0)}}
        apply, rngs = jax.jit(model.apply, static_argnames="train"), {"dropout": jax.random.key(1)}
        logits, _ = apply({"params": params}, ids(50, 4), model.initial_carry(params, 4), train=True, rngs=rngs)
        masks[variational] = np.asarray(logits) == 0
        assert 0.3 < masks[variational].mean() < 0.7
    assert (masks[True] == masks[True][0]).all() and not (masks[True][:, 0] == masks[True][:, 1]).all()
    assert not (masks[False] == masks[False][0]).all()


def test_only_last_returns_the_last_of_all_logits():
    model, params = build()
    ids_TB, carry = ids(8, 2), model.initial_carry(params, 2)
    apply = jax.jit(model.apply, static_argnames="only_last")
    logits, end = apply({"params": params}, ids_TB, carry)
    last, same_end = apply({"params": params}, ids_TB, carry, only_last=True)
    assert last.shape == (1, 2, V)
    np.testing.assert_allclose(last, logits[-1:], rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), end, same_end)


def test_a_text_read_in_two_parts_gives_the_same_logits_and_carry():
    model, params = build()
    ids_TB, carry = ids(8, 2), model.initial_carry(params, 2)
    apply = jax.jit(model.apply)
    whole, last = apply({"params": params}, ids_TB, carry)
    first, middle = apply({"params": params}, ids_TB[:4], carry)
    second, end = apply({"params": params}, ids_TB[4:], middle)
    np.testing.assert_allclose(whole, jnp.concatenate([first, second]), rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), last, end)
