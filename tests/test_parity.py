"""Outputs and gradients against PyTorch's recurrent layers with the same weights (the extra `parity`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlm import recurrence
from charlm.cells import CELLS

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
T, B, I, H = 9, 3, 4, 5
LAYERS = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}


@pytest.mark.parametrize("name", CELLS)
def test_outputs_and_gradients_equal_those_of_pytorch(x64, name):
    cell = CELLS[name]
    torch.manual_seed(0)
    layer = LAYERS[name](I, H).double()
    x, weight = torch.randn(T, B, I).double().requires_grad_(), torch.randn(T, B, H).double()
    first = [torch.randn(1, B, H).double().requires_grad_() for _ in range(cell.carries)]
    h, _ = layer(x, tuple(first) if name == "lstm" else first[0])
    (h.sin() * weight).sum().backward()

    def to_jax(tensor):
        return jnp.asarray(tensor.detach().numpy())

    W_x, W_h = to_jax(layer.weight_ih_l0).T, to_jax(layer.weight_hh_l0).T
    b_x, b_h = to_jax(layer.bias_ih_l0), to_jax(layer.bias_hh_l0)
    own = {}
    if name == "gru":  # Only the candidate needs a second bias.
        own, b_h = {"b_h": b_h[2 * H :]}, b_h.at[2 * H :].set(0)

    def outputs(W_x, W_h, b, own, x, carry):
        x_proj = recurrence.project(x, W_x, b, jnp.float64)
        return recurrence.unroll(cell, own, W_h, x_proj, carry, jnp.float64)[0]

    args = W_x, W_h, b_x + b_h, own, to_jax(x), tuple(to_jax(c)[0] for c in first)
    np.testing.assert_allclose(outputs(*args), to_jax(h), rtol=1e-10, atol=1e-10)
    loss = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(outputs(*a)) * to_jax(weight)), range(6)))
    dW_x, dW_h, db, down, dx, dcarry = loss(*args)
    expected = [layer.weight_ih_l0.grad.T, layer.weight_hh_l0.grad.T, layer.bias_ih_l0.grad, x.grad]
    for ours, theirs in zip([dW_x, dW_h, db, dx], expected):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(dcarry, first):
        np.testing.assert_allclose(ours, theirs.grad[0].numpy(), rtol=1e-10, atol=1e-10)
    if name == "gru":
        np.testing.assert_allclose(down["b_h"], layer.bias_hh_l0.grad[2 * H :].numpy(), rtol=1e-10, atol=1e-10)
