import dataclasses
import math
from pathlib import Path

import pytest

from charlm.config import default_config
from charlm.runs.outcome import Progress, is_over, limit_reached, make_result, summary_line
from charlm.system.errors import RunFailed


def config_of(**train):
    config = default_config()
    config.train.update(train)
    return config


def test_evaluations_off_the_cadence_may_be_the_best_but_do_not_count_for_patience():
    progress = Progress(eval_sum=3.0, eval_steps=2)
    assert progress.add_evaluation(10, 2.0, 2.5, at_cadence=True) and progress.eval_steps == 0
    assert progress.add_evaluation(13, 1.5, 2.4, at_cadence=False)
    assert (progress.best_step, progress.best_loss, progress.best_val, progress.bad_evals) == (13, 1.5, 2.4, 0)
    assert not progress.add_evaluation(20, 1.8, 2.3, at_cadence=True)  # Better than the last evaluation at the cadence.
    assert (progress.best_step, progress.patience_loss, progress.bad_evals) == (13, 1.8, 0)
    assert not progress.add_evaluation(30, 1.9, 2.3, at_cadence=True) and progress.bad_evals == 1
    assert not progress.add_evaluation(33, 1.9, 2.3, at_cadence=False) and progress.bad_evals == 1


def test_the_progress_of_other_versions_is_read():
    """Unknown fields are ignored, missing fields get their defaults, and the two sums of old versions become metrics."""
    old = {"best_step": 3, "loss_sum": 6.0, "norm_sum": 3.0, "steps": 4, "left_out": 1, "train_seconds": 2.0, "later": [1]}
    progress = Progress.from_saved(old)
    assert progress.means() == {"loss": 2.0, "grad_norm": 1.0}
    assert (progress.best_step, progress.steps, progress.train_seconds, progress.bad_evals) == (3, 4, 2.0, 0)
    assert Progress.from_saved(dataclasses.asdict(progress)) == progress


def test_sums_do_not_depend_on_the_size_of_a_chunk():
    metrics = {"loss": [0.1, math.nan, 0.3, 0.7], "grad_norm": [1.0, 2.0, math.inf, 3.0], "accuracy": [0.5, 0.6, 0.7, 0.8]}
    whole, parts = Progress(), Progress()
    whole.add_steps(metrics, 4.0, only_finite=True)
    for k in range(4):
        parts.add_steps({name: values[k : k + 1] for name, values in metrics.items()}, 1.0, only_finite=True)
    assert whole == parts and whole.counts == {"loss": 2, "grad_norm": 2, "accuracy": 2} and whole.steps == 4
    # The mean of a metric that is selected when a run is resumed is that over the steps since then.
    whole.add_steps({"loss": [1.0], "grad_norm": [1.0], "new": [5.0]}, 1.0, only_finite=True)
    assert whole.means()["new"] == 5.0 and whole.means()["loss"] == (0.1 + 0.7 + 1.0) / 3


def test_a_limit_is_reached_at_its_value():
    assert limit_reached(config_of(), Progress(bad_evals=99, train_seconds=1e9)) is None
    limits = config_of(patience=3, seconds=10.0)
    assert limit_reached(limits, Progress(bad_evals=2, train_seconds=9.9)) is None
    assert limit_reached(limits, Progress(bad_evals=3)) == "train.patience"
    assert limit_reached(limits, Progress(train_seconds=10.0)) == "train.seconds"


def test_a_result_says_whether_the_run_is_finished(capfd):
    config = config_of(seconds=10.0)
    config.batching.update(batch_size=4, seq_len=8)
    progress = Progress(best_step=30, best_val=1.5, train_seconds=12.0)
    result = make_result("stopped_early", 40, config, progress, 1234) | {"stopped_by": "train.seconds"}
    assert (result["chars"], result["num_params"]) == (1280, 1234)
    assert math.isclose(result["val_bits_per_char"], 1.5 / math.log(2)) and math.isclose(result["chars_per_second"], 1280 / 12)
    assert "stopped early after 40 steps; validation loss 1.5000" in summary_line(result, Path("runs/x"))
    assert is_over(Path("runs/x"), result, config, 100)
    assert "the run in runs/x is finished: stopped early by train.seconds after 40 steps" in capfd.readouterr().err
    assert not is_over(Path("runs/x"), result, config_of(seconds=13.0), 100)
    assert not is_over(Path("runs/x"), result, config_of(), 100)
    assert is_over(Path("runs/x"), result | {"stopped_by": "train.patience"}, config_of(), 100)
    assert is_over(Path("runs/x"), result | {"status": "completed"}, config, 40)
    assert not is_over(Path("runs/x"), result | {"status": "completed"}, config, 41)
    assert not is_over(Path("runs/x"), result | {"status": "failed"}, config, 40)
    with pytest.raises(RunFailed, match="diverged after step 40"):
        is_over(Path("runs/x"), result | {"status": "diverged"}, config, 40)
