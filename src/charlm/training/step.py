"""The training step: loss, gradient, update. Pure; it knows no files.

Letters: B batch, T time, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from charlm.nn.model import CharLM, is_static_zero
from charlm.parallel import mesh as meshes
from charlm.parallel.mesh import BATCH_SHARDED, REPLICATED
from charlm.training.averaging import updated_average
from charlm.training.loss import activation_penalty, cross_entropy
from charlm.training.metrics import TARGET_METRICS, measure_gradient, measure_targets
from charlm.training.state import Hyperparameters, Program, TrainState, run_keys

# {name: scalar}: `loss`, `grad_norm`, and what `train.metrics` selects.
Metrics = dict[str, jax.Array]


def train_step(
    program: Program, hyperparameters: Hyperparameters, state: TrainState, windows: jax.Array, reset_B: jax.Array
) -> tuple[TrainState, Metrics]:
    """Take one step on windows of shape (B, T + 1) and return the new state and the step's metrics.

    `loss` is the mean cross-entropy in nats per symbol over the targets that `batching.loss_on` selects: all T, or the last.
    The objective is the loss plus the penalties (`activation_penalty`); `sum_over_time` multiplies it by the number of targets
    in a window. `grad_norm` is the global norm of the objective's gradient, before clipping. The gradient stops where the
    window begins (truncated backpropagation through time, Williams and Peng 1990). The states selected by `reset_B` are
    replaced by the initial state.

    The batch is processed in `optimizer.accumulation_steps` equal parts, one after another, so only the activations of one
    part are in memory. Each device of a mesh processes its own rows of the batch. The dropout mask of a row depends only on its
    index in the batch, so the step is the same up to rounding.
    """
    config, model, optimizer = program.bind(hyperparameters)
    key = jax.random.fold_in(run_keys(config.seed)[1], state.step)
    grads, metrics, last = _gradient_on_mesh(program.mesh, config, model, state.params, windows, state.carry, reset_B, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = updated_average(config, state.ema, params, opt_state, state.step)
    metrics |= {"grad_norm": optax.tree.norm(grads), **measure_gradient(config.train.metrics, grads, state.params)}
    return TrainState(state.step + 1, params, opt_state, last if state.carry else (), ema), metrics


def _gradient_on_mesh(
    mesh: Mesh | None,
    config: ConfigDict,
    model: CharLM,
    params: Any,
    windows: jax.Array,
    carry: Any,
    reset_B: jax.Array,
    key: jax.Array,
) -> tuple[Any, Metrics, Any]:
    """Return `_gradient` of windows whose rows lie on several devices: the mean over the devices."""
    differentiate = _gradient if config.optimizer.accumulation_steps == 1 else _gradient_in_parts

    def of_rows(params, windows, carry, reset_B, key):
        first_row = 0 if mesh is None else jax.lax.axis_index("data") * len(windows)
        grads, metrics, last = differentiate(config, model, params, windows, carry, reset_B, key, first_row)
        return *meshes.pmean(mesh, (grads, metrics)), last

    in_specs = (REPLICATED, BATCH_SHARDED, BATCH_SHARDED, BATCH_SHARDED, REPLICATED)
    of_batch = meshes.shard_map(mesh, of_rows, in_specs, (REPLICATED, REPLICATED, BATCH_SHARDED))
    return of_batch(params, windows, carry, reset_B, key)


def _gradient(
    config: ConfigDict,
    model: CharLM,
    params: Any,
    windows: jax.Array,
    carry: Any,
    reset_B: jax.Array,
    key: jax.Array,
    first_row: int | jax.Array,
) -> tuple[Any, Metrics, Any]:
    """Return (gradient, metrics, last state) of some windows. `first_row` is the index of the first one in the batch."""
    ids_TB, targets_TB = windows.T[:-1], windows.T[1:]
    only_last = config.batching.loss_on == "last"
    if only_last:
        targets_TB = targets_TB[-1:]
    scale = targets_TB.shape[0] if config.optimizer.loss_reduction == "sum_over_time" else 1
    penalised = not (is_static_zero(config.optimizer.activation_reg) and is_static_zero(config.optimizer.temporal_reg))

    def objective(params):
        initial = model.initial_carry(params, windows.shape[0])
        if carry:
            initial = jax.tree.map(lambda old, new: jnp.where(reset_B[:, None], new, old), carry, initial)
        (logits_TBV, last), sown = model.apply(
            {"params": params},
            ids_TB,
            initial,
            train=True,
            only_last=only_last,
            first_row=first_row,
            rngs={"dropout": key},
            mutable=["activations"] if penalised else [],
        )
        loss = cross_entropy(logits_TBV, targets_TB).mean()
        starts_TB = None if model.boundary is None else ids_TB == model.boundary
        penalty = activation_penalty(config.optimizer, sown["activations"], starts_TB) if penalised else 0.0
        measured = measure_targets(config.train.metrics, logits_TBV, targets_TB)
        metrics = {"loss": loss, **{name: values.mean() for name, values in measured.items()}}
        return (loss + penalty) * scale, (metrics, last)

    grads, (metrics, last) = jax.grad(objective, has_aux=True)(params)
    return grads, metrics, last


def _gradient_in_parts(
    config: ConfigDict,
    model: CharLM,
    params: Any,
    windows: jax.Array,
    carry: Any,
    reset_B: jax.Array,
    key: jax.Array,
    first_row: int | jax.Array,
) -> tuple[Any, Metrics, Any]:
    """Return `_gradient` of the windows, computed in equal parts and averaged."""
    num_parts = config.optimizer.accumulation_steps

    def add_part(sums, part):
        index, windows, carry, reset_B = part
        *found, last = _gradient(config, model, params, windows, carry, reset_B, key, first_row + index * len(windows))
        return jax.tree.map(jnp.add, sums, tuple(found)), last

    def split(x):
        return x.reshape(num_parts, x.shape[0] // num_parts, *x.shape[1:])

    names = ("loss", *(name for name in config.train.metrics if name in TARGET_METRICS))
    zeros = jax.tree.map(jnp.zeros_like, params), {name: jnp.zeros(()) for name in names}
    parts = jnp.arange(num_parts), split(windows), jax.tree.map(split, carry), split(reset_B)
    sums, lasts = jax.lax.scan(add_part, zeros, parts)
    grads, metrics = jax.tree.map(lambda total: total / num_parts, sums)
    return grads, metrics, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), lasts)
