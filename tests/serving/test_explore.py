"""What the page that holds a model contains, and what the command refuses. test_explore_in_browser.py opens the page."""

import base64
import hashlib
import json
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from models import TEXT, small_model

from charlm.config import default_config
from charlm.nn.cells import CELLS
from charlm.nn.inputs import from_layer
from charlm.serving import page as page_module
from charlm.serving.influence import influence
from charlm.serving.packing import GATE_STEPS, SIGNED_STEPS, pack, quantise_gate, quantise_signed
from charlm.serving.page import ENGINE, FILES, VIEW, build_page
from charlm.serving.weights import CELLS as PAGE_CELLS
from charlm.serving.weights import check_supported, page_weights
from charlm.system.errors import ConfigError

ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!--"


# A reach that is shorter and one that is longer than the text.
# The boundary "s" is symbol 8 of 17, so both documents have one compiled program. The initial carry of the sLSTM is not 0.
@pytest.mark.parametrize(
    "cell, encoding, reach, documents",
    [
        ("rnn", "embedding", 5, "s"),
        pytest.param("ln_lstm", "one_hot", 20, None, marks=pytest.mark.slow),
        pytest.param("slstm", "embedding", 20, "s", marks=pytest.mark.slow),
    ],
)
def test_the_influence_is_the_norm_of_the_gradient_over_the_whole_text(cell, encoding, reach, documents):
    model = small_model(cell, 2, **{"model.encoding": encoding, "data.documents": documents})
    ids = model.vocab.encode(TEXT[:17])
    found = influence(model, ids, model.states(TEXT[:17]), reach)

    @jax.jit
    @jax.jacobian
    def jacobian(x_TIB, next_T):  # Of the log-probabilities.
        logits, _ = model.module.apply({"params": model.params}, from_layer(x_TIB), model.initial_state())
        return jax.nn.log_softmax(logits[:, 0])[jnp.arange(len(next_T)), next_T]

    norms = np.zeros((len(ids), len(ids)))  # Of symbol t, at symbol s.
    # Each document is a text of its own. It begins with a boundary.
    cuts = [0, 8, len(ids) - 1] if documents else [0, len(ids) - 1]
    for start, end in zip(cuts, cuts[1:]):
        x_TIB = model.module.features(model.params, ids[start:end, None].astype(np.int32))
        jacobian_TTIB = jacobian(x_TIB, ids[start + 1 : end + 1].astype(int))
        norms[start + 1 : end + 1, start:end] = np.linalg.norm(jacobian_TTIB[..., 0], axis=-1)
    expected = [[norms[t, t - 1 - k] if t - 1 - k >= 0 else 0 for k in range(reach)] for t in range(len(ids))]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@given(arrays.arrays(np.float32, (7, 3), elements=st.floats(0, 1, width=32)))
def test_quantised_gates_are_close_and_their_saturation_is_exact(values_NH):
    steps_HN = quantise_gate(values_NH)
    assert np.abs(steps_HN.T / GATE_STEPS - values_NH).max() <= 0.5 / GATE_STEPS + 1e-6
    clear = np.abs(values_NH - 0.1) > 1e-6  # At the threshold itself, rounding decides.
    assert ((steps_HN.T / GATE_STEPS < 0.1) == (values_NH < 0.1))[clear].all()
    clear = np.abs(values_NH - 0.9) > 1e-6
    assert ((steps_HN.T / GATE_STEPS > 0.9) == (values_NH > 0.9))[clear].all()


@given(arrays.arrays(np.float32, (7, 3), elements=st.floats(-1000, 1000, width=16)))
def test_quantised_signed_values_are_close_and_keep_zero(values_NH):
    steps_HN, scale_H = quantise_signed(values_NH)
    restored = (steps_HN.T.astype(np.float64) - SIGNED_STEPS) / SIGNED_STEPS * scale_H
    assert (np.abs(restored - values_NH) <= 0.51 / SIGNED_STEPS * scale_H).all()
    assert (restored[values_NH == 0] == 0).all()


