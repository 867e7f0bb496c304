"""The same training step in charlm and in other implementations, each in the usual style of its library.

The model is an embedding, recurrent layers and a head. A step computes the mean cross-entropy of B windows of T characters from
a zero state, clips the norm of the gradient to 1, and applies Adam. All implementations start from the same weights and train
on the same windows, so their losses can be compared.

A trainer is a function (task, PyTorch model, windows (B, T + 1)) -> train. `train(n)` takes n more steps and returns the loss
before the last of them.

Letters: B batch, T time, K steps in a chunk, R runs, H hidden, I input features, V vocabulary, E embedding.
"""

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.sharding import Mesh
from ml_collections import config_dict

from charlm.config import default_config
from charlm.nn.cells import CELLS
from charlm.nn.model import CharLM
from charlm.parallel import mesh as meshes
from charlm.training.chunk import MAX_STEPS_PER_DISPATCH, compile_train_chunk, train_chunk_of_runs
from charlm.training.state import Program, TrainState, init_state_of_runs
from experiments.parity.compare import TorchModel, to_charlm

LEARNING_RATE, CLIP_NORM = 1e-3, 1.0


class Task(NamedTuple):
    """The model and the batch of a training step. `dtype` is the type of the operands of the matrix products."""

    cell: str
    hidden: int
    layers: int
    batch: int
    seq_len: int = 100
    vocab: int = 65
    embedding: int = 256
    dtype: str = "float32"

    @property
    def chars(self) -> int:
        """The number of characters in a step."""
        return self.batch * self.seq_len


Train = Callable[[int], float]


def torch_model(task: Task) -> TorchModel:
    """Return the model whose initial weights all implementations start from."""
    torch.manual_seed(0)
    return TorchModel(task.cell, task.layers, task.vocab, task.embedding, task.hidden)


def charlm_params(task: Task, model: TorchModel) -> dict:
    """Return the weights of the PyTorch model in charlm's form."""
    tensors = {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}
    return jax.tree.map(jnp.array, to_charlm(task.cell, task.layers, tensors))


def charlm_config(task: Task, recurrence: str = "auto") -> config_dict.ConfigDict:
    config = default_config()
    config.model.update(cell=task.cell, hidden_size=task.hidden, num_layers=task.layers, embedding_size=task.embedding)
    config.model.update(recurrence=recurrence, dtype=task.dtype)
    return config


def charlm_model(task: Task) -> CharLM:
    return CharLM.from_config(charlm_config(task).model, task.vocab)


def charlm_program(task: Task, recurrence: str = "auto") -> Program:
    config = charlm_config(task, recurrence)
    config.batching.update(layout="random", batch_size=task.batch, seq_len=task.seq_len)
    config.optimizer.update(learning_rate=LEARNING_RATE, clip_norm=CLIP_NORM)
    return Program(config, task.vocab, 1, carries_state=False)


def shared_by(task: Task) -> int:
    """Return the number of devices that share a batch of a task with `mesh.auto`."""
    if jax.devices()[0].platform != "cpu":
        return 1
    return meshes.num_sharing_devices(charlm_program(task).config, jax.device_count())


def charlm(task: Task, model: TorchModel, windows: np.ndarray, recurrence: str = "auto", share: bool = True) -> Train:
    """charlm: the chunk of steps that `charlm.train` dispatches with `mesh.auto`, with windows cut on the device."""
    program, hyperparameters = charlm_program(task, recurrence), {"seed": np.uint32(0)}
    devices = shared_by(task) if share else 1
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",)) if devices > 1 else None
    program = program._replace(mesh=mesh)
    _, _, optimizer = program.bind(hyperparameters)
    params = charlm_params(task, model)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), (), ())
    replicated = None if mesh is None else meshes.sharding(mesh, meshes.REPLICATED)
    state, text = jax.device_put((state, windows.astype(np.uint8).ravel()), replicated)
    compiled = compile_train_chunk(program, state, hyperparameters, text)
    capacity = MAX_STEPS_PER_DISPATCH
    starts_KB = np.tile(np.arange(task.batch, dtype=np.int32) * windows.shape[1], (capacity, 1))
    reset_KB = np.ones((capacity, task.batch), bool)
    starts_KB, reset_KB = (meshes.put(mesh, each, meshes.STEPS_BATCH_SHARDED) for each in (starts_KB, reset_KB))

    def train(n: int) -> float:
        nonlocal state
        state, metrics_K, _ = compiled(state, hyperparameters, text, starts_KB, reset_KB, np.int32(n))
        return float(metrics_K["loss"][n - 1])

    return train


