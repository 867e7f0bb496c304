"""Pack documents into streams: every epoch shuffles all documents, and every stream reads one document after another.

Letters: B streams, W symbols that are read at a time, M documents.
"""

import bisect
import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class _Epoch(NamedTuple):
    """The documents of one epoch in their order, and which of them each stream reads.

    Attributes:
        source_M: the position in the text of the boundary before each document.
        begin_M: the number of symbols of the documents before each document.
        share_B: the number of symbols of the documents before the first document of each stream.
        size_B: the number of symbols of the documents of each stream.
    """

    source_M: np.ndarray
    begin_M: np.ndarray
    share_B: np.ndarray
    size_B: np.ndarray


def document_streams(
    boundaries: np.ndarray, batch_size: int, order: Callable[[int], np.ndarray]
) -> Callable[[int, int], np.ndarray]:
    """Return a function (first, W) -> the positions in the text of W symbols of every stream, int64, shape (B, W).

    The symbols of a document are the boundary before it and its characters. An epoch has every document exactly once. Its
    documents, in the order of the epoch, are cut into B parts of nearly equal size. A stream reads its part of one epoch after
    that of the epoch before, without padding, so a window may contain the end of an epoch. A document is never cut.

    The result depends only on the arguments. The sizes of the parts of past epochs are kept, because a stream's place in an
    epoch is their sum; the first call computes them.

    Args:
        boundaries: the positions of the boundaries in the text, shape (M + 1,) (`documents.document_positions`).
        batch_size: B.
        order: epoch -> the order of the documents, indices from 0 to M - 1.
    """
    size_M = np.diff(boundaries)
    # For each epoch, the number of symbols that each stream reads before it, and the largest of these numbers.
    starts, latest = [np.zeros(batch_size, np.int64)], [0]
    lock = threading.Lock()

    @functools.lru_cache(maxsize=3)
    def epoch(index: int) -> _Epoch:
        order_M = order(index)
        ends_M = np.cumsum(size_M[order_M])
        begin_M = ends_M - size_M[order_M]
        # A document belongs to the part in which it begins. The parts rotate over the streams, so each stream makes progress
        # even if some parts are empty, because a document is longer than a part.
        seams = np.searchsorted(begin_M, np.arange(batch_size + 1) * int(ends_M[-1]) // batch_size)
        shares = np.append(begin_M, ends_M[-1])[seams]
        part_B = (np.arange(batch_size) + index) % batch_size
        return _Epoch(boundaries[order_M], begin_M, shares[part_B], np.diff(shares)[part_B])

    def positions(first: int, count: int) -> np.ndarray:
        with lock:
            while starts[-1].min() < first + count:
                starts.append(starts[-1] + epoch(len(starts) - 1).size_B)
                latest.append(int(starts[-1].max()))
        at_BW = np.empty((batch_size, count), np.int64)
        wanted_W = first + np.arange(count)
        index = bisect.bisect_right(latest, first) - 1  # All streams have left the epochs before it.
        while starts[index].min() < first + count:
            source_M, begin_M, share_B, size_B = epoch(index)
            relative_BW = wanted_W - starts[index][:, None]
            here_BW = (relative_BW >= 0) & (relative_BW < size_B[:, None])
            offset = (relative_BW + share_B[:, None])[here_BW]
            document = np.searchsorted(begin_M, offset, side="right") - 1
            at_BW[here_BW] = source_M[document] + offset - begin_M[document]
            index += 1
        return at_BW

    return positions
