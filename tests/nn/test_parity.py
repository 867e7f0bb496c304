"""Compare outputs and gradients with those of PyTorch's recurrent layers, with the same weights (extra `parity`)."""

import importlib.util

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the extra `parity` is not installed")


# experiments/parity compares every cell with every number of layers in both types.
@pytest.mark.parametrize(
    "cell, num_layers, dtype",
    [("rnn", 1, "float64"), ("lstm", 2, "float64"), ("gru", 3, "float64"), ("lstm", 2, "float32"), ("gru", 1, "float32")],
)
def test_outputs_and_gradients_equal_those_of_pytorch(cell, num_layers, dtype):
    from experiments.parity import compare  # PyTorch takes three seconds, so only the process of these tests imports it.

    outputs, gradients = compare.differences(cell, num_layers, dtype)
    assert outputs <= {"float32": 1e-5, "float64": 1e-10}[dtype]
    assert gradients <= {"float32": 1e-5, "float64": 1e-10}[dtype]
