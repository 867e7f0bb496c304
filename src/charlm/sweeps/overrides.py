"""Functions that build the overrides of a sweep's runs: lists of {dotted key: value}. `charlm.sweep` exports them."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from charlm.system.arguments import check_arguments
from charlm.system.errors import ConfigError

# What one run changes: dotted config key -> value.
Overrides = dict[str, Any]


@runtime_checkable
class Distribution(Protocol):
    """A distribution of values of a config key."""

    def __call__(self, number: float) -> Any:
        """Return the value for a number in [0, 1). If the number is uniform, the value has this distribution."""

    def can_draw(self, value: Any) -> bool:
        """Return whether a value lies within the range of the distribution."""


@check_arguments
def product(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """Return all combinations of the values of some keys. The value of the last key changes fastest."""
    return [dict(zip(values, each)) for each in itertools.product(*values.values())]


@check_arguments
def zipped(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """Return the overrides with the first value of every key, those with the second value of every key, and so on.

    Raises:
        ConfigError: the keys have different numbers of values.
    """
    if len(counts := {key: len(each) for key, each in values.items()}) and len(set(counts.values())) > 1:
        raise ConfigError(f"zipped() needs the same number of values for every key; found {counts}")
    return [dict(zip(values, each)) for each in zip(*values.values())]


@check_arguments
def chain(*parts: Sequence[Overrides]) -> list[Overrides]:
    """Return the overrides of all parts, one part after another."""
    return list(itertools.chain(*parts))


class Sampled(list[Overrides]):
    """Overrides with random values, and the distributions from which a search may draw other values.

    Attributes:
        distributions: dotted key -> the distribution of its values.
        seed: the seed of the random values.
    """

    def __init__(self, overrides: Sequence[Overrides], distributions: Mapping[str, Distribution], seed: int):
        super().__init__(overrides)
        self.distributions, self.seed = dict(distributions), seed


@check_arguments
def sample(num_runs: int, draws: Mapping[str, Distribution], seed: int = 0) -> Sampled:
    """Return the overrides of some runs with random values.

    The values of run k depend only on the seed and on k, so a longer sweep begins with the runs of a shorter one.

    Args:
        num_runs: the number of runs.
        draws: dotted key -> the distribution of its values.
        seed: changing it changes all values.

    Raises:
        ConfigError: a number is negative or too large.
    """
    for name, value in (("num_runs", num_runs), ("seed", seed)):
        if not 0 <= value < 1 << 63:
            raise ConfigError(f"{name} is {value}; it must be at least 0 and below 2^63")
    found = []
    for run in range(num_runs):
        from charlm.data.batching import uniform  # A sweep file may be read before JAX is needed.

        numbers = uniform(seed, run, len(draws)).tolist()
        found.append({key: draw(number) for (key, draw), number in zip(draws.items(), numbers)})
    return Sampled(found, draws, seed)


class Floats(NamedTuple):
    """The uniform distribution of numbers from low to high, or, with `log`, of their logarithms.

    Numbers are rounded to four significant digits, so that the names of runs stay short.
    """

    low: float
    high: float
    log: bool = False

    def __call__(self, number: float) -> float:
        if self.log:
            return self.round(math.exp(math.log(self.low) + number * math.log(self.high / self.low)))
        return self.round(self.low + number * (self.high - self.low))

    def round(self, value: float) -> float:
        """Round a value to four significant digits, within the range."""
        return min(max(float(f"{value:.4g}"), self.low), self.high)

    def can_draw(self, value: Any) -> bool:
        return self.low <= value <= self.high


class Integers(NamedTuple):
    """The uniform distribution of integers from low to high, both included."""

    low: int
    high: int

    def __call__(self, number: float) -> int:
        return self.low + int(number * (self.high - self.low + 1))

    def can_draw(self, value: Any) -> bool:
        return self.low <= value <= self.high


class Choices(NamedTuple):
    """The uniform distribution over a list of values."""

    values: tuple[Any, ...]

    def __call__(self, number: float) -> Any:
        return self.values[int(number * len(self.values))]

    def can_draw(self, value: Any) -> bool:
        return value in self.values


@check_arguments
def log_uniform(low: float, high: float) -> Floats:
    """Return the distribution of numbers from low to high whose logarithm is uniform, rounded to four digits."""
    _check_range(low, high)
    if low <= 0:
        raise ConfigError(f"low is {low!r}; a logarithm needs a number above 0")
    return Floats(low, high, log=True)


@check_arguments
def uniform_between(low: float, high: float) -> Floats:
    """Return the uniform distribution of numbers from low to high, rounded to four digits."""
    _check_range(low, high)
    return Floats(low, high)


@check_arguments
def integer(low: int, high: int) -> Integers:
    """Return the uniform distribution of integers from low to high, both included."""
    _check_range(low, high)
    return Integers(low, high)


@check_arguments
def choice(values: Sequence[Any]) -> Choices:
    """Return the uniform distribution over a list of values."""
    if not values:
        raise ConfigError("choice() got no values; it needs at least one")
    return Choices(tuple(tuple(value) if isinstance(value, list) else value for value in values))


def _check_range(low: float, high: float) -> None:
    """Raise ConfigError unless two numbers are finite and the first is not above the second."""
    if not -math.inf < low <= high < math.inf:
        raise ConfigError(f"the range from {low!r} to {high!r} is empty or not finite; give the lower number first")
