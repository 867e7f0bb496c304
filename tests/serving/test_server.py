"""The server in this process, without a network: what it answers, and what it refuses."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import TEXT, small_model

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from starlette.testclient import TestClient  # noqa: E402

from charlm.serving.requests import Limits  # noqa: E402
from charlm.serving.server import Server  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return small_model("gru", **{"sample.temperature": 0.7, "eval.num_streams": 3, "eval.context": 7})


@pytest.fixture(scope="module")
def client(model):
    with TestClient(Server(model, num_rows=4).app, base_url="http://localhost") as client:
        yield client


def complete(client, **fields):
    response = client.post("/v1/completions", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def texts_of(answer):
    return [choice["text"] for choice in answer["choices"]]


def test_the_text_is_that_of_the_command(client, model):
    for fields in (
        {"prompt": "the cat", "max_tokens": 70, "seed": 3},
        {"max_tokens": 40, "seed": 1, "temperature": 1.3},
        {"prompt": "that was", "max_tokens": 33, "seed": 5, "top_k": 3},
        {"prompt": "a", "max_tokens": 5, "seed": 5, "top_p": 0.6},
    ):
        named = {name: value for name, value in fields.items() if name not in ("max_tokens",)}
        assert texts_of(complete(client, **fields)) == [model.sample(length=fields["max_tokens"], **named)]
    greedy = complete(client, prompt="the", max_tokens=40, temperature=0)
    assert texts_of(greedy) == [model.sample("the", 40, greedy=True)]


def test_echo_with_logprobs_is_the_score_of_evaluate(client, model):
    answer = complete(client, prompt=TEXT[:90], max_tokens=0, echo=True, logprobs=2)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == "".join(logprobs["tokens"]) == TEXT[:90] and logprobs["text_offset"] == list(range(90))
    np.testing.assert_allclose(-np.array(logprobs["token_logprobs"][1:]), model.score(TEXT[:90]).nats, atol=1e-5)
