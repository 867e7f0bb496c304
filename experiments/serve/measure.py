"""Measure the server: whether concurrent clients get the texts of the command, how fast, and what a flood of requests gets.

    python experiments/serve/measure.py --workdir runs/quickstart [--hidden H] [--clients 32] [--rounds 10] [--length 500]
        [--flood 1000]

The script starts the server, and needs the extra `serve`. With --hidden it measures an untrained LSTM of H units over the
symbols of the run. It prints the record that it appends to results.jsonl.
"""

import argparse
import asyncio
import collections
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

import jax  # noqa: E402
import numpy as np  # noqa: E402

import charlm  # noqa: E402
from charlm.config import default_config  # noqa: E402
from charlm.inference.sampler import sample_keys  # noqa: E402
from charlm.nn.model import CharLM  # noqa: E402
from experiments import records  # noqa: E402

PROMPTS = ("HAMLET:", "To be, or not to be", "\n", "The king", "Enter ROMEO", "My lord, ", "What is", "O ")


async def post(port: int, body: dict[str, Any]) -> tuple[int, Any]:
    """Return the status code and the JSON of a completion."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + data)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


async def text_of(port: int, body: dict[str, Any]) -> str:
    status, answer = await post(port, body)
    assert status == 200, answer
    return answer["choices"][0]["text"]


async def one_after_another(port: int, bodies: list[dict[str, Any]]) -> list[str]:
    return [await text_of(port, body) for body in bodies]


async def at_once(port: int, bodies: list[dict[str, Any]]) -> list[str]:
    return await asyncio.gather(*(text_of(port, body) for body in bodies))


async def flood(port: int, count: int) -> dict[int, int]:
    """Return how many of many concurrent requests got each status code."""
    body = {"prompt": "The king", "max_tokens": 100}
    return dict(collections.Counter(status for status, _ in await asyncio.gather(*(post(port, body) for _ in range(count)))))


def gap_at(model: charlm.LanguageModel, body: dict[str, Any], expected: str, found: str) -> tuple[int, float]:
    """Return where two texts first differ, and by how much the symbol of the first was ahead there.

    A symbol is drawn as the largest of logit / temperature + noise, so rounding can change the draw only if this number is
    about as small as the rounding.
    """
    at = next(k for k, pair in enumerate(zip(expected, found)) if pair[0] != pair[1])
    prompt_ids = model.vocab.encode(body["prompt"])
    logits_TV, _ = model.step(body["prompt"] + expected[:at])
    key = jax.random.fold_in(sample_keys(body["seed"], 1)[0], len(prompt_ids) + at)
    score_V = np.asarray(logits_TV[-1]) / body["temperature"] + np.asarray(jax.random.gumbel(key, (model.vocab.size,)))
    first, second = (score_V[model.vocab.symbols.index(text[at])] for text in (expected, found))
    return at, float(first - second)


def sampler_speed(model: charlm.LanguageModel, num_samples: int, length: int) -> float:
    """Return the characters/s of the sampler alone, without a server, with so many texts in its batch (median of 5)."""
    seconds = []
    for _ in range(6):
        start = time.monotonic()
        model.sample("\n", length, 1.0, num_samples=num_samples)
        seconds.append(time.monotonic() - start)
    return num_samples * length / statistics.median(seconds[1:])  # The first one compiles.


def untrained_model(model: charlm.LanguageModel, hidden: int) -> charlm.LanguageModel:
    """Return an untrained LSTM over the symbols of a model."""
    config = default_config()
    config.model.hidden_size = hidden
    module = CharLM.from_config(config.model, model.vocab.size)
    return charlm.LanguageModel(config.lock(), model.vocab, module.initial_params(jax.random.key(0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="the folder of the run")
    parser.add_argument("--hidden", type=int, help="the number of units of an untrained LSTM to measure instead of the run")
    parser.add_argument("--clients", type=int, default=32, help="number of concurrent clients")
    parser.add_argument("--rounds", type=int, default=10, help="number of requests of each client")
    parser.add_argument("--length", type=int, default=500, help="number of characters of each text")
    parser.add_argument("--flood", type=int, default=1000, help="number of requests at once in the flood")
    args = parser.parse_args()
    model, workdir = charlm.load(args.workdir), Path(args.workdir)
    if args.hidden:
        workdir = Path(tempfile.mkdtemp()) / "untrained"
        untrained_model(model, args.hidden).save(workdir)
        model = charlm.load(workdir)
    bodies = [
        {"prompt": PROMPTS[k % len(PROMPTS)], "max_tokens": args.length, "seed": k, "temperature": 1.0}
        for k in range(args.clients * args.rounds)
    ]
    rounds = [bodies[start : start + args.clients] for start in range(0, len(bodies), args.clients)]
    command = [sys.executable, "-m", "charlm.serve", "--workdir", str(workdir), "--port=0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port = int(next(found[1] for line in server.stderr if (found := re.search(r":(\d+)$", line))))
        asyncio.run(at_once(port, rounds[0]))  # Warm up.
        seconds: dict[str, list[float]] = {"one_after_another": [], "at_once": [], "four_at_once": []}
        texts: list[str] = []
        for of_round in rounds:  # The contenders take turns.
            start = time.monotonic()
            alone = asyncio.run(one_after_another(port, of_round))
            middle = time.monotonic()
            together = asyncio.run(at_once(port, of_round))
            seconds["one_after_another"].append(middle - start)
            end = time.monotonic()
            seconds["at_once"].append(end - middle)
            asyncio.run(at_once(port, of_round[:4]))
            # Counted as the seconds of as many texts as in the other two.
            seconds["four_at_once"].append((time.monotonic() - end) * len(of_round) / 4)
            texts += zip(alone, together)
        statuses = asyncio.run(flood(port, args.flood))
        page = None
        if not args.hidden:  # The page needs the corpus of the run.
            start = time.monotonic()
            size = len(urllib.request.urlopen(f"http://127.0.0.1:{port}/").read())
            page = {"megabytes": round(size / 1e6, 2), "seconds": round(time.monotonic() - start, 1)}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    expected, chars = [], args.clients * args.length
    start = time.monotonic()
    for body in bodies:
        expected.append(model.sample(body["prompt"], args.length, 1.0, seed=body["seed"]))
    from_python = time.monotonic() - start
    different = {"one_after_another": [], "at_once": []}
    for body, text, found in zip(bodies, expected, texts):
        for name, each in zip(different, found):
            if each != text:
                at, gap = gap_at(model, body, text, each)
                different[name].append({"seed": body["seed"], "at": at, "gap": float(f"{gap:.1e}")})
    alone = {num_samples: sampler_speed(model, num_samples, args.length) for num_samples in (1, args.clients)}
    speeds = {name: round(chars / statistics.median(each)) for name, each in seconds.items()}
    record = {
        "hidden": model.config.model.hidden_size,
        "clients": args.clients,
        "texts": len(bodies),
        "length": args.length,
        "chars_per_second": speeds | {"python": round(len(bodies) * args.length / from_python)},
        "ratio": round(speeds["at_once"] / speeds["one_after_another"], 2),
        "sampler_chars_per_second": {name: round(each) for name, each in alone.items()},
        "sampler_ratio": round(alone[args.clients] / alone[1], 2),
        "ratios": [round(a / b, 2) for a, b in zip(seconds["one_after_another"], seconds["at_once"])],
        "different": different,
        "flood": statuses,
        "page": page,
        "exit_code": server.returncode,
    }
    print(json.dumps(records.append(Path(__file__).parent, record), indent=1))


if __name__ == "__main__":
    main()
