"""Draw texts together: a batch whose rows are texts with any prompts and lengths, which join and leave it between two blocks.

Every row has its own state, key, position, prompt and settings, so its text does not depend on the other rows, except for
rounding.

Letters: N rows of the batch, K symbols in a block, C most probable symbols.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from charlm.inference.sampler import Logprobs, Sampler, Settings, block_size

# The number of most probable symbols that are computed if a row asks for log-probabilities.
MAX_TOP = 5
# The most symbols in a block. Texts join and leave between two blocks.
_BLOCK = 32


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
        position: the position of the last symbol that is known to the model.
        last: this symbol.
        cancelled: whether the row is to leave the batch.
    """

    ids: np.ndarray
    length: int
    first: int
    key: np.ndarray
    settings: Settings
    scored: bool
    position: int = 0
    last: int = 0
    cancelled: bool = False

    def __post_init__(self):
        self.last = int(self.ids[0])

    @property
    def end(self) -> int:
        """The position of the last symbol of the text."""
        return len(self.ids) - 1 + self.length

    @property
    def done(self) -> bool:
        """Whether the text is complete or cancelled."""
        return self.cancelled or self.position >= self.end


class RowBatch:
    """Draws a block of up to N rows at a time.

    Args:
        sampler: from `make_sampler`.
        params: the parameters of the model.
        vocab_size: V.
        sizes: the numbers of rows that the batch may have, ascending. Each is compiled, and a batch of fewer rows is padded.
    """

    def __init__(self, sampler: Sampler, params: Any, vocab_size: int, sizes: Sequence[int]):
        self._sampler, self._vocab_size = sampler, vocab_size
        self._weights = sampler.prepare(params)
        self._sizes = sizes
        self.forget()

    def compile(self) -> None:
        """Compile the programs that draw without filters, before the first request needs them."""
        key, settings = np.zeros(2, np.uint32), Settings(1.0, self._vocab_size, 1.0, False)
        for size in self._sizes:
            row = Row(np.zeros(1, np.int32), 1, 1, key, settings, False)
            self.draw([row] * size)
        self.forget()

    def forget(self) -> None:
        """Forget the states of all rows."""
        self._batch: tuple[list[Row], int, Any] = ([], 1, self._sampler.start(self._weights, 1))

    def draw(self, rows: Sequence[Row]) -> list[Piece | None]:
        """Draw a block of every row; return the symbols of each that are wanted, or None if there are none.

        Args:
            rows: at most as many rows as the largest size. A row that was not in the last block starts.
        """
        rows = list(rows)
        size = next(size for size in self._sizes if size >= len(rows))
        num_symbols = min(_BLOCK, block_size(size, self._vocab_size))
        state = self._regroup(rows, size)
        spare = size - len(rows)
        prompt_KN, known_N = np.zeros((num_symbols, size), np.int32), np.zeros(size, np.int32)
        for i, row in enumerate(rows):
            ahead = row.ids[row.position + 1 : row.position + 1 + num_symbols]
            prompt_KN[: len(ahead), i], known_N[i] = ahead, len(ahead)
        keys_N = jax.random.wrap_key_data(np.stack([row.key for row in rows] + [np.zeros_like(rows[0].key)] * spare))
        how = list(zip(*(row.settings for row in rows), *[Settings(1.0, self._vocab_size, 1.0, False)] * spare))
        settings = Settings(*(np.array(each, dtype) for each, dtype in zip(how, (np.float32, np.int32, np.float32, bool))))
        last_N, position_N = (
            np.array([getattr(row, name) for row in rows] + [0] * spare, np.int32) for name in ("last", "position")
        )
        state, _, ids_KN, logprobs = self._sampler.block(
            self._weights,
            state,
            last_N,
            keys_N,
            position_N,
            prompt_KN,
            known_N,
            settings,
            filtered=bool((settings.top_k < self._vocab_size).any() or (settings.top_p < 1).any()),
            num_top=min(MAX_TOP, self._vocab_size) if any(row.scored for row in rows) else None,
        )
        self._batch = rows, size, state
        ids_KN, logprobs = jax.device_get((ids_KN, logprobs))
        return [self._advance(row, i, ids_KN, logprobs) for i, row in enumerate(rows)]

    def _regroup(self, rows: list[Row], size: int) -> Any:
        """Return the state of these rows: that of the last block where they were in it, else the initial state."""
        old_rows, old_size, state = self._batch
        if old_size == size and old_rows == rows:
            return state
        places = {id(row): i for i, row in enumerate(old_rows)}
        source_N = np.full(size, -1, np.int32)
        source_N[: len(rows)] = [places.get(id(row), -1) for row in rows]
        return self._sampler.regroup(self._weights, state, source_N)

    @staticmethod
    def _advance(row: Row, i: int, ids_KN: np.ndarray, logprobs: Logprobs | None) -> Piece | None:
        """Move a row to the end of a block; return its new symbols."""
        start, end = max(row.first - row.position - 1, 0), min(row.end - row.position, len(ids_KN))
        row.position, row.last = row.position + len(ids_KN), int(ids_KN[-1, i])
        if start >= end:
            return None
        found = Logprobs(*(each[start:end, i] for each in logprobs)) if row.scored else None
        return Piece(ids_KN[start:end, i], row.position >= row.end, found)
