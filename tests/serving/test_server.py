"""The server in this process, without a network: what it answers, and what it refuses."""

import asyncio
import contextlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import TEXT, small_model

for package in ("starlette", "uvicorn", "openai"):
    pytest.importorskip(package)

from starlette.testclient import TestClient  # noqa: E402

from charlm.serving.batcher import Closing  # noqa: E402
from charlm.serving.completions import Completions  # noqa: E402
from charlm.serving.requests import CompletionRequest, Limits  # noqa: E402
from charlm.serving.server import Server  # noqa: E402

LIMITS = Limits(requests=3, choices=6, prompt=300, max_tokens=200, body=20_000)


def served(model, **kwargs):
    return TestClient(Server(model, num_rows=4, limits=LIMITS, **kwargs).app, base_url="http://localhost")


@pytest.fixture(scope="module")
def model():
    return small_model("gru", scale=1.0, **{"sample.temperature": 0.7, "eval.num_streams": 3, "eval.context": 7})


@pytest.fixture(scope="module")
def client(model):
    with served(model, hosts=["localhost"]) as client:
        yield client


def complete(client, **fields):
    response = client.post("/v1/completions", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def texts_of(answer):
    return [choice["text"] for choice in answer["choices"]]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "the cat", "max_tokens": 70, "seed": 3},
        {"max_tokens": 40, "seed": (1 << 32) - 1, "temperature": 1.3},
        {"prompt": "that was", "max_tokens": 33, "seed": 5, "top_k": 3},
        {"prompt": "a", "max_tokens": 5, "seed": 5, "top_p": 0.6, "stop": ["zz", "t"]},
    ],
)
def test_the_text_is_that_of_the_command(client, model, fields):
    length, stops = fields["max_tokens"], fields.get("stop", [])
    named = {name: value for name, value in fields.items() if name not in ("max_tokens", "stop")}
    expected = model.sample(length=length, **named)
    cut = min([expected.find(stop) for stop in stops if stop in expected], default=length)
    (choice,) = complete(client, **fields)["choices"]
    assert choice["text"] == expected[:cut] and choice["finish_reason"] == ("stop" if cut < length else "length")


def test_several_texts_are_those_of_the_command(client, model):
    answer = complete(client, prompt="the", max_tokens=20, n=3, seed=7, echo=True)
    assert texts_of(answer) == ["the" + text for text in model.sample("the", 20, seed=7, num_samples=3)]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 60, "total_tokens": 63}
    prompts = ["the cat", "a dog", "that"]
    assert texts_of(complete(client, prompt=prompts, max_tokens=20, seed=7)) == model.sample(prompts, 20, seed=7)
    assert texts_of(complete(client, prompt="the", max_tokens=30, temperature=0)) == [model.sample("the", 30, greedy=True)]
    random = complete(client, prompt="the", max_tokens=30)
    assert texts_of(random) == [model.sample("the", 30, seed=random["seed"])]


def test_concurrent_texts_do_not_depend_on_each_other(model):
    """Eleven requests share four rows, with their own prompts, lengths, seeds and filters."""
    requests = [
        CompletionRequest((TEXT[k : k + 1 + 9 * k],), 5 + 13 * k, seed=k, top_k=(k % 3) + 2 if k % 2 else None, echo=k == 4)
        for k in range(11)
    ]

    async def text_of(completions, request):
        parts = completions.answer(request, request.seed, completions.read_prompts(request, 0))
        return "".join([part.text async for part in parts])

    async def answer_all():
        completions = Completions(model, 4, LIMITS)
        drawing = asyncio.create_task(completions.batcher.run())
        found = await asyncio.gather(*(text_of(completions, request) for request in requests))
        drawing.cancel()
        return found

    for request, text in zip(requests, asyncio.run(answer_all())):
        (prompt,) = request.prompt
        expected = model.sample(prompt, request.max_tokens, seed=request.seed, top_k=request.top_k)
        assert text == (prompt if request.echo else "") + expected


def events_of(response):
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_a_stream_has_the_parts_of_the_whole_answer(client):
    fields = {"prompt": ["the cat ", "a"], "max_tokens": 100, "seed": 2, "n": 2, "logprobs": 1, "echo": True, "stop": "th"}
    whole = complete(client, **fields)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *parts, usage = events_of(client.post("/v1/completions", json=fields | options))
    assert usage["choices"] == [] and usage["usage"] == whole["usage"] and len(parts) > 4
    for choice in whole["choices"]:
        of_choice = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in of_choice) == choice["text"] == "".join(choice["logprobs"]["tokens"])
        for name, values in choice["logprobs"].items():
            assert sum((part["logprobs"][name] for part in of_choice), []) == values
        reasons = [part["finish_reason"] for part in of_choice]
        assert reasons[-1] == choice["finish_reason"] and set(reasons[:-1]) <= {None}
        assert choice["logprobs"]["text_offset"] == list(range(len(choice["text"])))


