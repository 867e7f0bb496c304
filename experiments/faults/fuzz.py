"""Damage files again and again, and check that each is read without the damage or refused with one line.

    pip install -c constraints.txt -e '.[shakespeare,test]'
    python experiments/faults/fuzz.py [--profile more|thorough]

The files are entries of the cache, checkpoints, configs, vocabularies, manifests, results, metrics and the records of a sweep.
The properties are the tests with the marker `fuzz`. The profile `more` tries 500 examples of each, and `thorough` 10,000. The
script appends a line to results.jsonl.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

from experiments import records  # noqa: E402

HERE = Path(__file__).parent
EXAMPLES = {"more": 500, "thorough": 10_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=EXAMPLES, default="thorough", help="how many examples are tried")
    profile = parser.parse_args().profile
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "fuzz", f"--hypothesis-profile={profile}", "--durations=20"]
    found = subprocess.run(command, cwd=HERE.parent.parent)
    if found.returncode:
        raise SystemExit(found.returncode)
    records.append(HERE, {"fuzz": profile, "examples": EXAMPLES[profile], "seconds": round(time.monotonic() - started)})


if __name__ == "__main__":
    main()
