"""`config.optimizer` to an optax chain: clipping, then the optimizer, with a learning rate that is a function of the step.

An optimizer is one entry of `OPTIMIZERS`, a schedule one entry of `SCHEDULES`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import optax
from ml_collections import ConfigDict
from optax import contrib

from charlm.training.muon import muon

LOSS_REDUCTIONS = ("mean", "sum_over_time")
# (config.optimizer, schedule) -> the transformation after clipping.
MakeOptimizer = Callable[[ConfigDict, optax.Schedule], optax.GradientTransformation]


class ScheduleKind(NamedTuple):
    """A kind of learning-rate schedule.

    Attributes:
        make: (config.optimizer, number of steps of the run) -> schedule.
        spans_run: whether the schedule depends on the length of the run, so a finished run cannot be extended.
        needs: keys of `config.optimizer` that must be set, with what they are.
    """

    make: Callable[[ConfigDict, int], optax.Schedule]
    spans_run: Callable[[ConfigDict], bool] = lambda optimizer: False
    needs: Mapping[str, str] = {}


def constant(optimizer: ConfigDict, num_steps: int) -> optax.Schedule:
    """Return `learning_rate` at every step."""
    del num_steps
    return optax.constant_schedule(optimizer.learning_rate)


def step_decay(optimizer: ConfigDict, num_steps: int) -> optax.Schedule:
    """Multiply the rate by `decay_factor` after every `decay_every` steps, but not below `final_learning_rate`."""
    del num_steps
    return optax.exponential_decay(
        optimizer.learning_rate,
        transition_steps=optimizer.decay_every,
        decay_rate=optimizer.decay_factor,
        staircase=True,
        end_value=optimizer.final_learning_rate,
    )


def warmup_cosine(optimizer: ConfigDict, num_steps: int) -> optax.Schedule:
    """Rise linearly over `warmup_steps`, then fall along half a cosine (Loshchilov and Hutter 2017).

    The rate reaches `final_learning_rate` at `schedule_steps`, or at the end of the run if that key is not set.
    """
    length = num_steps if optimizer.schedule_steps is None else optimizer.schedule_steps
    warmup = min(optimizer.warmup_steps, max(length - 1, 0))
    # optax's own warmup_cosine_decay_schedule branches on the peak, which may be traced here.
    peak = optimizer.learning_rate
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    fall = optax.cosine_decay_schedule(peak, max(length, 1) - warmup, alpha=optimizer.final_learning_rate / peak)
    return optax.join_schedules([rise, fall], [warmup])


SCHEDULES: Mapping[str, ScheduleKind] = {
    "constant": ScheduleKind(constant),
    "warmup_cosine": ScheduleKind(warmup_cosine, spans_run=lambda optimizer: optimizer.schedule_steps is None),
    "step_decay": ScheduleKind(step_decay, needs={"decay_every": "a number of steps"}),
}


def sgd(optimizer: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Stochastic gradient descent, with `momentum` if it is not 0."""
    return optax.sgd(schedule, momentum=optimizer.momentum or None)


def rmsprop(optimizer: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """RMSProp (Tieleman and Hinton 2012)."""
    decay = optimizer.mean_square_decay
    return optax.rmsprop(schedule, decay=decay, eps=optimizer.eps, momentum=optimizer.momentum or None)


def adam(optimizer: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015)."""
    return optax.adam(schedule, b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps)


def adamw(optimizer: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
    return optax.adamw(schedule, b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps, weight_decay=optimizer.weight_decay)


def lion(optimizer: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Lion, which moves every parameter by the same amount (Chen et al. 2023)."""
    return optax.lion(schedule, b1=optimizer.b1, b2=optimizer.b2, weight_decay=optimizer.weight_decay)


def schedule_free_adamw(optimizer: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with an average of all parameters so far in place of a falling rate (Defazio et al. 2024).

    Its `b1` is the weight of the average where the gradient is computed. `averaging` computes the average, which is scored.
    """
    b1, b2 = optimizer.b1, optimizer.b2
    return contrib.schedule_free_adamw(schedule, b1=b1, b2=b2, eps=optimizer.eps, weight_decay=optimizer.weight_decay)


OPTIMIZERS: Mapping[str, MakeOptimizer] = {
    "sgd": sgd,
    "rmsprop": rmsprop,
    "adam": adam,
    "adamw": adamw,
    "lion": lion,
    "muon": muon,
    "schedule_free_adamw": schedule_free_adamw,
}


def make_schedule(optimizer: ConfigDict, num_steps: int) -> optax.Schedule:
    """Return the schedule of `config.optimizer`, step -> learning rate, for a run of `num_steps` steps."""
    return SCHEDULES[optimizer.schedule].make(optimizer, num_steps)


def schedule_spans_run(optimizer: ConfigDict) -> bool:
    """Return whether the learning rate depends on the length of the run, so a finished run cannot be extended."""
    return SCHEDULES[optimizer.schedule].spans_run(optimizer)


def make_optimizer(optimizer: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """Return the optax chain of `config.optimizer` for a run of `num_steps` steps.

    Clipping by value (each element to [-clip_value, clip_value]) comes before clipping by global norm (Pascanu et al. 2013).
    Each is left out if its key is not set. With `skip_not_finite` n a gradient that is not finite changes nothing, up to n
    times in a row; the state, an `optax.ApplyIfFiniteState`, counts these gradients.
    """
    parts = []
    if optimizer.clip_value is not None:
        parts.append(optax.clip(optimizer.clip_value))
    if optimizer.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(optimizer.clip_norm))
    parts.append(OPTIMIZERS[optimizer.name](optimizer, make_schedule(optimizer, num_steps)))
    if optimizer.skip_not_finite:
        return optax.apply_if_finite(optax.chain(*parts), optimizer.skip_not_finite)
    return optax.chain(*parts)
