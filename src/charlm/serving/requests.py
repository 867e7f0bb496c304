"""Read the body of a completion request, as OpenAI's clients write it, and describe errors as OpenAI does."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from charlm.inference.rows import MAX_TOP


class Limits(NamedTuple):
    """What a server accepts.

    Attributes:
        requests: the most requests that are answered or wait at the same time.
        choices: the most texts of a request: its prompts times `n`.
        prompt: the most symbols of a prompt.
        max_tokens: the most symbols that are drawn for a text.
        body: the most bytes of a body.
        stops: the most stop strings.
        body_seconds: the most seconds in which a body must arrive.
    """

    requests: int = 256
    choices: int = 64
    prompt: int = 32_768
    max_tokens: int = 32_768
    body: int = 1 << 20
    stops: int = 4
    body_seconds: float = 30.0


class ApiError(Exception):
    """An error that is answered with a status code and OpenAI's JSON.

    Attributes:
        status: the HTTP status code.
        message: what is wrong, on one line.
        param: the field of the body; None: no single one.
        code: a name of the error for programs; None: none.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's JSON of the error."""
        kind = {429: "rate_limit_error"}.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A completion request. The fields have OpenAI's names. A field that is None has the value of the run's `config.sample`."""

    prompt: tuple[str | None, ...] = (None,)
    max_tokens: int = 16
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    echo: bool = False


# (name, value) -> the value. It raises ApiError for a value of another type or out of range.
_Check = Callable[[str, Any], Any]


def parse_request(body: bytes, model_name: str, limits: Limits) -> CompletionRequest:
    """Return the request in a body.

    Args:
        body: JSON.
        model_name: the name of the model that is served.
        limits: what the server accepts.

    Raises:
        ApiError: the body is not a JSON object, a field is unknown, of a wrong type or out of range (400), or it asks for
            another model (404).
    """
    fields = {name: value for name, value in _parse_object(body).items() if value is not None}
    model = _string("model", fields.pop("model", model_name))
    if model != model_name:
        raise unknown_model(model, model_name)
    checks: dict[str, _Check] = {
        "prompt": _one_or_more_strings(limits.choices),
        "max_tokens": _integer(0, limits.max_tokens),
        "temperature": _number(0.0, 3.4e38),
        "top_p": _number(0.0, 1.0),
        "top_k": _integer(1, 1 << 31),
        "seed": _integer(0, (1 << 32) - 1),
        "n": _integer(1, limits.choices),
        "stop": _one_or_more_strings(limits.stops),
        "stream": _boolean,
        "logprobs": _integer(0, MAX_TOP),
        "echo": _boolean,
    }
    found = {name: check(name, fields.pop(name)) for name, check in checks.items() if name in fields}
    options = fields.pop("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise ApiError(400, "stream_options must be an object with include_usage", "stream_options")
    if options:
        found["include_usage"] = _boolean("include_usage", options.get("include_usage") or False)
    _check_rest(fields, found.get("n", 1))
    if "" in found.get("stop", ()):
        raise ApiError(400, "stop must not be an empty string", "stop")
    request = CompletionRequest(**found)
    if (choices := len(request.prompt) * request.n) > limits.choices:
        raise ApiError(400, f"{choices} texts are too many; a request may ask for {limits.choices}", "n")
    return request


def unknown_model(name: str, known: str) -> ApiError:
    """Return the error for a request for another model than the one that is served."""
    return ApiError(404, f"the model {_shown(name)} does not exist; this server has {known!r}", "model", "model_not_found")


def _parse_object(body: bytes) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error) or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {_shown(value)}; it must be a JSON object")
    return value


def _check_rest(fields: Mapping[str, Any], n: int) -> None:
    """Raise ApiError for a field that is unknown, or that asks for what this server does not do."""
    neutral = {"best_of": (n,), "suffix": ("",), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},)}
    for name, value in fields.items():
        if name in neutral and value not in neutral[name]:
            raise ApiError(400, f"{name} is {_shown(value)}; this server supports only {neutral[name][0]!r}", name)
        if name not in neutral and name != "user":
            raise ApiError(400, f"unknown field {_shown(name)}", name[:100], "unknown_parameter")


def _shown(value: Any) -> str:
    """Return a value of a body in at most 100 characters. `ascii` escapes what JSON in UTF-8 cannot hold."""
    try:
        text = ascii(value)
    except RecursionError:
        return f"a deep {type(value).__name__}"
    return text if len(text) <= 100 else text[:97] + "..."


def _refuse(name: str, value: Any, expected: str) -> ApiError:
    return ApiError(400, f"{name} is {_shown(value)}; it must be {expected}", name)


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _refuse(name, value, "a string")
    return value


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "true or false")
    return value


def _integer(low: int, high: int) -> _Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refuse(name, value, f"an integer between {low} and {high}")
        return value

    return check


def _number(low: float, high: float) -> _Check:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise _refuse(name, value, f"a number between {low:g} and {high:g}")
        return float(value)

    return check


def _one_or_more_strings(most: int) -> _Check:
    def check(name: str, value: Any) -> tuple[str, ...]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not 1 <= len(values) <= most or not all(isinstance(each, str) for each in values):
            raise _refuse(name, value, f"a string, or a list of 1 to {most} strings")
        return tuple(values)

    return check
