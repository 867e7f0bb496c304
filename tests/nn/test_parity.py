"""Compare outputs and gradients with those of PyTorch's recurrent layers, with the same weights (extra `parity`)."""

import pytest

pytest.importorskip("torch", reason="the extra `parity` is not installed")
from experiments.parity import compare  # noqa: E402


@pytest.mark.parametrize("dtype", compare.BOUNDS)
@pytest.mark.parametrize("num_layers", compare.NUM_LAYERS)
@pytest.mark.parametrize("cell", compare.TORCH_LAYERS)
def test_outputs_and_gradients_equal_those_of_pytorch(cell, num_layers, dtype):
    outputs, gradients = compare.differences(cell, num_layers, dtype)
    assert outputs <= {"float32": 1e-5, "float64": 1e-10}[dtype]
    assert gradients <= {"float32": 1e-5, "float64": 1e-10}[dtype]
