"""Texts of separate documents (`data.documents`): names, verses, functions, one a line or between separators.

The encoded text of a part is `boundary document boundary document boundary`. The boundary is one symbol, so every document
begins after one and ends with one, and two neighbouring documents share it. A model replaces its state when it reads the
boundary (`nn.model.CharLM`), so the boundary is all that training, scoring and sampling have to know of documents.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from charlm.data.text import normalise
from charlm.data.vocab import Vocab
from charlm.system.errors import CorpusError

# The value of `data.documents` for a text with one document a line.
LINES = "lines"
# U+001E, the record separator of ASCII, is the boundary in place of a separator of several bytes.
_RECORD_SEPARATOR = "\x1e"
# A longer document is more likely a text without separators. A document has to fit into memory.
_MAX_CHARS = 1 << 26
# Documents are passed on in pieces of about this many characters.
_PIECE_CHARS = 1 << 20


class Documents(NamedTuple):
    """How a text is split into documents.

    Attributes:
        separator: the string between two documents in a file.
        boundary: the symbol between two documents in the encoded text, an ASCII character.
    """

    separator: str
    boundary: str

    @classmethod
    def from_config(cls, data: ConfigDict) -> "Documents | None":
        """Return how `config.data` splits its text; None if the text is not split."""
        if not data.documents:
            return None
        separator = "\n" if data.documents == LINES else normalise(data.documents, data.lowercase)
        return cls(separator, separator if len(separator.encode()) == 1 else _RECORD_SEPARATOR)

    def boundary_id(self, vocab: Vocab) -> int:
        """Return the id of the boundary. Raises CorpusError if the vocabulary lacks it."""
        if self.boundary not in vocab.symbols:
            raise CorpusError(
                f"the vocabulary lacks {self.boundary!r}, the boundary between documents; data.documents needs a vocabulary "
                "that was made for documents"
            )
        return vocab.symbols.index(self.boundary)

    def split(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield the documents of one file. Empty documents are left out.

        The line end at the end of the file ends the last document and does not belong to it.

        Args:
            pieces: the text of the file, normalised, piece by piece.

        Raises:
            CorpusError: a document is too long, or contains the boundary.
        """
        rest = ""
        for piece in pieces:
            if self.boundary != self.separator and self.boundary in piece:
                raise CorpusError(
                    f"the text contains the symbol {self.boundary!r}, which marks the boundaries between documents; remove it, "
                    "or separate the documents by a single ASCII character"
                )
            *documents, rest = (rest + piece).split(self.separator)
            yield from filter(None, documents)
            if len(rest) > _MAX_CHARS:
                raise CorpusError(
                    f"a document has more than {_MAX_CHARS:,} characters; data.documents {self.separator!r} must be the "
                    "separator of the text"
                )
        if rest := rest.removesuffix("\n"):
            yield rest

    def join(self, documents: Iterable[str]) -> str:
        """Return documents as one text, with a boundary before each and after the last one. No documents: an empty text."""
        text = self.boundary.join(documents)
        return self.boundary + text + self.boundary if text else ""

    def split_into_parts(
        self, files: Iterable[Iterable[str]], fractions: tuple[float, float, float]
    ) -> Iterator[tuple[int, str]]:
        """Yield (index of the part, piece) for the training, validation and test parts of some files.

        The pieces of a part, one after another, are `join` of its documents. The parts alternate.

        Args:
            files: the pieces of each file.
            fractions: the approximate fraction of the documents in each part (`part_of`).
        """
        documents = itertools.chain.from_iterable(self.split(pieces) for pieces in files)
        begun: set[int] = set()
        parts: tuple[list[str], ...] = ([], [], [])

        def joined() -> Iterator[tuple[int, str]]:
            for part, found in enumerate(parts):
                if found:
                    piece = self.join(found)
                    yield part, piece[1:] if part in begun else piece
                    begun.add(part)
                    found.clear()

        size = 0
        for document in documents:
            parts[part_of(document, fractions)].append(document)
            size += len(document)
            if size > _PIECE_CHARS:
                yield from joined()
                size = 0
        yield from joined()


def part_of(document: str, fractions: tuple[float, float, float]) -> int:
    """Return the part that a document belongs to: 0 training, 1 validation, 2 test.

    A hash of the document decides. So a document stays in its part when others are added or the order changes, equal documents
    are in the same part, and no seed changes the parts.
    """
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    share = (int.from_bytes(digest, "little") >> 11) * 2.0**-53
    train, val, test = fractions
    if share < train:
        return 0
    return 1 if not test or share < train + val else 2


def document_positions(ids: np.ndarray, boundary: int) -> np.ndarray:
    """Return the positions of the boundaries in a part of an encoded text, int64, shape (documents + 1,).

    Document i has the symbols `ids[positions[i] + 1 : positions[i + 1]]`. An empty text has no positions.
    """
    pieces = (start + np.flatnonzero(ids[start : start + (1 << 24)] == boundary) for start in range(0, len(ids), 1 << 24))
    return np.concatenate([np.zeros(0, np.int64), *pieces])
