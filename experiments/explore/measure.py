"""Measure the page that holds a model, in headless Chromium without a network: size, time to open, numbers, and speed.

    python experiments/explore/measure.py --workdir runs/quickstart [--seeds 20] [--length 500] [--picture FILE]

The script needs the extra `browser`, Chromium and its driver. It also makes the page of an untrained LSTM with 1,024 units and
5,000 characters, for the times of choosing a unit and of typing. It prints the record that it appends to results.jsonl.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

import jax  # noqa: E402
import numpy as np  # noqa: E402

import charlm  # noqa: E402
from charlm.config import default_config  # noqa: E402
from charlm.nn.model import CharLM  # noqa: E402
from charlm.serving import page  # noqa: E402
from experiments import records  # noqa: E402
from experiments.page import measure  # noqa: E402

# Called with an asynchronous function body and its arguments.
_CALL = (
    "const done = arguments[arguments.length - 1]; (async (...args) => {{ {} }})(...arguments).then(done, e => done(String(e)))"
)
_LOGITS = "return Array.from((await charlm.engine.ask('logits', { text: args[0] })).logits)"
_WRITE = """
    let text = ""
    const settings = { prompt: "", temperature: 1, topK: null, topP: null, greedy: false, ...args[0] }
    await charlm.engine.ask("write", settings, (piece) => (text += piece))
    return text
"""
# The time from the choice of a unit until the browser has painted the frame after it.
_CHOOSE = """
    const times = []
    for (let unit = 0; unit < 30; unit++) {
        await new Promise(requestAnimationFrame)
        const start = performance.now()
        charlm.inside.choose(unit)
        await new Promise(requestAnimationFrame)
        const channel = new MessageChannel()
        const painted = new Promise((resolve) => (channel.port1.onmessage = resolve))
        channel.port2.postMessage(null)
        await painted
        times.push(performance.now() - start)
    }
    return times
"""
# One character after another at the end of a text of 1,000 characters; the next one is typed when the last one is coloured.
_TYPE = """
    const { read } = charlm
    const all = charlm.data.text
    const times = []
    for (let n = 1000; n < 1100; n++) {
        const start = performance.now()
        read.input.value = all.slice(0, n)
        read.update()
        while (read.nats.length < n) await new Promise((resolve) => setTimeout(resolve, 0))
        if (n > 1000) times.push(performance.now() - start)
    }
    return times
