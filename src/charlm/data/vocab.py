"""Vocabularies: maps between symbols and ids. A symbol is a Unicode character (`chars`) or a byte of UTF-8 (`bytes`)."""

import codecs
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from charlm.system.errors import MissingSymbol

KINDS = ("chars", "bytes")
# The unknown symbol. A vocabulary that contains it maps every other character to it.
UNKNOWN = "\ufffd"
NUM_CODE_POINTS = 0x110000
_BYTES = "".join(map(chr, range(256)))


@dataclasses.dataclass(frozen=True)
class Vocab:
    """An immutable map between symbols and ids 0 .. size - 1.

    Attributes:
        kind: `chars` or `bytes`.
        symbols: for `chars`, the characters in id order (sorted by code point); for `bytes`, chr(0) .. chr(255).
        unknown: whether the vocabulary contains the unknown symbol U+FFFD. If not, any other character is an error.
    """

    kind: str
    symbols: str
    unknown: bool = False

    @classmethod
    def from_chars(cls, chars: Iterable[str], unknown: bool = False) -> "Vocab":
        """Return the vocabulary of these characters, plus the unknown symbol if `unknown`."""
        return cls("chars", "".join(sorted({*chars, UNKNOWN} if unknown else set(chars))), unknown)

    @classmethod
    def from_counts(cls, counts: np.ndarray, max_symbols: int | None = None, unknown: bool = False) -> "Vocab":
        """Return the vocabulary of the characters that occur, or of the most frequent ones.

        Args:
            counts: the number of occurrences of each code point, shape (NUM_CODE_POINTS,).
            max_symbols: keep only this many characters, and add the unknown symbol. Among equally frequent characters the
                smaller code points are kept. None: keep all.
            unknown: whether to add the unknown symbol even if all characters are kept.
        """
        # A stable sort breaks ties by code point on every machine.
        by_frequency = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        return cls.from_chars(map(chr, by_frequency[:max_symbols]), unknown or max_symbols is not None)

    @classmethod
    def all_bytes(cls) -> "Vocab":
        """Return the vocabulary of all 256 bytes."""
        return cls("bytes", _BYTES)

    @property
    def size(self) -> int:
        """The number of symbols, V."""
        return len(self.symbols)

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer dtype that can represent every id."""
        return np.dtype(np.uint8 if self.size <= 1 << 8 else np.uint16 if self.size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, shape (n,), dtype `self.dtype`. Raises MissingSymbol as `encoder` does."""
        return self.encoder()(text)

    def encoder(self) -> Callable[[str], np.ndarray]:
        """Return a function that maps the next piece of a text to its ids, shape (n,), dtype `self.dtype`.

        The function raises MissingSymbol if a character is not in the vocabulary. The message names the character and its
        position in the whole text.
        """
        if self.kind == "bytes":
            return lambda text: np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
        known = code_points(self.symbols)
        # A table from code point to id, at most 4.5 MB. Larger code points share its last entry.
        other = self.symbols.index(UNKNOWN) if self.unknown else self.size
        table = np.full(max(int(known[-1]) + 2, 128), other, np.uint32)
        table[known] = np.arange(self.size, dtype=np.uint32)
        # `bytes.translate` encodes ASCII several times faster. The ids and the marker of a missing symbol must fit into a byte.
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
                raise MissingSymbol(
                    f"symbol {text[first]!r} at position {position + first} is not in the vocabulary of {self.size} "
                    f"symbols: {preview(self.symbols)}"
                )
            position += len(text)
            return ids.astype(self.dtype, copy=False)

        return encode

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of ids, shape (n,), without an incomplete character at the end."""
        return self.decoder()(ids)

    def decoder(self) -> Callable[[np.ndarray], str]:
        """Return a function that maps the next piece of ids to text.

        The function holds back an incomplete character at the end of a piece. Bytes that are not UTF-8 become U+FFFD.
        """
        if self.kind == "bytes":
            utf8 = codecs.getincrementaldecoder("utf-8")("replace")
            return lambda ids: utf8.decode(np.asarray(ids, np.uint8).tobytes())
        known = code_points(self.symbols)
        return lambda ids: known[np.asarray(ids, np.int64)].tobytes().decode("utf-32-le", "surrogatepass")

    def num_chars(self, ids: np.ndarray) -> int:
        """Return the number of characters that start in ids of shape (n,): n for chars. A character has one to four bytes."""
        if self.kind == "chars":
            return len(ids)
        # Bytes 10xxxxxx continue a character. The ids are read in pieces, because they may not fit into memory.
        pieces = (ids[i : i + (1 << 20)] for i in range(0, len(ids), 1 << 20))
        return sum(int(np.count_nonzero((piece & 0xC0) != 0x80)) for piece in pieces)

    def to_json(self) -> dict[str, Any]:
        """Return the vocabulary as a JSON object."""
        return {"kind": self.kind, "symbols": self.symbols if self.kind == "chars" else None, "unknown": self.unknown}

    def sha256(self) -> str:
        """Return the sha256 of the vocabulary in hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()

    @classmethod
    def from_json(cls, value: Any) -> "Vocab":
        """Return the vocabulary that `to_json` wrote. Raises ValueError for any other value."""
        if not isinstance(value, dict) or value.get("kind") not in KINDS:
            raise ValueError("not a vocabulary")
        if value["kind"] == "bytes":
            return cls.all_bytes()
        symbols, unknown = value.get("symbols"), value.get("unknown", False)
        if not isinstance(symbols, str) or not symbols or list(symbols) != sorted(set(symbols)):
            raise ValueError("its symbols are not a sorted string of distinct characters")
        if any("\ud800" <= symbol <= "\udfff" for symbol in symbols):
            raise ValueError("its symbols are not Unicode characters")
        if not isinstance(unknown, bool) or (unknown and UNKNOWN not in symbols):
            raise ValueError("it lacks the unknown symbol")
        return cls("chars", symbols, unknown)


def utf8_transitions() -> np.ndarray:
    """Return the transition table of the automaton that accepts exactly UTF-8 (RFC 3629, section 4): shape (8, 256), int32.

    Entry [state, byte] is the next state, or -1 if the byte is not allowed. State 0 is between two characters. States 1, 2 and
    3 expect as many continuation bytes. States 4 to 7 follow the bytes E0, ED, F0 and F4, which restrict the second byte.
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
    """Return the code points of a text, uint32, shape (n,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def count_code_points(text: str) -> np.ndarray:
    """Return the number of occurrences of each code point, int64, at least up to the largest code point of the text."""
    if not text.isascii():
        return np.bincount(code_points(text))
    data = text.encode("ascii")
    # Counting pairs of characters is faster, because the time of a count depends on the number of items, not of bytes.
    pairs = np.bincount(np.frombuffer(data, "<u2", len(data) // 2), minlength=1 << 16).reshape(256, 256)
    counts = pairs.sum(0) + pairs.sum(1)
    if len(data) % 2:
        counts[data[-1]] += 1
    return counts


def preview(symbols: str, most: int = 80) -> str:
    """Return the first symbols of a vocabulary as one quoted line."""
    return repr(symbols[:most]) + ("..." if len(symbols) > most else "")
