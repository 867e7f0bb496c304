"""The training step: loss, gradient, update; many of them in one dispatch; many runs side by side. Pure; knows no files.

Letters: B batch, T time, V vocabulary, N characters of the text, K steps in a dispatch, R runs.
"""

import copy
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_dict

from charlm import mesh as meshes
from charlm.batching import cut_windows
from charlm.mesh import OF_STEPS, ROWS, WHOLE
from charlm.model import CharLM, is_zero
from charlm.optim import make_optimizer

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


class Program(NamedTuple):
    """What one compiled program can train: runs that differ in nothing but their `numbers`.

    The numbers of a run map dotted config keys of `NUMBERS` to scalars, the seed always among them. They are arguments
    of what is compiled, so that runs share it, one after another or side by side (`train_chunk_of_runs`).

    Attributes:
        config: of one of the runs.
        vocab_size: V.
        num_steps: the length of a run, for schedules that span it.
        carries_state: whether the layout carries states from window to window.
        mesh: the devices that share a batch (`mesh.make_mesh`); None: one.
    """

    config: config_dict.ConfigDict
    vocab_size: int
    num_steps: int
    carries_state: bool
    mesh: Mesh | None = None

    def of(self, numbers: Mapping[str, Any]) -> tuple[config_dict.ConfigDict, CharLM, optax.GradientTransformation]:
        """(config, model, optimizer) of the run with these numbers, which may be traced."""
        config = copy.deepcopy(self.config)
        with config.unlocked(), config.ignore_type():
            for key, number in numbers.items():
                *groups, name = key.split(".")
                functools.reduce(operator.getitem, groups, config)[name] = number
        return config, CharLM.from_config(config.model, self.vocab_size), make_optimizer(config.optimizer, self.num_steps)


# The keys that may be numbers of a run: no shape and no branch of the program depends on them, unless they are 0 or unset.
NUMBERS = (
    "seed",
    "model.dropout",
    "model.recurrent_dropout",
    "model.init_std",
    "model.forget_bias",
    "optimizer.learning_rate",
    "optimizer.final_learning_rate",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.eps",
    "optimizer.mean_square_decay",
    "optimizer.weight_decay",
    "optimizer.clip_value",
    "optimizer.clip_norm",
    "optimizer.activation_reg",
    "optimizer.temporal_reg",
    "train.ema_decay",
)


def init_state(program: Program, numbers: Mapping[str, Any]) -> TrainState:
    """The state before step 0: parameters drawn from the seed, and the recurrent states that they begin with."""
    config, model, optimizer = program.of(numbers)
    params = model.initial_params(run_keys(config.seed)[0])
    carry = model.initial_carry(params, config.batching.batch_size) if program.carries_state else ()
    ema = () if is_zero(config.train.ema_decay) else jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), carry, ema)


def first_state(init: Callable, program: Program, numbers: Mapping[str, Any], shardings: Any = None) -> TrainState:
    """`init_state`, or `init_state_of_runs`, by one program, on the devices as the shardings say."""
    # The program runs once: a CPU's compiler, told to hurry, takes half the time, and the bits are the same.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(functools.partial(init, program), out_shardings=shardings, compiler_options=options)(numbers)


def state_shardings(program: Program, shapes: TrainState) -> TrainState | None:
    """Where each array of a state lies: the recurrent states with their rows of the batch, what belongs to parameters whole
    on every device, or with `mesh.shard_params` split. None without a mesh.
    """
    if program.mesh is None:
        return None

    def of_params(leaf) -> NamedSharding:
        split = program.config.mesh.shard_params
        return meshes.sharding(program.mesh, meshes.split_spec(leaf.shape, program.mesh) if split else WHOLE)

    rows = meshes.sharding(program.mesh, ROWS)
    return jax.tree.map(of_params, shapes).replace(carry=jax.tree.map(lambda leaf: rows, shapes.carry))


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The two keys of a run: for its parameters, and for what is random in a step (fold in the step)."""
    params_key, step_key = jax.random.split(jax.random.key(seed))
    return params_key, step_key


def nats(logits_TBV: jax.Array, targets_TB: jax.Array) -> jax.Array:
    """Cross-entropy of every target in nats, shape (T, B)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_TBV, targets_TB)


