"""Encode a text that is given as a string, as the corpus of a run is encoded."""

import numpy as np

from charlm.data.documents import Documents
from charlm.data.text import normalise
from charlm.data.vocab import Vocab
from charlm.system.errors import CorpusError


def encode_text(text: str, vocab: Vocab, lowercase: bool, documents: Documents | None = None) -> np.ndarray:
    """Return the ids of a text, shape (symbols,). The text is normalised like a file.

    Args:
        text: the text.
        vocab: the vocabulary.
        lowercase: whether to lower-case the text.
        documents: how to split the text into documents; None: it is not split.

    Raises:
        CorpusError: the text is not valid Unicode, or has a symbol that is not in the vocabulary.
    """
    text = text.removeprefix("\ufeff")  # A byte-order mark, as in a file.
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise CorpusError("the text has half of a surrogate pair; it must be valid Unicode")
    text = normalise(text, lowercase)
    return vocab.encode(text if documents is None else documents.join(documents.split([text])))
