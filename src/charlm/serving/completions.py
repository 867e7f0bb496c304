"""Answer completion requests with a model: texts that continue prompts, and the log-probabilities of their symbols.

Letters: N symbols, C most probable symbols.
"""

import asyncio
import copy
import dataclasses
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from charlm.data.documents import Documents
from charlm.data.vocab import Vocab
from charlm.inference.decoding import SampleDecoder
from charlm.inference.prompt import make_prompt
from charlm.inference.rows import MAX_TOP, Piece
from charlm.inference.sampler import Settings, sample_keys
from charlm.inference.scorer import cut_text, min_text_length
from charlm.runs.language_model import LanguageModel
from charlm.serving.batcher import Batcher, Row
from charlm.serving.requests import ApiError, CompletionRequest, Limits
from charlm.system.errors import ConfigError

# The settings of a row that only scores.
_NO_DRAW = np.zeros(2, np.uint32), Settings(1.0, 1, 1.0, True)


@dataclasses.dataclass
class Choice:
    """The next part of one of the texts of a request.

    Attributes:
        index: the number of the text in the request.
        text: the part.
        num_drawn: the number of symbols in it that were drawn.
        logprobs: its tokens, in OpenAI's legacy format; None: the request does not ask for them.
        finish_reason: `stop` or `length` in the last part of a text.
    """

    index: int
    text: str
    num_drawn: int = 0
    logprobs: dict[str, list[Any]] | None = None
    finish_reason: str | None = None

    def extend(self, part: "Choice") -> None:
        """Append the next part of the same text."""
        self.text += part.text
        self.num_drawn += part.num_drawn
        self.finish_reason = part.finish_reason
        for name, values in (part.logprobs or {}).items():
            self.logprobs[name] += values

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's JSON object of this part."""
        return {"index": self.index, "text": self.text, "logprobs": self.logprobs, "finish_reason": self.finish_reason}


