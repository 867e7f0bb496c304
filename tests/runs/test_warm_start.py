"""Runs that start from the parameters or the vocabulary of another run."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import start

import charlm
from charlm.config import default_config
from charlm.runs.flat_state import flatten_state, sha256
from charlm.runs.reproduce import record_from_workdir, reproduce
from charlm.sweeps.vmap_executor import group_runs
from charlm.system.errors import ConfigError, CorpusError, WorkdirError

NEW = "ÄÖÜß€"


def config_for(path, steps=30, **changes):
    config = default_config()
    config.data.path = str(path)
    config.batching.batch_size, config.batching.seq_len, config.model.hidden_size = 4, 8, 16
    config.train.steps, config.train.log_every, config.train.eval_every, config.train.sample_every = steps, 10, 10, 0
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def other_text(text_file, tmp_path_factory):
    """Return the path of a text in the same language, with five symbols more and without j."""
    text = text_file.read_text().replace("j", "i")
    words = text.split(" ")[::-1]
    words[::7] = [word + NEW[i % 5] for i, word in enumerate(words[::7])]
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def first(text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("first") / "first"
    charlm.fit(config_for(text_file, 5), path, progress=False)
    return path


@pytest.fixture(scope="module")
def learned(text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("learned") / "learned"
    charlm.fit(config_for(text_file, 200, **{"optimizer.learning_rate": 0.01}), path, progress=False)
    return path


ENCODINGS = [("embedding", "lstm"), *(pytest.param("one_hot", c, marks=pytest.mark.slow) for c in ("lstm", "mogrifier_lstm"))]


@pytest.mark.parametrize("encoding, cell", ENCODINGS)
def test_symbols_keep_their_rows_and_new_ones_get_fresh_rows(text_file, other_text, tmp_path, encoding, cell, capfd):
    config = config_for(text_file, 3, **{"model.encoding": encoding, "model.cell": cell})
    source = charlm.fit(config, tmp_path / "source", progress=False)
    changes = {"train.init_from": str(tmp_path / "source"), "model.encoding": encoding, "optimizer.learning_rate": 1e-30}
    changes["model.cell"] = cell
    capfd.readouterr()
    model = charlm.fit(config_for(other_text, 1, **changes), tmp_path / "warm")
    err = capfd.readouterr().err
    assert (
        repr(NEW[0])[1:-1] in err
        and "new symbols" in err
        and model.vocab.symbols == "".join(sorted({*source.vocab.symbols, *NEW}))
    )
    table = ("embedding", None) if encoding == "embedding" else ("layer_0", "W_x")

    def rows(model):
        found = model.params[table[0]] if table[1] is None else model.params[table[0]][table[1]]
        columns = np.concatenate([found, model.params["head_W"].T, model.params["head_b"][:, None]], axis=1)
        return dict(zip(model.vocab.symbols, columns))

    old, new = rows(source), rows(model)
    for symbol, row in old.items():
        np.testing.assert_allclose(new[symbol], row, atol=1e-20)
    assert all(np.abs(new[symbol]).max() > 0 for symbol in NEW)
    np.testing.assert_allclose(model.params["layer_0"]["W_h"], source.params["layer_0"]["W_h"], atol=1e-20)
    # A text of known symbols gets the same scores, but for the probability of the new symbols.
    assert model.manifest["init_from"]["params_sha256"] == sha256(flatten_state(source.params))


@pytest.mark.slow
def test_a_warm_start_learns_faster_than_a_cold_one(learned, other_text, tmp_path):
    def losses(name, steps, **changes):
        model = charlm.fit(config_for(other_text, steps, **changes), tmp_path / name, progress=False)
        return [line["nats_per_char"] for line in model.metrics() if line["split"] == "val"]

    warm, cold = losses("warm", 30, **{"train.init_from": str(learned)}), losses("cold", 60)
    assert warm[-1] < cold[2] - 0.1 and warm[-1] < cold[-1]


@pytest.mark.slow
def test_a_warm_start_that_is_killed_and_continued_has_the_same_bits(first, other_text, tmp_path):
    file = tmp_path / "warm.py"
    changes = {"train.init_from": str(first), "train.checkpoint_every": 10}
    charlm.fit(config_for(other_text, 400, **changes), tmp_path / "whole", progress=False)
    source = json.loads((tmp_path / "whole" / "config.json").read_text())
    file.write_text(
        "from charlm.config import default_config\n"
        "def get_config():\n    config = default_config()\n"
        f"    config.update({source!r})\n    return config\n"
    )
    for _ in range(2):
        process = start("train", f"--config={file}", f"--workdir={tmp_path / 'parts'}")
        checkpoints = tmp_path / "parts" / "checkpoints"
        before = max((int(each.name) for each in checkpoints.glob("[0-9]*") if each.name.isdecimal()), default=-1)
        while process.poll() is None:
            if any(each.name.isdecimal() and int(each.name) > before for each in checkpoints.glob("[0-9]*")):
                process.kill()
        process.communicate()
    process = start("train", f"--config={file}", f"--workdir={tmp_path / 'parts'}")
    _, err = process.communicate()
    assert process.returncode == 0, err
    whole, parts = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts"))
    assert whole["params_sha256"] == parts["params_sha256"] and whole["val_nats_per_char"] == parts["val_nats_per_char"]


@pytest.mark.slow
def test_a_warm_start_is_reproduced_and_a_changed_source_is_refused(text_file, other_text, tmp_path):
    charlm.fit(config_for(text_file, 3), tmp_path / "source", progress=False)
    config = config_for(other_text, 10, **{"train.init_from": str(tmp_path / "source"), "train.ema_decay": 0.9})
    model = charlm.fit(config, tmp_path / "warm", progress=False)
    record = record_from_workdir(tmp_path / "warm")
    assert reproduce(record)["same"]
    shutil.rmtree(tmp_path / "source")
    assert charlm.load(tmp_path / "warm").evaluate()["count"] == model.evaluate()["count"]  # The source is not needed.
    charlm.fit(config, tmp_path / "warm", progress=False)
    charlm.fit(config_for(text_file, 4), tmp_path / "source", progress=False)
    with pytest.raises(WorkdirError, match="is not what the run was started from"):
        reproduce(record)


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_starts_from_the_same_source(text_file, other_text, tmp_path):
    charlm.fit(config_for(text_file, 3), tmp_path / "source", progress=False)
    config = config_for(other_text, 10, **{"train.init_from": str(tmp_path / "source")})
    whole = charlm.fit(config, tmp_path / "warm", progress=False)
    shutil.rmtree(tmp_path / "warm" / "checkpoints")
    (tmp_path / "warm" / "result.json").unlink()
    again = charlm.fit(config, tmp_path / "warm", progress=False)
    assert sha256(flatten_state(again.params)) == sha256(flatten_state(whole.params))
    shutil.rmtree(tmp_path / "warm" / "checkpoints")
    (tmp_path / "warm" / "result.json").unlink()
    shutil.rmtree(tmp_path / "source")
    charlm.fit(config_for(text_file, 4), tmp_path / "source", progress=False)
    with pytest.raises(WorkdirError, match="is not what the run was started from"):
        charlm.fit(config, tmp_path / "warm", progress=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.hidden_size": 17}, "model.hidden_size is 17, but train.init_from .* has 16"),
        ({"model.cell": "gru"}, "model.cell is 'gru'"),
        ({"model.num_layers": 2}, "model.num_layers"),
        ({"model.embedding_size": 5}, "model.embedding_size"),
        ({"data.vocab": "bytes"}, "data.vocab is 'bytes'"),
    ],
)
def test_what_cannot_be_matched_is_refused_by_name(first, other_text, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        charlm.fit(config_for(other_text, **{"train.init_from": str(first), **changes}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_source_that_is_no_run_is_refused(other_text, tmp_path):
    with pytest.raises(WorkdirError, match="train.init_from .*nowhere does not exist"):
        charlm.fit(config_for(other_text, **{"train.init_from": str(tmp_path / "nowhere")}), tmp_path / "run", progress=False)


def test_a_vocabulary_can_be_kept_alone(first, text_file, other_text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("abc " * 300)
    model = charlm.fit(config_for(short, 2, **{"data.vocab_from": str(first)}), tmp_path / "kept", progress=False)
    assert model.vocab == charlm.load(first).vocab and model.num_steps == 2
    with pytest.raises(CorpusError, match="data.vocab_from .* is not in the vocabulary"):
        charlm.fit(config_for(other_text, 2, **{"data.vocab_from": str(first)}), tmp_path / "run", progress=False)


def test_vmap_trains_runs_from_a_source_by_themselves(first, other_text, tmp_path):
    configs = [config_for(other_text, 4, **{"train.init_from": str(first), "seed": seed}) for seed in (0, 1)]
    groups, alone = group_runs([SimpleNamespace(name=str(config.seed), config=config) for config in configs], tmp_path)
    assert not groups and [why for _, why in alone] == ["train.init_from is set"] * 2
