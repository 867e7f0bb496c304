"""Train configs/names.py on invented names; check the loss of the held-out names, and draw 1,000 samples.

    pip install -c constraints.txt -e .
    python experiments/names/measure.py [--workdir DIR]

The script writes 20,000 names of a known distribution (invented.py) into DIR/names.txt, by default runs/names_experiment, and
trains on them. It scores all held-out names together and each one alone from the zero state, and compares both losses with
that of the distribution. Then the sampling command draws 1,000 names with --novelty. The script appends a line to
results.jsonl.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

import charlm  # noqa: E402
from experiments import records  # noqa: E402
from experiments.names.invented import draw_name, nats_of  # noqa: E402

NUM_NAMES, NUM_SAMPLES = 20_000, 1_000


def run(command: str, *flags: str) -> str:
    """Run a command of charlm; return what it writes on stdout."""
    found = subprocess.run([sys.executable, "-m", f"charlm.{command}", *flags], stdout=subprocess.PIPE, text=True)
    if found.returncode:
        raise SystemExit(found.returncode)
    return found.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/names_experiment"))
    folder = parser.parse_args().workdir
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    names = [draw_name(draw) for _ in range(NUM_NAMES)]
    (folder / "names.txt").write_text("\n".join(names) + "\n")
    start = time.perf_counter()
    flags = "--config=configs/names.py", f"--config.data.path={folder / 'names.txt'}"
    run("train", *flags, f"--workdir={folder / 'run'}")
    seconds = time.perf_counter() - start

    model = charlm.load(folder / "run")
    found = model.evaluate(per_document=True)
    held_out = found["documents"]
    alone = [model.score(each["text"]).total.nats for each in held_out]
    symbols = sum(len(each["text"]) + 1 for each in held_out)  # The end of a name counts.
    per_char = {
        "together": found["nats_per_char"],
        "each alone": sum(alone) / symbols,
        "distribution": sum(nats_of(each["text"]) for each in held_out) / symbols,
    }
    flags = f"--workdir={folder / 'run'}", f"--num_samples={NUM_SAMPLES}"
    samples = json.loads(run("sample", *flags, "--novelty", "--json"))
    texts = [each["text"] for each in samples["samples"]]
    line = {
        "kind": "names",
        "names": len(names),
        "distinct_names": len(set(names)),
        "held_out_names": len(held_out),
        "nats_per_char": per_char,
        "largest_difference_of_a_name": max(abs(one - each["nats"]) for one, each in zip(alone, held_out)),
        "samples": len(texts),
        "samples_that_end_at_a_boundary": sum(len(text) < model.config.sample.length for text in texts),
        "new_samples": samples["new"],
        "distinct_samples": len(set(texts)),
        "command_seconds": round(seconds, 1),
        "examples": texts[:8],
    }
    print(json.dumps(records.append(Path(__file__).parent, line), indent=2))
    difference = abs(per_char["together"] - per_char["each alone"])
    print(f"{difference:.1e} nats per character between the held-out names together and each one alone")
    print(f"{line['samples_that_end_at_a_boundary']} of {len(texts)} samples end at a boundary; {samples['new']:.1%} are new")
    if difference > 1e-5 or line["samples_that_end_at_a_boundary"] < len(texts):
        raise SystemExit("the losses differ, or a sample does not end at a boundary")


if __name__ == "__main__":
    main()