def side_by_side(task: Task, windows: np.ndarray, num_runs: int) -> Train:
    """charlm: `num_runs` runs that differ in their seed, as one program whose runs are distributed over all devices."""
    program, hyperparameters_R = charlm_program(task), {"seed": np.arange(num_runs, dtype=np.uint32)}
    states = init_state_of_runs(program, hyperparameters_R)
    text = jax.device_put(windows.astype(np.uint8).ravel())
    devices = jax.devices()
    chunk = functools.partial(train_chunk_of_runs, program, devices, devices[0].platform != "cpu")
    compiled = jax.jit(chunk, donate_argnums=0)
    shape = (num_runs, MAX_STEPS_PER_DISPATCH, task.batch)
    starts_RKB = np.broadcast_to(np.arange(task.batch, dtype=np.int32) * windows.shape[1], shape)
    reset_RKB = np.ones(shape, bool)

    def train(n: int) -> float:
        nonlocal states
        states, metrics_RK, _ = compiled(states, hyperparameters_R, text, starts_RKB, reset_RKB, np.int32(n))
        return float(metrics_RK["loss"][0, n - 1])

    return train


def torch_device() -> str:
    """Return the name of the device that PyTorch uses."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_nn(task: Task, model: TorchModel, windows: np.ndarray) -> Train:
    """PyTorch: torch.nn.LSTM or GRU (on a GPU those of cuDNN) and fused Adam; autocast for bfloat16."""
    device = torch_device()
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which is the default of JAX.
    autocast = torch.autocast(device, torch.bfloat16, enabled=task.dtype == "bfloat16")
    model = copy.deepcopy(model).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    ids_TB = torch.from_numpy(windows.T.astype(np.int64)).to(device)
    inputs, targets = ids_TB[:-1], ids_TB[1:].reshape(-1)

    def train(n: int) -> float:
        for _ in range(n):
            with autocast:
                logits, _ = model(inputs, None)
                loss = torch.nn.functional.cross_entropy(logits.view(-1, task.vocab), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
        return loss.item()

    return train


def _train_with_optax(apply: Callable, params, windows: np.ndarray) -> Train:
    """Return `train` for a model `apply(params, ids_TB) -> logits_TBV`, with one jitted step whose state is donated."""
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adam(LEARNING_RATE))
    ids_TB = jnp.asarray(windows.T.astype(np.int32))

    @jax.jit
    def loss_of(params):
        losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, ids_TB[:-1]), ids_TB[1:])
        return losses.mean()

    def step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    step = jax.jit(step, donate_argnums=(0, 1))
    state = params, optimizer.init(params)

    def train(n: int) -> float:
        nonlocal state
        for _ in range(n):
            *state, loss = step(*state)
        return float(loss)

    return train


def plain_scan(task: Task, model: TorchModel, windows: np.ndarray) -> Train:
    """Plain JAX: the inputs are projected before a scan, and JAX differentiates everything."""

    def lstm(p, x_proj, carry):
        h, c = carry
        i, f, g, o = jnp.split(x_proj + h @ p["W_h"].T, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def gru(p, x_proj, carry):
        (h,) = carry
        x_r, x_z, x_n = jnp.split(x_proj, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(h @ p["W_h"].T, 3, axis=-1)
        r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
        return ((1 - z) * jnp.tanh(x_n + r * (h_n + p["b_h"])) + z * h,)

    cell = {"lstm": lstm, "gru": gru}[task.cell]

    def apply(params, ids_TB):
        x_TBI = params["embedding"][ids_TB]
        for layer in range(task.layers):
            p = params[f"layer_{layer}"]

            def step(carry, x_proj, p=p):
                carry = cell(p, x_proj, carry)
                return carry, carry[0]

            zero = tuple(jnp.zeros((ids_TB.shape[1], task.hidden)) for _ in CELLS[task.cell].carries)
            _, x_TBI = jax.lax.scan(step, zero, x_TBI @ p["W_x"] + p["b"])
        return x_TBI @ params["head_W"] + params["head_b"]

    return _train_with_optax(apply, charlm_params(task, model), windows)


class FlaxModel(nn.Module):
    """The model with the recurrent layers of Flax."""

    task: Task

    @nn.compact
    def __call__(self, ids_TB):
        cell = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}[self.task.cell]
        x_TBI = nn.Embed(self.task.vocab, self.task.embedding, name="embedding")(ids_TB)
        for layer in range(self.task.layers):
            x_TBI = nn.RNN(cell(self.task.hidden, name=f"layer_{layer}"), time_major=True)(x_TBI)
        return nn.Dense(self.task.vocab, name="head")(x_TBI)


def flax_params(task: Task, params: dict) -> dict:
    """Return charlm's weights in the form of FlaxModel, which has one kernel for each gate."""
    theirs = {
        "embedding": {"embedding": params["embedding"]},
        "head": {"kernel": params["head_W"], "bias": params["head_b"]},
    }
    for layer in range(task.layers):
        ours, cell = params[f"layer_{layer}"], {}
        for k, gate in enumerate(CELLS[task.cell].gates):
            block = slice(k * task.hidden, (k + 1) * task.hidden)
            of_input, of_state = {"kernel": ours["W_x"][:, block]}, {"kernel": ours["W_h"][block].T}
            # Flax has the bias of an LSTM in the recurrent layer, and that of a GRU in the input layer. The candidate has two.
            (of_state if task.cell == "lstm" else of_input)["bias"] = ours["b"][block]
            if gate == "n":
                of_state["bias"] = ours["b_h"]
            cell |= {f"i{gate}": of_input, f"h{gate}": of_state}
        theirs[f"layer_{layer}"] = cell
    return theirs


