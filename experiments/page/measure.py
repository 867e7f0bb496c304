"""Measure how long the page of a sweep takes to open from disk, in headless Chromium without a network.

    python experiments/page/measure.py [--runs 200] [--points 1000] [--rounds 5]

The script needs the extra `browser`, Chromium and its driver.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from charlm.sweeps.page import write_page_of_sweep

_FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-background-networking --window-size=1250,1450"
# Nothing listens at this address, so the page would lack everything that it fetches.
_NO_NETWORK = "--proxy-server=127.0.0.1:9"
# True once the page is drawn and can be used.
_READY = "return window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle"


def make_sweep(folder: Path, num_runs: int, num_points: int) -> Path:
    """Write made-up records of a sweep over cell and seed, and its page. Return the path of the page."""
    with open(folder / "results.jsonl", "w") as file:
        for k in range(num_runs):
            cell, loss = ("lstm", "gru")[k % 2], 1.5 + k / 100
            name, overrides = f"cell={cell},seed={k}", {"model.cell": cell, "seed": k}
            result = {"val_nats_per_char": loss, "best_step": 10, "steps": 20, "train_seconds": 1.5, "params_sha256": "ab"}
            record = {"run": name, "overrides": overrides, "config": None, "manifest": None, "reason": None}
            record |= {"result": result | {"status": "completed"}, "status": "completed"}
            file.write(json.dumps(record) + "\n")
            (folder / name).mkdir()
            lines = (
                {"step": s, "split": "val", "chars": 1e4 * s, "nats_per_char": loss + 1 / s} for s in range(1, num_points + 1)
            )
            (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (folder / name / "samples.txt").write_text(f"=== step 1 ===\nthus spoke {name}\n")
    write_page_of_sweep(folder)
    return folder / "report.html"


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a Selenium driver of headless Chromium without a network."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in (*_FLAGS.split(), _NO_NETWORK):
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))) as driver:
        yield driver


def open_page(driver: Any, page: Path) -> None:
    """Open a page from disk and wait until it is drawn. Raises TimeoutError after 30 seconds."""
    driver.get(page.as_uri())
    give_up = time.monotonic() + 30
    while not driver.execute_script(_READY):
        if time.monotonic() > give_up:
            raise TimeoutError(f"{page} is not drawn after 30 seconds")
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="number of runs in the sweep")
    parser.add_argument("--points", type=int, default=1000, help="number of points in the curve of each run")
    parser.add_argument("--rounds", type=int, default=5, help="how often the page is opened")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, browser() as driver:
        page, seconds = make_sweep(Path(folder), args.runs, args.points), []
        for _ in range(args.rounds):
            driver.get("about:blank")
            start = time.monotonic()
            open_page(driver, page)
            seconds.append(time.monotonic() - start)
        times = ", ".join(f"{each:.2f}" for each in seconds)
        print(f"{args.runs} runs of {args.points} points, {page.stat().st_size / 1e6:.1f} MB; seconds to open: {times}")
        print(f"median: {statistics.median(seconds):.2f} s")


if __name__ == "__main__":
    main()
