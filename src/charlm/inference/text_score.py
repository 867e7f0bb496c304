"""The score of a text, symbol by symbol, and how it is drawn in a notebook."""

import dataclasses
import html
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from charlm.data.vocab import UNKNOWN, Vocab
from charlm.inference.scorer import Score

# A notebook draws at most this many characters.
_MAX_DRAWN = 20_000
# The surprise that gets the full colour, in bits. A uniform choice among 256 symbols has 8 bits.
_FULL_BITS = 8.0


def losses_in_all_units(score: Score, vocab: Vocab) -> dict[str, float]:
    """Return a score in every unit: {"nats_per_char": ..., "bits_per_char": ..., ...}."""
    losses = {"nats_per_char": score.nats_per_char, "bits_per_char": score.bits_per_char, "perplexity": score.perplexity}
    if vocab.kind == "bytes":
        losses |= {"nats_per_byte": score.nats_per_symbol, "bits_per_byte": score.nats_per_symbol / math.log(2)}
    return losses


def describe_score(score: Score, vocab: Vocab, ids: np.ndarray) -> dict[str, Any]:
    """Return a score of the text `ids` in every unit, its metrics, and the counts that belong to it."""
    found = {**losses_in_all_units(score, vocab), **score.metrics, "count": math.ceil(score.chars)}
    if vocab.kind == "bytes":
        found["bytes"] = score.count
    if vocab.unknown:
        found["unknown"] = int(np.count_nonzero(ids == vocab.symbols.index(UNKNOWN)))
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class TextScore:
    """The loss of a model on a text, in total and symbol by symbol. A notebook draws it as text coloured by surprise.

    Attributes:
        ids: the text as ids, shape (n,). A symbol is a character, or a byte for the byte vocabulary.
        vocab: the map between symbols and ids.
        nats: the cross-entropy of every symbol but the first, in nats, float32, shape (n - 1,). `nats[i]` is that of symbol
            i + 1, because nothing predicts the first. It is nan for a symbol that was not scored: a many-to-one model scores
            only what follows a whole window.
        total: the loss of the whole text (`inference.scorer.Score`).
    """

    ids: np.ndarray
    vocab: Vocab
    nats: np.ndarray
    total: Score

    @property
    def nats_per_char(self) -> float:
        """The mean cross-entropy of a character in nats."""
        return self.total.nats_per_char

    @property
    def bits_per_char(self) -> float:
        """The mean cross-entropy of a character in bits."""
        return self.total.bits_per_char

    @property
    def perplexity(self) -> float:
        """exp(nats_per_char)."""
        return self.total.perplexity

    @property
    def text(self) -> str:
        """The text that was scored, as the model read it: normalised, and with unknown symbols replaced."""
        return self.vocab.decode(self.ids)

    def chars(self) -> Iterator[tuple[str, float]]:
        """Yield (character, nats) for every character. The nats of its bytes are added up. The first character has nan."""
        decode = self.vocab.decoder()
        nats = 0.0
        for id, loss in zip(self.ids, [math.nan, *self.nats.tolist()]):
            nats += loss
            if char := decode(np.array([id])):
                yield char, nats
                nats = 0.0

    def __repr__(self) -> str:
        return (
            f"TextScore({self.nats_per_char:.4f} nats per character, {self.bits_per_char:.4f} bits per character, "
            f"perplexity {self.perplexity:.2f}, {math.ceil(self.total.chars):,} characters)"
        )

    def _repr_html_(self) -> str:
        """Return the text as HTML. The more bits a character costs, the redder it is. The tooltip names its bits."""
        return _page(repr(self), (_char_span(char, nats) for char, nats in self.chars()), len(self.ids))


def _page(title: str, spans: Iterator[str], num_symbols: int) -> str:
    """Return the HTML of a coloured text."""
    drawn = [span for span, _ in zip(spans, range(_MAX_DRAWN))]
    rest = f"<p>The first {_MAX_DRAWN:,} characters are drawn.</p>" if num_symbols > len(drawn) >= _MAX_DRAWN else ""
    style = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; font-family: monospace"
    return f"<p>{html.escape(title)}</p><div style='{style}'>{''.join(drawn)}</div>{rest}"


def _char_span(char: str, nats: float) -> str:
    """Return one character as HTML."""
    shown = html.escape(char).replace("\n", "&#9166;\n")
    if not math.isfinite(nats):
        return shown
    bits = nats / math.log(2)
    strength = min(bits / _FULL_BITS, 1.0)
    color = f"rgba(220, 50, 30, {0.75 * strength:.2f})"
    return f"<span style='background: {color}' title='{html.escape(repr(char), quote=True)}: {bits:.2f} bits'>{shown}</span>"
