"""What a sample copies from the training text: whether all of it occurs there, and the longest run of symbols that does.

A run of L symbols is compared by a polynomial hash modulo 2^64, which NumPy computes for every position of a block of the text
at once (Karp and Rabin 1987). The longest run of a sample is found by a search over L, because a text that contains a run of L
symbols contains runs of all smaller lengths. What the hashes find is compared symbol by symbol. The memory does not depend on
the length of the text.

Letters: N symbols of a block of the text.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from charlm.data.vocab import Vocab

# The text is read in blocks of this many symbols. The hashes of a block take 8 bytes for each.
_BLOCK = 1 << 22
# An odd multiplier has an inverse modulo 2^64.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


class Copy(NamedTuple):
    """The longest run of symbols of a sample that occurs in a text.

    Attributes:
        start: where the run begins in the sample. Of several runs it is the first.
        length: its number of symbols; 0 if no symbol of the sample occurs.
    """

    start: int
    length: int


def describe_novelty(
    texts: Sequence[str],
    vocab: Vocab,
    train_ids: np.ndarray,
    boundary: int | None = None,
    was_cut: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """Return how much of each sample occurs in the training text.

    Args:
        texts: the samples. Their symbols must be in the vocabulary.
        vocab: the vocabulary of the model.
        train_ids: the training text, shape (symbols,).
        boundary: the id of the boundary between documents. A sample is then a document from its beginning.
        was_cut: for documents, whether each sample ends before the end of its document; None: no sample does.

    Returns:
        {"samples": [...], "new": the share of the samples that are not in the training text}. Each sample is {"text": the
        sample, "in_training_text": whether all of it is there, for documents as a whole one, or as the beginning of one if it
        was cut, "longest_copy": the length of its longest run of characters that is there, "copy": this run}.
    """
    samples = [vocab.encode(text) for text in texts]
    whole = samples
    if boundary is not None:
        ends = [[] if cut else [boundary] for cut in was_cut or [False] * len(samples)]
        whole = [np.concatenate([[boundary], sample, end]).astype(vocab.dtype) for sample, end in zip(samples, ends)]
    found = []
    for text, sample, known, copy in zip(texts, samples, contains(whole, train_ids), longest_copies(samples, train_ids)):
        # A run of bytes may begin and end inside a character.
        run = vocab.decode(sample[copy.start : copy.start + copy.length]).strip("\ufffd")
        found.append({"text": text, "in_training_text": known, "longest_copy": len(run), "copy": run})
    return {"samples": found, "new": sum(not each["in_training_text"] for each in found) / max(len(found), 1)}


def longest_copies(samples: Sequence[np.ndarray], text: np.ndarray) -> list[Copy]:
    """Return the longest run of each sample that occurs in a text.

    Args:
        samples: the ids of each sample, shape (symbols,).
        text: the ids of the text, shape (symbols,). It may be a memory map.
    """
    copies = [Copy(0, 0) for _ in samples]
    overlap = max((len(sample) for sample in samples), default=0)
    for start in range(0, len(text), _BLOCK):
        block = np.asarray(text[start : start + _BLOCK + overlap])
        find = _finder(block)
        # A longer run than those of the blocks before is searched: first one that is longer by one symbol, then by bisection.
        limits = [len(sample) for sample in samples]
        length = [copy.length + 1 for copy in copies]
        while longer := [i for i in range(len(samples)) if copies[i].length < length[i] <= limits[i]]:
            L = length[longer[0]]
            indices = [i for i in longer if length[i] == L]
            for i, at in zip(indices, find([samples[i] for i in indices], L)):
                if at is None:
                    limits[i] = L - 1
                else:
                    copies[i] = Copy(at, L)
                length[i] = (copies[i].length + limits[i] + 1) // 2
    return copies


def contains(samples: Sequence[np.ndarray], text: np.ndarray) -> list[bool]:
    """Return for each sample whether all of it occurs in a text. An empty sample does."""
    found = [not len(sample) for sample in samples]
    for start in range(0, len(text), _BLOCK):
        block = np.asarray(text[start : start + _BLOCK + max(map(len, samples), default=0)])
        find = _finder(block)
        for L in {len(sample) for sample, is_found in zip(samples, found) if not is_found}:
            indices = [i for i, sample in enumerate(samples) if len(sample) == L and not found[i]]
            for i, at in zip(indices, find([samples[i] for i in indices], L)):
                found[i] = at is not None
    return found


def _finder(block: np.ndarray) -> Callable[[Sequence[np.ndarray], int], list[int | None]]:
    """Return a function (samples, L) -> for each sample, where its first run of L symbols begins that occurs in the block."""
    hashes_of_block = _hashes(block)

    def find(samples: Sequence[np.ndarray], length: int) -> list[int | None]:
        wanted = [_hashes(sample)(length) for sample in samples]
        in_block = hashes_of_block(length)
        distinct = np.unique(np.concatenate(wanted))
        # Most positions of the block share not even the upper bits with a sample.
        table = np.zeros(1 << 20, bool)
        table[distinct >> np.uint64(44)] = True
        at = np.flatnonzero(table[in_block >> np.uint64(44)])
        present, first = np.unique(in_block[at], return_index=True)
        found: list[int | None] = []
        for sample, hashes in zip(samples, wanted):
            index = np.minimum(np.searchsorted(present, hashes), max(len(present) - 1, 0))
            hits = np.flatnonzero(present[index] == hashes) if len(present) else []
            same = (k for k in hits if _equal(block, at[first[index[k]]], sample, k, length))
            found.append(next((int(k) for k in same), None))
        return found

    return find


def _equal(block: np.ndarray, at: int, sample: np.ndarray, start: int, length: int) -> bool:
    return np.array_equal(block[at : at + length], sample[start : start + length])


def _hashes(ids: np.ndarray) -> Callable[[int], np.ndarray]:
    """Return a function L -> the hash of the L symbols from every position, uint64, shape (N - L + 1,)."""
    powers = np.full(len(ids), _INVERSE, np.uint64)
    powers[:1] = 1
    np.multiply.accumulate(powers, out=powers)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * powers, dtype=np.uint64)])
    scale = np.full(len(ids), _BASE, np.uint64)
    scale[:1] = 1
    np.multiply.accumulate(scale, out=scale)
    return lambda length: (sums[length:] - sums[:-length]) * scale[: max(len(ids) - length + 1, 0)]