def test_echo_with_logprobs_is_the_score_of_evaluate(client, model):
    (choice,) = complete(client, prompt=TEXT[:90], max_tokens=0, echo=True, logprobs=2)["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == "".join(logprobs["tokens"]) == TEXT[:90] and choice["finish_reason"] == "length"
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    np.testing.assert_allclose(-np.array(logprobs["token_logprobs"][1:]), model.score(TEXT[:90]).nats, atol=1e-5)
    expected = dict(model.next(TEXT[:1], 2))  # The first stream has read the first symbol only.
    found = {token: np.exp(value) for token, value in logprobs["top_logprobs"][1].items() if token in expected}
    assert found == pytest.approx(expected, abs=1e-5)


WINDOWS = {"batching.loss_on": "last", "batching.layout": "windows", "batching.seq_len": 5}


@pytest.mark.parametrize(
    "changes",
    [
        WINDOWS | {"eval.max_chars": 9},
        WINDOWS | {"sample.window": 5},
        {"sample.window": 4},
        {"kind": "bytes"},
    ],
)
@pytest.mark.slow
def test_many_to_one_models_windows_and_bytes(changes):
    model = small_model("rnn", **changes)
    text = TEXT[:30] if "kind" not in changes else "aé漢🙂b"
    with served(model) as client:
        assert texts_of(complete(client, prompt=text, max_tokens=50, seed=1)) == [model.sample(text, 50, seed=1)]
        if changes == {"sample.window": 4}:
            refused = client.post("/v1/completions", json={"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1})
            assert refused.status_code == 422 and "charlm.evaluate" in refused.json()["error"]["message"]
            return
        (choice,) = complete(client, prompt=text, max_tokens=0, echo=True, logprobs=1)["choices"]
        found = [np.nan if each is None else each for each in choice["logprobs"]["token_logprobs"]]
        np.testing.assert_allclose(-np.array(found[1:]), model.score(text).nats, atol=1e-5)
        if "kind" in changes:
            assert choice["logprobs"]["tokens"][:3] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
            assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4]


@pytest.mark.slow
def test_the_logprobs_of_drawn_symbols_are_those_of_the_model():
    model = small_model("rnn", **{"data.documents": "lines"})
    with served(model) as client:
        (choice,) = complete(client, prompt="the cat", max_tokens=60, seed=8, logprobs=0, temperature=0.5)["choices"]
    assert choice["text"] == model.sample("the cat", 60, seed=8, temperature=0.5)
    logprobs, length = choice["logprobs"], len(choice["text"])
    assert choice["finish_reason"] == ("length" if length == 60 else "stop") and len(logprobs["tokens"]) == length
    nats = model.score("the cat" + choice["text"]).nats[7 : 7 + length]
    np.testing.assert_allclose(-np.array(logprobs["token_logprobs"]), nats, atol=1e-4)


@pytest.mark.parametrize(
    "body, status, param",
    [
        ("", 400, None),
        ("[1]", 400, None),
        ('{"prompt": NaN}', 400, None),
        ("[" * 10_000, 400, None),
        ('{"temperature": 1' + "0" * 5000 + "}", 400, None),
        ('{"temperature": 1' + "0" * 400 + "}", 400, "temperature"),
        ('{"prompt": "a\\ud800"}', 422, "prompt"),
        ('{"prompt": "a#"}', 422, "prompt"),
        ('{"prompt": [1, 2]}', 400, "prompt"),
        ('{"prompt": "' + "a" * 301 + '"}', 400, "prompt"),
        ('{"prompt": "' + "a" * 20_000 + '"}', 413, None),
        ('{"prompt": ["a", "b", "c"], "n": 3}', 400, "n"),
        ('{"n": true}', 400, "n"),
        ('{"max_tokens": 201}', 400, "max_tokens"),
        ('{"top_p": 1.1}', 400, "top_p"),
        ('{"logprobs": 6}', 400, "logprobs"),
        ('{"stop": ["a", "b", "c", "d", "e"]}', 400, "stop"),
        ('{"stop": ""}', 400, "stop"),
        ('{"best_of": 2}', 400, "best_of"),
        ('{"max_token": 2}', 400, "max_token"),
        ('{"model": "\\ud800"}', 404, "model"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(client, body, status, param):
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"] and len(error["message"]) < 500


def test_only_the_page_and_the_interface_are_served(client):
    for path in (
        "/config.json",
        "/../config.json",
        "/v1/models/..%2f..%2fconfig.json",
        "/v1/models/other",
        "/page.html",
        "/v1",
    ):
        response = client.get(path)
        assert response.status_code == 404 and response.json()["error"]["message"]
    assert client.get("/v1/completions").status_code == 405
    assert client.post("/v1/completions", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.get("/v1/models", headers={"Host": "example.org"}).status_code == 400
    (found,) = client.get("/v1/models").json()["data"]
    assert client.get(f"/v1/models/{found['id']}").json() == found and found["object"] == "model"
    assert complete(client, model=found["id"], max_tokens=1)["model"] == found["id"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = {
    "prompt": st.text("the ca\n#é", max_size=9) | st.lists(st.text("the ", max_size=4), max_size=3),
    "max_tokens": st.integers(-1, 4),
    "temperature": st.floats(-1, 3, width=32) | st.sampled_from([0, 1e-320, 1e-38, 3e38, 10**400]),
    "top_p": st.floats(0, 1.1) | st.just(5e-324),
    "top_k": st.integers(0, 20),
    "seed": st.integers(-1, 1 << 33),
    "n": st.integers(0, 3),
    "stop": st.text("th", max_size=2) | st.lists(st.text("the", max_size=2), max_size=3),
    "logprobs": st.integers(-1, 6),
    "echo": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "best_of": st.integers(1, 3),
    "logit_bias": st.just({}),
    "user": st.text(max_size=3),
    "model": st.just("charlm"),
}


@pytest.mark.fuzz
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.fixed_dictionaries({}, optional={name: value | value | value | JSON for name, value in FIELDS.items()}),
    unknown=st.dictionaries(st.text(max_size=4), JSON, max_size=1),
    cut=st.none() | st.none() | st.integers(0, 60),
)
def test_no_body_makes_the_server_fail(client, fields, unknown, cut):
    body = json.dumps(fields | unknown)[:cut].encode()
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404, 422), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@pytest.mark.fuzz
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=50) | st.text("{}[]\":,0e-+.\\u'truefalsn ", max_size=40).map(str.encode))
def test_no_bytes_make_the_server_fail(client, body):
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400)


def test_requests_beyond_the_limit_get_429_and_the_others_their_text(model):
    app = Server(model, 1, Limits(requests=2)).app

    async def flood():
        from httpx2 import ASGITransport, AsyncClient

        async with app.router.lifespan_context(app), AsyncClient(transport=ASGITransport(app), base_url="http://a") as client:
            body = {"prompt": "the", "max_tokens": 40, "seed": 1}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(9)))

    responses = asyncio.run(flood())
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 2
    for response in responses:
        if response.status_code == 200:
            assert texts_of(response.json()) == [model.sample("the", 40, seed=1)]
        else:
            assert response.json()["error"]["type"] == "rate_limit_error" and response.headers["retry-after"] == "1"


