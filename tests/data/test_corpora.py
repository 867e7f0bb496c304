"""Corpora that have names: the field's standard corpora, from stand-ins that a server on this machine serves, and one's own."""

import hashlib
import io
import json
import math
import random
import string
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from server import Server

from charlm.config import default_config
from charlm.data import corpora, corpus
from charlm.runs.tracking import read_metrics
from charlm.system.errors import ConfigError, CorpusError

STANDARD = {name: corpora.CORPORA[name] for name in ("enwik8", "text8")}
CONFIGS = Path(__file__).parents[2] / "configs"
SIZE = 200_000
SPLIT = (180_000, 10_000, 10_000)


def stand_in(name: str) -> bytes:
    """A text of the shape of enwik8 (XML with characters of several bytes) or of text8 (letters and spaces)."""
    draw = random.Random(0)
    symbols = string.ascii_lowercase + " " if name == "text8" else string.printable[:95] + "\n\té漢🙂"
    words = ["".join(draw.choices(symbols, k=draw.randint(2, 9))) for _ in range(300)]
    start = "" if name == "text8" else "<mediawiki>\n"
    # The end is cut off after so many bytes, wherever that is.
    return (start + " ".join(draw.choices(words, k=SIZE // 4))).encode()[:SIZE]


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Return a function that puts a stand-in into the place of a corpus, with sums of its own, and returns its text."""
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    servers = []

    def replace(name, **changes):
        text, archive = stand_in(name), io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(name, text)
        servers.append(Server(archive.getvalue()))
        entry = STANDARD[name]
        sums = {"sha256": hashlib.sha256(archive.getvalue()).hexdigest(), "text_sha256": hashlib.sha256(text).hexdigest()}
        changes = {"url": f"{servers[-1].url}#{name}", "split": SPLIT} | sums | changes
        monkeypatch.setitem(corpora.CORPORA, name, entry._replace(**changes))
        return text

    yield replace
    for server in servers:
        server.close()


def data(name, **changes):
    options = default_config().data
    options.update(corpus=name, **changes)
    return options


@pytest.mark.parametrize("name", ["enwik8", pytest.param("text8", marks=pytest.mark.slow)])
def test_the_whole_path_of_a_standard_corpus_is_taken(run, serve, tmp_path, name):
    text, path, unit = serve(name), tmp_path / "run", "bits_per_byte" if name == "enwik8" else "bits_per_char"
    small = ["batching.batch_size=32", "batching.seq_len=16", "model.hidden_size=8", "model.embedding_size=8", "train.steps=4"]
    small += ["model.num_layers=1", "eval.num_streams=64", "eval.context=8", "optimizer.warmup_steps=1", "train.sample_every=0"]
    config = [f"--config={CONFIGS / name}.py", f"--workdir={path}", *(f"--config.{key}" for key in small)]
    code, _, err = run("train", *config)
    assert code == 0, err
    result = json.loads((path / "result.json").read_text())
    assert json.loads((path / "manifest.json").read_text())["corpus_sha256"] == hashlib.sha256(text).hexdigest()
    loaded = corpus.load_corpus(data(name, vocab="bytes" if name == "enwik8" else "chars"))
    parts = [loaded.train, loaded.val, loaded.test]
    assert tuple(map(len, parts)) == SPLIT and loaded.vocab.size == (256 if name == "enwik8" else 27)
    if name == "enwik8":
        assert np.concatenate(parts).tobytes() == text
    else:
        assert "".join(map(loaded.vocab.decode, parts)) == text.decode()
    for split in ("val", "test"):
        code, out, _ = run("evaluate", f"--workdir={path}", f"--split={split}", "--json")
        score = json.loads(out)
        assert code == 0 and score["bytes" if name == "enwik8" else "count"] == 9_999
        if split == "val":
            assert math.isclose(score[unit], result[f"val_{unit}"], rel_tol=1e-5)
            (line,) = [line for line in read_metrics(path / "metrics.jsonl") if line["split"] == "val"]
            assert line[unit] == result[f"val_{unit}"]
        elif name == "enwik8":
            assert math.isclose(score[unit], result["test_bits_per_byte"], rel_tol=1e-5)
    assert ("val_bits_per_byte" in result) == (name == "enwik8")


def test_a_standard_corpus_is_what_the_field_takes_it_for(serve):
    for entry in STANDARD.values():
        assert [part / 500 for part in entry.split] == list(SPLIT)
    serve("enwik8"), serve("text8")
    with pytest.raises(ConfigError, match="data.vocab is 'chars'; the corpus enwik8 is measured per symbol of 'bytes'"):
        corpus.load_corpus(data("enwik8"))
    with pytest.raises(ConfigError, match="data.lowercase is True; the corpus text8 has a fixed text"):
        corpus.load_corpus(data("text8", lowercase=True))
    loaded = corpus.load_corpus(data("text8", split=(1000, 200, 100)))
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [1000, 200, 100]
    with pytest.raises(ConfigError, match="each play of shakespeare is split, so it must be fractions"):
        corpus.load_corpus(data("shakespeare", split=(1000, 200, 100)))


def test_another_archive_or_another_text_is_refused(serve, tmp_path):
    serve("text8", sha256="0" * 64)
    with pytest.raises(CorpusError, match=f"has the sha256 [0-9a-f]{{64}}, not {'0' * 64}: it was altered"):
        corpus.load_corpus(data("text8"))
    serve("text8", text_sha256="0" * 64)
    with pytest.raises(CorpusError, match=f"the text of text8 has the sha256 [0-9a-f]{{64}}, not {'0' * 64}"):
        corpus.load_corpus(data("text8"))
    assert not [path for path in (tmp_path / "cache" / "corpora").iterdir() if path.suffix != ".lock"]


MODULE = '''
from charlm.data.corpora import corpus

CALLS = []

@corpus
def lines(data):
    """A generator: the text in pieces."""
    CALLS.append(data.vocab)
    for i in range(200):
        yield f"Line {i}\\r\\n"

@corpus
def parts(data):
    return "train " * 30, ["va", "l " * 30], (c for c in "test")

@corpus
def broken(data):
    yield "text"
    raise KeyError("speech")

@corpus
def numbers(data):
    return [1, 2]

@corpus
def empty(data):
    return ""

@corpus
def two(data):
    return "a", "b"

@corpus
def nothing(data):
    pass

@corpus
def leaves(data):
    raise SystemExit(0)

@corpus
def another_each_time(data, seen=[]):
    seen.append(len(seen))
    return chr(97 + len(seen)) * 50

def unmarked(data):
    raise AssertionError("must not be called")
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Put a module with corpora on the path, and return its name."""
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "texts_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield "texts_of_mine"
    sys.modules.pop("texts_of_mine", None)


def decoded(loaded):
    return [loaded.vocab.decode(part) for part in (loaded.train, loaded.val, loaded.test)]


def test_a_function_is_a_corpus(module):
    __import__(module)
    whole = "".join(f"line {i}\n" for i in range(200))
    for changes, cuts in (({}, (0.9, 1)), ({"split": (100, 50, 20)}, (100, 150, 170))):
        loaded = corpus.load_corpus(data(f"{module}:lines", lowercase=True, **changes))
        ends = [round(cut * len(whole)) if cut <= 1 else cut for cut in cuts]
        assert decoded(loaded)[:2] == [whole[: ends[0]], whole[ends[0] : ends[1]]]
    assert loaded.sha256 == hashlib.sha256(whole.encode()).hexdigest()
    assert decoded(corpus.load_corpus(data(f"{module}:parts"))) == ["train " * 30, "va" + "l " * 30, "test"]


@pytest.mark.parametrize(
    "function, match",
    [
        ("broken", r"texts_of_mine:broken failed: KeyError: 'speech' \(.*texts_of_mine.py, line 20\)"),
        ("numbers", "texts_of_mine:numbers returned int; it must return strings"),
        ("empty", "the corpus texts_of_mine:empty is empty"),
        ("two", "texts_of_mine:two returned 2 texts; it must return one, or three in a tuple"),
        ("nothing", "texts_of_mine:nothing returned NoneType; it must return strings"),
        ("leaves", "texts_of_mine:leaves failed: SystemExit: 0"),
        ("another_each_time", "texts_of_mine:another_each_time changed while it was read"),
        ("unmarked", "of type function; it must be a function with the decorator charlm.data.corpora.corpus"),
        ("missing", "of type NoneType; it must be a function"),
    ],
)
def test_a_function_that_is_no_corpus_is_refused(module, function, match):
    __import__(module)
    with pytest.raises((ConfigError, CorpusError), match=match) as error:
        corpus.load_corpus(data(f"{module}:{function}"))
    assert "\n" not in str(error.value)


def test_a_corpus_of_ones_own_needs_its_module_to_be_named(run, small_config, tmp_path, module):
    path = tmp_path / "run"
    keys = [f"--config.data.corpus={module}:lines", "--config.train.steps=2"]
    config = tmp_path / "config.py"
    config.write_text(small_config.read_text().replace("    config.data.path", "    # config.data.path"))
    assert run("train", f"--config={config}", f"--workdir={path}", *keys)[0] == 0
    for command in ("evaluate", "reproduce"):
        sys.modules.pop(module)  # As in a new process.
        code, _, err = run(command, f"--workdir={path}")
        assert code == 2 and err.count("\n") == 1 and f"name {module} with --corpus_module" in err, err
        assert module not in sys.modules, "a name in a workdir imports nothing"
        code, _, err = run(command, f"--workdir={path}", f"--corpus_module={module}")
        assert code == 0, err
    sys.modules.pop(module)
    assert run("sample", f"--workdir={path}", "--length=5")[0] == 0  # It reads no corpus.
    assert run("sample", f"--workdir={path}", "--length=5", "--random_prompt=5")[0] == 2
    (tmp_path / "modules" / "leaving.py").write_text("raise SystemExit(0)")
    for name in ("no_such_module", "leaving"):
        code, _, err = run("evaluate", f"--workdir={path}", f"--corpus_module={name}")
        assert code == 2 and f"the module {name!r} of a corpus cannot be imported" in err


@pytest.mark.parametrize("name", ["os:system", "subprocess:call", "builtins:print", "json:"])
def test_a_config_calls_no_other_function(name):
    with pytest.raises(ConfigError, match="it must be a function with the decorator"):
        corpus.load_corpus(data(name))
