"""Turn the ids of samples into text, piece by piece, and end a sample where a stop string begins."""

from collections.abc import Iterator, Sequence

import numpy as np

from charlm.data.vocab import Vocab


class SampleDecoder:
    """Turns the ids of one sample into text, piece by piece, and ends the text where a stop string begins.

    Args:
        vocab: the vocabulary of the ids.
        stops: the strings that end the sample and do not belong to it. The one that begins first ends it.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(self, vocab: Vocab, stops: Sequence[str] = ()):
        self._decode, self._stops, self._held, self.stopped = vocab.decoder(), stops, "", False

    def feed(self, ids: np.ndarray) -> str:
        """Return the text that the next ids add. What may be the beginning of a stop string is held back."""
        if self.stopped or not self._stops:
            return "" if self.stopped else self._decode(ids)
        text = self._held + self._decode(ids)
        # A stop string that may still be completed can begin before one that is complete.
        sure = len(text) - max(n for stop in self._stops for n in range(len(stop)) if text.endswith(stop[:n]))
        end = self._find_stop(text)
        self.stopped = end <= sure and end < len(text)
        end = min(end, sure)
        self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """Return the text that was held back, after the last ids."""
        return "" if self.stopped else self._held[: self._find_stop(self._held)]

    def _find_stop(self, text: str) -> int:
        """Return where the first stop string begins; the length of the text if there is none."""
        return min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=len(text))


def decode_samples(
    pieces: Iterator[np.ndarray], vocab: Vocab, num_samples: int, stops: Sequence[str] = ()
) -> Iterator[list[str]]:
    """Yield the new text of each sample for each piece of ids from `generate`; end when all samples have stopped.

    Args:
        pieces: ids of shape (num_samples, up to K).
        vocab: the vocabulary of the ids.
        num_samples: the number of samples.
        stops: see `SampleDecoder`.
    """
    decoders = [SampleDecoder(vocab, stops) for _ in range(num_samples)]
    for piece in pieces:
        yield [decoder.feed(ids) for decoder, ids in zip(decoders, piece)]
        if all(decoder.stopped for decoder in decoders):
            return
    yield [decoder.flush() for decoder in decoders]
