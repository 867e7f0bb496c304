"""The training step: loss, gradient, update; and many of them in one dispatch. Pure and jitted; knows no files.

Letters: B batch, T time, V vocabulary, N characters of the text, K steps in a dispatch.
"""

import functools
from collections.abc import Callable
from typing import Any

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
    """

    step: jax.Array
    params: Any
    opt_state: Any
    carry: Any


def init_state(
    model: CharLM, optimizer: optax.GradientTransformation, seed: int, batch_size: int, carries_state: bool
) -> TrainState:
    """The state before step 0: parameters drawn from the seed, zero recurrent states."""

    @jax.jit  # One compilation in place of one an operation.
    def init(params_key):
        params = model.initial_params(params_key)
        carry = model.initial_carry(batch_size) if carries_state else ()
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), carry)

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
    loss_reduction: str,
    step_key: jax.Array,
    loss_on: str = "all",
    num_parts: int = 1,
) -> Callable:
    """(state, windows (B, T + 1), reset_B) -> (state, loss, gradient norm).

    The loss is the mean in nats per character over the targets that `loss_on` says: all T, or the last. What is
    minimised is that mean, or with `sum_over_time` as many times it as there are targets in a window: their sum, mean
    over the batch. The gradient norm is that of the minimised quantity, before clipping. The gradient stops where the
    window begins (truncated backpropagation through time, Williams and Peng 1990).

    The batch is worked on in `num_parts` equal parts, one after another, so that only one part's activations are in
    memory. Each draws its own dropout masks; without dropout the step is the same but for rounding.
    """
    only_last = loss_on == "last"

    def gradient(params, windows, carry, key):
        """(gradient, (loss, last state)) of some windows."""
        ids_TB, targets_TB = windows.T[:-1], windows.T[1:]
        if only_last:
            targets_TB = targets_TB[-1:]
        scale = targets_TB.shape[0] if loss_reduction == "sum_over_time" else 1

        def objective(params):
            logits_TBV, last = model.apply(
                {"params": params}, ids_TB, carry, train=True, only_last=only_last, rngs={"dropout": key}
            )
            loss = nats(logits_TBV, targets_TB).mean()
            return loss * scale, (loss, last)

        return jax.grad(objective, has_aux=True)(params)

    def gradient_in_parts(params, windows, carry, key):
        """The same, of equal parts of the windows, averaged."""

        def add_part(sums, part):
            index, windows, carry = part
            grads, (loss, last) = gradient(params, windows, carry, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, sums, (grads, loss)), last

        def split(x):
            return x.reshape(num_parts, x.shape[0] // num_parts, *x.shape[1:])

        zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
        parts = jnp.arange(num_parts), split(windows), jax.tree.map(split, carry)
        sums, lasts = jax.lax.scan(add_part, zeros, parts)
        grads, loss = jax.tree.map(lambda total: total / num_parts, sums)
        return grads, (loss, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), lasts))

    def train_step(state: TrainState, windows: jax.Array, reset_B: jax.Array):
        carry = model.initial_carry(windows.shape[0])
        if state.carry:
            carry = jax.tree.map(lambda old, zero: jnp.where(reset_B[:, None], zero, old), state.carry, carry)
        key = jax.random.fold_in(step_key, state.step)
        grads, (loss, last) = (gradient if num_parts == 1 else gradient_in_parts)(state.params, windows, carry, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = TrainState(state.step + 1, params, opt_state, last if state.carry else ())
        return state, loss, optax.tree.norm(grads)

    return train_step


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
