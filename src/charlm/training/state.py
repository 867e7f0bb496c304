"""The state of a training run, and what one compiled program can train.

Letters: B batch, V vocabulary, R runs.
"""

import copy
import functools
import json
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from charlm.nn.cells import SameCell
from charlm.nn.model import CharLM
from charlm.parallel import mesh as meshes
from charlm.training.averaging import keeps_average, opt_state_from
from charlm.training.optimizers import make_optimizer

# Dotted config keys whose values may be traced: no shape and no branch of the program depends on them, except on whether they
# are 0 or unset.
TRACED_HYPERPARAMETERS = (
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
# Dotted key -> scalar, possibly traced. The seed is always there.
Hyperparameters = Mapping[str, Any]


@flax.struct.dataclass
class TrainState:
    """Everything that changes from step to step.

    Attributes:
        step: number of steps done, int32.
        params: parameter tree, float32.
        opt_state: optax's state.
        carry: the recurrent states of the B streams, one for each layer; () if the layout carries no state.
        ema: the averaged parameters (`averaging`); () if none are kept.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    carry: Any
    ema: Any

    @property
    def eval_params(self) -> Any:
        """The parameters for scoring and sampling: the average if there is one."""
        return self.ema or self.params

    def started_from(self, params: Any, carry: Any) -> "TrainState":
        """Return this first state with other parameters and recurrent states."""
        ema = jax.tree.map(jnp.copy, params) if self.ema else ()
        return self.replace(params=params, opt_state=opt_state_from(params, self.opt_state), carry=carry, ema=ema)


class Program(NamedTuple):
    """What one compiled program can train: runs that differ only in their traced hyperparameters.

    The traced hyperparameters of a run are arguments of the compiled program, so runs share the program, one after another or
    side by side (`chunk.train_chunk_of_runs`).

    Attributes:
        config: the config of one of the runs.
        vocab_size: V.
        num_steps: the length of a run, for schedules that span it.
        carries_state: whether the layout carries states from window to window.
        mesh: the devices that share a batch (`mesh.make_mesh`); None: one device.
        boundary: the id of the symbol between documents (`CharLM`); None: the text has no documents.
    """

    config: ConfigDict
    vocab_size: int
    num_steps: int
    carries_state: bool
    mesh: Mesh | None = None
    boundary: int | None = None

    def bind(self, hyperparameters: Hyperparameters) -> tuple[ConfigDict, CharLM, optax.GradientTransformation]:
        """Return (config, model, optimizer) of the run with these hyperparameters."""
        config = copy.deepcopy(self.config)
        with config.unlocked(), config.ignore_type():
            for key, value in hyperparameters.items():
                *groups, name = key.split(".")
                functools.reduce(operator.getitem, groups, config)[name] = value
        model = CharLM.from_config(config.model, self.vocab_size, self.boundary)
        return config, model, make_optimizer(config.optimizer, self.num_steps)


def jit_program(function: Callable[..., Any], program: Program, **options: Any) -> Any:
    """Return `jax.jit(functools.partial(function, program), **options)`, the same object for programs that compute the same.

    JAX keeps what it has traced and compiled for such an object. A process that trains several runs with one program, such as
    the seeds of a sweep or a run that continues in a notebook, therefore traces and compiles the program once. The config that
    the function reads holds only keys that are part of the key of this cache, so no other key can change the program.

    Args:
        function: its first argument is the program.
        program: what to compile.
        options: of `jax.jit`. Their leaves must be hashable.
    """
    config, train = program.config, program.config.train
    read = {name: config[name].to_dict() for name in ("model", "optimizer", "batching")}
    read |= {"seed": 0, "train": {"metrics": list(train.metrics), "ema_decay": train.ema_decay}}
    model = CharLM.from_config(config.model, program.vocab_size, program.boundary)
    leaves, tree = jax.tree.flatten(options)
    key = json.dumps(read), tuple(leaves), tree, program._replace(config=None), SameCell(model.cell), model.recurrence
    return _jit_program(function, *key)


@functools.lru_cache(maxsize=16)
def _jit_program(function: Callable[..., Any], read: str, leaves: tuple, tree: Any, rest: Program, *compared: Any) -> Any:
    """Return the function of `jit_program`. `compared` distinguishes cells of the same name and the forms of the recurrence."""
    program = rest._replace(config=ConfigDict(json.loads(read)))
    return jax.jit(functools.partial(function, program), **jax.tree.unflatten(tree, leaves))


def init_state(program: Program, hyperparameters: Hyperparameters) -> TrainState:
    """Return the state before step 0. The seed determines the parameters."""
    config, model, optimizer = program.bind(hyperparameters)
    params = model.initial_params(run_keys(config.seed)[0])
    carry = model.initial_carry(params, config.batching.batch_size) if program.carries_state else ()
    ema = jax.tree.map(jnp.copy, params) if keeps_average(config) else ()
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), carry, ema)


def init_state_of_runs(program: Program, hyperparameters_R: Mapping[str, jax.Array]) -> TrainState:
    """Return the states of R runs: every leaf has a leading axis of R. Each hyperparameter has shape (R,)."""
    return jax.lax.map(functools.partial(init_state, program), hyperparameters_R)


def compute_first_state(
    init: Callable[[Program, Hyperparameters], TrainState],
    program: Program,
    hyperparameters: Hyperparameters,
    shardings: Any = None,
) -> TrainState:
    """Compile and run `init_state` or `init_state_of_runs`; the result lies on the devices as `shardings` says."""
    options: dict[str, Any] = {}
    level = "xla_backend_optimization_level"
    if jax.default_backend() == "cpu" and level not in os.environ.get("XLA_FLAGS", ""):
        # This program runs once. A low optimization level halves its compile time on a CPU, and the bits are the same. A
        # level in XLA_FLAGS takes precedence.
        options["compiler_options"] = {level: 1}
    if shardings is not None:
        options["out_shardings"] = shardings
    return jit_program(init, program, **options)(hyperparameters)


def shapes_of_state(program: Program) -> TrainState:
    """Return the state of a run, with the shape and dtype of each array in its place."""
    return jit_program(_zero_state, program).eval_shape(np.uint32(0))


def _zero_state(program: Program, seed: jax.Array) -> TrainState:
    """Return a first state whose kernels are 0. Its shapes are those of any other, and tracing it takes less time."""
    return init_state(program, {"seed": seed, "model.init_std": 0.0})


def state_shardings(program: Program, shapes: TrainState) -> TrainState | None:
    """Return the sharding of each array of a state; None without a mesh.

    The recurrent states are sharded with their rows of the batch. Parameters and the optimizer's state are replicated, or
    sharded with `mesh.shard_params`.
    """
    if program.mesh is None:
        return None

    def of_params(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        sharded = program.config.mesh.shard_params
        spec = meshes.param_spec(leaf.shape, program.mesh) if sharded else meshes.REPLICATED
        return meshes.sharding(program.mesh, spec)

    rows = meshes.sharding(program.mesh, meshes.BATCH_SHARDED)
    return jax.tree.map(of_params, shapes).replace(carry=jax.tree.map(lambda leaf: rows, shapes.carry))


def run_keys(seed: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the two PRNG keys of a run: for its parameters, and for its steps (fold in the step)."""
    params_key, step_key = jax.random.split(jax.random.key(seed))
    return params_key, step_key
