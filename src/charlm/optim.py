"""config.optimizer -> an optax chain: clip, then the optimizer, with a learning rate that is a function of the step."""

import optax

OPTIMIZERS = ("sgd", "rmsprop", "adam", "adamw")
SCHEDULES = ("constant", "warmup_cosine", "step_decay")
LOSS_REDUCTIONS = ("mean", "sum_over_time")


def make_schedule(optimizer, num_steps: int) -> optax.Schedule:
    """Step -> learning rate.

    `warmup_cosine` rises linearly over `warmup_steps` and falls along half a cosine (Loshchilov and Hutter 2017) to
    `final_learning_rate` at `schedule_steps`, or at the end of the run if that is not set. `step_decay` multiplies it
    by `decay_factor` after every `decay_every` steps, but not below `final_learning_rate`.
    """
    if optimizer.schedule == "constant":
        return optax.constant_schedule(optimizer.learning_rate)
    if optimizer.schedule == "step_decay":
        return optax.exponential_decay(
            optimizer.learning_rate,
            transition_steps=optimizer.decay_every,
            decay_rate=optimizer.decay_factor,
            staircase=True,
            end_value=optimizer.final_learning_rate,
        )
    length = num_steps if optimizer.schedule_steps is None else optimizer.schedule_steps
    warmup = min(optimizer.warmup_steps, max(length - 1, 0))
    # Put together of optax's parts, as its whole wants to know whether the peak is 0, and it may be traced.
    peak = optimizer.learning_rate
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    fall = optax.cosine_decay_schedule(peak, max(length, 1) - warmup, alpha=optimizer.final_learning_rate / peak)
    return optax.join_schedules([rise, fall], [warmup])


def schedule_spans_run(optimizer) -> bool:
    """Whether the learning rate depends on how long the run is, so that a finished run cannot be extended."""
    return optimizer.schedule == "warmup_cosine" and optimizer.schedule_steps is None


def make_optimizer(optimizer, num_steps: int) -> optax.GradientTransformation:
    """The optax chain of `config.optimizer` for a run of `num_steps`.

    Clipping by value (each element to [-clip_value, clip_value]) comes before clipping by global norm (Pascanu et al.
    2013); each is left out if its key is not set. With `skip_not_finite` n a gradient that is not finite changes nothing,
    up to n times in a row; the state, an `optax.ApplyIfFiniteState`, counts them.
    """
    schedule = make_schedule(optimizer, num_steps)
    parts = []
    if optimizer.clip_value is not None:
        parts.append(optax.clip(optimizer.clip_value))
    if optimizer.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(optimizer.clip_norm))
    if optimizer.name == "sgd":
        parts.append(optax.sgd(schedule, momentum=optimizer.momentum or None))
    elif optimizer.name == "rmsprop":  # Tieleman and Hinton 2012
        decay = optimizer.mean_square_decay
        parts.append(optax.rmsprop(schedule, decay=decay, eps=optimizer.eps, momentum=optimizer.momentum or None))
    else:
        adam = {"b1": optimizer.b1, "b2": optimizer.b2, "eps": optimizer.eps}
        if optimizer.name == "adam":
            parts.append(optax.adam(schedule, **adam))
        else:
            parts.append(optax.adamw(schedule, weight_decay=optimizer.weight_decay, **adam))
    if optimizer.skip_not_finite:
        return optax.apply_if_finite(optax.chain(*parts), optimizer.skip_not_finite)
    return optax.chain(*parts)