def flax_nn(task: Task, model: TorchModel, windows: np.ndarray) -> Train:
    """Flax: flax.linen.RNN with OptimizedLSTMCell or GRUCell."""
    theirs = FlaxModel(task)
    params = jax.tree.map(jnp.array, flax_params(task, charlm_params(task, model)))
    return _train_with_optax(lambda params, ids_TB: theirs.apply({"params": params}, ids_TB), params, windows)


def keras_fit(task: Task, model: TorchModel, windows: np.ndarray) -> Train:
    """Keras on JAX: the layers of Keras, `compile` and `fit`."""
    import keras  # Imported here, because the import reads KERAS_BACKEND.

    layer_class = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU}[task.cell]
    layers = [layer_class(task.hidden, return_sequences=True) for _ in range(task.layers)]
    embedding, head = keras.layers.Embedding(task.vocab, task.embedding), keras.layers.Dense(task.vocab)
    theirs = keras.Sequential([keras.Input((task.seq_len,), dtype="int32"), embedding, *layers, head])
    params = jax.tree.map(np.asarray, charlm_params(task, model))
    embedding.set_weights([params["embedding"]])
    head.set_weights([params["head_W"], params["head_b"]])
    for layer, keras_layer in enumerate(layers):
        ours = params[f"layer_{layer}"]
        if task.cell == "lstm":
            keras_layer.set_weights([ours["W_x"], ours["W_h"].T, ours["b"]])
        else:  # In Keras the update gate comes before the reset gate.

            def swap(x):
                r, z, n = np.split(x, 3, axis=-1)
                return np.concatenate([z, r, n], axis=-1)

            b_h = np.concatenate([np.zeros(2 * task.hidden, np.float32), ours["b_h"]])
            keras_layer.set_weights([swap(ours["W_x"]), swap(ours["W_h"].T), np.stack([swap(ours["b"]), b_h])])
    theirs.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE, global_clipnorm=CLIP_NORM, epsilon=1e-8),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    inputs, targets = windows[:, :-1].astype(np.int32), windows[:, 1:].astype(np.int32)

    def train(n: int) -> float:
        # Each epoch is one batch, so the last reported loss is that of the last step.
        history = theirs.fit(inputs, targets, batch_size=task.batch, epochs=n, shuffle=False, verbose=0)
        return history.history["loss"][-1]

    return train


Trainer = Callable[[Task, TorchModel, np.ndarray], Train]
TRAINERS: dict[str, Trainer] = {
    "charlm": charlm,
    "torch.nn": torch_nn,
    "flax nn.RNN": flax_nn,
    "plain scan": plain_scan,
    "Keras on JAX": keras_fit,
}


def trainers_of(task: Task) -> dict[str, Trainer]:
    """Return the trainers for a task, by name.

    In bfloat16 only PyTorch is compared with charlm. Where charlm uses several devices, or cuDNN, it is also measured without.
    """
    if task.dtype == "bfloat16":
        return {name: TRAINERS[name] for name in ("charlm", "torch.nn")}
    if shared_by(task) > 1:
        return TRAINERS | {"charlm on one device": functools.partial(charlm, share=False)}
    if charlm_model(task).recurrence == "scan":
        return TRAINERS
    return {"charlm": charlm, "charlm's scan": functools.partial(charlm, recurrence="scan")} | TRAINERS
