"""A run on documents, end to end: training, resuming, scores, samples, and what is refused."""

import json
import random

import numpy as np
import pytest
from models import small_model

import charlm
from charlm.runs.loop import train
from charlm.runs.tracking import read_metrics
from charlm.system.errors import ConfigError, CorpusError

FLAGS = ("--config.data.documents=lines", "--config.model.dropout=0.2", "--config.train.steps=30", "--config.sample.length=60")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Return the path of 400 names, one a line."""
    draw = random.Random(0)
    names = {"".join(draw.choice("bdklmn") + draw.choice("aeiou") for _ in range(draw.randint(1, 4))) for _ in range(900)}
    path = tmp_path_factory.mktemp("names") / "names.txt"
    path.write_text("\n".join(sorted(names)[:400]) + "\n")
    return path


@pytest.fixture(scope="module")
def config_file(small_config, tmp_path_factory):
    """Return the path of the small config without the context of its score, which has no meaning for documents."""
    path = tmp_path_factory.mktemp("config") / "documents.py"
    path.write_text(small_config.read_text().replace("    config.eval.context = 4\n", ""))
    return path


@pytest.fixture(scope="module")
def workdir(names, config_file, tmp_path_factory):
    from conftest import COMMANDS

    from charlm.config import cli

    path = tmp_path_factory.mktemp("run") / "run"
    flags = [*FLAGS, f"--config.data.path={names}", "--workdir", str(path)]
    assert cli.run(COMMANDS["train"], ["--config", str(config_file), *flags]) == 0
    return path


def test_a_stopped_run_whose_text_stays_on_disk_has_the_same_bits(workdir, tmp_path):
    config = charlm.load(workdir).config
    config.data.device_bytes = 0  # The host reads the windows ahead of their use.
    config.train.steps = 11
    train(config, tmp_path / "run")
    config.train.steps = 30
    train(config, tmp_path / "run", extend=True)
    hashes = [json.loads((path / "result.json").read_text())["params_sha256"] for path in (workdir, tmp_path / "run")]
    assert hashes[0] == hashes[1]


def test_the_loss_of_held_out_documents_is_that_of_each_one_alone(workdir, run):
    code, out, _ = run("evaluate", "--workdir", str(workdir), "--per_document", "--json")
    found, model = json.loads(out), charlm.load(workdir)
    assert code == 0 and 20 < len(found["documents"]) < 70
    nats = [model.score(each["text"]).total.nats for each in found["documents"][:10]]
    np.testing.assert_allclose(nats, [each["nats"] for each in found["documents"][:10]], atol=1e-5, rtol=1e-5)
    assert found["count"] == sum(each["count"] for each in found["documents"])
    assert abs(found["nats_per_char"] - sum(each["nats"] for each in found["documents"]) / found["count"]) < 1e-5
    line = [
        line for line in read_metrics(workdir / "metrics.jsonl") if line["split"] == "val" and line["step"] == model.num_steps
    ]
    assert abs(line[-1]["nats_per_char"] - found["nats_per_char"]) < 1e-6
    table = run("evaluate", "--workdir", str(workdir), "--per_document")[1].splitlines()
    assert len(table) == 5 + len(found["documents"]) and repr(found["documents"][-1]["text"]) in table[-1]
    held_out = {each["text"] for each in found["documents"]}
    assert not held_out & set(model.vocab.decode(model.corpus().train).split("\n"))
    assert model.evaluate(dynamic=True)["dynamic_nats_per_char"] > 0


def test_samples_are_whole_documents_with_their_novelty(workdir, names, run):
    code, out, err = run("sample", "--workdir", str(workdir), "--num_samples", "50", "--novelty", "--length", "200")
    samples = out.splitlines()
    assert code == 0 and len(samples) == 50 and "were cut" not in err
    assert len(set(samples)) > 10 and err.count("its longest copy has") == 50 and "of 50 samples are new" in err
    code, out, err = run("sample", "--workdir", str(workdir), "--num_samples", "50", "--novelty", "--length", "200", "--json")
    found = json.loads(out)
    model = charlm.load(workdir)
    known = set(model.vocab.decode(model.corpus().train).split("\n")) - {""}
    assert [each["text"] for each in found["samples"]] == samples
    assert [each["in_training_text"] for each in found["samples"]] == [sample in known for sample in samples]
    assert found["new"] == np.mean([sample not in known for sample in samples])
    code, out, err = run("sample", "--workdir", str(workdir), "--num_samples", "9", "--length", "1", "--prompt", "ma")
    assert code == 0 and all(line.startswith("ma") and len(line) <= 3 for line in out.splitlines())
    assert "of 9 samples were cut at --length 1" in err
    assert run("sample", "--workdir", str(workdir), "--prompt", "ma\nbo")[0] == 2
    assert "symbol 'é' at position 2" in run("sample", "--workdir", str(workdir), "--prompt", "maé")[2]
    code, out, err = run("sample", "--workdir", str(workdir), "--num_samples", "9", "--length", "2", "--novelty", "--json")
    for each in json.loads(out)["samples"]:  # A sample that was cut is known as the beginning of a document.
        begins = [name.startswith(each["text"]) if len(each["text"]) == 2 else name == each["text"] for name in known]
        assert each["in_training_text"] == any(begins)
    recorded = [json.loads(line)["text"] for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert recorded and not any("\n" in text for text in recorded)


def test_a_model_reads_nothing_beyond_a_boundary(workdir):
    model = charlm.load(workdir)
    one, two = model.step("\nma")[0][-1], model.step("xyz\nma" if "x" in model.vocab.symbols else "bo\nma")[0][-1]
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    probabilities = [dict(model.next(text, k=5)) for text in ("ma", "\nma", "bo\nma")]
    for other in probabilities[1:]:
        assert probabilities[0].keys() == other.keys()
        np.testing.assert_allclose(list(probabilities[0].values()), list(other.values()), rtol=1e-5)
    whole = model.score("ma\n\nbode\n").total.nats
    assert abs(whole - model.score("ma").total.nats - model.score("bode").total.nats) < 1e-4
    with pytest.raises(CorpusError, match="a score needs at least 2"):
        model.score("\n")


@pytest.mark.parametrize(
    "flag, key",
    [
        ("batching.layout=windows", "batching.layout"),
        ("batching.reset_prob=0.5", "batching.reset_prob"),
        ("eval.context=5", "eval.context"),
        ("model.recurrence=cudnn", "model.recurrence"),
        ("data.separator=|", "data.separator"),
        ("sample.window=4", "sample.window"),
        ("sample.random_prompt=4", "sample.random_prompt"),
    ],
)
def test_what_has_no_meaning_for_documents_is_refused(run, config_file, tmp_path, flag, key):
    flags = f"--config.{flag}", "--config.data.documents=lines"
    code, _, err = run("train", "--config", str(config_file), "--workdir", str(tmp_path / "run"), *flags)
    assert code == 2 and key in err and len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("separator", ["\\n\\n", "|"])
def test_a_separator_that_does_not_occur_in_the_text_is_refused(run, config_file, tmp_path, separator):
    """A shell passes the two characters of a backslash and an n. The text would be one document, without validation."""
    flags = f"--config.data.documents={separator}", "--config.data.split=(1.0,0.0,0.0)"
    code, _, err = run("train", "--config", str(config_file), "--workdir", str(tmp_path / "run"), *flags)
    assert code == 2 and f"{separator!r}, which leaves 1 document(s)" in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_a_run_without_documents_has_no_score_of_each():
    with pytest.raises(ConfigError, match="data.documents is not set"):
        small_model().evaluate(per_document=True)
