"""The score of a text, symbol by symbol, and how it is drawn in a notebook."""

import dataclasses
import html
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from charlm.data.documents import document_positions
from charlm.data.vocab import UNKNOWN, Vocab
from charlm.inference.scorer import Score
from charlm.system.arguments import check_arguments_of_methods
from charlm.system.errors import CorpusError

# A notebook draws at most this many characters.
_MAX_DRAWN = 20_000
# The surprise that gets the full colour, in bits. A uniform choice among 256 symbols has 8 bits.
_FULL_BITS = 8.0
# The difference of two models that gets the full colour, in bits.
_FULL_DIFFERENCE = 4.0
_RED, _BLUE = "220, 50, 30", "30, 90, 220"


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


def document_scores(ids: np.ndarray, nats_N: np.ndarray, vocab: Vocab, boundary: int) -> list[dict[str, Any]]:
    """Return the score of each document: {"text", "nats", "nats_per_char", "count"}, in the order of the text.

    `nats` is the sum over the characters of the document and the boundary at its end, and `count` is the number of these
    characters. The sum of all `nats` is that of the text.

    Args:
        ids: the text, shape (symbols,), with a boundary before each document and after the last.
        nats_N: the cross-entropy of every symbol but the first (`Score.nats_N`).
        vocab: the map between symbols and ids.
        boundary: the id of the boundary.
    """
    at = document_positions(ids, boundary)
    sums = np.add.reduceat(nats_N.astype(np.float64), at[:-1])
    found = []
    for start, end, nats in zip(at[:-1].tolist(), at[1:].tolist(), sums.tolist()):
        count = vocab.num_chars(ids[start + 1 : end + 1])
        found.append(
            {"text": vocab.decode(ids[start + 1 : end]), "nats": nats, "nats_per_char": nats / max(count, 1), "count": count}
        )
    return found


@check_arguments_of_methods
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

    def compare(self, other: "TextScore") -> "ScoreDifference":
        """Return this score minus another score of the same text, character by character.

        The other model may have another vocabulary. Raises CorpusError if the two models read different texts, for example
        because an unknown symbol was replaced, or if they score no character in common.
        """
        (chars, nats), (other_chars, other_nats) = zip(*self.chars()), zip(*other.chars())
        if chars != other_chars:
            at = next((i for i, pair in enumerate(zip(chars, other_chars)) if pair[0] != pair[1]), None)
            where = f"{len(chars):,} and {len(other_chars):,} characters" if at is None else f"they differ at character {at:,}"
            raise CorpusError(f"compare: the two models read different texts ({where}); score the same text with both")
        difference = np.subtract(nats, other_nats)
        if not np.isfinite(difference).any():
            raise CorpusError("compare: no character of the text is scored by both models; score a longer text")
        return ScoreDifference("".join(chars), difference)

    def __repr__(self) -> str:
        return (
            f"TextScore({self.nats_per_char:.4f} nats per character, {self.bits_per_char:.4f} bits per character, "
            f"perplexity {self.perplexity:.2f}, {math.ceil(self.total.chars):,} characters)"
        )

    def _repr_html_(self) -> str:
        """Return the text as HTML. The more bits a character costs, the redder it is. The tooltip names its bits."""
        return _page(repr(self), (_char_span(char, nats, _FULL_BITS) for char, nats in self.chars()), len(self.ids))


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreDifference:
    """The score of one model minus that of another on the same text (`TextScore.compare`). A notebook draws it as text.

    Attributes:
        text: the text that both models read.
        nats: the difference of each character in nats, float64, shape (characters,). It is negative where the first model
            predicts the character better, and nan where one of the two models does not score it, as for the first character.
    """

    text: str
    nats: np.ndarray

    @property
    def count(self) -> int:
        """The number of characters that both models score."""
        return int(np.isfinite(self.nats).sum())

    @property
    def mean(self) -> float:
        """The mean difference of these characters in nats. It is negative if the first model is better."""
        return float(np.mean(self.nats[np.isfinite(self.nats)]))

    @property
    def standard_error(self) -> float:
        """The standard error of the mean, paired by character, as if characters were independent. Nan for a single character.

        Neighbouring characters are usually correlated, so the true error tends to be larger.
        """
        if self.count < 2:
            return math.nan
        return float(np.std(self.nats[np.isfinite(self.nats)], ddof=1)) / math.sqrt(self.count)

    def __repr__(self) -> str:
        return f"ScoreDifference({self.mean:+.4f} ± {self.standard_error:.4f} nats per character, {self.count:,} characters)"

    def _repr_html_(self) -> str:
        """Return the text as HTML: blue where the first model is better, red where the second one is."""
        spans = (_char_span(char, nats, _FULL_DIFFERENCE, "+") for char, nats in zip(self.text, self.nats.tolist()))
        return _page(f"{self!r}: blue where the first is better, red where the second is", spans, len(self.text))


def _page(title: str, spans: Iterator[str], num_symbols: int) -> str:
    """Return the HTML of a coloured text."""
    drawn = [span for span, _ in zip(spans, range(_MAX_DRAWN))]
    rest = f"<p>The first {_MAX_DRAWN:,} characters are drawn.</p>" if num_symbols > len(drawn) >= _MAX_DRAWN else ""
    style = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; font-family: monospace"
    return f"<p>{html.escape(title)}</p><div style='{style}'>{''.join(drawn)}</div>{rest}"


def _char_span(char: str, nats: float, full_bits: float, sign: str = "") -> str:
    """Return one character as HTML. `full_bits` get the full colour: red, or blue if `nats` is negative."""
    shown = html.escape(char).replace("\n", "&#9166;\n")
    if not math.isfinite(nats):
        return shown
    bits = nats / math.log(2)
    strength = min(abs(bits) / full_bits, 1.0)
    color = f"rgba({_BLUE if bits < 0 else _RED}, {0.75 * strength:.2f})"
    title = f"{html.escape(repr(char), quote=True)}: {bits:{sign}.2f} bits"
    return f"<span style='background: {color}' title='{title}'>{shown}</span>"
