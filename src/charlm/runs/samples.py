"""The samples of a run: samples.jsonl for programs, and samples.txt for people.

A line of samples.jsonl is `{"step": ..., "text": ...}`, so no text can be mistaken for the start of another sample. samples.txt
repeats the samples, each below a header `=== step N ===`. Older runs have only samples.txt.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from charlm.system.files import read_json_lines, read_text, write_text


class Sample(NamedTuple):
    """A text that a run drew after a number of steps."""

    step: int
    text: str


def append_samples(workdir: Path, step: int, texts: Sequence[str]) -> None:
    """Append the samples of a step to both files."""
    samples = [Sample(step, text) for text in texts]
    for name, lines in (("samples.jsonl", _as_json(samples)), ("samples.txt", _as_text(samples))):
        with open(workdir / name, "a", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(lines)


def read_samples(workdir: Path) -> list[Sample]:
    """Return the samples of a run, in the order in which they were drawn; [] if there are none.

    Raises:
        WorkdirError: a file cannot be read.
    """
    if (workdir / "samples.jsonl").exists():
        return [Sample(line["step"], line["text"]) for line in read_json_lines(workdir / "samples.jsonl", _is_sample)]
    if not (workdir / "samples.txt").exists():
        return []
    # In an old file, a line of a text may look like a header. Numbers of steps have at most ten digits.
    text = read_text(workdir / "samples.txt", errors="replace")
    _, *found = re.split(r"^=== step (\d{1,10}) ===\n", text, flags=re.MULTILINE)
    samples: list[Sample] = []
    for step, text in zip(found[::2], found[1::2]):
        # A sample ends with a line end. After anything else, a header belongs to the text of the sample.
        if samples and not samples[-1].text.endswith("\n"):
            samples[-1] = Sample(samples[-1].step, f"{samples[-1].text}=== step {step} ===\n{text}")
        else:
            samples.append(Sample(int(step), text))
    return [Sample(step, text.removesuffix("\n")) for step, text in samples]


def cut_back_samples(workdir: Path, step: int) -> None:
    """Remove the samples of later steps. Write samples.txt again, from samples.jsonl."""
    samples = read_samples(workdir)
    while samples and samples[-1].step > step:
        samples.pop()
    write_text(workdir / "samples.jsonl", _as_json(samples))
    write_text(workdir / "samples.txt", _as_text(samples))


def _is_sample(line: dict) -> bool:
    return isinstance(line.get("step"), int) and isinstance(line.get("text"), str)


def _as_json(samples: Iterable[Sample]) -> str:
    return "".join(json.dumps(sample._asdict()) + "\n" for sample in samples)


def _as_text(samples: Iterable[Sample]) -> str:
    return "".join(f"=== step {step} ===\n{text}\n" for step, text in samples)
