"""The training step: loss, gradient, update; and many of them in one dispatch. Pure and jitted; knows no files.

Letters: B batch, T time, V vocabulary, N characters of the text, K steps in a dispatch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from charlm.batching import cut_windows
from charlm.model import CharLM

# The loss buffer of a dispatch: the most steps that one can hold. The number is part of the compiled program, so it
# is no config key; how many steps a dispatch takes is `train.steps_per_dispatch`.
MAX_STEPS_PER_DISPATCH = 128


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step.

    Attributes:
        step: steps done, int32.
        params: parameter tree, float32.
        opt_state: optax's state.
        carry: the recurrent states of the B streams, one a layer; () where a layout carries none.
        ema: the moving average of `params`; () where none is kept.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    carry: Any
    ema: Any

    @property
    def eval_params(self) -> Any:
        """The parameters to score and to sample with: the averaged ones, where they are kept."""
        return self.ema or self.params


class Objective(NamedTuple):
    """What a step minimises.

    Attributes:
        loss_on: the targets of a window that count: all T, or the last.
        loss_reduction: their mean; or with `sum_over_time` as many times it as there are: their sum, mean over the batch.
        activation_reg: times the mean square of the last layer's outputs as they reach the head, added to the mean
            (Merity et al. 2018: AR).
        temporal_reg: times the mean square of the differences between its outputs at consecutive steps, before dropout
            (TAR).
    """

    loss_on: str = "all"
    loss_reduction: str = "mean"
    activation_reg: float = 0.0
    temporal_reg: float = 0.0

    @classmethod
    def from_config(cls, config) -> "Objective":
        optimizer = config.optimizer
        return cls(config.batching.loss_on, optimizer.loss_reduction, optimizer.activation_reg, optimizer.temporal_reg)


def init_state(
    model: CharLM,
    optimizer: optax.GradientTransformation,
    seed: int,
    batch_size: int,
    carries_state: bool,
    averages: bool = False,
) -> TrainState:
    """The state before step 0: parameters drawn from the seed, and the recurrent states that they say."""

    @jax.jit  # One compilation in place of one an operation.
    def init(params_key):
        params = model.initial_params(params_key)
        carry = model.initial_carry(params, batch_size) if carries_state else ()
        ema = jax.tree.map(jnp.copy, params) if averages else ()
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), carry, ema)

    return init(run_keys(seed)[0])


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The two keys of a run: for its parameters, and for what is random in a step (fold in the step)."""
    params_key, step_key = jax.random.split(jax.random.key(seed))
    return params_key, step_key


