"""Choose between two forms of a computation: one for CPUs, and one for accelerators."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

# Whether a program may be compiled for another platform than JAX's default one (`for_any_platform`).
_ANY_PLATFORM = contextvars.ContextVar("charlm_any_platform", default=False)


@contextlib.contextmanager
def for_any_platform() -> Iterator[None]:
    """Within the context, a program that JAX traces has the forms for all platforms, and the compiler chooses one of them.

    An export, or a program compiled for a device that is not here, needs it. Other programs do not, and are traced faster.
    """
    token = _ANY_PLATFORM.set(True)
    try:
        yield
    finally:
        _ANY_PLATFORM.reset(token)


def by_platform(*args: Any, cpu: Callable[..., Any], elsewhere: Callable[..., Any]) -> Any:
    """Return `cpu(*args)` on CPUs and `elsewhere(*args)` on other platforms.

    `jax.lax.platform_dependent` does the same but traces both forms, which takes time if they are large.
    """
    if _ANY_PLATFORM.get():
        return jax.lax.platform_dependent(*args, cpu=cpu, default=elsewhere)
    return (cpu if jax.default_backend() == "cpu" else elsewhere)(*args)
