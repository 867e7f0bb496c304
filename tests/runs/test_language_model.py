"""The Python front door: what it returns equals what the commands print, and what the model computes."""

import dataclasses
import html
import json
import math
import re
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TEXT, small_model

import charlm
from charlm.config import default_config
from charlm.data.vocab import Vocab
from charlm.inference.decoding import SampleDecoder
from charlm.nn.model import CharLM
from charlm.runs.flat_state import flatten_state, sha256
from charlm.runs.reproduce import record_from_workdir, reproduce
from charlm.system.errors import ConfigError, CorpusError, UserError, WorkdirError


@pytest.fixture(scope="module")
def model():
    return small_model()


# Every cell, depth and kind of symbols.
SLOW = [("lstm", 2, "bytes"), ("rnn", 3, "bytes"), ("gru", 3, "chars"), ("ln_lstm", 1, "bytes")]


@pytest.mark.parametrize(
    "cell, layers, kind", [("lstm", 1, "chars"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_samples_and_scores_are_those_of_the_commands(tmp_path, run, cell, layers, kind):
    small_model(cell, layers, kind, **{"eval.num_streams": 5, "eval.context": 4}).save(tmp_path / "run")
    model = charlm.load(tmp_path / "run")
    flags = "--prompt=the ", "--seed=3", "--length=30", "--temperature=0.7", "--num_samples=2", "--top_k=9", "--stop=qq"
    code, out, _ = run("sample", f"--workdir={tmp_path / 'run'}", *flags)
    texts = model.sample("the ", 30, 0.7, seed=3, num_samples=2, top_k=9, stop="qq")
    assert code == 0 and out == "".join(f"the {text}\n" for text in texts)
    assert "".join(model.stream("the ", length=30, temperature=0.7, top_k=9, seed=3)) == texts[0]
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, _ = run("evaluate", f"--workdir={tmp_path / 'run'}", f"--text={tmp_path / 'text.txt'}", "--json")
    found, score = json.loads(out), model.score(TEXT)
    assert code == 0 and len(score.nats) == len(score.ids) - 1 == len(TEXT) - 1
    for key in ("nats_per_char", "bits_per_char", "perplexity"):
        assert getattr(score, key) == found[key]  # To the bit.


@pytest.mark.parametrize("kind", ["chars", "bytes"])
def test_the_loss_of_each_symbol_is_that_of_the_models_probabilities(kind):
    model = small_model(kind=kind)
    score = model.score(TEXT)
    logits, _ = model.step(TEXT)
    logs = np.asarray(logits, np.float64) - np.logaddexp.reduce(np.asarray(logits, np.float64), axis=-1, keepdims=True)
    ids = model.vocab.encode(TEXT)
    np.testing.assert_allclose(score.nats, -logs[np.arange(len(ids) - 1), ids[1:]], rtol=2e-5, atol=1e-5)
    assert score.nats_per_char == pytest.approx(score.nats.mean(), rel=1e-6)
    assert score.text == TEXT and "".join(char for char, _ in score.chars()) == TEXT


def test_with_streams_every_symbol_but_the_first_has_a_loss():
    score = small_model(**{"eval.num_streams": 7, "eval.context": 3, "eval.batch_size": 2}).score(TEXT)
    assert np.isfinite(score.nats).all()
    assert score.nats_per_char == pytest.approx(score.nats.mean(), rel=1e-6)


def test_a_many_to_one_model_scores_what_follows_a_window():
    changes = {"batching.loss_on": "last", "batching.layout": "windows", "batching.seq_len": 8, "eval.max_chars": 5}
    score = small_model(**changes).score(TEXT)
    assert np.isfinite(score.nats).sum() == 5 and np.isnan(score.nats[:7]).all() and np.isfinite(score.nats[7])
    assert score.nats_per_char == pytest.approx(np.nanmean(score.nats), rel=1e-6)
    score._repr_html_()


@settings(max_examples=3)
@given(cut=st.integers(1, 39))
def test_a_text_can_be_read_in_steps_of_any_length(model, cut):
    text = TEXT[:40]
    whole, last = model.step(text)
    first, state = model.step(text[:cut])
    second, state = model.step(text[cut:], state)
    np.testing.assert_allclose(np.concatenate([first, second]), whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, last)


@pytest.mark.parametrize(
    "cell", ["lstm", "ln_gru", *(pytest.param(cell, marks=pytest.mark.slow) for cell in ("rnn", "gru", "ln_lstm"))]
)
def test_states_and_gates_obey_the_equations_of_the_cell(cell):
    model = small_model(cell, layers=2)
    text = TEXT[:100]
    found = model.states(text, gates=True)
    _, last = model.step(text)
    for layer in range(2):
        named = {
            name.removeprefix(f"layer_{layer}."): each for name, each in found.items() if name.startswith(f"layer_{layer}.")
        }
        h, gate = named["h"], {name.removeprefix("gate_"): each for name, each in named.items() if name.startswith("gate_")}
        assert all(each.shape == (100, 12) for each in named.values())
        np.testing.assert_allclose(h[-1], last[layer][0][0], atol=1e-5)
        before = {name: np.concatenate([np.zeros((1, 12)), named[name][:-1]]) for name in ("h", "c") if name in named}
        if cell == "rnn":
            np.testing.assert_array_equal(gate["h"], h)
        elif "lstm" in cell:
            np.testing.assert_allclose(named["c"], gate["f"] * before["c"] + gate["i"] * gate["g"], atol=1e-5)
            if cell == "lstm":
                np.testing.assert_allclose(h, gate["o"] * np.tanh(named["c"]), atol=1e-5)
        else:
            np.testing.assert_allclose(h, (1 - gate["z"]) * gate["n"] + gate["z"] * before["h"], atol=1e-5)
    without = model.states(text)
    assert set(without) == {name for name in found if "gate" not in name}
    np.testing.assert_array_equal(without["layer_1.h"], found["layer_1.h"])


@pytest.mark.parametrize("length", [1, 5, 64, 130])
def test_the_next_symbols_have_the_probabilities_of_the_last_logits(model, length):
    found = model.next(TEXT[:length], k=1000)
    probs = np.asarray(jax.nn.softmax(model.step(TEXT[:length])[0][-1]))
    assert [symbol for symbol, _ in found] == [model.vocab.symbols[i] for i in np.argsort(-probs, kind="stable")]
    np.testing.assert_allclose([p for _, p in found], np.sort(probs)[::-1], rtol=1e-4)
    assert small_model(kind="bytes").next("é", 3)[0][0] in [bytes([i]) for i in range(256)]
    assert model.next("", 2) == model.next("\n", 2)


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=4),
)
def test_a_sample_ends_before_the_first_stop_string_however_it_is_cut(text, stops, cuts):
    vocab, ends = Vocab.from_chars("ab"), [0, *sorted(cuts), 30]
    decoder = SampleDecoder(vocab, stops)
    parts = [decoder.feed(vocab.encode(text[a:b])) for a, b in zip(ends, ends[1:])]
    assert "".join(parts) + decoder.flush() == min((text.split(stop)[0] for stop in stops), key=len)
    # Where one stop string is complete, the end of the text may be the beginning of another one, which would begin earlier.
    assert not decoder.stopped or any(stop in text for stop in stops)
    assert decoder.stopped or len(stops) > 1 or stops[0] not in text


@pytest.mark.slow
def test_a_saved_model_is_loaded_sampled_and_trained_further(model, text_file, tmp_path, run):
    config = default_config()
    config.data.path, config.model.hidden_size, config.train.steps, config.train.ema_decay = str(text_file), 8, 3, 0.5
    first = charlm.fit(config, tmp_path / "first", progress=False)
    first.save(tmp_path / "second")
    second = charlm.load(tmp_path / "second")
    assert sha256(flatten_state(second.params)) == sha256(flatten_state(first.params))
    assert second.sample("ab", 20, seed=1) == first.sample("ab", 20, seed=1) and second.num_steps == 0
    assert second.manifest["origin"]["from"] == str(tmp_path / "first")
    code, _, err = run("reproduce", f"--workdir={tmp_path / 'second'}")
    assert code == 2 and err.count("\n") == 1 and "first" in err
    third = charlm.fit(config, tmp_path / "second", progress=False)
    assert third.num_steps == 3 and sha256(flatten_state(third.params)) != sha256(flatten_state(first.params))
    with pytest.raises(WorkdirError, match="holds a run already"):
        first.save(tmp_path / "second")


def test_wrong_arguments_are_refused(model):
    for error, call in [
        (ConfigError, lambda: model.sample(temperature=-1.0)),
        (ConfigError, lambda: model.sample(length="many")),
        (ConfigError, lambda: model.sample("ж")),
        (ConfigError, lambda: model.sample(seed=-1)),
        (ConfigError, lambda: model.sample(seed=1.5)),
        (ConfigError, lambda: model.sample(stop=7)),
        (ConfigError, lambda: model.next("the", k=0)),
        (ConfigError, lambda: model.next(b"the")),
        (ConfigError, lambda: model.score(b"the cat")),
        (ConfigError, lambda: model.sample(stop="")),
        (ConfigError, lambda: model.stream(lenght=3)),
        (CorpusError, lambda: model.next("ж")),
        (CorpusError, lambda: model.score("x")),
        (CorpusError, lambda: model.score("the жук")),
        (CorpusError, lambda: model.score("the \ud800")),
        (CorpusError, lambda: model.states("")),
        (CorpusError, lambda: model.step("")),
        (CorpusError, lambda: model.step("the", model.initial_state(2))),
        (ConfigError, lambda: model.step("the", 5)),
        (ConfigError, lambda: model.evaluate("foo")),
        (CorpusError, lambda: model.step(np.array([0, 99]))),
        (CorpusError, lambda: model.step(np.array([0.5]))),
        (WorkdirError, lambda: model.metrics()),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_changed_vocabulary_is_noticed(small_config, tmp_path, run):
    path = tmp_path / "run"
    assert run("train", f"--config={small_config}", f"--workdir={path}", "--config.train.steps=2")[0] == 0
    vocab = json.loads((path / "vocab.json").read_text())
    vocab["symbols"] = vocab["symbols"][:-1] + "ж"
    (path / "vocab.json").write_text(json.dumps(vocab))
    for command, flags in [("evaluate", ()), ("sample", ()), ("train", (f"--config={small_config}",))]:
        flags = (*flags, "--config.train.steps=3", "--extend") if command == "train" else flags
        code, out, err = run(command, f"--workdir={path}", *flags)
        assert code == 2 and "another vocabulary" in err and not out


def test_a_score_is_drawn_as_text_and_runs_no_script(model):
    text = "<script>alert('&')</script>\n"
    vocab = Vocab.from_chars(text)
    config = model.config
    params = CharLM.from_config(config.model, vocab.size).initial_params(jax.random.key(0))
    score = charlm.LanguageModel(config, vocab, params).score(text)
    drawn = score._repr_html_()
    assert "<script" not in drawn
    inside = drawn[drawn.index("<div") :]
    assert html.unescape(re.sub("<[^>]*>", "", inside)) == text.replace("\n", "\u23ce\n")
    assert len(re.findall("rgba", drawn)) == len(text) - 1


def test_two_models_are_compared_character_by_character_whatever_their_symbols(model):
    text = "the red café"
    chars = small_model(text=text + "o")
    one, two = chars.score(text), small_model(kind="bytes").score(text)
    found = one.compare(two)
    expected = np.array([a - b for (_, a), (_, b) in zip(one.chars(), two.chars())])
    np.testing.assert_array_equal(found.nats, expected)
    assert found.text == text and found.count == len(text) - 1
    assert found.mean == pytest.approx((one.total.nats - two.total.nats) / found.count, rel=1e-5)
    assert found.standard_error == pytest.approx(expected[1:].std(ddof=1) / math.sqrt(found.count))
    np.testing.assert_array_equal(two.compare(one).nats, -expected)
    assert one.compare(one).mean == one.compare(one).standard_error == 0
    drawn = found._repr_html_()
    assert drawn.count("rgba(30,") == (expected < 0).sum() and drawn.count("rgba(220,") == (expected >= 0).sum()
    for first, second, message in [
        (one, chars.score(text[:-1]), "12 and 11 characters"),
        (one, chars.score("the rod café"), "differ at character 5"),
    ]:
        with pytest.raises(CorpusError, match=message) as caught:
            first.compare(second)
        assert "\n" not in str(caught.value)


def fast_config(text_file=None):
    config = default_config()
    config.data.path = text_file and str(text_file)
    config.batching.batch_size, config.batching.seq_len, config.model.hidden_size = 4, 8, 8
    config.train.steps, config.train.log_every, config.train.eval_every, config.train.sample_every = 30, 5, 10, 0
    return config


def test_fit_trains_on_a_string_and_returns_the_best_model(tmp_path, capfd):
    text = "so much depends upon a red wheel barrow " * 60
    lines = []
    model = charlm.fit(fast_config(), tmp_path / "run", text, progress=False, callback=lines.append)
    assert [line["step"] for line in model.metrics()] == [line["step"] for line in lines] and model.num_steps in (10, 20, 30)
    assert model.evaluate()["nats_per_char"] == min(line["nats_per_char"] for line in lines if line["split"] == "val")
    assert len(model.plot().axes) == 1 and not capfd.readouterr().err
    again = charlm.fit(fast_config(), tmp_path / "run", text, progress=False)
    assert sha256(flatten_state(again.params)) == sha256(flatten_state(model.params)) and len(again.metrics()) == len(lines)
    assert capfd.readouterr() == ("", "")  # The command says that the run is finished.
    with pytest.raises(WorkdirError, match="is another text than"):
        charlm.fit(fast_config(), tmp_path / "run", text + "!", progress=False)


def test_fit_that_is_stopped_continues_to_the_same_bits_in_a_thread_too(text_file, tmp_path):
    whole = charlm.fit(fast_config(text_file), tmp_path / "whole", progress=False)

    def stop(line):
        if line["step"] == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        charlm.fit(fast_config(text_file), tmp_path / "parts", progress=False, callback=stop)
    assert not (tmp_path / "parts" / "result.json").exists() and (tmp_path / "parts" / "checkpoints" / "15").exists()
    found = []
    thread = threading.Thread(
        target=lambda: found.append(charlm.fit(fast_config(text_file), tmp_path / "parts", progress=False))
    )
    thread.start()
    thread.join()
    assert sha256(flatten_state(found[0].params)) == sha256(flatten_state(whole.params))


def test_fit_refuses_and_leaves_nothing(tmp_path):
    bad = fast_config()
    bad.model.dropout = -0.5
    for config, text in [
        (bad, TEXT),
        (fast_config(tmp_path / "a.txt"), TEXT),
        (fast_config(), "x"),
        ({}, TEXT),
        (fast_config(), 7),
    ]:
        with pytest.raises(UserError):
            charlm.fit(config, tmp_path / "run", text, progress=False)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_fit_keeps_the_config_and_the_files_of_the_caller(tmp_path):
    config, before = fast_config(), fast_config()
    first = charlm.fit(config, tmp_path / "one", TEXT * 9, progress=False)
    assert config == before and config.is_locked == before.is_locked
    assert charlm.fit(config, tmp_path / "two", TEXT * 9, progress=False).num_steps == first.num_steps
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text.txt").write_text("my only copy")
    for text in ("my only copy", "another"):
        with pytest.raises(UserError):
            charlm.fit(config, tmp_path / "mine", text, progress=False)
        assert [each.name for each in (tmp_path / "mine").iterdir()] == ["text.txt"]
    with pytest.raises(ConfigError, match="callback"):
        charlm.fit(config, tmp_path / "a" / "b", TEXT, callback=5)
    assert not (tmp_path / "a").exists()
    expected = first.evaluate()
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = charlm.fit(config, tmp_path / "moved", TEXT * 9, progress=False)
    assert moved.evaluate() == expected
    assert reproduce(record_from_workdir(tmp_path / "moved"))["same"]
    moved.save(tmp_path / "saved")
    assert charlm.load(tmp_path / "saved").evaluate()["nats_per_char"] == expected["nats_per_char"]


def test_threads_that_fit_in_one_folder_leave_one_whole_run(tmp_path):
    errors = []

    def work():
        try:
            charlm.fit(fast_config(), tmp_path / "run", TEXT * 9, progress=False)
        except UserError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("another process is training" in error for error in errors)
    assert charlm.load(tmp_path / "run", "latest").num_steps == 30


def test_parameters_that_cannot_be_read_again_are_not_saved(model, tmp_path):
    double = dataclasses.replace(model, params=jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params))
    double.save(tmp_path / "double")
    assert charlm.load(tmp_path / "double").score(TEXT).nats_per_char == model.score(TEXT).nats_per_char
    nan = jax.tree.map(lambda leaf: leaf * np.nan, model.params)
    wrong = jax.tree.map(lambda leaf: leaf[:1], model.params)
    for params, message in [
        (nan, "not finite"),
        (wrong, "has shape"),
        ({"a": np.ones(3)}, "other names"),
        (None, "other names"),
    ]:
        with pytest.raises(WorkdirError, match=message) as caught:
            dataclasses.replace(model, params=params).save(tmp_path / "run")
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["chars", "bytes"])
def test_a_byte_order_mark_counts_as_in_a_file(kind, tmp_path):
    model = small_model(kind=kind)
    (tmp_path / "text.txt").write_text("\ufeff" + TEXT, encoding="utf-8")
    assert model.score("\ufeff" + TEXT).nats_per_char == model.evaluate(file=tmp_path / "text.txt")["nats_per_char"]


def test_the_import_is_light():
    code = "import sys, charlm; print(*sorted({name.split('.')[0] for name in sys.modules} & set(sys.argv[1:])))"
    heavy = "jax", "numpy", "flax", "orbax", "matplotlib", "absl", "ml_collections"
    assert subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True).stdout == "\n"
    with pytest.raises(AttributeError, match="no attribute 'laod'; it has LanguageModel"):
        _ = charlm.laod
    assert set(charlm.__all__) <= set(dir(charlm))


def test_a_model_with_other_parameters_is_another_model(model):
    zero = dataclasses.replace(model, params=jax.tree.map(np.zeros_like, model.params))
    assert zero.score(TEXT).nats_per_char == pytest.approx(math.log(model.vocab.size), rel=1e-6)
    assert model.score(TEXT).nats_per_char != zero.score(TEXT).nats_per_char
