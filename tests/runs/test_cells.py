"""Every cell can be trained, resumed, swept, scored and sampled."""

import json

import pytest

from charlm.nn.cells import CELLS

# Other tests train, resume and sweep these.
COVERED = ("rnn", "lstm", "gru", "ln_lstm", "ln_gru")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CELLS if name not in COVERED])
def test_a_run_in_two_parts_has_the_bits_of_a_whole_one(run, small_config, tmp_path, name):
    flags = f"--config.model.cell={name}", "--config.model.learn_initial_state"
    flags += "--config.train.sample_every=0", "--config.optimizer.schedule=constant"
    results = []
    for workdir, lengths in (("whole", (30,)), ("parts", (10, 30))):
        for steps in lengths:
            argv = f"--config={small_config}", f"--workdir={tmp_path / workdir}", f"--config.train.steps={steps}", "--extend"
            assert run("train", *argv, *flags)[0] == 0
        results.append(json.loads((tmp_path / workdir / "result.json").read_text()))
    assert results[0]["params_sha256"] == results[1]["params_sha256"]
    assert results[0]["val_nats_per_char"] == results[1]["val_nats_per_char"]
    code, out, _ = run("sample", f"--workdir={tmp_path / 'parts'}", "--length=20")
    assert code == 0 and len(out) == 21


@pytest.mark.slow
def test_cells_are_swept_side_by_side(run, small_config, tmp_path):
    """Runs that differ only in their seeds train in one program. Their losses equal those of runs alone.

    test_sweep.py does this with different learning rates.
    """
    path = tmp_path / "sweep.py"
    cells = ["mogrifier_lstm", "slstm", "min_gru"]  # Features, several carries, and the parallel form.
    body = "[{'model.cell': cell, 'seed': seed, 'train.steps': 20} for cell in CELLS for seed in (0, 1)]"
    path.write_text(f"CELLS = {cells}\n\ndef get_sweep():\n    return {str(small_config)!r}, {body}\n")
    losses = []
    for executor in ("vmap", "sequential"):
        folder = tmp_path / executor
        assert run("sweep", f"--sweep={path}", f"--workdir={folder}", f"--executor={executor}")[0] == 0
        records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        losses.append([record["result"]["val_nats_per_char"] for record in records])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