def train_step(
    program: Program, numbers: Mapping[str, Any], state: TrainState, windows: jax.Array, reset_B: jax.Array
) -> tuple[TrainState, jax.Array, jax.Array]:
    """One step on windows (B, T + 1): (state, loss, gradient norm).

    The loss is the mean in nats per character over the targets that `batching.loss_on` says: all T, or the last. What is
    minimised is that and the penalties (`_penalty`), or with `sum_over_time` as many times it as a window has targets.
    The gradient norm is that of what is minimised, before clipping. The gradient stops where the window begins (truncated
    backpropagation through time, Williams and Peng 1990). States marked in `reset_B` are those that a text starts from.

    The batch is worked on in `optimizer.accumulation_steps` equal parts, one after another, so that only one part's
    activations are in memory; and the devices of a mesh each work on their rows of it. Each part and each device draws its
    own dropout masks; without dropout the step is the same but for rounding.

    With `train.ema_decay` d the state's `ema` becomes d ema + (1 - d) params after step t, where d is (1 + t) / (10 + t)
    as long as that is less, so that the first parameters are soon forgotten.
    """
    config, model, optimizer = program.of(numbers)
    key = jax.random.fold_in(run_keys(config.seed)[1], state.step)
    grads, (loss, last) = _gradient_on_mesh(program.mesh, config, model, state.params, windows, state.carry, reset_B, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if not is_zero(config.train.ema_decay):
        decay = jnp.minimum(config.train.ema_decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, ema, 1 - decay)
    state = TrainState(state.step + 1, params, opt_state, last if state.carry else (), ema)
    return state, loss, optax.tree.norm(grads)


def _gradient_on_mesh(mesh, config, model: CharLM, params, windows: jax.Array, carry, reset_B: jax.Array, key: jax.Array):
    """`_gradient` of windows whose rows lie on several devices: the means over them."""
    differentiate = _gradient if config.optimizer.accumulation_steps == 1 else _gradient_in_parts

    def of_rows(params, windows, carry, reset_B, key):
        key = key if mesh is None else jax.random.fold_in(key, jax.lax.axis_index("data"))
        grads, (loss, last) = differentiate(config, model, params, windows, carry, reset_B, key)
        return *meshes.mean_over(mesh, (grads, loss)), last

    of_batch = meshes.on_each(mesh, of_rows, (WHOLE, ROWS, ROWS, ROWS, WHOLE), (WHOLE, WHOLE, ROWS))
    grads, loss, last = of_batch(params, windows, carry, reset_B, key)
    return grads, (loss, last)


def _gradient(config, model: CharLM, params, windows: jax.Array, carry, reset_B: jax.Array, key: jax.Array):
    """(gradient, (loss, last state)) of some windows."""
    ids_TB, targets_TB = windows.T[:-1], windows.T[1:]
    only_last = config.batching.loss_on == "last"
    if only_last:
        targets_TB = targets_TB[-1:]
    scale = targets_TB.shape[0] if config.optimizer.loss_reduction == "sum_over_time" else 1
    penalised = not (is_zero(config.optimizer.activation_reg) and is_zero(config.optimizer.temporal_reg))

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
        penalty = _penalty(config.optimizer, sown["activations"]) if penalised else 0.0
        return (loss + penalty) * scale, (loss, last)

    return jax.grad(minimised, has_aux=True)(params)


def _gradient_in_parts(config, model: CharLM, params, windows: jax.Array, carry, reset_B: jax.Array, key: jax.Array):
    """The same, of equal parts of the windows, averaged."""
    num_parts = config.optimizer.accumulation_steps

    def add_part(sums, part):
        index, windows, carry, reset_B = part
        grads, (loss, last) = _gradient(config, model, params, windows, carry, reset_B, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, sums, (grads, loss)), last

    def split(x):
        return x.reshape(num_parts, x.shape[0] // num_parts, *x.shape[1:])

    zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
    parts = jnp.arange(num_parts), split(windows), jax.tree.map(split, carry), split(reset_B)
    sums, lasts = jax.lax.scan(add_part, zeros, parts)
    grads, loss = jax.tree.map(lambda total: total / num_parts, sums)
    return grads, (loss, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), lasts))


def _penalty(optimizer, activations) -> jax.Array:
    """Activation and temporal activation regularisation (Merity et al. 2018, section 4.7).

    `activation_reg` times the mean square of the last layer's outputs as they reach the head, and `temporal_reg` times
    that of the differences between its outputs at consecutive steps, before dropout.
    """
    (output_TBH,), (dropped_TBH,) = activations["output"], activations["dropped"]
    differences_TBH = output_TBH[1:] - output_TBH[:-1]
    # A window of one character has no differences; their mean would be no number.
    temporal = jnp.sum(jnp.square(differences_TBH)) / max(differences_TBH.size, 1)
    return optimizer.activation_reg * jnp.mean(jnp.square(dropped_TBH)) + optimizer.temporal_reg * temporal


