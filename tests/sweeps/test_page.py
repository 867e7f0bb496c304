import json
import re

import pytest

from charlm.sweeps import results
from charlm.sweeps.page import write_page_of_sweep


def record(name, overrides, loss, status="completed", reason=None):
    result = {
        "val_nats_per_char": loss,
        "best_step": 10,
        "steps": 20,
        "train_seconds": 1.5,
        "params_sha256": "ab",
        "status": status,
    }
    return {"run": name, "overrides": overrides, "config": None, "manifest": None} | {
        "result": result if loss else None,
        "status": status,
        "reason": reason,
    }


@pytest.fixture
def sweep_folder(tmp_path):
    """Return the folder of a sweep of three runs, one of which failed."""
    records = [
        record("cell=lstm", {"model.cell": "lstm", "seed": 0}, 1.75),
        record("cell=gru", {"model.cell": "gru", "seed": 1}, 1.5),
        record("cell=<b>", {"model.cell": "<b>", "seed": 2}, None, "failed", "out of memory"),
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    for each in records[:2]:
        (tmp_path / each["run"]).mkdir()
        lines = [{"step": k, "split": "val", "chars": 1e6 * k, "nats_per_char": 2.0 - k / 20} for k in range(1, 11)]
        (tmp_path / each["run"] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / each["run"] / "samples.txt").write_text(f"=== step 1 ===\nold\n=== step 2 ===\n<i> {each['run']}\n")
    return tmp_path


def test_the_page_of_a_sweep_is_self_contained_and_lists_every_run_best_first(sweep_folder):
    write_page_of_sweep(sweep_folder)
    page = (sweep_folder / "report.html").read_text()
    assert not re.findall(r"<(?:script|link)[^>]*(?:src|href)=", page), "the page fetches nothing"
    assert "3 runs: 2 completed, 1 failed" in page
    body = page[page.rindex("<div class=samples>") :]
    assert 0 < body.index("cell=gru, 1.5000") < body.index("cell=lstm, 1.7500") < body.index("cell=&lt;b&gt;")
    assert "&lt;i&gt; cell=gru" in body and "old" not in body and "<i>" not in body and "cell=<b>" not in body
    assert "out of memory" in page and f"charlm.reproduce --result {sweep_folder}/results.jsonl --run cell=gru" in page


def test_the_page_of_a_run_shows_its_curves_result_samples_and_config(run, small_config, tmp_path):
    metrics = "--config.train.metrics=('accuracy','grad_norm_by_layer')", "--config.eval.metrics=('accuracy',)"
    assert run("train", f"--config={small_config}", f"--workdir={tmp_path / 'w'}", *metrics)[0] == 0
    (tmp_path / "w" / "explore.html").touch()
    code, _, err = run("report", f"--workdir={tmp_path / 'w'}")
    assert code == 0 and "report.html" in err
    page = (tmp_path / "w" / "report.html").read_text()
    result = json.loads((tmp_path / "w" / "result.json").read_text())
    assert "<a href='explore.html'>" in page
    assert result["params_sha256"] in page and "corpus_sha256" in page and "optimizer.learning_rate" in page
    body = page[page.rindex("<div class=samples>") :]
    assert body.index(">step 40<") < body.index(">step 20<")
    # One figure for the loss, and one for each selected metric, with a curve for each split or layer.
    labels = [label for label in re.findall(r'"axis_label":"([^"]*)"', page) if label != "million characters"]
    assert labels == ["nats per character", "accuracy", "grad_norm_by_layer"]
    legends = re.findall(r'"type":"object","name":"LegendItem".*?"label":\{"type":"value","value":"([^"]*)"\}', page)
    assert legends == ["train", "val", "train", "val", "embedding", "head", "layer_0"]


def test_a_folder_that_is_neither_a_run_nor_a_sweep_is_refused(run, tmp_path):
    code, _, err = run("report", f"--workdir={tmp_path}")
    assert code == 2 and "is neither a run nor a sweep: it has no config.json and no results.jsonl" in err
    (tmp_path / "results.jsonl").write_text("{}\n")
    assert run("report", f"--workdir={tmp_path}")[0] == 2


def test_distinct_values_are_sorted():
    assert results.sort_distinct([10, 9, 10, 1.5]) == [1.5, 9, 10]
    assert results.sort_distinct(["b", None, "a"]) == [None, "a", "b"] and not results.are_numbers([True, 1])


def test_a_sweep_without_any_loss_is_drawn(tmp_path):
    records = [record(f"seed={k}", {"seed": k, "model.cell": "lstm"}, None, "failed", "why") for k in (0, 1)]
    results.draw_sweep(records, ["seed", "model.cell"], {each["run"]: [] for each in records}, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000