class Tokens:
    """The tokens of a text with their log-probabilities. A token is a symbol.

    Args:
        vocab: the map between symbols and ids.
        num_top: the number of most probable tokens to report beside each token.
        offset: the position in the text of the first character that is added.
    """

    def __init__(self, vocab: Vocab, num_top: int, offset: int = 0):
        self._vocab, self._num_top, self._chars = vocab, num_top, offset
        self._held: list[tuple[str, float | None, dict[str, float] | None, int]] = []

    def add(self, ids_N: np.ndarray, logprobs_N: np.ndarray, top_NC: np.ndarray, top_ids_NC: np.ndarray) -> None:
        """Add symbols. A log-probability that is nan is not known."""
        for id, logprob, tops, top_ids in zip(ids_N.tolist(), logprobs_N.tolist(), top_NC.tolist(), top_ids_NC.tolist()):
            token = self._name(id)
            # A byte that continues a character has the position of this character.
            self._chars += self._vocab.kind == "chars" or id & 0xC0 != 0x80
            if logprob != logprob:
                self._held.append((token, None, None, self._chars - 1))
                continue
            top = {self._name(each): value for each, value in zip(top_ids[: self._num_top], tops)}
            self._held.append((token, logprob, top | {token: logprob}, self._chars - 1))

    def take(self, end: int) -> dict[str, list[Any]]:
        """Return the tokens of the characters before the position `end` that were not taken yet."""
        count = next((i for i, (*_, at) in enumerate(self._held) if at >= end), len(self._held))
        taken, self._held = self._held[:count], self._held[count:]
        columns = zip(*taken) if taken else ([] for _ in range(4))
        return dict(zip(("tokens", "token_logprobs", "top_logprobs", "text_offset"), map(list, columns)))

    def _name(self, id: int) -> str:
        if self._vocab.kind == "bytes" and id >= 0x80:
            return f"bytes:\\x{id:02x}"
        return self._vocab.symbols[id]


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt, normalised as the corpus, and the ids from which its texts start (`prompt.make_prompt`)."""

    text: str
    ids: np.ndarray


class Completions:
    """Answers completion requests with one model.

    Args:
        model: the model.
        num_rows: the most texts that are drawn at the same time.
        limits: what is accepted.

    Attributes:
        batcher: draws the texts.
    """

    def __init__(self, model: LanguageModel, num_rows: int, limits: Limits):
        self._vocab, self._limits, self._boundary = model.vocab, limits, model.boundary
        self._config = copy.deepcopy(model.config).unlock()
        self._config.sample.random_prompt = None  # It would need the training text.
        self._default_prompt = self._config.sample.prompt
        documents = Documents.from_config(self._config.data)
        self._ends = (documents.boundary,) if documents else ()
        sampler = model.make_sampler(model.config.sample.window, model.config.sample.dtype)
        self.batcher = Batcher(sampler, model.params, model.vocab.size, num_rows)

    def read_prompts(self, request: CompletionRequest, seed: int) -> list[Prompt]:
        """Return the prompts of a request. Raises ApiError if the model cannot read or score one of them."""
        window, batching = self._config.sample.window, self._config.batching
        if request.echo and request.logprobs is not None and window not in (0, batching.loss_on == "last" and batching.seq_len):
            message = f"sample.window of this model is {window}, so the server cannot score a prompt; use charlm.evaluate"
            raise ApiError(422, message, "logprobs")
        return [self._read_prompt(prompt, seed) for prompt in request.prompt]

    async def answer(self, request: CompletionRequest, seed: int, prompts: Sequence[Prompt]) -> AsyncIterator[Choice]:
        """Yield the parts of all texts as they are drawn. The texts are those of the command `sample` with this seed.

        Raises:
            Closing: the server ends.
        """
        rows: list[Row] = []
        try:
            async for choice in self._answer(request, seed, prompts, rows):
                yield choice
        finally:
            for row in rows:
                row.closed = True

    async def _answer(
        self, request: CompletionRequest, seed: int, prompts: Sequence[Prompt], rows: list[Row]
    ) -> AsyncIterator[Choice]:
        """Yield as `answer` does. The rows are added to `rows`."""
        num_top, choices = request.logprobs, [each for each in prompts for _ in range(request.n)]
        finished = None if request.max_tokens else "length"
        if request.echo or finished:
            logprobs: dict[Prompt, Any] = {}
            if num_top is not None:
                logprobs = await self._score(num_top, prompts if request.echo else (), rows)
            for index, prompt in enumerate(choices):
                tokens = None
                if num_top is not None:
                    tokens = copy.deepcopy(logprobs.get(prompt, Tokens(self._vocab, num_top).take(0)))
                yield Choice(index, prompt.text if request.echo else "", 0, tokens, finished)
        if finished:
            return
        queue: asyncio.Queue[tuple[Row, Piece | Exception]] = asyncio.Queue()
        settings, stops = self._settings(request), (*request.stop, *self._ends)
        texts: dict[Row, _Text] = {}
        for index, prompt in enumerate(choices):
            key = np.asarray(_row_key(np.uint32(seed), index))
            row = Row(prompt.ids, request.max_tokens, len(prompt.ids), key, settings, num_top is not None, deliver=_put(queue))
            texts[row] = _Text(index, self._vocab, stops, num_top, len(prompt.text) if request.echo else 0)
        rows.extend(texts)
        self.batcher.submit(texts)
        open_rows = set(texts)
        async for row, piece in _receive(queue, open_rows):
            choice = texts[row].add(piece)
            if choice.finish_reason:
                row.closed = True
                open_rows.discard(row)
            if choice.text or choice.finish_reason:
                yield choice

    def _settings(self, request: CompletionRequest) -> Settings:
        """Return how symbols are drawn: as the request says, else as `config.sample` does."""
        found = Settings.from_config(self._config.sample, self._vocab.size)
        if request.temperature is not None:
            greedy = request.temperature == 0
            found = found._replace(temperature=1.0 if greedy else max(request.temperature, 1.2e-38), greedy=greedy)
        if request.top_k is not None:
            found = found._replace(top_k=min(request.top_k, self._vocab.size))
        return found if request.top_p is None else found._replace(top_p=request.top_p)

    def _read_prompt(self, prompt: str | None, seed: int) -> Prompt:
        """Return a prompt. Raises ApiError if it cannot be read."""
        self._config.sample.prompt = self._default_prompt if prompt is None else prompt
        try:
            text, ids = make_prompt(self._config, self._vocab, None, seed)
        except ConfigError as error:
            raise ApiError(422, str(error).replace("sample.prompt", "prompt"), "prompt") from None
        if len(ids) > self._limits.prompt:
            message = f"the prompt has {len(ids):,} symbols; at most {self._limits.prompt:,} are read"
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        return Prompt(text, ids)

    async def _score(self, num_top: int, prompts: Sequence[Prompt], rows: list[Row]) -> dict[Prompt, dict[str, list[Any]]]:
        """Return the log-probabilities of prompts. Each is scored in the streams of the command `evaluate`."""
        queue: asyncio.Queue[tuple[Row, Piece | Exception]] = asyncio.Queue()
        found: dict[Prompt, tuple[np.ndarray, ...]] = {}
        placed: dict[Row, tuple[tuple[np.ndarray, ...], int]] = {}
        for prompt in prompts:
            shape_NC = len(prompt.ids), min(MAX_TOP, self._vocab.size)
            found[prompt] = np.full(len(prompt.ids), np.nan), np.zeros(shape_NC), np.zeros(shape_NC, int)
            for row, first in self._score_rows(prompt, queue):
                placed[row] = found[prompt], first
        rows.extend(placed)
        self.batcher.submit(placed)
        open_rows = set(placed)
        async for row, piece in _receive(queue, open_rows):
            scores, at = placed[row]
            for whole, part in zip(scores, piece.logprobs):
                whole[at : at + len(part)] = part
            placed[row] = scores, at + len(piece.ids)
            if piece.last:
                open_rows.discard(row)
        return {prompt: self._tokens(prompt, num_top, *scores) for prompt, scores in found.items()}

    def _score_rows(self, prompt: Prompt, queue: asyncio.Queue) -> Iterator[tuple[Row, int]]:
        """Yield the rows that score a prompt, and for each the position of the first symbol that it scores."""
        ids = prompt.ids
        if len(ids) < min_text_length(self._config.batching):
            return
        for start, first, end in zip(*cut_text(ids, self._config.batching, self._config.eval, self._boundary)):
            yield Row(ids[start:end], 0, first - start, *_NO_DRAW, True, deliver=_put(queue)), first

    def _tokens(self, prompt: Prompt, num_top: int, *scores: np.ndarray) -> dict[str, list[Any]]:
        """Return the tokens of a prompt. The symbol after which a text without a prompt starts is none of them."""
        tokens = Tokens(self._vocab, num_top)
        start = len(prompt.ids) if not prompt.text else int(self._boundary is not None)
        tokens.add(prompt.ids[start:], *(each[start:] for each in scores))
        return tokens.take(len(prompt.text))


@jax.jit
def _row_key(seed: jax.Array, index: jax.Array) -> jax.Array:
    """Return the data of the PRNG key of a sample (`sampler.sample_keys`)."""
    return jax.random.key_data(sample_keys(seed, 1, index)[0])


class _Text:
    """One text of a request, as it is drawn."""

    def __init__(self, index: int, vocab: Vocab, stops: Sequence[str], num_top: int | None, offset: int):
        self._index, self._end, self._vocab = index, offset, vocab
        self._decoder = SampleDecoder(vocab, stops)
        self._tokens = None if num_top is None else Tokens(vocab, num_top, offset)

    def add(self, piece: Piece) -> Choice:
        """Return what the next symbols add to the text."""
        text = self._decoder.feed(piece.ids)
        if piece.last:
            text += self._decoder.flush()
        reason = "stop" if self._decoder.stopped else "length" if piece.last else None
        self._end += len(text)
        num_drawn = len(text.encode()) if self._vocab.kind == "bytes" else len(text)
        if self._tokens is None:
            return Choice(self._index, text, num_drawn, None, reason)
        self._tokens.add(piece.ids, *piece.logprobs)
        return Choice(self._index, text, num_drawn, self._tokens.take(self._end), reason)


def _put(queue: asyncio.Queue) -> Any:
    """Return the function that delivers what a row draws into a queue."""
    return lambda row, piece: queue.put_nowait((row, piece))


async def _receive(queue: asyncio.Queue, open_rows: set[Row]) -> AsyncIterator[tuple[Row, Piece]]:
    """Yield the pieces of rows until the caller has removed all rows from the set. Raises the error that ends a row."""
    while open_rows:
        row, piece = await queue.get()
        if row not in open_rows:
            continue
        if isinstance(piece, Exception):
            raise piece
        yield row, piece


def new_seed() -> int:
    """Return a seed for a request that names none."""
    return secrets.randbits(32)
