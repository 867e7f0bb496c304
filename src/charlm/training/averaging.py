"""The averaged parameters of a run. If a run keeps them, they are scored, sampled and exported in place of the trained ones."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax import contrib

from charlm.nn.model import is_static_zero


def keeps_average(config: ConfigDict) -> bool:
    """Return whether a run with this config averages its parameters."""
    return config.optimizer.name == "schedule_free_adamw" or not is_static_zero(config.train.ema_decay)


def updated_average(config: ConfigDict, average: Any, params: Any, opt_state: Any, step: jax.Array) -> Any:
    """Return the averaged parameters after a step.

    With `train.ema_decay` d the average becomes d average + (1 - d) params. While (1 + t) / (10 + t) is smaller than d, it
    takes the place of d, so the first parameters lose their weight quickly. `schedule_free_adamw` defines its own average x:
    the trained parameters are b1 x + (1 - b1) z, where z is a part of the optimizer's state (Defazio et al. 2024, section 2).

    Args:
        config: the config of the run.
        average: the average before the step; () if the run keeps none.
        params: the parameters after the step.
        opt_state: the optimizer's state after the step.
        step: the number of steps before this one, t.
    """
    if config.optimizer.name == "schedule_free_adamw":
        (found,) = filter(_is_schedule_free, jax.tree.leaves(opt_state, is_leaf=_is_schedule_free))
        return contrib.schedule_free_eval_params(found, params)
    if is_static_zero(config.train.ema_decay):
        return average
    decay = jnp.minimum(config.train.ema_decay, (1 + step) / (10 + step))
    return optax.incremental_update(params, average, 1 - decay)


def opt_state_from(params: Any, opt_state: Any) -> Any:
    """Return the optimizer's first state for a run that starts from these parameters, not from those that it drew."""

    def replaced(part: Any) -> Any:
        return part._replace(z=jax.tree.map(jnp.copy, params)) if _is_schedule_free(part) else part

    return jax.tree.map(replaced, opt_state, is_leaf=_is_schedule_free)


def _is_schedule_free(part: Any) -> bool:
    return isinstance(part, contrib.ScheduleFreeState)
