"""What the runs of a sweep change: lists of {dotted key: value}, built by small functions (`charlm.sweep` has them too)."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from charlm.data.batching import uniform
from charlm.system.errors import ConfigError

Overrides = dict[str, Any]


class Draw(Protocol):
    """How a value is drawn."""

    def __call__(self, number: float) -> Any:
        """From a number in [0, 1) to a value."""

    def holds(self, value: Any) -> bool:
        """Whether it could be drawn."""


def product(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """Every combination of the values of some keys, the last key's changing fastest."""
    return [dict(zip(values, each)) for each in itertools.product(*values.values())]


def zipped(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """The first value of every key, then the second of every key, and so on. Raises ConfigError unless all have as many."""
    if len(counts := {key: len(each) for key, each in values.items()}) and len(set(counts.values())) > 1:
        raise ConfigError(f"zipped() needs as many values for every key; found {counts}")
    return [dict(zip(values, each)) for each in zip(*values.values())]


def chain(*parts: Sequence[Overrides]) -> list[Overrides]:
    """The runs of each part, one part after another."""
    return list(itertools.chain(*parts))


class Sampled(list[Overrides]):
    """Overrides that were drawn, and from what: a search may draw others from there.

    Attributes:
        draws: dotted key -> how its values are drawn.
        seed: that they were drawn with.
    """

    def __init__(self, overrides: Sequence[Overrides], draws: Mapping[str, Draw], seed: int):
        super().__init__(overrides)
        self.draws, self.seed = dict(draws), seed


def sample(num_runs: int, draws: Mapping[str, Draw], seed: int = 0) -> Sampled:
    """Random values: run k's depend on the seed and on k alone, so that a longer sweep begins with a shorter one's runs."""
    found = []
    for run in range(num_runs):
        numbers = uniform(seed, run, len(draws)).tolist()
        found.append({key: draw(number) for (key, draw), number in zip(draws.items(), numbers)})
    return Sampled(found, draws, seed)


class Floats(NamedTuple):
    """Numbers between two, or those whose logarithms are; rounded to four digits, so that they can be read."""

    low: float
    high: float
    log: bool = False

    def __call__(self, number: float) -> float:
        if self.log:
            return self.rounded(math.exp(math.log(self.low) + number * math.log(self.high / self.low)))
        return self.rounded(self.low + number * (self.high - self.low))

    def rounded(self, value: float) -> float:
        return min(max(float(f"{value:.4g}"), self.low), self.high)

    def holds(self, value: Any) -> bool:
        return self.low <= value <= self.high


class Integers(NamedTuple):
    """Whole numbers from low to high, both included."""

    low: int
    high: int

    def __call__(self, number: float) -> int:
        return self.low + int(number * (self.high - self.low + 1))

    def holds(self, value: Any) -> bool:
        return self.low <= value <= self.high


class Choices(NamedTuple):
    """One of some values."""

    values: tuple[Any, ...]

    def __call__(self, number: float) -> Any:
        return self.values[int(number * len(self.values))]

    def holds(self, value: Any) -> bool:
        return value in self.values


def log_uniform(low: float, high: float) -> Floats:
    """A number whose logarithm is uniform, rounded to four digits."""
    return Floats(low, high, log=True)


def uniform_between(low: float, high: float) -> Floats:
    """A number, rounded to four digits."""
    return Floats(low, high)


def integer(low: int, high: int) -> Integers:
    """A whole number from low to high, both included."""
    return Integers(low, high)


def choice(values: Sequence[Any]) -> Choices:
    """One of some values."""
    return Choices(tuple(tuple(value) if isinstance(value, list) else value for value in values))