def train_chunk(
    program: Program, state: TrainState, numbers: Mapping[str, Any], ids_N, starts_KB, reset_KB, n, ids_spec: P = WHOLE
) -> tuple[TrainState, jax.Array, jax.Array, jax.Array]:
    """(state, losses_K, gradient norms_K, finite) after the first n of K = MAX_STEPS_PER_DISPATCH batches.

    They are cut out of the text on the device. n is traced, so that one compiled program serves every cadence of logging,
    evaluating and saving, with the same bits. `finite` says whether all parameters are: the losses cannot tell, as each is
    that of the parameters before its own update. On a mesh `ids_spec` says whether every device has all of `ids_N`, or each
    a part of it, in which the windows of its own rows start.
    """
    cut = functools.partial(cut_windows, seq_len=program.config.batching.seq_len)
    cut = meshes.on_each(program.mesh, cut, (ids_spec, ROWS), ROWS)

    def body(k, carried):
        state, losses_K, norms_K = carried
        state, loss, norm = train_step(program, numbers, state, cut(ids_N, starts_KB[k]), reset_KB[k])
        return state, losses_K.at[k].set(loss), norms_K.at[k].set(norm)

    buffer_K = jnp.zeros(starts_KB.shape[0])
    state, losses_K, norms_K = jax.lax.fori_loop(0, n, body, (state, buffer_K, buffer_K))
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]).all()
    return state, losses_K, norms_K, finite


def compile_train_chunk(
    program: Program, state: TrainState, numbers: Mapping[str, Any], ids_N: jax.ShapeDtypeStruct
) -> Callable:
    """`train_chunk` for chunks of such ids, compiled, so that no step waits for it; it donates the state."""
    mesh, shape_KB = program.mesh, (MAX_STEPS_PER_DISPATCH, program.config.batching.batch_size)
    starts_KB, reset_KB = (meshes.shape(mesh, shape_KB, dtype, OF_STEPS) for dtype in (jnp.int32, bool))
    chunk, out_shardings = functools.partial(train_chunk, program), None
    if mesh is not None:
        chunk = functools.partial(chunk, ids_spec=ids_N.sharding.spec)
        out_shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), *[meshes.sharding(mesh, WHOLE)] * 3)
    jitted = jax.jit(chunk, donate_argnums=0, out_shardings=out_shardings)
    return jitted.lower(state, numbers, ids_N, starts_KB, reset_KB, jax.ShapeDtypeStruct((), jnp.int32)).compile()


def init_state_of_runs(program: Program, numbers_R: Mapping[str, jax.Array]) -> TrainState:
    """The states of R runs side by side: every leaf with a leading axis of R. Each number has shape (R,)."""
    return jax.lax.map(functools.partial(init_state, program), numbers_R)


def train_chunk_of_runs(
    program: Program, devices: Sequence[jax.Device], at_once: bool, state, numbers_R, ids_N, starts_RKB, reset_RKB, n
):
    """`train_chunk` of R runs side by side, each with numbers, windows and resets of its own, over the same text.

    The runs are shared out among the devices, whose number divides R; no device waits for another within a chunk. A device
    works on its runs all at once, as suits a GPU, whose products are too small one by one; or one after another, as suits
    the core of a CPU. Every result has a leading axis of R, and is that of R separate runs but for rounding.
    """
    if at_once:  # cuDNN takes one run at a time.
        config = copy.deepcopy(program.config)
        config.model.recurrence = "scan"
        program = program._replace(config=config)

    def share(state, numbers_R, ids_N, starts_RKB, reset_RKB, n):
        def one(run):
            state, numbers, starts_KB, reset_KB = run
            return train_chunk(program, state, numbers, ids_N, starts_KB, reset_KB, n)

        over_runs = jax.vmap(one) if at_once else functools.partial(jax.lax.map, one)
        return over_runs((state, numbers_R, starts_RKB, reset_RKB))

    mesh, runs, all_of_it = jax.sharding.Mesh(np.array(devices), ("run",)), P("run"), P()
    specs = (runs, runs, all_of_it, runs, runs, all_of_it)
    sharded = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=runs, check_vma=False)
    return sharded(state, numbers_R, ids_N, starts_RKB, reset_RKB, n)
