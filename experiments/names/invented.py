"""Invented names of a known distribution, so that the smallest possible loss is known.

A name has two to four syllables and possibly a final consonant. A syllable is a consonant and a vowel. The consonant depends on
the vowel before it, and the vowel on the consonant. So a model has to learn the order of the letters and when a name may end.
"""

import math
import random

CONSONANTS, VOWELS, FINALS = "tnrslkmdvbhjfg", "aeiou", "nrsl"
NUM_SYLLABLES = {2: 0.2, 3: 0.5, 4: 0.3}
FINAL_PROBABILITY = 0.4


def _weights(symbols: str, before: str) -> dict[str, float]:
    """Return the probability of each symbol after another one: Zipf's law, in an order that the other one determines."""
    shift = ord(before) % len(symbols)
    ranked = symbols[shift:] + symbols[:shift]
    total = sum(1 / (rank + 1) for rank in range(len(ranked)))
    return {symbol: 1 / (rank + 1) / total for rank, symbol in enumerate(ranked)}


def _choose(draw: random.Random, weights: dict) -> object:
    return draw.choices(list(weights), list(weights.values()))[0]


def draw_name(draw: random.Random) -> str:
    """Return a name."""
    name = "\n"  # The line end before the name determines the order of its first consonants.
    for _ in range(_choose(draw, NUM_SYLLABLES)):
        name += _choose(draw, _weights(CONSONANTS, name[-1]))
        name += _choose(draw, _weights(VOWELS, name[-1]))
    if draw.random() < FINAL_PROBABILITY:
        name += _choose(draw, _weights(FINALS, name[-1]))
    return name[1:]


def nats_of(name: str) -> float:
    """Return the negative logarithm of the probability of a name, in nats. It includes the end of the name."""
    text, final = "\n" + name, len(name) % 2
    probability = NUM_SYLLABLES[len(name) // 2] * (FINAL_PROBABILITY if final else 1 - FINAL_PROBABILITY)
    for i in range(1, len(text)):
        is_final = final and i == len(name)
        symbols = FINALS if is_final else (VOWELS, CONSONANTS)[i % 2]
        probability *= _weights(symbols, text[i - 1])[text[i]]
    return -math.log(probability)
