"""Linear recurrences h' = decay * h + added: a loop on a CPU, and a parallel scan on an accelerator.

Letters: B batch, T time, H hidden.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def linear_recurrence(decay_THB: jax.Array, added_THB: jax.Array, h_HB: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return all states h_t = decay_t * h_(t-1) + added_t, shape (T, H, B), and the last one.

    A parallel scan combines neighbouring steps (Blelloch 1990; Martin and Cundy 2018). Feng et al. (2024) compute the same in
    log space, because they divide by a product of decays. The scan does not divide, so it needs no logarithms, and states may
    have any sign.

    Args:
        decay_THB: the factors.
        added_THB: the terms.
        h_HB: the state before the first step.
    """
    h_THB = _run(decay_THB, added_THB, h_HB, reverse=False)
    return h_THB, h_THB[-1]


def _run(decay_THB: jax.Array, added_THB: jax.Array, h_HB: jax.Array, reverse: bool) -> jax.Array:
    """Return all states, from the first step to the last, or from the last to the first."""

    def loop(decay_THB, added_THB, h_HB):
        def step(h_HB, coefficients):
            h_HB = coefficients[0] * h_HB + coefficients[1]
            return h_HB, h_HB

        return jax.lax.scan(step, h_HB, (decay_THB, added_THB), reverse=reverse)[1]

    def parallel(decay_THB, added_THB, h_HB):
        first = -1 if reverse else 0
        added_THB = added_THB.at[first].add(decay_THB[first] * h_HB)
        return jax.lax.associative_scan(_combine, (decay_THB, added_THB), reverse=reverse)[1]

    return jax.lax.platform_dependent(decay_THB, added_THB, h_HB, cpu=loop, default=parallel)


def _combine(earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return the coefficients of two consecutive stretches of steps as those of one."""
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def _fwd(decay_THB, added_THB, h_HB):
    h_THB, last = linear_recurrence(decay_THB, added_THB, h_HB)
    return (h_THB, last), (decay_THB, h_THB, h_HB)


def _bwd(residuals, grads):
    """The gradient with respect to the states is a linear recurrence too, from the last step to the first."""
    decay_THB, h_THB, h_HB = residuals
    dh_THB, dlast = grads
    later_THB = jnp.concatenate([decay_THB[1:], jnp.zeros_like(decay_THB[:1])])
    dh_THB = _run(later_THB, dh_THB.at[-1].add(dlast), jnp.zeros_like(h_HB), reverse=True)
    before_THB = jnp.concatenate([h_HB[None], h_THB[:-1]])
    return dh_THB * before_THB, dh_THB, decay_THB[0] * dh_THB[0]


linear_recurrence.defvjp(_fwd, _bwd)
