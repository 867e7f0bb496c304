"""Vocab: symbols <-> ids. A symbol is a Unicode character (`chars`) or a byte of the UTF-8 text (`bytes`)."""

import codecs
import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from charlm.system.errors import CorpusError

KINDS = ("chars", "bytes")
# What stands for every symbol that is not in the vocabulary, where the vocabulary has such a symbol.
UNKNOWN = "\ufffd"
NUM_CODE_POINTS = 0x110000
_BYTES = "".join(map(chr, range(256)))


@dataclasses.dataclass(frozen=True)
class Vocab:
    """An immutable map between symbols and ids 0 .. size - 1.

    Attributes:
        kind: `chars` or `bytes`.
        symbols: for `chars`, the characters in id order (sorted by code point); for `bytes`, chr(0) .. chr(255).
        unknown: whether other characters become U+FFFD, which is then one of the symbols; else they are an error.
    """

    kind: str
    symbols: str
    unknown: bool = False

    @classmethod
    def of_chars(cls, chars: Iterable[str], unknown: bool = False) -> "Vocab":
        return cls("chars", "".join(sorted({*chars, UNKNOWN} if unknown else set(chars))), unknown)

    @classmethod
    def of_counts(cls, counts: np.ndarray, max_symbols: int | None = None, unknown: bool = False) -> "Vocab":
        """The characters that occur, or the `max_symbols` most frequent and one symbol for all others.

        Args:
            counts: how often each code point occurs, shape (NUM_CODE_POINTS,).
            max_symbols: equally frequent characters are taken in the order of their code points.
            unknown: a symbol for other characters though none of these is left out.
        """
        # Stable, so that ties are broken by code point on every machine.
        by_frequency = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        return cls.of_chars(map(chr, by_frequency[:max_symbols]), unknown or max_symbols is not None)

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

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, shape (n,), dtype `self.dtype`. Raises CorpusError as `encoder` does."""
        return self.encoder()(text)

    def encoder(self) -> Callable[[str], np.ndarray]:
        """A function from the next piece of a text to its ids, shape (n,), dtype `self.dtype`.

        Raises:
            CorpusError: a character is not in the vocabulary; names it and its position in all the pieces.
        """
        if self.kind == "bytes":
            return lambda text: np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
        known = code_points(self.symbols)
        # A table from code point to id, at most 4.5 MB. Its last entry is that of all code points beyond it.
        other = self.symbols.index(UNKNOWN) if self.unknown else self.size
        table = np.full(max(int(known[-1]) + 2, 128), other, np.uint32)
        table[known] = np.arange(self.size, dtype=np.uint32)
        # ASCII is several times faster through `bytes.translate`, where an id and what marks none both fit a byte.
        ascii_table = table[:128].astype(np.uint8).tobytes() * 2 if self.size < 256 else None
        position = 0

        def encode(text: str) -> np.ndarray:
            nonlocal position
            if ascii_table and text.isascii():
                ids = np.frombuffer(text.encode("ascii").translate(ascii_table), np.uint8)
            else:
                ids = table.take(code_points(text), mode="clip")
            if ids.size and int(ids.max()) == self.size:
                first = int(np.argmax(ids == self.size))
                raise CorpusError(
                    f"symbol {text[first]!r} at position {position + first} is not in the vocabulary of {self.size} "
                    f"symbols: {preview(self.symbols)}"
                )
            position += len(text)
            return ids.astype(self.dtype, copy=False)

        return encode

    def decode(self, ids: np.ndarray) -> str:
        """The text of some ids, shape (n,), without a character at the end that lacks some of its bytes."""
        return self.decoder()(ids)

    def decoder(self) -> Callable[[np.ndarray], str]:
        """A function from ids that arrive in pieces to text, which holds back an unfinished character.

        Bytes that are not UTF-8 become U+FFFD.
        """
        if self.kind == "bytes":
            utf8 = codecs.getincrementaldecoder("utf-8")("replace")
            return lambda ids: utf8.decode(np.asarray(ids, np.uint8).tobytes())
        known = code_points(self.symbols)
        return lambda ids: known[np.asarray(ids, np.int64)].tobytes().decode("utf-32-le", "surrogatepass")

    def num_chars(self, ids: np.ndarray) -> int:
        """How many characters begin in some ids, shape (n,): n but for bytes, of which a character has one to four."""
        if self.kind == "chars":
            return len(ids)
        # Bytes 10xxxxxx go on with a character. In pieces, as the text may be larger than the memory.
        pieces = (ids[i : i + (1 << 20)] for i in range(0, len(ids), 1 << 20))
        return sum(int(np.count_nonzero((piece & 0xC0) != 0x80)) for piece in pieces)

    def to_json(self) -> dict:
        return {"kind": self.kind, "symbols": self.symbols if self.kind == "chars" else None, "unknown": self.unknown}

    @classmethod
    def from_json(cls, value) -> "Vocab":
        """The inverse of `to_json`. Raises ValueError on anything else."""
        if not isinstance(value, dict) or value.get("kind") not in KINDS:
            raise ValueError("not a vocabulary")
        if value["kind"] == "bytes":
            return cls.of_bytes()
        symbols, unknown = value.get("symbols"), value.get("unknown", False)
        if not isinstance(symbols, str) or not symbols or list(symbols) != sorted(set(symbols)):
            raise ValueError("its symbols are not a sorted string without repetitions")
        if any("\ud800" <= symbol <= "\udfff" for symbol in symbols):
            raise ValueError("its symbols are not Unicode characters")
        if not isinstance(unknown, bool) or (unknown and UNKNOWN not in symbols):
            raise ValueError("it has no symbol for the unknown")
        return cls("chars", symbols, unknown)


def utf8_transitions() -> np.ndarray:
    """The automaton that accepts UTF-8 and nothing else (RFC 3629, section 4): shape (8, 256), int32.

    Entry [state, byte] is the next state, or -1 where the byte cannot come. State 0 is between two characters; 1, 2 and
    3 are before as many continuation bytes; 4 to 7 before a second byte that E0, ED, F0 and F4 restrict.
    """
    table = np.full((8, 256), -1, np.int32)
    for state, first, last, following in (
        (0, 0x00, 0x7F, 0), (0, 0xC2, 0xDF, 1), (0, 0xE0, 0xEF, 2), (0, 0xF0, 0xF4, 3),
        (0, 0xE0, 0xE0, 4), (0, 0xED, 0xED, 5), (0, 0xF0, 0xF0, 6), (0, 0xF4, 0xF4, 7),
        (1, 0x80, 0xBF, 0), (2, 0x80, 0xBF, 1), (3, 0x80, 0xBF, 2),
        (4, 0xA0, 0xBF, 1), (5, 0x80, 0x9F, 1), (6, 0x90, 0xBF, 2), (7, 0x80, 0x8F, 2),
    ):  # fmt: skip
        table[state, first : last + 1] = following
    return table


def code_points(text: str) -> np.ndarray:
    """The code points of a text, uint32, shape (n,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def count_code_points(text: str) -> np.ndarray:
    """How often each code point up to the largest occurs, int64."""
    if not text.isascii():
        return np.bincount(code_points(text))
    data = text.encode("ascii")
    # Two characters at a time: counting takes its time by the item, not by the byte.
    pairs = np.bincount(np.frombuffer(data, "<u2", len(data) // 2), minlength=1 << 16).reshape(256, 256)
    counts = pairs.sum(0) + pairs.sum(1)
    if len(data) % 2:
        counts[data[-1]] += 1
    return counts


def preview(symbols: str, most: int = 80) -> str:
    """A vocabulary as one short quoted line."""
    return repr(symbols[:most]) + ("..." if len(symbols) > most else "")
