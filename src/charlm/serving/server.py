"""The server: OpenAI's completions over HTTP for one model, and the page that holds the model.

    client --HTTP--> uvicorn --> Starlette --requests--> completions --> batcher --> the jitted sampler

The server reads no file that a request names. Everything except the sampler runs in one event loop.
"""

import asyncio
import contextlib
import functools
import json
import math
import resource
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from charlm.runs.language_model import LanguageModel
from charlm.serving.batcher import Closing
from charlm.serving.completions import Choice, Completions, new_seed
from charlm.serving.page import build_page, page_text
from charlm.serving.requests import ApiError, Limits, parse_request, unknown_model
from charlm.system.errors import ConfigError, UserError

# The number of characters of the text that the page shows.
_PAGE_LENGTH = 2000


class Server:
    """The answers to the requests for one model.

    Args:
        model: the model.
        num_rows: the most texts that are drawn at the same time.
        limits: what is accepted; None: the defaults.
        hosts: the names of this server that a request may use; None: any. A page of another site can make a browser send a
            request to this machine, but only under the name of that site.

    Attributes:
        app: the ASGI application.
    """

    def __init__(self, model: LanguageModel, num_rows: int = 32, limits: Limits | None = None, hosts: list[str] | None = None):
        self._model, self._limits = model, (limits := limits or Limits())
        self._name = model.path.name if model.path and model.path.name else "charlm"
        self._created = int(time.time())
        self._completions = Completions(model, num_rows, limits)
        self._page: asyncio.Task[str] | None = None
        self.app = Starlette(
            routes=[
                Route("/", self._get_page),
                Route("/v1/models", self._list_models),
                Route("/v1/models/{name:path}", self._get_model),
                Route("/v1/completions", self._complete, methods=["POST"], middleware=[Middleware(_Limiter, limits.requests)]),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers={
                ApiError: _answer_error,
                HTTPException: _answer_http_error,
                ClientDisconnect: _answer_nobody,
                Exception: _answer_failure,
            },
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        del app
        batcher = self._completions.batcher
        await asyncio.to_thread(batcher.compile)
        drawing = asyncio.create_task(batcher.run())
        yield
        batcher.abort()
        drawing.cancel()
        await asyncio.wait([drawing])

    def close(self, grace: float) -> None:
        """Answer new requests with 503, end those that wait, and after `grace` seconds all others."""
        self._completions.batcher.close()
        asyncio.get_running_loop().call_later(grace, self._completions.batcher.abort)

    async def _list_models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._describe()]})

    async def _get_model(self, request: Request) -> Response:
        if (name := request.path_params["name"]) != self._name:
            raise unknown_model(name, self._name)
        return _json(self._describe())

    def _describe(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._created, "owned_by": "charlm"}

    async def _get_page(self, request: Request) -> Response:
        """Answer with the page that holds the model. It is built at the first request."""
        if self._page is None:
            self._page = asyncio.create_task(asyncio.to_thread(self._build_page))
        try:
            return HTMLResponse(await asyncio.shield(self._page), headers=_HEADERS)
        except UserError as error:
            raise ApiError(404, f"the page of this model cannot be built: {error}") from None

    def _build_page(self) -> str:
        return build_page(self._model, *page_text(self._model, _PAGE_LENGTH))

    async def _complete(self, request: Request) -> Response:
        """Answer a completion request."""
        if self._completions.batcher.closing:
            raise _closing()
        asked = parse_request(await self._read_body(request), self._name, self._limits)
        seed = new_seed() if asked.seed is None else asked.seed
        prompts = self._completions.read_prompts(asked, seed)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        answer = _Answer(
            head | {"model": self._name, "seed": seed},
            self._completions.answer(asked, seed, prompts),
            sum(len(prompt.ids) for prompt in prompts),
        )
        try:
            if asked.stream:
                return _EventStream(answer, await anext(answer.parts), asked.include_usage)
            return await answer.whole(request)
        except Closing:
            raise _closing() from None

    async def _read_body(self, request: Request) -> bytes:
        """Return the body of a request. Raises ApiError if it is no JSON, too large, or arrives too slowly."""
        # A page of another site cannot send this type without permission, which this server does not give.
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the Content-Type must be application/json")
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > self._limits.body:
                        raise ApiError(413, f"the body is too large; at most {self._limits.body:,} bytes are read")
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self._limits.body_seconds:g} seconds") from None
        return bytes(body)


