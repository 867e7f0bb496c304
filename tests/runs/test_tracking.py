import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from charlm.config import default_config
from charlm.runs.tracking import Tracker, draw_curves, read_metrics


def line(step, split="train", loss=2.0):
    return {
        "step": step,
        "epoch": 0.1,
        "chars": 100 * step,
        "seconds": 1.0,
        "split": split,
        "nats_per_char": loss,
        "bits_per_char": loss,
    }


def test_resuming_cuts_the_records_back_to_the_checkpoint(tmp_path, capfd):
    tracker = Tracker(tmp_path, 0, default_config())
    for step in (10, 20, 30):
        tracker.record(line(step))
        tracker.sample(step, [f"text of {step}\n=== not a header"])
    tracker.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "epo')
    tracker = Tracker(tmp_path, 20, default_config())
    tracker.record(line(30, loss=1.0))
    tracker.sample(30, ["again"])
    tracker.close()
    assert [(m["step"], m["nats_per_char"]) for m in read_metrics(tmp_path / "metrics.jsonl")] == [
        (10, 2.0),
        (20, 2.0),
        (30, 1.0),
    ]
    for text in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(text)
    assert not capfd.readouterr().err  # A kill leaves an incomplete last line, which is no damage.
    samples = (tmp_path / "samples.txt").read_text()
    assert [s for s in samples.splitlines() if s.endswith("===")] == ["=== step 10 ===", "=== step 20 ===", "=== step 30 ==="]
    assert samples.endswith("=== step 30 ===\nagain\n") and "text of 20\n=== not a header" in samples


def values_of_events(folder):
    """Return {tag: value} of the only event file in a folder."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob("events.out.tfevents.*")
    content, at, found = path.read_bytes(), 0, {}
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        found |= {value.tag: value for value in Event.FromString(content[at + 12 : at + 12 + size]).summary.value}
        at += 12 + size + 4
    return found


def test_event_files_hold_the_metrics(tmp_path):
    tracker = Tracker(tmp_path, 0, default_config())
    tracker.record(line(10, "val", 1.25))
    tracker.close()
    assert values_of_events(tmp_path)["val/nats_per_char"].simple_value == 1.25


def test_event_files_hold_hyperparameters_if_selected(run, small_config, tmp_path):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    flags = f"--config={small_config}", f"--workdir={tmp_path / 'w'}", "--config.train.tensorboard_hparams"
    assert run("train", *flags, "--config.optimizer.learning_rate=0.005")[0] == 0
    found = values_of_events(tmp_path / "w")
    begin = HParamsPluginData.FromString(found["_hparams_/session_start_info"].metadata.plugin_data.content)
    assert begin.session_start_info.hparams["optimizer.learning_rate"].number_value == 0.005
    assert begin.session_start_info.hparams["model.cell"].string_value == "lstm"
    shown = HParamsPluginData.FromString(found["_hparams_/experiment"].metadata.plugin_data.content).experiment
    assert {info.name.tag for info in shown.metric_infos} <= found.keys() and "_hparams_/session_end_info" in found


@pytest.mark.slow
def test_weights_and_biases_works_offline(run, small_config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = f"--config={small_config}", f"--workdir={tmp_path / 'sweep' / 'w'}", "--config.train.wandb_project=tests"
    for steps in (20, 40):
        code, _, err = run("train", *flags, f"--config.train.steps={steps}", "--extend")
        assert code == 0, err
    files = sorted((tmp_path / "sweep" / "w" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name, "both starts are one run"
    first, second = (path.read_bytes() for path in files)
    assert b"val/nats_per_char" in first and b"result/params_sha256" in second and b"optimizer.learning_rate" in first


def test_a_tracker_that_is_not_installed_is_refused(run, small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = run("train", f"--config={small_config}", f"--workdir={tmp_path / 'w'}", "--config.train.wandb_project=a")
    assert code == 2 and "pip install 'charlm[wandb]'" in err and not (tmp_path / "w").exists()


def test_curves_are_drawn(tmp_path):
    lines = [line(step, "train", 3 - step / 100) for step in range(1, 100)]
    lines += [line(step, "val", 3.2 - step / 100) for step in range(10, 100, 10)]
    draw_curves(lines, tmp_path / "full.png")
    draw_curves([], tmp_path / "empty.png")
    full, empty = imread(tmp_path / "full.png"), imread(tmp_path / "empty.png")
    orange = (full[..., 0] > 0.6) & (full[..., 1] < 0.45) & (full[..., 2] < 0.3)
    assert full.shape == empty.shape and orange.sum() > 500 and np.ptp(empty[..., :3]) > 0


def test_a_loss_that_is_not_finite_can_be_drawn(tmp_path):
    draw_curves([line(1, loss=float("nan")), line(2, loss=float("inf")), line(3)], tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.slow
def test_writing_event_files_does_not_import_pytorch(tmp_path):
    script = f"""
import sys
from pathlib import Path
from charlm.config import default_config
from charlm.runs.tracking import Tracker
Tracker(Path({str(tmp_path)!r}), 0, default_config()).close()
assert "torch" not in sys.modules
import torch
"""
    subprocess.run([sys.executable, "-c", script], check=True)
