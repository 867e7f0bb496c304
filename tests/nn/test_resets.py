"""The state is reset at the boundaries of documents, so each document is a text of its own: its loss and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm.config import default_config
from charlm.nn.model import CharLM
from charlm.training.loss import activation_penalty, cross_entropy

# The symbols 1 to V - 1 form the documents.
V, BOUNDARY, T = 7, 0, 24


def model_and_params():
    config = default_config().model
    config.update(hidden_size=8, embedding_size=4, num_layers=2, learn_initial_state=True)
    model = CharLM.from_config(config, V, BOUNDARY)
    params = jax.tree.map(np.asarray, jax.jit(model.initial_params)(jax.random.key(0)))
    # Large weights and an initial state far from zero, so that the loss depends on the context and on where it begins.
    return model, jax.tree.map(lambda p: np.float32(1.5) * p + np.float32(0.3) * np.sign(p + np.float32(1e-3)), params)


def losses_of(model, params, ids_WB, carry):
    logits_TBV, last = model.apply({"params": params}, ids_WB[:-1], carry)
    return cross_entropy(logits_TBV, ids_WB[1:]), last


@functools.cache
def masked_loss_and_gradient():
    """Return params, and (params, ids_W, mask_T) -> (nats_T, gradient of the masked sum), compiled once for all examples."""
    model, params = model_and_params()

    def loss(params, ids_W, mask_T):
        # The state before the window is far from the initial state.
        carry = jax.tree.map(lambda each: each + 2.0, model.initial_carry(params, 1))
        nats_T = losses_of(model, params, ids_W[:, None], carry)[0][:, 0]
        return jnp.sum(nats_T * mask_T), nats_T

    return params, jax.jit(jax.grad(loss, has_aux=True))


DOCUMENT = st.lists(st.integers(1, V - 1), min_size=1, max_size=6)


@given(st.lists(DOCUMENT, min_size=2, max_size=4), DOCUMENT, st.data())
@settings(max_examples=40)
def test_changing_a_document_changes_no_loss_and_no_gradient_of_another(documents, other, draw):
    params, loss_and_gradient = masked_loss_and_gradient()
    changed = draw.draw(st.integers(0, len(documents) - 1))
    kept = draw.draw(st.integers(0, len(documents) - 1).filter(lambda index: index != changed))

    def of_kept(documents):
        ids = [BOUNDARY]
        for index, document in enumerate(documents):
            if index == kept:
                targets = slice(len(ids) - 1, len(ids) + len(document))  # The end of the document counts.
            ids += [*document, BOUNDARY]
        ids_W = np.full(T + 5, V - 1)
        ids_W[: len(ids)] = ids
        mask_T = np.zeros(T + 4, np.float32)
        mask_T[targets] = 1
        grads, nats_T = loss_and_gradient(params, ids_W.astype(np.int32), mask_T)
        return np.asarray(nats_T)[targets], grads

    before, after = of_kept(documents), of_kept([*documents[:changed], other, *documents[changed + 1 :]])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), before, after)


def test_the_gradient_of_a_window_is_the_sum_of_those_of_its_documents(x64):
    """Two rows with two documents each. The carry before the window does not count, but the learned initial state does."""
    model, params = model_and_params()
    params = jax.tree.map(lambda p: p.astype(np.float64), params)
    documents = np.random.default_rng(0).integers(1, V, (4, 5))
    documents = np.concatenate([np.full((4, 1), BOUNDARY), documents, np.full((4, 1), BOUNDARY)], axis=1)
    windows = np.concatenate([documents[:2], documents[2:, 1:]], axis=1)

    def loss(start, params, ids_BW):
        carry = model.initial_carry(params, len(ids_BW))
        if start is not None:
            carry = jax.tree.map(lambda each: jnp.full_like(each, start), carry)
        return losses_of(model, params, jnp.asarray(ids_BW.T), carry)[0].sum()

    whole = jax.jit(jax.grad(functools.partial(loss, 3.0)))(params, windows)
    alone = jax.jit(jax.grad(functools.partial(loss, None)))(params, documents)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), whole, alone)
    assert float(jnp.abs(whole["layer_1"]["first_0"]).sum()) > 0


def test_the_change_of_the_outputs_at_a_boundary_is_not_penalised():
    optimizer = default_config().optimizer
    optimizer.temporal_reg = 1.0
    output_TBH = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    starts_TB = np.zeros((5, 2), bool)
    starts_TB[[0, 2], 0] = True
    squares = np.square(np.diff(output_TBH, axis=0))
    squares[1, 0] = 0
    found = activation_penalty(optimizer, {"output": (output_TBH,), "dropped": (output_TBH,)}, starts_TB)
    np.testing.assert_allclose(found, squares.mean(), rtol=1e-6)