def test_packed_arrays_have_their_bytes_in_the_order_of_their_names():
    given = {"a": np.arange(3, dtype=np.float32), "b": np.array([[1, 2]], np.uint8), "c": np.ones((2, 1), np.float16)}
    packed = json.loads(json.dumps(pack(given)))
    data, offset = zlib.decompress(base64.b64decode(packed["blob"])), 0
    for (name, array), described in zip(given.items(), packed["arrays"]):
        assert described == {"name": name, "dtype": array.dtype.name, "shape": list(array.shape)}
        assert (np.frombuffer(data, array.dtype, array.size, offset).reshape(array.shape) == array).all()
        offset += array.nbytes
    assert offset == len(data)


@pytest.fixture(scope="module")
def page():
    """The page of a model with hostile symbols and a hostile text, without its activations."""
    text = ATTACK + "\0\u202e\u200d\U0001f469 &amp; {{data}} {{title}}\n"
    return text, build_page(small_model("rnn", text=text * 2), text, ATTACK)


def test_a_hostile_text_is_data_and_the_policy_names_only_the_scripts_of_the_page(page):
    text, html = page
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == html.count("<script") == 3 and "<img" not in html and html.isascii() is False
    (data,) = (json.loads(body) for attributes, body in scripts if "application/json" in attributes)
    assert data["text"] == text and data["about"]["source"] == ATTACK
    assert set(data["vocab"]["symbols"]) == set(text * 2)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    (view,), (style,) = (
        [body for attributes, body in scripts if not attributes],
        re.findall(r"<style>(.*?)</style>", html, re.DOTALL),
    )
    for source in (view, style):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy


def test_every_file_of_the_page_is_used_and_can_be_inside_a_page():
    names = {path.relative_to(FILES).as_posix() for path in FILES.rglob("*.*")}
    used = {f"engine/{name}.js" for name in ENGINE} | {f"{name}.js" for name in VIEW}
    assert names == used | {"page.html", "style.css"}
    for name in names - {"page.html"}:
        source = (FILES / name).read_text(encoding="utf-8")
        assert "</script" not in source and "<!--" not in source and "</style" not in source
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", source)


def test_the_command_writes_a_page_of_a_text(run, tmp_path):
    small_model("rnn", **{"data.unknown": False, "data.documents": "lines"}).save(tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT)
    flags = f"--workdir={tmp_path / 'run'}", f"--text={tmp_path / 'text.txt'}", f"--output={tmp_path / 'page.html'}"
    code, _, err = run("explore", *flags, "--length=20", "--dtype=float16")
    assert code == 0 and "the page shows the first 20" in err and str(tmp_path / "page.html") in err
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert data["text"] == "\n" + TEXT[:19] and str(tmp_path) not in html  # A document begins after a boundary.
    assert {each["dtype"] for each in data["weights"]["arrays"]} == {"float32", "float16"}
    (tmp_path / "text.txt").write_text("")
    code, _, err = run("explore", *flags)
    assert code == 2 and "text.txt has 0 symbols; the page needs at least 2" in err
    for output, reason in (tmp_path, f"{tmp_path} is a folder"), (tmp_path / "no" / "p.html", "no does not exist"):
        code, _, err = run("explore", *flags, f"--output={output}")
        assert code == 2 and reason in err


def test_a_text_of_bytes_ends_with_a_whole_character(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "build_page", lambda model, text, *rest: text)
    (tmp_path / "text.txt").write_text("ab\u20acc", encoding="utf-8")
    for length, shown in ((3, "ab"), (4, "ab"), (5, "ab\u20ac"), (6, "ab\u20acc")):
        page_module.write_page(small_model(kind="bytes"), tmp_path / "page.html", tmp_path / "text.txt", length)
        assert (tmp_path / "page.html").read_text(encoding="utf-8") == shown


def test_the_page_has_a_step_for_every_cell_of_charlm():
    steps = re.findall(r"^  (\w+): \w+Step,$", (FILES / "engine/cells.js").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(steps) == set(PAGE_CELLS) == set(CELLS)


def test_a_cell_from_outside_the_package_is_refused():
    config = default_config()
    config.model.cell = "my_cells:lstm"
    with pytest.raises(ConfigError, match="'my_cells:lstm', which the page cannot compute; it computes rnn, .*, min_lstm$"):
        check_supported(config)


def test_weights_that_float16_cannot_hold_are_refused():
    model = small_model("rnn", scale=1e6)
    with pytest.raises(ConfigError, match="--dtype float16 cannot hold all weights"):
        page_weights(model, "float16")
