import re
import sys

import pytest

from charlm.system import progress
from charlm.system.progress import ByteProgress, ProgressLine


def test_without_a_terminal_progress_is_plain_lines(capfd):
    line = ProgressLine(200, 0)
    line.update(50, {"loss": 2.5}, 12345.6, 0.5)
    line.record({"step": 50, "split": "train", "nats_per_char": 2.5, "chars_per_second": 12345.6}, {})
    line.record({"step": 50, "split": "val", "nats_per_char": 2.25}, {"accuracy": 0.25})
    line.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 50/200  loss 2.5000  12,346 chars/s  1:15 left",
        "step 50  validation loss 2.2500 nats per character  accuracy 0.2500",
    ]


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that never advances by itself, and return a function that advances it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def advance_clock(seconds):
        now[0] += seconds

    return advance_clock


def test_byte_progress_prints_a_line_every_ten_seconds_and_none_for_short_work(clock, capfd):
    with ByteProgress("encoding book.txt", 200_000_000) as bar:
        bar.advance(1_000_000)
        clock(0.9)
        bar.advance(1_000_000)
    assert capfd.readouterr().err == ""
    with ByteProgress("encoding book.txt", 200_000_000, done=50_000_000) as bar:
        for _ in range(200):
            clock(0.1)
            bar.advance(500_000)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("encoding book.txt: 5")
    assert re.fullmatch(r"encoding book.txt: 10\d of 200 MB at 5 MB/s, (19|20) s left", lines[1])
    with ByteProgress("downloading", None) as bar:
        clock(5)
        bar.advance(10_000_000)
    assert capfd.readouterr().err == "downloading: 10 MB at 2 MB/s\n"


def test_byte_progress_is_a_bar_in_a_terminal(clock, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ByteProgress("encoding [book].txt", 4_000_000) as bar:
        for _ in range(4):
            clock(2)
            bar.advance(1_000_000)
    err = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capfd.readouterr().err)
    assert "encoding [book].txt" in err and "4.0/4.0 MB" in err
