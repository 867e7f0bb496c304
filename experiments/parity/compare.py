"""Compare charlm with PyTorch: outputs and all gradients, with the same weights in both.

    pip install -c constraints.txt -e '.[parity]'
    python experiments/parity/compare.py

The model has 65 symbols, an embedding of 32, one to three layers of 64 units, and a head. It reads 8 sequences of 50 characters
from a random initial state. The loss is the cross-entropy summed over time and averaged over the batch. The script compares the
outputs (logits, loss, final states) and the gradients (of all weights, all biases and the initial states). The difference of a
tensor is its largest absolute difference, divided by the largest absolute value in PyTorch's tensor. The table shows the
largest difference of any tensor. The exit code is 1 if a difference exceeds its bound.

Letters: B batch, T time, H hidden, V vocabulary, E embedding.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch

from charlm.config import default_config
from charlm.nn.cells import CELLS
from charlm.nn.model import CharLM
from charlm.training.loss import cross_entropy

V, E, H, T, B = 65, 32, 64, 50, 8
TORCH_LAYERS = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
NUM_LAYERS = (1, 2, 3)
BOUNDS = {"float32": 1e-5, "float64": 1e-10}


class TorchModel(torch.nn.Module):
    """The model in the usual style of PyTorch."""

    def __init__(self, cell: str, num_layers: int, vocab: int = V, embedding: int = E, hidden: int = H):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, embedding)
        self.layers = TORCH_LAYERS[cell](embedding, hidden, num_layers)
        self.head = torch.nn.Linear(hidden, vocab)

    def forward(self, ids_TB, state):
        h_TBH, state = self.layers(self.embedding(ids_TB), state)
        return self.head(h_TBH), state


def to_charlm(cell: str, num_layers: int, tensors: dict[str, np.ndarray]) -> dict:
    """Return charlm's parameter tree for PyTorch's weights, given by name, or for their gradients.

    PyTorch has two biases where one is enough. charlm's bias is the sum of the two. Only the candidate of the GRU needs the
    second bias. For gradients, the caller must set the gradient of each unneeded second bias to zero.
    """
    params = {"embedding": tensors["embedding.weight"], "head_W": tensors["head.weight"].T, "head_b": tensors["head.bias"]}
    for layer in range(num_layers):
        b, b_h = tensors[f"layers.bias_ih_l{layer}"], tensors[f"layers.bias_hh_l{layer}"]
        candidate = {}
        if cell == "gru":
            r, z, n = np.split(b_h, 3)
            candidate, b_h = {"b_h": n}, np.concatenate([r, z, np.zeros_like(n)])
        params[f"layer_{layer}"] = {
            "W_x": tensors[f"layers.weight_ih_l{layer}"].T,
            "W_h": tensors[f"layers.weight_hh_l{layer}"],
            "b": b + b_h,
            **candidate,
        }
    return params


def run_torch(cell: str, num_layers: int, dtype: str, ids: np.ndarray, targets: np.ndarray, first: list[np.ndarray]):
    """Return the weights, outputs and gradients of PyTorch, in the form of charlm."""
    torch.manual_seed(0)
    model = TorchModel(cell, num_layers).to(getattr(torch, dtype))
    state = [torch.from_numpy(s).requires_grad_() for s in first]
    logits, last = model(torch.from_numpy(ids), tuple(state) if cell == "lstm" else state[0])
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), torch.from_numpy(targets).reshape(-1)) * T
    loss.backward()
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    # charlm's bias is the sum of PyTorch's two biases, so its gradient is that of either one. `to_charlm` adds the two. The
    # gradient of the second bias is therefore set to zero, except for the candidate of the GRU.
    for name in grads:
        if "bias_hh" in name:
            grads[name] = np.concatenate([np.zeros_like(grads[name][: 2 * H]), grads[name][2 * H :]]) * (cell == "gru")
    last = [s.detach().numpy() for s in (last if cell == "lstm" else (last,))]
    outputs = {"logits": logits.detach().numpy(), "loss": loss.detach().numpy(), "last": last}
    params = to_charlm(cell, num_layers, grads)
    return to_charlm(cell, num_layers, weights), outputs, {"params": params, "first": [s.grad.numpy() for s in state]}


def run_charlm(cell: str, num_layers: int, dtype: str, weights, ids: np.ndarray, targets: np.ndarray, first: list[np.ndarray]):
    """Return the outputs and gradients of charlm."""
    config = default_config().model
    config.update(cell=cell, hidden_size=H, num_layers=num_layers, embedding_size=E)
    model = CharLM.from_config(config, V).clone(dtype=dtype)

    def objective(params, first):
        carry = tuple(tuple(state[layer] for state in first) for layer in range(num_layers))
        logits, last = model.apply({"params": params}, ids, carry)
        loss = cross_entropy(logits, targets).mean() * T
        last = [jnp.stack(states) for states in zip(*last)]
        return loss, {"logits": logits, "loss": loss, "last": last}

    (params, first), outputs = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(weights, first)
    return outputs, {"params": params, "first": first}


def largest_difference(ours, theirs) -> float:
    """Return the largest difference between two trees, relative to the largest absolute value of the tensor in `theirs`."""

    def difference(a, b) -> float:
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())

    return max(jax.tree.leaves(jax.tree.map(difference, ours, theirs)))


def differences(cell: str, num_layers: int, dtype: str) -> tuple[float, float]:
    """Return the largest relative difference of the outputs and that of the gradients."""
    draw = np.random.default_rng(0)
    ids, targets = draw.integers(0, V, (2, T, B))
    first = [draw.normal(size=(num_layers, B, H)).astype(dtype) / 2 for _ in CELLS[cell].carries]
    with jax.enable_x64(dtype == "float64"):
        weights, outputs, grads = run_torch(cell, num_layers, dtype, ids, targets, first)
        our_outputs, our_grads = run_charlm(cell, num_layers, dtype, weights, ids, targets, first)
        return largest_difference(our_outputs, outputs), largest_difference(our_grads, grads)


def main() -> int:
    print(f"PyTorch {torch.__version__}, JAX {jax.__version__}\n")
    print("| cell | layers | outputs, float32 | gradients, float32 | outputs, float64 | gradients, float64 |")
    print("| --- | --- | --- | --- | --- | --- |")
    failed = False
    for cell in TORCH_LAYERS:
        for num_layers in NUM_LAYERS:
            found = {dtype: differences(cell, num_layers, dtype) for dtype in BOUNDS}
            failed |= any(max(found[dtype]) > bound for dtype, bound in BOUNDS.items())
            cells = [f"{value:.1e}" for pair in found.values() for value in pair]
            print(f"| {cell.upper()} | {num_layers} | {' | '.join(cells)} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
