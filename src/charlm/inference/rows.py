"""Draw texts together: a batch whose rows are texts with any prompts and lengths, which join and leave it between two blocks.

Every row has its own state, key, position, prompt and settings, so its text does not depend on the other rows, except for
rounding.

Letters: N rows of the batch, K symbols in a block, C most probable symbols.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from charlm.inference.sampler import Logprobs, Sampler, Settings, block_size

# The number of most probable symbols that are computed if a row asks for log-probabilities.
MAX_TOP = 5


class Piece(NamedTuple):
    """The next n symbols of a row.

    Attributes:
        ids: shape (n,).
        last: whether they are the last ones.
        logprobs: their log-probabilities, arrays (n,), (n, C) and (n, C); None: the row did not ask for them.
    """

    ids: np.ndarray
    last: bool
    logprobs: Logprobs | None = None


@dataclasses.dataclass(eq=False)
class Row:
    """A text that is drawn or scored.

    Attributes:
        ids: the symbols from which the text starts, at least one.
        length: the number of symbols to draw after them.
        first: the position in the text of the first symbol that is wanted. len(ids): only drawn symbols are.
        key: the data of the PRNG key (`jax.random.key_data`).
        settings: how a symbol is drawn, each a number.
        scored: whether the log-probabilities are wanted.
        position: the position of the last symbol whose drawing was dispatched.
        closed: whether the row is complete, cancelled or failed, so nothing more is wanted.
    """

    ids: np.ndarray
    length: int
    first: int
    key: np.ndarray
    settings: Settings
    scored: bool
    position: int = 0
    closed: bool = False

    @property
    def end(self) -> int:
        """The position of the last symbol of the text."""
        return len(self.ids) - 1 + self.length

    @property
    def done(self) -> bool:
        """Whether no further block of the row is to be dispatched."""
        return self.closed or self.position >= self.end


class Block(NamedTuple):
    """A block that was dispatched: its rows, the position of each before it, and the arrays that the device computes."""

    rows: list[Any]
    positions: list[int]
    ids_KN: jax.Array
    logprobs: Logprobs | None


class RowBatch:
    """Draws a block of several rows at a time.

    Args:
        sampler: from `make_sampler`.
        params: the parameters of the model.
        vocab_size: V.
        sizes: the numbers of rows that the batch may have, ascending. Each is compiled, and a batch of fewer rows is padded.
    """

    def __init__(self, sampler: Sampler, params: Any, vocab_size: int, sizes: Sequence[int]):
        self._sampler, self._vocab_size, self._sizes = sampler, vocab_size, sizes
        self._weights = sampler.prepare(params)
        self.forget()

    def compile(self) -> None:
        """Compile the programs that draw without filters, before the first request needs them."""
        key, settings = np.zeros(2, np.uint32), Settings(1.0, self._vocab_size, 1.0, False)
        # A batch of every size follows one of every size, because each such change is a program too.
        for size in itertools.chain(*itertools.product(self._sizes, repeat=2)):
            row = Row(np.zeros(1, np.int32), 1, 1, key, settings, False)
            fetch_pieces(self.dispatch([row] * size))
        self.forget()

    def forget(self) -> None:
        """Forget the states of all rows."""
        self._batch: tuple[list[Row], Any, Any] = [], self._sampler.start(self._weights, 1), np.zeros(1, np.int32)

    def dispatch(self, rows: Sequence[Row]) -> Block:
        """Dispatch a block of these rows and advance their positions. `fetch_pieces` waits for the symbols.

        Args:
            rows: at most as many rows as the largest size. A row that was not in the last block starts.
        """
        rows = list(rows)
        size = next(size for size in self._sizes if size >= len(rows))
        num_symbols = block_size(size, self._vocab_size)
        state, ids_N = self._regroup(rows, size)
        spare, positions = size - len(rows), [row.position for row in rows]
        prompt_KN, known_N = np.zeros((num_symbols, size), np.int32), np.zeros(size, np.int32)
        for i, row in enumerate(rows):
            ahead = row.ids[row.position + 1 : row.position + 1 + num_symbols]
            prompt_KN[: len(ahead), i], known_N[i] = ahead, len(ahead)
            row.position += num_symbols
        keys_N = jax.random.wrap_key_data(np.stack([row.key for row in rows] + [np.zeros_like(rows[0].key)] * spare))
        how = list(zip(*(row.settings for row in rows), *[Settings(1.0, self._vocab_size, 1.0, False)] * spare))
        settings = Settings(*(np.array(each, dtype) for each, dtype in zip(how, (np.float32, np.int32, np.float32, bool))))
        state, ids_N, ids_KN, logprobs = self._sampler.block(
            self._weights,
            state,
            ids_N,
            keys_N,
            np.array(positions + [0] * spare, np.int32),
            prompt_KN,
            known_N,
            settings,
            filtered=bool((settings.top_k < self._vocab_size).any() or (settings.top_p < 1).any()),
            num_top=min(MAX_TOP, self._vocab_size) if any(row.scored for row in rows) else None,
        )
        self._batch = rows, state, ids_N
        return Block(rows, positions, ids_KN, logprobs)

    def _regroup(self, rows: list[Row], size: int) -> tuple[Any, Any]:
        """Return the state and the last symbols of these rows: those after the last block, or the initial ones."""
        old_rows, state, ids_N = self._batch
        if old_rows == rows and len(ids_N) == size:
            return state, ids_N
        places = {id(row): i for i, row in enumerate(old_rows)}
        source_N, first_ids_N = np.full(size, -1, np.int32), np.zeros(size, np.int32)
        source_N[: len(rows)] = [places.get(id(row), -1) for row in rows]
        first_ids_N[: len(rows)] = [row.ids[0] for row in rows]
        return self._sampler.regroup(self._weights, state, ids_N, source_N, first_ids_N)


def fetch_pieces(block: Block) -> list[Piece | None]:
    """Wait for a block; return the symbols of each of its rows that are wanted, or None if there are none."""
    ids_KN, logprobs = jax.device_get((block.ids_KN, block.logprobs))
    return [_piece(row, i, start, ids_KN, logprobs) for i, (row, start) in enumerate(zip(block.rows, block.positions))]


def _piece(row: Row, i: int, position: int, ids_KN: np.ndarray, logprobs: Logprobs | None) -> Piece | None:
    """Return the symbols of the i-th row of a block, whose position was `position` before it."""
    start, end = max(row.first - position - 1, 0), min(row.end - position, len(ids_KN))
    if start >= end:
        return None
    found = Logprobs(*(each[start:end, i] for each in logprobs)) if row.scored else None
    return Piece(ids_KN[start:end, i], position + len(ids_KN) >= row.end, found)