def nats(logits_TBV: jax.Array, targets_TB: jax.Array) -> jax.Array:
    """Cross-entropy of every target in nats, shape (T, B)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_TBV, targets_TB)


def make_train_step(
    model: CharLM,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    step_key: jax.Array,
    num_parts: int = 1,
    ema_decay: float = 0.0,
) -> Callable:
    """(state, windows (B, T + 1), reset_B) -> (state, loss, gradient norm).

    The loss is the mean in nats per character over the targets that the objective counts, without penalties. The gradient
    norm is that of what is minimised, before clipping. The gradient stops where the window begins (truncated
    backpropagation through time, Williams and Peng 1990).

    The batch is worked on in `num_parts` equal parts, one after another, so that only one part's activations are in
    memory. Each draws its own dropout masks; without dropout the step is the same but for rounding.

    With `ema_decay` d the state's `ema` becomes d ema + (1 - d) params after each step t, where d is (1 + t) / (10 + t)
    as long as that is less, so that the first parameters are soon forgotten.
    """
    only_last = objective.loss_on == "last"
    penalised = objective.activation_reg > 0 or objective.temporal_reg > 0

    def gradient(params, windows, carry, reset_B, key):
        """(gradient, (loss, last state)) of some windows."""
        ids_TB, targets_TB = windows.T[:-1], windows.T[1:]
        if only_last:
            targets_TB = targets_TB[-1:]
        scale = targets_TB.shape[0] if objective.loss_reduction == "sum_over_time" else 1

        def minimised(params):
            first = model.initial_carry(params, windows.shape[0])
            if carry:
                first = jax.tree.map(lambda old, new: jnp.where(reset_B[:, None], new, old), carry, first)
            (logits_TBV, last), sown = model.apply(
                {"params": params},
                ids_TB,
                first,
                train=True,
                only_last=only_last,
                rngs={"dropout": key},
                mutable=["activations"] if penalised else [],
            )
            loss = nats(logits_TBV, targets_TB).mean()
            penalty = _penalty(objective, sown["activations"]) if penalised else 0.0
            return (loss + penalty) * scale, (loss, last)

        return jax.grad(minimised, has_aux=True)(params)

    def gradient_in_parts(params, windows, carry, reset_B, key):
        """The same, of equal parts of the windows, averaged."""

        def add_part(sums, part):
            index, windows, carry, reset_B = part
            grads, (loss, last) = gradient(params, windows, carry, reset_B, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, sums, (grads, loss)), last

        def split(x):
            return x.reshape(num_parts, x.shape[0] // num_parts, *x.shape[1:])

        zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
        parts = jnp.arange(num_parts), split(windows), jax.tree.map(split, carry), split(reset_B)
        sums, lasts = jax.lax.scan(add_part, zeros, parts)
        grads, loss = jax.tree.map(lambda total: total / num_parts, sums)
        return grads, (loss, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), lasts))

    def train_step(state: TrainState, windows: jax.Array, reset_B: jax.Array):
        key = jax.random.fold_in(step_key, state.step)
        differentiate = gradient if num_parts == 1 else gradient_in_parts
        grads, (loss, last) = differentiate(state.params, windows, state.carry, reset_B, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay:
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            ema = optax.incremental_update(params, ema, 1 - decay)
        state = TrainState(state.step + 1, params, opt_state, last if state.carry else (), ema)
        return state, loss, optax.tree.norm(grads)

    return train_step


def _penalty(objective: Objective, activations) -> jax.Array:
    """Activation and temporal activation regularisation (Merity et al. 2018, section 4.7), of one window's batch."""
    (output_TBH,), (dropped_TBH,) = activations["output"], activations["dropped"]
    differences_TBH = output_TBH[1:] - output_TBH[:-1]
    # A window of one character has no differences; their mean would be no number.
    temporal = jnp.sum(jnp.square(differences_TBH)) / max(differences_TBH.size, 1)
    return objective.activation_reg * jnp.mean(jnp.square(dropped_TBH)) + objective.temporal_reg * temporal


def make_train_chunk(train_step: Callable, seq_len: int) -> Callable:
    """(state, ids_N, starts_KB, reset_KB, n) -> (state, losses_K, gradient norms_K, finite), jitted; the state is donated.

    Runs the first n of K = MAX_STEPS_PER_DISPATCH batches, cut out of the text on the device. n is traced, so that one
    compiled program serves every cadence of logging, evaluating and saving, with the same bits. `finite` says whether
    all parameters are: the losses cannot tell, as each is that of the parameters before its own update.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_chunk(state, ids_N, starts_KB, reset_KB, n):
        def body(k, carried):
            state, losses_K, norms_K = carried
            state, loss, norm = train_step(state, cut_windows(ids_N, starts_KB[k], seq_len), reset_KB[k])
            return state, losses_K.at[k].set(loss), norms_K.at[k].set(norm)

        buffer_K = jnp.zeros(starts_KB.shape[0])
        state, losses_K, norms_K = jax.lax.fori_loop(0, n, body, (state, buffer_K, buffer_K))
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]).all()
        return state, losses_K, norms_K, finite

    return train_chunk


def compile_train_chunk(train_chunk: Callable, state: TrainState, num_ids: int, ids_dtype, batch_size: int) -> Callable:
    """`train_chunk` compiled for chunks of `num_ids` ids, so that no step waits for it."""
    starts_KB = jax.ShapeDtypeStruct((MAX_STEPS_PER_DISPATCH, batch_size), jnp.int32)
    reset_KB = jax.ShapeDtypeStruct(starts_KB.shape, bool)
    ids_N = jax.ShapeDtypeStruct((num_ids,), ids_dtype)
    return train_chunk.lower(state, ids_N, starts_KB, reset_KB, jax.ShapeDtypeStruct((), jnp.int32)).compile()
