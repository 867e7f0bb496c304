"""Vocab: symbols <-> ids. A symbol is a Unicode character (`chars`) or a byte of the UTF-8 text (`bytes`)."""

import codecs
import dataclasses
from collections.abc import Iterable

import numpy as np

from charlm.errors import CorpusError

KINDS = ("chars", "bytes")
_BYTES = "".join(map(chr, range(256)))


@dataclasses.dataclass(frozen=True)
class Vocab:
    """An immutable map between symbols and ids 0 .. size - 1.

    Attributes:
        kind: `chars` or `bytes`.
        symbols: for `chars`, the characters in id order (sorted by code point); for `bytes`, chr(0) .. chr(255).
    """

    kind: str
    symbols: str

    @classmethod
    def of_chars(cls, chars: Iterable[str]) -> "Vocab":
        return cls("chars", "".join(sorted(chars)))

    @classmethod
    def of_bytes(cls) -> "Vocab":
        return cls("bytes", _BYTES)

    @property
    def size(self) -> int:
        return len(self.symbols)

    @property
    def dtype(self) -> np.dtype:
        """The narrowest unsigned type that holds every id."""
        return np.dtype(np.uint8 if self.size <= 1 << 8 else np.uint16 if self.size <= 1 << 16 else np.uint32)

    def encode(self, text: str, position: int = 0) -> np.ndarray:
        """Ids of a text, shape (n,), dtype `self.dtype`.

        Args:
            text: any string.
            position: where the text begins in a longer one, for the error message.

        Raises:
            CorpusError: a character is not in the vocabulary; names it and its position.
        """
        if self.kind == "bytes":
            return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        known = np.frombuffer(self.symbols.encode("utf-32-le", "surrogatepass"), "<u4")
        # A table from code point to id: one pass over the text, at most 4.5 MB.
        table = np.full(int(known[-1]) + 2, self.size, np.uint32)
        table[known] = np.arange(self.size, dtype=np.uint32)
        ids = table[np.minimum(code_points, len(table) - 1)]
        unknown = np.flatnonzero(ids == self.size)
        if unknown.size:
            first = int(unknown[0])
            raise CorpusError(
                f"symbol {text[first]!r} at position {position + first} is not in the vocabulary of {self.size} symbols: "
                f"{preview(self.symbols)}"
            )
        return ids.astype(self.dtype)

    def decode(self, ids: np.ndarray) -> str:
        """The text of some ids, shape (n,); bytes that are not UTF-8 become U+FFFD."""
        return self.decoder()(ids, True)

    def decoder(self):
        """A function (ids, final) -> text for ids that arrive in pieces: it holds back an unfinished character."""
        if self.kind == "bytes":
            utf8 = codecs.getincrementaldecoder("utf-8")("replace")
            return lambda ids, final=False: utf8.decode(np.asarray(ids, np.uint8).tobytes(), final)
        symbols = np.array(list(self.symbols))
        return lambda ids, final=False: "".join(symbols[np.asarray(ids, np.int64)])

    def to_json(self) -> dict:
        return {"kind": self.kind, "symbols": self.symbols if self.kind == "chars" else None}

    @classmethod
    def from_json(cls, value) -> "Vocab":
        """The inverse of `to_json`. Raises ValueError on anything else."""
        if not isinstance(value, dict) or value.get("kind") not in KINDS:
            raise ValueError("not a vocabulary")
        if value["kind"] == "bytes":
            return cls.of_bytes()
        symbols = value.get("symbols")
        if not isinstance(symbols, str) or not symbols or list(symbols) != sorted(set(symbols)):
            raise ValueError("its symbols are not a sorted string without repetitions")
        return cls("chars", symbols)


def preview(symbols: str, most: int = 80) -> str:
    """A vocabulary as one short quoted line."""
    return repr(symbols[:most]) + ("..." if len(symbols) > most else "")
