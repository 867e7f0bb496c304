"""Two generated texts, one problem a line: parity and associative recall. Each line is a document.

A line of `parity` holds bits, and after each bit the parity of all bits so far: `e` for even, `o` for odd. To predict it, the
state must follow the bits without an error, for any number of steps: `1o0o1e`. A line of `recall` holds 8 letters with a digit
each, and after `?` the same letters in another order, each with its digit: `b7k0...?k0b7...`. The state must hold all pairs.
"""

import random
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from charlm.data.corpora import corpus

TRAIN_LINES, HELD_OUT_LINES = 40_000, 1_000
MAX_BITS, NUM_PAIRS = 32, 8
_LETTERS, _DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"


def parity_line(draw: random.Random, num_bits: int) -> str:
    """Return a line of `parity` with this number of bits."""
    line, odd = "", False
    for _ in range(num_bits):
        bit = draw.getrandbits(1)
        odd ^= bool(bit)
        line += f"{bit}{'o' if odd else 'e'}"
    return line + "\n"


def recall_line(draw: random.Random, num_pairs: int) -> str:
    """Return a line of `recall` with this number of pairs."""
    pairs = [letter + draw.choice(_DIGITS) for letter in draw.sample(_LETTERS, num_pairs)]
    return "".join(pairs) + "?" + "".join(draw.sample(pairs, num_pairs)) + "\n"


def answers(line: str) -> list[int]:
    """Return the positions of the symbols of a line that the symbols before them determine."""
    start = line.find("?") + 1  # 0 for parity.
    return list(range(start + 1, len(line.rstrip("\n")), 2))


# The texts for training, validation and test.
Parts = tuple[Iterator[str], Iterator[str], Iterator[str]]


def _parts(make_line: Callable[[random.Random], str]) -> Parts:
    """Return lines for training and for validation, and no test text."""

    def lines(seed: int, count: int) -> Iterator[str]:
        draw = random.Random(seed)
        return (make_line(draw) for _ in range(count))

    return lines(0, TRAIN_LINES), lines(1, HELD_OUT_LINES), iter(())


@corpus
def parity(data: ConfigDict) -> Parts:
    """Return lines of 1 to 32 bits."""
    return _parts(lambda draw: parity_line(draw, draw.randint(1, MAX_BITS)))


@corpus
def recall(data: ConfigDict) -> Parts:
    """Return lines of 8 pairs."""
    return _parts(lambda draw: recall_line(draw, NUM_PAIRS))