"""


def call(driver: Any, code: str, *args: Any) -> Any:
    """Return the value of an asynchronous function body in the page. Raises RuntimeError if it fails."""
    found = driver.execute_async_script(_CALL.format(code), *args)
    if isinstance(found, str) and "Error" in found[:20]:
        raise RuntimeError(found)
    return found


def open_page(driver: Any, path: Path) -> float:
    """Open a page from disk; return the seconds until it can be used."""
    driver.get("about:blank")
    start = time.monotonic()
    driver.get(path.as_uri())
    while not driver.execute_script("return document.body?.dataset.ready"):
        time.sleep(0.005)
    return time.monotonic() - start


def large_model(model: charlm.LanguageModel) -> charlm.LanguageModel:
    """Return an untrained LSTM with 1,024 units over the symbols of a model."""
    config = default_config()
    config.model.hidden_size = 1024
    module = CharLM.from_config(config.model, model.vocab.size)
    return charlm.LanguageModel(config.lock(), model.vocab, module.initial_params(jax.random.key(0)))


def count_equal(model: charlm.LanguageModel, driver: Any, seeds: int, length: int) -> dict[str, dict[str, Any]]:
    """Return for several settings how many texts of the page and of Python are equal, and where the others first differ."""
    counts = {}
    for name, how in {
        "sampled": {},
        "top-k 10": {"top_k": 10},
        "top-p 0.9": {"top_p": 0.9},
        "greedy": {"greedy": True},
    }.items():
        first = []
        count = 1 if name == "greedy" else seeds
        for seed in range(count):
            expected = model.sample(length=length, temperature=1.0, seed=seed, **how)
            settings = {"seed": seed, "length": length, "topK": how.get("top_k"), "topP": how.get("top_p")}
            found = call(driver, _WRITE, {**settings, "greedy": how.get("greedy", False)})
            if found != expected:
                first.append(next((k for k, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), length))
        counts[name] = {"texts": count, "equal": count - len(first), "first_differences": first}
    return counts


def best_units(driver: Any) -> dict[str, list[Any]]:
    """Return for each detector the unit that follows it most closely: {detector: [layer, carry, unit, correlation]}."""
    code = """
        const found = []
        for (const [key, label] of charlm.DETECTORS) {
            for (const layer of charlm.inside.activations.layers) for (const kind of charlm.data.model.cell.carries) {
                charlm.inside.setDetector(key)
                charlm.inside.setArray(layer, kind)
                found.push([label, layer, kind, charlm.inside.ranked[0].unit, charlm.inside.ranked[0].r])
            }
        }
        return found
    """
    best: dict[str, Any] = {}
    for label, *unit, r in call(driver, code):
        if abs(r) > abs(best.get(label, [0])[-1]):
            best[label] = [*unit, r]
    return {label: [*unit, round(r, 2)] for label, (*unit, r) in best.items()}


def take_picture(driver: Any, path: Path) -> None:
    """Save a picture of the panel that looks inside, with the units that follow the position in the line."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 1180, "height": 860, "deviceScaleFactor": 1, "mobile": False}
    )
    driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    driver.find_element("id", "tab-inside").click()
    call(driver, "charlm.inside.setDetector('line'); charlm.inside.view.setCursor(45)")
    driver.execute_script("window.scrollTo(0, 0)")
    time.sleep(0.5)
    driver.save_screenshot(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="the folder of the run")
    parser.add_argument("--seeds", type=int, default=20, help="number of seeds whose texts are compared")
    parser.add_argument("--length", type=int, default=500, help="number of characters of each text")
    parser.add_argument("--picture", type=Path, help="save a picture of the page in this file")
    args = parser.parse_args()
    model = charlm.load(args.workdir)
    text, source = page.page_text(model, 2000)
    with tempfile.TemporaryDirectory() as folder, measure.browser() as driver:
        driver.set_script_timeout(300)
        path = Path(folder) / "page.html"
        page.write_page(model, path, None, 2000)
        found: dict[str, Any] = {"length": args.length, "megabytes": round(path.stat().st_size / 1e6, 2)}
        found["seconds_to_open"] = [round(open_page(driver, path), 2) for _ in range(5)]
        logits = np.asarray(model.step(text)[0])
        difference = np.abs(np.reshape(call(driver, _LOGITS, text), logits.shape) - logits).max()
        found["logit_difference"] = float(f"{difference:.1e}")
        found["texts"] = count_equal(model, driver, args.seeds, args.length)
        found["units"] = best_units(driver)
        if args.picture:
            take_picture(driver, args.picture)
        found["console_errors"] = [each["message"] for each in driver.get_log("browser") if each["level"] == "SEVERE"]
        # The influence of 1,024 units takes minutes, and none of these times depends on it.
        page.influence = lambda model, ids_N, states, reach: np.zeros((len(ids_N), reach), np.float32)
        shown = model.vocab.decode(model.corpus().split("val")[:5000])
        path.write_text(page.build_page(large_model(model), shown, source), encoding="utf-8")
        large = {"megabytes": round(path.stat().st_size / 1e6, 1), "seconds_to_open": round(open_page(driver, path), 2)}
        call(driver, "while (charlm.write.running) await new Promise((resolve) => setTimeout(resolve, 50))")
        driver.find_element("id", "tab-inside").click()
        chosen = call(driver, _CHOOSE)
        large["choosing_ms"] = {"median": round(statistics.median(chosen)), "largest": round(max(chosen))}
        driver.find_element("id", "tab-read").click()
        typed = call(driver, _TYPE)
        large["typed_chars_per_second"] = round(1000 * len(typed) / sum(typed))
    print(json.dumps(records.append(Path(__file__).parent, found | {"large": large}), indent=1))


if __name__ == "__main__":
    main()
