"""Measure how fast a large text is encoded, how much memory encoding and training need, and how soon the first step ends.

    pip install -c constraints.txt -e '.[shakespeare]'
    python experiments/large_text/measure.py [MEGABYTES]

The script writes two texts of MEGABYTES each (default 1000) into a temporary folder, in ten files each. One text repeats the
built-in plays in ASCII, the other repeats lines in a dozen scripts. `load_corpus` encodes each text three times, in a fresh
process with an empty cache; the two texts take turns. Then the training command runs twice on the ASCII text, first with an
empty cache and then with a filled cache.

Memory is RssAnon, the memory of a process without mapped files. The script reads it every 20 ms from /proc, so it runs only on
Linux. It appends a line to results.jsonl.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from charlm.data.text import play_paths, play_text

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

from experiments import records  # noqa: E402

LINES = """\
Être ou ne pas être, voilà la question; où êtes-vous, mon cœur?
Größe, Maß und Übermut: Heißa, süße Törin!
Zażółć gęślą jaźń; příliš žluťoučký kůň.
Ἄνδρα μοι ἔννεπε, Μοῦσα, πολύτροπον, ὃς μάλα πολλὰ
Мой дядя самых честных правил, когда не в шутку занемог
בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת הַשָּׁמַיִם וְאֵת הָאָרֶץ
قفا نبك من ذكرى حبيب ومنزل بسقط اللوى بين الدخول فحومل
धर्मक्षेत्रे कुरुक्षेत्रे समवेता युयुत्सवः
床前明月光,疑是地上霜。举头望明月,低头思故乡。
古池や蛙飛び込む水の音
나 보기가 역겨워 가실 때에는 말없이 고이 보내 드리오리다
👩‍👩‍👧 sing 🎶, 🏳️‍🌈 fly, 🇵🇪 and 👍🏽 end the line
"""
ENCODE = """
import sys, time
from charlm.config import default_config
from charlm.data.corpus import load_corpus
data = default_config().data
data.path = sys.argv[1]
start = time.perf_counter()
corpus = load_corpus(data)
print(time.perf_counter() - start, corpus.vocab.size)
"""
ENCODINGS_PER_TEXT, FILES_PER_TEXT = 3, 10


def write_texts(folder: Path, size: int) -> dict[str, Path]:
    """Write the texts, of `size` bytes each. Return the folder of each text by its name."""
    plays = "".join(play_text(path.read_text(encoding="utf-8")) for path in play_paths())
    blocks = {"ASCII": plays.encode("ascii", "ignore"), "mixed scripts": LINES.encode() * 500}
    paths = {}
    for name, block in blocks.items():
        paths[name] = folder / name.replace(" ", "_")
        paths[name].mkdir()
        for part in range(FILES_PER_TEXT):
            with open(paths[name] / f"{part}.txt", "wb") as file:
                while file.tell() < size / FILES_PER_TEXT:
                    file.write(block)
    return paths


def rss_anon(pid: int) -> int:
    """Return the bytes of memory of a process without mapped files; 0 if the process has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def run_watched(command: list[str], env: dict[str, str], until: str | None = None) -> tuple[str, float, float | None]:
    """Run a command. Return its output, its peak RssAnon in MB, and the seconds until a line starts with `until`."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, rss_anon(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, seconds = [], None
    for line in process.stdout:
        output.append(line)
        if until and seconds is None and line.startswith(until):
            seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if process.wait():
        raise SystemExit("".join(output))
    return "".join(output), round(peak / 1e6), seconds


def train_command(text: Path, workdir: Path) -> list[str]:
    """Return the training command for a text. A full run takes hours; 300 steps are enough to measure the memory."""
    flags = {
        "data.path": text,
        "data.split": (0.9998, 0.0001, 0.0001),
        "train.steps": 300,
        "train.log_every": 1,
        "train.steps_per_dispatch": 1,
    }
    command = [sys.executable, "-m", "charlm.train", "--config", "configs/quickstart.py", "--workdir", str(workdir)]
    return command + [f"--config.{key}={value}" for key, value in flags.items()]


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "cache"
        env = os.environ | {"CHARLM_CACHE": str(cache)}
        texts = write_texts(folder, megabytes * 10**6)
        measured = {text: {"seconds": [], "rss_anon_mb": []} for text in texts}
        for _ in range(ENCODINGS_PER_TEXT):
            for text, path in texts.items():
                shutil.rmtree(cache, ignore_errors=True)
                output, peak, _ = run_watched([sys.executable, "-c", ENCODE, str(path)], env)
                seconds, symbols = output.split()[-2:]
                measured[text]["seconds"].append(round(float(seconds), 2))
                measured[text]["rss_anon_mb"].append(peak)
                measured[text]["symbols"] = int(symbols)
        for text, found in measured.items():
            size = sum(path.stat().st_size for path in texts[text].iterdir())
            found["mb_per_second"] = round(size / 1e6 / statistics.median(found["seconds"]))
        shutil.rmtree(cache)
        starts = []
        for i in range(2):
            _, peak, seconds = run_watched(train_command(texts["ASCII"], folder / f"run{i}"), env, until="step 1/")
            starts.append({"seconds_to_first_step": round(seconds, 1), "rss_anon_mb": peak})
    line = {
        "megabytes": megabytes,
        "encoding": measured,
        "training": {"from an empty cache": starts[0], "from a filled cache": starts[1]},
    }
    print(json.dumps(records.append(Path(__file__).parent, line), indent=2))


if __name__ == "__main__":
    main()
