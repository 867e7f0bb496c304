"""The command `serve` as users start it: OpenAI's client, the code of docs/serve.md, floods and signals."""

import json
import re
import signal
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import start
from models import TEXT, small_model

import charlm

for package in ("starlette", "uvicorn", "openai"):
    pytest.importorskip(package)

import openai  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "quickstart"
    small_model("rnn", text=TEXT + "HAMLET:To be, or not to be", scale=1.0).save(path)
    return path


class Served:
    """A server in another process."""

    def __init__(self, workdir, *flags):
        self.process = start("serve", f"--workdir={workdir}", "--port=0", *flags)
        line = next(line for line in self.process.stderr if "http" in line)
        self.url = re.search(r"http://\S+", line)[0]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def end(self):
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@pytest.mark.slow
def test_openais_client_works_and_sigterm_finishes_what_streams(workdir, monkeypatch):
    served = Served(workdir, "--queue=20")
    model, client = charlm.load(workdir), served.client
    (listed,) = client.models.list().data
    assert listed.id == "quickstart" and client.models.retrieve("quickstart").id == "quickstart"
    answer = client.completions.create(model="quickstart", prompt="the cat", max_tokens=50, seed=4, n=2)
    assert [choice.text for choice in answer.choices] == model.sample("the cat", 50, seed=4, num_samples=2)
    assert answer.usage.completion_tokens == 100
    scored = client.completions.create(model="quickstart", prompt=TEXT[:80], max_tokens=0, echo=True, logprobs=1)
    logprobs = scored.choices[0].logprobs.token_logprobs[1:]
    assert -sum(logprobs) / len(logprobs) == pytest.approx(model.score(TEXT[:80]).nats_per_char, abs=1e-4)
    for wrong, error in (
        ({"prompt": "#"}, openai.UnprocessableEntityError),
        ({"model": "other"}, openai.NotFoundError),
        ({"max_tokens": -1}, openai.BadRequestError),
        ({"prompt": "a" * (1 << 20)}, openai.APIStatusError),
    ):
        with pytest.raises(error):
            client.completions.create(**{"model": "quickstart", "prompt": "the", **wrong})

    # The code of the page, with the port of this server.
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setattr(sys, "stdout", open("/dev/null", "w"))
    exec(compile(code.replace("http://127.0.0.1:8000", served.url), "serve.md", "exec"), {})
    monkeypatch.undo()

    def status_of(_):
        body = json.dumps({"prompt": "the", "max_tokens": 300}).encode()
        try:
            request = urllib.request.Request(f"{served.url}/v1/completions", body, {"Content-Type": "application/json"})
            return urllib.request.urlopen(request).status
        except urllib.error.HTTPError as error:
            return error.code

    with ThreadPoolExecutor(60) as pool:
        assert set(pool.map(status_of, range(200))) == {200, 429}

    stream = client.completions.create(model="quickstart", prompt="the cat", max_tokens=20_000, seed=4, stream=True)
    text = next(iter(stream)).choices[0].text
    served.process.send_signal(signal.SIGTERM)
    text += "".join(part.choices[0].text for part in stream)
    assert text == model.sample("the cat", 20_000, seed=4)
    code, err = served.end()
    assert code == 143 and "Traceback" not in err, err


@pytest.mark.slow
def test_sigint_ends_the_server_after_the_grace_period(workdir):
    served = Served(workdir, "--grace=0.5")
    stream = served.client.completions.create(model="quickstart", prompt="the", max_tokens=32_000, n=64, stream=True)
    next(iter(stream))
    served.process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass
    code, err = served.end()
    assert code == 130 and "Traceback" not in err, err


def test_what_cannot_be_served_is_refused(run, tmp_path, monkeypatch):
    code, _, err = run("serve", f"--workdir={tmp_path}", "--host=999.1.1.1")
    assert code == 2 and "cannot listen on --host 999.1.1.1 --port 8000" in err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = run("serve", f"--workdir={tmp_path}")
    assert code == 2 and err == "charlm: uvicorn is not installed: pip install 'charlm[serve]'\n"
