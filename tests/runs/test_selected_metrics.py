"""The metrics that `train.metrics` and `eval.metrics` select, through the commands: records, curves, resuming, old workdirs."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from conftest import COMMANDS

from charlm.config import cli
from charlm.runs.curves import metric_panels
from charlm.runs.tracking import read_metrics

METRICS = "--config.train.metrics=('accuracy','grad_norm_by_layer')", "--config.eval.metrics=('accuracy',)"
BY_LAYER = {f"grad_norm_by_layer/{layer}" for layer in ("embedding", "layer_0", "head")}


def params_sha256(workdir):
    return json.loads((workdir / "result.json").read_text())["params_sha256"]


def lines(workdir, split):
    return [line for line in read_metrics(workdir / "metrics.jsonl") if line["split"] == split]


@pytest.fixture(scope="module")
def trained(small_config, tmp_path_factory):
    """Return a folder of three runs: without selected metrics, with them, and without them for half of the steps."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"plain": (), "selected": METRICS, "half": ("--config.train.steps=20",)}.items():
        assert cli.run(COMMANDS["train"], [f"--config={small_config}", f"--workdir={folder / name}", *flags]) == 0
    return folder


@pytest.mark.slow
def test_selected_metrics_change_no_bit(small_config, tmp_path):
    """This holds for programs that XLA optimizes as usual. The tests' flags of XLA fuse other operations."""
    more = {"plain": [()], "selected": [METRICS], "later": [("--config.train.steps=20",), (*METRICS, "--extend")]}
    runs = [
        [f"--config={small_config}", f"--workdir={tmp_path / name}", *flags] for name, each in more.items() for flags in each
    ]
    code = f"from charlm import train; from charlm.config import cli; assert not any(cli.run(train.main, r) for r in {runs!r})"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"XLA_FLAGS": ""}, check=True)
    assert params_sha256(tmp_path / "plain") == params_sha256(tmp_path / "selected") == params_sha256(tmp_path / "later")
    for split in ("train", "val"):
        losses = [[line["nats_per_char"] for line in lines(tmp_path / name, split)] for name in more]
        assert losses[0] == losses[1] == losses[2]


def test_selected_metrics_are_recorded_and_drawn(trained):
    plain, selected = trained / "plain", trained / "selected"
    for split, keys in {"train": {"accuracy", *BY_LAYER}, "val": {"accuracy"}}.items():
        for before, line in zip(lines(plain, split), lines(selected, split), strict=True):
            assert line.keys() == before.keys() | keys
            assert line["step"] == before["step"]
            assert math.isclose(line["nats_per_char"], before["nats_per_char"], rel_tol=1e-5)
            assert 0 < line["accuracy"] < 1
    # In every step, and therefore in the mean, the norm of a layer is at most the norm of all layers.
    for line in lines(selected, "train"):
        assert 0 < max(line[key] for key in BY_LAYER) <= line["grad_norm"]
    panels = metric_panels(read_metrics(selected / "metrics.jsonl"))
    assert {metric: set(curves) for metric, curves in panels.items()} == {
        "accuracy": {"train", "val"},
        "grad_norm_by_layer": {"embedding", "layer_0", "head"},
    }
    from matplotlib.image import imread

    heights = [imread(path / "curves.png").shape[0] for path in (plain, selected)]
    assert heights[1] > 1.8 * heights[0], "curves.png has a panel for each metric"


def test_metrics_may_be_selected_when_a_run_is_resumed(trained, run, small_config, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(trained / "half", path)
    code, _, err = run("train", f"--config={small_config}", f"--workdir={path}", *METRICS, "--extend")
    assert code == 0 and "; from step 20" in err, err
    for split in ("train", "val"):
        for line in lines(path, split):
            assert ("accuracy" in line) == (line["step"] > 20)
    # They may also be changed without an extension, for an unfinished run.
    (path / "result.json").unlink()
    shutil.rmtree(path / "checkpoints" / "40")
    code, _, err = run("train", f"--config={small_config}", f"--workdir={path}")
    assert code == 0 and "; from step 30" in err, err
    assert [("accuracy" in line) for line in lines(path, "train")] == [False, False, True, False]


def test_a_workdir_without_the_keys_is_resumed_to_the_same_bits(trained, run, small_config, tmp_path):
    """Versions of charlm before `train.metrics` and `eval.metrics` wrote such a config.json."""
    path = tmp_path / "run"
    shutil.copytree(trained / "half", path)
    config = json.loads((path / "config.json").read_text())
    del config["train"]["metrics"], config["eval"]["metrics"]
    (path / "config.json").write_text(json.dumps(config))
    code, _, err = run("train", f"--config={small_config}", f"--workdir={path}", "--extend")
    assert code == 0 and "; from step 20" in err, err
    assert f"{path / 'config.json'} lacks keys of this version of charlm" in err
    assert "train.metrics (())" in err or "train.metrics ([])" in err
    assert params_sha256(path) == params_sha256(trained / "plain")