def test_closing_finishes_what_is_drawn_and_refuses_the_rest(model):
    """One request is being drawn, one waits for the only row, and a text that takes too long is cut."""

    async def text_of(completions, request):
        parts = completions.answer(request, 1, completions.read_prompts(request, 1))
        async with contextlib.aclosing(parts):
            return "".join([part.text async for part in parts])

    async def close():
        completions = Completions(model, 1, LIMITS)
        drawing = asyncio.create_task(completions.batcher.run())
        first, second = (asyncio.create_task(text_of(completions, CompletionRequest(("the",), 3000))) for _ in range(2))
        while not completions.batcher._rows:
            await asyncio.sleep(0.001)
        completions.batcher.close()
        with pytest.raises(Closing):
            await second
        assert await first == model.sample("the", 3000, seed=1)
        third = asyncio.create_task(text_of(completions, CompletionRequest(("the",), 10**9)))
        while not completions.batcher._rows:
            await asyncio.sleep(0.001)
        completions.batcher.abort()
        with pytest.raises(Closing):
            await third
        drawing.cancel()

    asyncio.run(close())


def test_a_closed_server_answers_503(model):
    server = Server(model, 1)
    with TestClient(server.app) as client:
        client.portal.call(server.close, 5.0)
        response = client.post("/v1/completions", json={"prompt": "the"})
        assert response.status_code == 503 and response.json()["error"]["type"] == "server_error"
        assert client.get("/v1/models").status_code == 200


def test_a_client_that_goes_away_frees_its_rows(model):
    async def leave():
        completions = Completions(model, 4, LIMITS)
        drawing = asyncio.create_task(completions.batcher.run())
        request = CompletionRequest(("the",), 10**9, n=6)
        parts = completions.answer(request, 1, completions.read_prompts(request, 1))
        assert (await anext(parts)).text
        await parts.aclose()
        for _ in range(2000):
            if not completions.batcher._rows and not completions.batcher._waiting:
                break
            await asyncio.sleep(0.001)
        assert not completions.batcher._rows and not completions.batcher._waiting
        drawing.cancel()

    asyncio.run(leave())


def test_a_page_that_cannot_be_built_says_why(client):
    response = client.get("/")
    assert response.status_code == 404 and "the page of this model cannot be built" in response.json()["error"]["message"]