class _Answer:
    """The answer to a completion request: the fields of its JSON, the parts of its texts, and the number of symbols read."""

    def __init__(self, head: dict[str, Any], parts: AsyncIterator[Choice], num_read: int):
        self._head, self.parts, self._num_read, self._num_drawn = head, parts, num_read, 0

    def to_json(self, *choices: Choice) -> dict[str, Any]:
        """Return OpenAI's JSON with these parts of the texts."""
        self._num_drawn += sum(choice.num_drawn for choice in choices)
        return self._head | {"choices": [choice.to_json() for choice in choices]}

    def usage(self) -> dict[str, Any]:
        """Return the field that counts the symbols."""
        total = self._num_read + self._num_drawn
        return {"usage": {"prompt_tokens": self._num_read, "completion_tokens": self._num_drawn, "total_tokens": total}}

    async def whole(self, request: Request) -> Response:
        """Return the response with all texts at once. Raises ClientDisconnect if the client goes away before."""
        tasks = collecting, leaving = asyncio.create_task(self._collect()), asyncio.create_task(_disconnect(request))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ClientDisconnect
            return _json(self.to_json(*collecting.result()) | self.usage())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _collect(self) -> list[Choice]:
        """Return the whole texts, in order."""
        choices: dict[int, Choice] = {}
        async with contextlib.aclosing(self.parts):
            async for part in self.parts:
                if part.index in choices:
                    choices[part.index].extend(part)
                else:
                    choices[part.index] = part
        return [choices[index] for index in sorted(choices)]


class _EventStream(StreamingResponse):
    """Server-sent events: one for each part of a text, and the end."""

    def __init__(self, answer: _Answer, first: Choice, include_usage: bool):
        super().__init__(self._events(answer, first, include_usage), media_type="text/event-stream", headers=_HEADERS)
        self._parts = answer.parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The texts end when the client goes away, even before the first event.
        async with contextlib.aclosing(self._parts):
            await super().__call__(scope, receive, send)

    @staticmethod
    async def _events(answer: _Answer, first: Choice, include_usage: bool) -> AsyncIterator[str]:
        try:
            yield _event(answer.to_json(first))
            async for part in answer.parts:
                yield _event(answer.to_json(part))
            if include_usage:
                yield _event(answer.to_json() | answer.usage())
            yield "data: [DONE]\n\n"
        except Closing:
            yield _event(_closing().to_json())
        except Exception:
            yield _event(ApiError(500, "the text could not be drawn").to_json())
            raise


class _Limiter:
    """ASGI middleware that answers with 429 while `limit` requests are open."""

    def __init__(self, app: ASGIApp, limit: int):
        self._app, self._limit, self._open = app, limit, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._open >= self._limit:
            raise ApiError(429, f"{self._open} requests are being answered; try again later", code="queue_full")
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1


async def _disconnect(request: Request) -> None:
    """Return when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def _json(value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    # ASCII, because UTF-8 cannot hold half of a surrogate pair, which a message may quote.
    return Response(json.dumps(value), status, {**_HEADERS, **headers}, "application/json")


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _closing() -> ApiError:
    return ApiError(503, "the server is closing", code="server_closing")


async def _answer_error(request: Request, error: ApiError) -> Response:
    return _json(error.to_json(), error.status, {"Retry-After": "1"} if error.status in (429, 503) else {})


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {ascii(request.url.path)}: {error.detail}"
    return _json(ApiError(error.status_code, message).to_json(), error.status_code, error.headers or {})


async def _answer_failure(request: Request, error: Exception) -> Response:
    return _json(ApiError(500, "the server failed; its log has the error").to_json(), 500)


async def _answer_nobody(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # Nobody reads it.


class _Uvicorn(uvicorn.Server):
    """uvicorn, which closes `server` at SIGINT and SIGTERM, and returns instead of raising the signal again."""

    def __init__(self, config: uvicorn.Config, server: Server, grace: float, ready: Callable[[], None]):
        super().__init__(config)
        self._close, self._ready, self.caught = functools.partial(server.close, grace), ready, 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.caught:
            self.caught = sig
            self._loop.call_soon_threadsafe(self._close)
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises ConfigError if the address cannot be used."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {why}") from None


def serve(server: Server, listener: socket.socket, grace: float, ready: Callable[[], None]) -> int:
    """Answer requests until SIGINT or SIGTERM; return the number of the signal.

    Args:
        server: the answers.
        listener: from `listen`.
        grace: the seconds in which the texts that are being drawn may be finished.
        ready: called once the server answers.
    """
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(grace) + 2,
    )
    # Every client takes a file descriptor, and the usual limit is 1,024.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65_536)), hard))
    # The thread that draws waits for Python's lock up to this long, 5 ms by default, which is as long as a block takes.
    sys.setswitchinterval(0.0005)
    runner = _Uvicorn(config, server, grace, ready)
    runner.run([listener])
    return runner.caught
