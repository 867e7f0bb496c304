"""Draw the texts of concurrent requests together: a batch whose rows are texts, which join and leave it between two blocks.

Every row has its own state, key, position, prompt and settings, so its text does not depend on the other rows, except for
rounding.

Letters: N rows of the batch, K symbols in a block, C most probable symbols.
"""

import asyncio
import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from charlm.inference.sampler import Logprobs, Sampler, Settings, block_size

# The number of most probable symbols that are computed if a row asks for log-probabilities.
MAX_TOP = 5
# The size of the batch that draws few rows.
_FEW_ROWS = 8


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


# Called in the thread of the event loop with a row, and its next piece or the error that ends it.
Deliver = Callable[["Row", Piece | Exception], None]


@dataclasses.dataclass(eq=False)
class Row:
    """A text that is drawn or scored.

    Attributes:
        ids: the symbols from which the text starts, at least one.
        length: the number of symbols to draw after them.
        first: the position in the text of the first symbol that is delivered. len(ids): only drawn symbols are.
        key: the data of the PRNG key (`jax.random.key_data`).
        settings: how a symbol is drawn, each a number.
        scored: whether the log-probabilities are delivered.
        deliver: receives the symbols.
        position: the position of the last symbol whose drawing was dispatched.
        closed: whether nothing more is delivered: the row is complete, cancelled or failed.
    """

    ids: np.ndarray
    length: int
    first: int
    key: np.ndarray
    settings: Settings
    scored: bool
    deliver: Deliver
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


class _Block(NamedTuple):
    """A block that was dispatched: its rows, the position of each before it, and the arrays that the device computes."""

    rows: list[Row]
    positions: list[int]
    ids_KN: jax.Array
    logprobs: Logprobs | None


class Closing(Exception):
    """The server ends, and does not draw the row to its end."""


@dataclasses.dataclass
class _Group:
    """The rows of a request that wait, and whether one of its rows was drawn already."""

    rows: collections.deque[Row]
    started: bool = False


class Batcher:
    """Draws the rows of all requests in one batch.

    The next block is dispatched before the symbols of the last one are read, so the device draws while the host delivers. All
    methods belong to the thread of the event loop, except `_step` and what it calls. `_step` dispatches a block and waits for
    the one before it in another thread, so that the event loop answers meanwhile.

    Args:
        sampler: from `make_sampler`.
        params: the parameters of the model.
        vocab_size: V.
        num_rows: the most rows that are drawn at the same time.
    """

    def __init__(self, sampler: Sampler, params: Any, vocab_size: int, num_rows: int):
        self._sampler, self._vocab_size, self._num_rows = sampler, vocab_size, num_rows
        self._weights = sampler.prepare(params)
        # A batch has one of few sizes, because each is compiled. A text alone is then drawn as fast as by the command.
        self._sizes = sorted({1, min(_FEW_ROWS, num_rows), num_rows})
        self._rows: list[Row] = []
        self._waiting: collections.deque[_Group] = collections.deque()
        self._work = asyncio.Event()
        self._block: _Block | None = None
        self.closing, self._aborted = False, False
        self._forget()

    def submit(self, rows: Iterable[Row]) -> None:
        """Add the rows of a request. Requests take turns: each gives one row to the batch before any gives the next."""
        if group := collections.deque(rows):
            self._waiting.append(_Group(group))
            self._work.set()
        if self._aborted:
            self.abort()

    def close(self) -> None:
        """End the requests of which no row was drawn yet. `closing` asks the server to submit no new one."""
        self.closing = True
        for group in self._waiting:
            for row in () if group.started else group.rows:
                self._deliver(row, Closing())

    def abort(self) -> None:
        """End all rows, and those that are submitted from now on."""
        self.close()
        self._aborted = True
        for row in [*self._drawn_rows(), *(row for group in self._waiting for row in group.rows)]:
            self._deliver(row, Closing())

    async def run(self) -> None:
        """Draw rows until this task is cancelled."""
        while True:
            self._admit()
            if not self._rows and not self._block:
                self._work.clear()
                await self._work.wait()
                continue
            last = self._block
            try:
                self._block, pieces = await asyncio.to_thread(self._step, list(self._rows), last)
            except Exception as error:
                for row in self._drawn_rows():
                    self._deliver(row, error)
                self._forget()
                continue
            for row, piece in zip(last.rows if last else (), pieces):
                if piece is not None:
                    self._deliver(row, piece)

    def _drawn_rows(self) -> list[Row]:
        """Return the rows of the batch, and those of the last block."""
        return [*self._rows, *(self._block.rows if self._block else ())]

    def _deliver(self, row: Row, piece: Piece | Exception) -> None:
        """Deliver the next symbols of a row or its error, unless it is closed."""
        if not row.closed:
            row.closed = isinstance(piece, Exception) or piece.last
            row.deliver(row, piece)

    def _admit(self) -> None:
        """Remove the rows that are complete, and let waiting rows join."""
        self._rows = [row for row in self._rows if not row.done]
        while self._waiting and len(self._rows) < self._num_rows:
            group = self._waiting.popleft()
            row = group.rows.popleft()
            if not row.done:
                self._rows.append(row)
                group.started = True
            if group.rows:
                self._waiting.append(group)

    def _forget(self) -> None:
        """Start again with an empty batch."""
        self._block = None
        self._batch: tuple[list[Row], Any, Any] = [], self._sampler.start(self._weights, 1), np.zeros(1, np.int32)

    def compile(self) -> None:
        """Compile the programs that draw without filters, before the first request needs them."""
        key, settings = np.zeros(2, np.uint32), Settings(1.0, self._vocab_size, 1.0, False)
        # A batch of every size follows one of every size, because each such change is a program too.
        for size in itertools.chain(*itertools.product(self._sizes, repeat=2)):
            row = Row(np.zeros(1, np.int32), 1, 1, key, settings, False, lambda row, piece: None)
            self._step([], self._dispatch([row] * size))
        self._forget()

    def _step(self, rows: list[Row], last: _Block | None) -> tuple[_Block | None, list[Piece | None]]:
        """Dispatch a block of these rows. Return it, and the pieces of the last one: None for a row that has none."""
        block = self._dispatch(rows) if rows else None
        if last is None:
            return block, []
        ids_KN, logprobs = jax.device_get((last.ids_KN, last.logprobs))
        return block, [_piece(row, i, start, ids_KN, logprobs) for i, (row, start) in enumerate(zip(last.rows, last.positions))]

    def _dispatch(self, rows: list[Row]) -> _Block:
        """Dispatch a block of these rows and advance their positions."""
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
        return _Block(rows, positions, ids_KN, logprobs)

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


def _piece(row: Row, i: int, position: int, ids_KN: np.ndarray, logprobs: Logprobs | None) -> Piece | None:
    """Return what a block delivers to a row, its i-th one, whose position was `position` before it."""
    start, end = max(row.first - position - 1, 0), min(row.end - position, len(ids_KN))
    if start >= end:
        return None
    found = Logprobs(*(each[start:end, i] for each in logprobs)) if row.scored else None
    return Piece(ids_KN[start:end, i], position + len(ids_KN) >= row.end, found)
