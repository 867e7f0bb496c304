"""The programs of a config, compiled for devices that need not be present, and two peers of the training step.

Letters: B batch, T time, K steps in a chunk, V vocabulary, N samples, G gates times hidden.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, SingleDeviceSharding
from ml_collections import ConfigDict

from charlm.data.vocab import Vocab
from charlm.inference.sampler import Settings, make_sampler, sample_keys
from charlm.inference.scorer import WINDOW, make_window_program
from charlm.nn.cells import CELLS
from charlm.nn.model import CharLM
from charlm.parallel import mesh as meshes
from charlm.training.chunk import compile_train_chunk
from charlm.training.state import Program, init_state, state_shardings

# The symbols of the built-in corpus, and the length of a text. Only the shapes of the programs depend on them.
SYMBOLS, TEXT = 76, 1 << 22
# The symbols that one dispatch of the sampler draws.
BLOCK = 64


class Setting:
    """A config, and the devices that its programs are compiled for.

    Args:
        config: the config.
        devices: the devices that share a batch.
    """

    def __init__(self, config: ConfigDict, devices: Sequence[Any]):
        self.config = config
        self.vocab = Vocab.all_bytes() if config.data.vocab == "bytes" else Vocab.from_chars(map(chr, range(33, 33 + SYMBOLS)))
        self.boundary = 0 if config.data.documents else None
        self.mesh = Mesh(np.array(devices), ("data",)) if len(devices) > 1 else None
        self.replicated = meshes.sharding(self.mesh, meshes.REPLICATED) or SingleDeviceSharding(devices[0])
        self.rows = meshes.sharding(self.mesh, meshes.BATCH_SHARDED) or self.replicated
        self.columns = meshes.sharding(self.mesh, meshes.STEPS_BATCH_SHARDED) or self.replicated

    @property
    def model(self) -> CharLM:
        return CharLM.from_config(self.config.model, self.vocab.size, self.boundary)

    def shape(self, shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self.replicated)

    def shapes(self, function: Callable[..., Any], *args: Any, sharding: Any = None) -> Any:
        """Return the shapes of what a function returns, on the devices."""
        return jax.tree.map(lambda leaf: self.shape(leaf.shape, leaf.dtype, sharding), jax.eval_shape(function, *args))

    @property
    def params(self) -> Any:
        return self.shapes(self.model.initial_params, jax.random.key(0))


def train(setting: Setting) -> jax.stages.Compiled:
    """Return the chunk of training steps that `charlm.train` dispatches."""
    config = setting.config
    program = Program(config, setting.vocab.size, 1000, config.batching.layout == "stream", setting.mesh, setting.boundary)
    hyperparameters = {"seed": jax.ShapeDtypeStruct((), jnp.uint32)}
    state = setting.shapes(functools.partial(init_state, program), hyperparameters)
    if setting.mesh is not None:
        put = lambda leaf, sharding: setting.shape(leaf.shape, leaf.dtype, sharding)  # noqa: E731
        state = jax.tree.map(put, state, state_shardings(program, state))
    return compile_train_chunk(program, state, hyperparameters, setting.shape((TEXT,), setting.vocab.dtype))


def score(setting: Setting) -> jax.stages.Compiled:
    """Return the program that scores one window of every stream."""
    evaluation, each = setting.config.eval, 1 if setting.mesh is None else setting.mesh.size
    batch = meshes.round_up(setting.mesh, min(evaluation.batch_size * each, evaluation.num_streams))
    carry = setting.shapes(lambda params: setting.model.initial_carry(params, batch), setting.params, sharding=setting.rows)
    windows = setting.shape((batch, WINDOW + 1), setting.vocab.dtype, setting.rows)
    weights = setting.shape((WINDOW, batch), bool, setting.columns)
    program = make_window_program(setting.model, setting.mesh, setting.config.eval.metrics)
    return program.lower(setting.params, carry, windows, weights).compile()


def sample(setting: Setting) -> jax.stages.Compiled:
    """Return the program that draws a block of symbols for `sample.num_samples` texts. It runs on one device."""
    num_samples, window = setting.config.sample.num_samples, setting.config.sample.window
    sampler = make_sampler(setting.model, setting.vocab, window)
    weights = setting.shapes(sampler.prepare, setting.params)
    state = setting.shapes(lambda weights: sampler.start(weights, num_samples), weights)
    keys = setting.shapes(lambda: sample_keys(0, num_samples))
    number = setting.shape((), jnp.int32)
    settings = Settings(setting.shape((), jnp.float32), number, setting.shape((), jnp.float32), setting.shape((), bool))
    ids, prompt = setting.shape((num_samples,), jnp.int32), setting.shape((BLOCK, 1), jnp.int32)
    block = sampler.block.lower(weights, state, ids, keys, number, prompt, number, settings, filtered=False)
    return block.compile()


def plain_scan(setting: Setting) -> jax.stages.Compiled:
    """Return one training step of a plain scan over `Cell.update`, which JAX differentiates as a whole."""
    cell, model = CELLS[setting.config.model.cell], setting.config.model
    dtype = jnp.dtype(model.dtype)

    def layer(p, x_TBI):
        def project(x, W):
            return jnp.matmul(x.astype(dtype), W.astype(dtype), preferred_element_type=jnp.float32)

        def step(carry, x_proj_BG):
            turned = tuple(each.T for each in carry)
            carry = cell.update(p, x_proj_BG.T, turned, lambda name, h_HB: project(h_HB.T, p[name].T).T)
            carry = tuple(each.T for each in carry)
            return carry, carry[0]

        zero = (jnp.zeros((x_TBI.shape[1], model.hidden_size)),) * len(cell.carries)
        return jax.lax.scan(step, zero, project(x_TBI, p["W_x"]) + p["b"])[1]

    def apply(params, ids_TB):
        x_TBI = params["embedding"][ids_TB] if "embedding" in params else jax.nn.one_hot(ids_TB, setting.vocab.size)
        for index in range(model.num_layers):
            x_TBI = layer(params[f"layer_{index}"], x_TBI)
        return x_TBI @ params["head_W"] + params["head_b"]

    return _compile_step(setting, apply, setting.params)


class FlaxModel(nn.Module):
    """The model with the recurrent layers of Flax."""

    cell: str
    hidden: int
    layers: int
    embedding: int
    vocab: int
    dtype: Any

    @nn.compact
    def __call__(self, ids_TB):
        cell = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell, "rnn": nn.SimpleCell}[self.cell]
        x = nn.Embed(self.vocab, self.embedding)(ids_TB)
        for _ in range(self.layers):
            x = nn.RNN(cell(self.hidden, dtype=self.dtype), time_major=True)(x)
        return nn.Dense(self.vocab)(x).astype(jnp.float32)


def flax_rnn(setting: Setting) -> jax.stages.Compiled:
    """Return one training step of Flax's `nn.RNN`."""
    model = setting.config.model
    dtype = None if model.dtype == "float32" else jnp.dtype(model.dtype)
    module = FlaxModel(model.cell, model.hidden_size, model.num_layers, model.embedding_size, setting.vocab.size, dtype)
    params = setting.shapes(lambda: module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    return _compile_step(setting, module.apply, params)


def _compile_step(setting: Setting, apply: Callable[..., jax.Array], params: Any) -> jax.stages.Compiled:
    """Return one step of Adam on the cross-entropy of a model `apply(params, ids_TB) -> logits_TBV`."""
    batching, optimizer = setting.config.batching, optax.adam(1e-3)

    def loss_of(params, ids_TB):
        logits_TBV = apply(params, ids_TB[:-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_TBV, ids_TB[1:]).mean()

    def step(params, opt_state, ids_TB):
        loss, grads = jax.value_and_grad(loss_of)(params, ids_TB)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    ids_TB = setting.shape((batching.seq_len + 1, batching.batch_size), jnp.int32, setting.columns)
    opt_state = setting.shapes(optimizer.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, ids_TB).compile()


PROGRAMS = {"train": train, "score": score, "sample": sample, "plain scan": plain_scan, "nn.RNN": flax_rnn}
# The cells of the peers.
PEERS, PEER_CELLS = ("plain scan", "nn.RNN"), ("rnn", "lstm", "gru")
