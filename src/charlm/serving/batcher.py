"""Draw the texts of concurrent requests together, in one batch (`inference.rows`)."""

import asyncio
import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from charlm.inference import rows as drawing
from charlm.inference.sampler import Sampler

# Called in the thread of the event loop with a row, and its next piece or the error that ends it.
Deliver = Callable[["Row", drawing.Piece | Exception], None]


@dataclasses.dataclass(eq=False)
class Row(drawing.Row):
    """A text of a request.

    Attributes:
        deliver: receives the symbols.
    """

    deliver: Deliver = dataclasses.field(kw_only=True)


class Closing(Exception):
    """The server ends, and does not draw the row to its end."""


@dataclasses.dataclass
class _Group:
    """The rows of a request that wait, and whether one of its rows was drawn already."""

    rows: collections.deque[Row]
    started: bool = False


class Batcher:
    """Draws the rows of all requests in one batch.

    All methods belong to the thread of the event loop. Only `RowBatch.draw`, which dispatches a block and waits for it, runs in
    another thread, so that the event loop answers meanwhile.

    Args:
        sampler: from `make_sampler`.
        params: the parameters of the model.
        vocab_size: V.
        num_rows: the most rows that are drawn at the same time.
    """

    def __init__(self, sampler: Sampler, params: Any, vocab_size: int, num_rows: int):
        # Two sizes, so that a text alone is drawn as fast as by the command.
        self._batch = drawing.RowBatch(sampler, params, vocab_size, sorted({1, num_rows}))
        self._num_rows = num_rows
        self._rows: list[Row] = []
        self._waiting: collections.deque[_Group] = collections.deque()
        self._work = asyncio.Event()
        self.closing, self._aborted = False, False

    def compile(self) -> None:
        """Compile the programs that draw without filters, before the first request needs them."""
        self._batch.compile()

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
                self._fail(row, Closing())

    def abort(self) -> None:
        """End all rows, and those that are submitted from now on."""
        self.close()
        self._aborted = True
        for row in [*self._rows, *(row for group in self._waiting for row in group.rows)]:
            self._fail(row, Closing())

    async def run(self) -> None:
        """Draw rows until this task is cancelled."""
        while True:
            self._admit()
            if not self._rows:
                self._work.clear()
                await self._work.wait()
                continue
            rows = list(self._rows)
            try:
                pieces = await asyncio.to_thread(self._batch.draw, rows)
            except Exception as error:
                self._batch.forget()
                for row in rows:
                    self._fail(row, error)
                continue
            for row, piece in zip(rows, pieces):
                if piece is not None and not row.cancelled:
                    row.deliver(row, piece)

    def _fail(self, row: Row, error: Exception) -> None:
        if not row.done:
            row.cancelled = True
            row.deliver(row, error)

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
