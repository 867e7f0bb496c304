"""The page that holds a model, in headless Chromium without a network: its numbers are those of Python, and it works.

Chromium opens one page, of a model with hostile symbols. The numbers of other models are asked of further workers of that page.
"""

import shutil
import time

import jax.numpy as jnp
import numpy as np
import pytest
from models import TEXT, small_model
from test_explore import ATTACK

import charlm
from charlm.nn.cells import CELLS
from charlm.serving.packing import pack
from charlm.serving.page import build_page
from charlm.serving.weights import describe_model, describe_vocab, page_weights
from experiments.page import measure

webdriver = pytest.importorskip("selenium.webdriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromedriver"), reason="Chromium or its driver is not installed"),
]

# A line, control characters, a family with joiners, Hebrew, and half of the alphabet in upper case.
HOSTILE = ATTACK + '\0\u202e\u202d\u200d\ufeff \U0001f468\u200d\U0001f469\u200d\U0001f467 \u05d0\u05d1\n(The SUN) "is up"\n'
PAGE_TEXT = HOSTILE + TEXT[:200]

# (cell, layers, kind, changes of the config)
MODELS = [
    ("rnn", 1, "chars", {"sample.window": 4, "data.lowercase": True}),
    ("lstm", 1, "bytes", {}),
    ("lstm", 3, "chars", {"model.residual": True, "model.encoding": "scalar"}),
    ("gru", 2, "chars", {"model.encoding": "one_hot", "model.learn_initial_state": True}),
    ("ln_lstm", 2, "chars", {"model.residual": True, "model.tie_weights": True, "model.embedding_size": 12}),
    ("ln_gru", 3, "bytes", {}),
    ("slstm", 2, "bytes", {"data.documents": "lines"}),
    (
        "mogrifier_lstm",
        3,
        "chars",
        {"data.documents": "; ", "data.lowercase": True, "model.tie_weights": True, "model.embedding_size": 12},
    ),
]
# The other cells: samples follow from logits, so only logits and states are compared.
OTHER_CELLS = [
    ("mlstm", 2, "bytes", {}),
    ("mogrifier_lstm", 1, "bytes", {"model.encoding": "one_hot"}),
    ("slstm", 1, "chars", {"model.learn_initial_state": True}),
    ("cifg_lstm", 3, "chars", {"model.residual": True}),
    ("mgu", 2, "chars", {"model.encoding": "scalar"}),
    ("indrnn", 3, "bytes", {}),
    ("min_gru", 2, "chars", {"data.documents": "lines", "model.learn_initial_state": True}),
    ("min_lstm", 1, "bytes", {}),
]


@pytest.fixture(scope="module")
def page_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a <img src=x onerror=alert(1)> run"
    small_model("lstm", 2, scale=1.2, text=PAGE_TEXT).save(folder)
    return charlm.load(folder)


@pytest.fixture(scope="module")
def browser(page_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(build_page(page_model, PAGE_TEXT, ATTACK), encoding="utf-8")
    with measure.browser() as driver:
        driver.set_script_timeout(60)
        driver.get(path.as_uri())
        until(lambda: driver.execute_script("return document.body.dataset.ready"))
        yield driver


@pytest.fixture(autouse=True)
def no_error_in_the_console(browser):
    yield
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def until(what):
    """Wait until a function returns a true value, and return that value."""
    give_up = time.monotonic() + 30
    while not (found := what()):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    return found


def ask(browser, code, *args):
    """Return the value of an asynchronous function body in the page."""
    found = browser.execute_async_script(
        f"const done = arguments[arguments.length - 1]; (async (...args) => {{ {code} }})(...arguments)"
        ".then(value => done({value}), error => done({error: String(error)}))",
        *args,
    )
    assert "error" not in found, found
    return found["value"]


def text_of(browser, name):
    return browser.execute_script("return document.getElementById(arguments[0]).textContent", name)


def tab(browser, name):
    browser.find_element("id", f"tab-{name}").click()


def assert_computes(browser, model, text, how):
    """Assert that the page computes the logits and the states of a text, and the samples of some settings."""
    payload = {"model": describe_model(model), "vocab": describe_vocab(model), "weights": pack(page_weights(model))}
    code = """
        const [payload, text, how] = args
        const engine = new charlm.Engine()
        await engine.ask("load", payload)
        const { logits } = await engine.ask("logits", { text })
        const states = await engine.ask("record", { text })
        const texts = []
        for (const { temperature = 1, top_k = null, top_p = null, greedy = false, seed = 0, stop = null } of how) {
            let drawn = ""
            const settings = { prompt: "the ", length: 60, temperature, topK: top_k, topP: top_p, greedy, seed, stop }
            await engine.ask("write", settings, (piece) => (drawn += piece))
            texts.push(drawn)
        }
        engine.worker.terminate()
        const lists = Object.fromEntries(Object.entries(states).map(([name, { data }]) => [name, Array.from(data)]))
        return { logits: Array.from(logits), states: lists, texts }
    """
    found = ask(browser, code, payload, text, how)
    logits, _ = model.step(text)
    np.testing.assert_allclose(np.reshape(found["logits"], logits.shape), logits, atol=1e-4)
    for name, values in model.states(text, gates=True).items():
        if not name.endswith("gate_h"):  # The gate of the RNN is its state.
            if "gate_" in name:
                is_logistic = name.split("gate_")[1] in payload["model"]["cell"]["logistic"]
                assert is_logistic == (values.min() >= 0 and values.max() <= 1)
            np.testing.assert_allclose(np.reshape(found["states"].pop(name), values.T.shape), values.T, atol=1e-4, rtol=1e-4)
    assert not found["states"]
    assert found["texts"] == [model.sample("the ", length=60, **each) for each in how]


@pytest.mark.parametrize("cell, layers, kind, changes", MODELS)
def test_logits_states_and_samples_are_those_of_python(browser, cell, layers, kind, changes):
    documents = changes.get("data.documents")
    symbols = TEXT + "\x1e" if documents == "; " else TEXT
    model = small_model(cell, layers, kind, scale=1.0, text=symbols, **changes)
    text = TEXT[:200] if kind == "chars" else "caf\u00e9 \u20ac " + TEXT[:100]
    if documents:
        text = model.vocab.symbols[model.boundary] + text.replace("; ", "\x1e")
    how = [
        {"temperature": 1.0, "seed": 2**32 - 2},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.6, "seed": 7},
        {"greedy": True},
        {"temperature": 1e-35, "stop": "e"},
    ]
    assert_computes(browser, model, text, how)


@pytest.mark.parametrize("cell, layers, kind, changes", OTHER_CELLS)
def test_logits_and_states_of_the_other_cells_are_those_of_python(browser, cell, layers, kind, changes):
    model = small_model(cell, layers, kind, scale=1.0, **changes)
    assert_computes(browser, model, "\n" + TEXT[:120], [])


def test_every_cell_of_charlm_is_compared():
    assert {cell for cell, *_ in MODELS + OTHER_CELLS} == set(CELLS)


def test_the_page_splits_a_text_into_documents_as_python_does(browser):
    model = small_model("gru", text=TEXT + "\x1e", **{"data.documents": "; "})
    payload = {"model": describe_model(model), "vocab": describe_vocab(model), "weights": pack(page_weights(model))}
    code = """
        const [payload, text] = args
        const engine = new charlm.Engine()
        await engine.ask("load", payload)
        let nats = []
        await engine.ask("read", { text, known: 0 }, ({ from, nats: found }) => (nats = [...nats.slice(0, from), ...found]))
        const error = await engine.ask("write", { prompt: "cat; ", length: 1 }).catch((refusal) => refusal.message)
        engine.worker.terminate()
        return { nats, error }
    """
    text = "the cat; the dog sat; "
    found = ask(browser, code, payload, text)
    np.testing.assert_allclose(found["nats"], model.score(text).nats, atol=1e-4)
    assert 'must not contain "; "' in found["error"]


def test_float16_weights_give_nearly_the_same_logits(browser):
    model = small_model("lstm", scale=1.0)
    payload = {"model": describe_model(model), "vocab": describe_vocab(model), "weights": pack(page_weights(model, "float16"))}
    code = """
        const engine = new charlm.Engine()
        await engine.ask("load", args[0])
        return Array.from((await engine.ask("logits", { text: args[1] })).logits)
    """
    logits = np.asarray(model.step(TEXT[:50])[0])
    np.testing.assert_allclose(np.reshape(ask(browser, code, payload, TEXT[:50]), logits.shape), logits, atol=0.01)


def test_a_held_unit_keeps_its_value_in_every_step(browser):
    model = small_model("gru", scale=1.2)
    payload = {"model": describe_model(model), "vocab": describe_vocab(model), "weights": pack(page_weights(model))}
    code = """
        const engine = new charlm.Engine()
        await engine.ask("load", args[0])
        let drawn = ""
        const clamps = [{ layer: 0, name: "h", unit: 3, value: 0.9 }]
        const settings = { prompt: "the ", length: 30, temperature: 1, greedy: true, seed: 0, clamps }
        await engine.ask("write", settings, (piece) => (drawn += piece))
        return drawn
    """
    expected, state = "", model.initial_state()
    while len(expected) < 30:
        for char in expected[-1] if expected else "the ":
            _, ((h_1H,),) = model.step(char, state)
            state = ((h_1H.at[0, 3].set(0.9),),)
        logits_V = jnp.dot(state[0][0][0], model.params["head_W"]) + model.params["head_b"]
        expected += model.vocab.symbols[int(jnp.argmax(logits_V))]
    assert ask(browser, code, payload) == expected != model.sample("the ", length=30, greedy=True)


def test_the_page_writes_the_text_of_python_and_compares_it_with_that_of_a_held_unit(browser, page_model):
    tab(browser, "write")
    for name, value in {"prompt": "the ", "length": "80", "seed": "5", "temperature": "0.9"}.items():
        box = browser.find_element("id", f"write-{name}")
        box.clear()
        box.send_keys(value)
    browser.find_element("id", "write-go").click()
    until(lambda: "80 characters" in text_of(browser, "write-status"))
    expected = page_model.sample("the ", length=80, temperature=0.9, seed=5)
    assert browser.execute_script("return charlm.write.areas[0].drawn") == expected
    browser.execute_script("charlm.write.addClamp(1, 'c', 2, 40)")
    browser.find_element("id", "write-go").click()
    until(lambda: "160 characters" in text_of(browser, "write-status"))
    first, second = [each.text for each in browser.find_elements("css selector", "#write-output section")]
    assert first != second and browser.find_elements("css selector", "#write-output .differs")
    browser.find_element("css selector", "#clamps button").click()
    box = browser.find_element("id", "write-prompt")
    box.send_keys("\u00fc")
    browser.find_element("id", "write-go").click()
    until(lambda: "which is not one of the model's" in text_of(browser, "write-status"))


def test_reading_gives_the_score_of_python_after_every_edit(browser, page_model):
    tab(browser, "read")
    box = browser.find_element("id", "read-input")

    def shows(text):
        score = f"{page_model.score(text).nats_per_char:.3f}"
        return until(lambda: text_of(browser, "read-score") == score)

    box.send_keys(TEXT[:70])
    assert shows(TEXT[:70])
    box.send_keys("\b" * 30 + "rat")
    assert shows(TEXT[:40] + "rat")
    browser.execute_script("arguments[0].setSelectionRange(3, 3)", box)
    box.send_keys("n")
    text = TEXT[:3] + "n" + TEXT[3:40] + "rat"
    assert shows(text)
    top = [line.split("\n") for line in browser.find_element("id", "read-next").text.split("\n1")]
    assert top and browser.execute_script("return charlm.read.top.length") == len(text) + 1
    symbol, probability = page_model.next(text, k=1)[0]
    found = browser.execute_script("return charlm.read.top.at(-1)[0]")
    assert page_model.vocab.symbols[found[0]] == symbol and found[1] == pytest.approx(probability, abs=1e-4)
    box.send_keys("\u00fc")
    until(lambda: "has no symbol for \u00fc" in text_of(browser, "read-missing"))


DETECTED = 'ab "the (Cat)"\n\nROMEO:\n\U0001f469 it\'s 12\n'


def test_detectors_find_what_their_names_say(browser):
    found = ask(
        browser, "return charlm.DETECTORS.map(([key, , detect]) => [key, Array.from(detect(Array.from(args[0])))])", DETECTED
    )
    found = {
        key: [char for char, value in zip(DETECTED, values) if value] if key not in ("line", "word", "paragraph") else values
        for key, values in found
    }
    assert "".join(found["upper"]) == "CROMEO" and "".join(found["speaker"]) == "ROMEO:"
    assert "".join(found["quotes"]) == '"the (Cat)' and "".join(found["brackets"]) == "(Cat"
    assert found["line"][:4] == [1, 2, 3, 4] and found["line"][14:18] == [0, 0, 1, 2] and found["word"][:5] == [1, 2, 0, 0, 1]
    code = "return Array.from(charlm.detectorOf(args[1])(Array.from(args[0])))"
    own = ask(browser, code, DETECTED, "\\d+|^it")
    assert "".join(char for char, value in zip(DETECTED, own) if value) == "12"


def test_units_are_ranked_by_their_correlation_and_a_choice_recolours_the_text(browser, page_model):
    tab(browser, "inside")
    detected = np.array([c.isupper() for c in PAGE_TEXT], float)
    c_NH = page_model.states(PAGE_TEXT)["layer_1.c"]
    expected = np.array([np.corrcoef(c_NH[:, unit], detected)[0, 1] for unit in range(12)])
    browser.execute_script("charlm.inside.setDetector('upper'); charlm.inside.setArray(1, 'c')")
    ranked = browser.execute_script("return charlm.inside.ranked")
    assert [each["r"] for each in ranked] == pytest.approx(expected[[each["unit"] for each in ranked]], abs=0.02)
    assert ranked[0]["unit"] == browser.execute_script("return charlm.inside.unit")
    browser.find_elements("css selector", "#ranked .unit")[1].click()
    unit = ranked[1]["unit"]
    assert f"unit {unit}" in text_of(browser, "inside-title")
    colors = browser.execute_script("return charlm.inside.view.spans.map(span => getComputedStyle(span).backgroundColor)")
    assert len(colors) == len(PAGE_TEXT)
    strength = c_NH[:, unit] / np.abs(c_NH[:, unit]).max()
    for color, value in zip(colors, strength):
        alpha = float(color.split(",")[3].rstrip(")")) if color.count(",") == 3 else 1.0
        assert alpha == pytest.approx(0.78 * abs(value), abs=0.03)
        assert abs(value) < 0.05 or ("44, 120, 226" in color) == (value < 0)


def test_a_brushed_span_shows_its_units_and_other_places(browser):
    tab(browser, "inside")
    spans = browser.find_elements("css selector", "#inside-text span")
    start = PAGE_TEXT.index("the cat")
    action = webdriver.ActionChains(browser)
    action.move_to_element(spans[start]).click_and_hold().move_to_element(spans[start + 2]).release().perform()
    until(lambda: "\u201cthe\u201d" in text_of(browser, "found-span"))
    assert browser.execute_script("return charlm.inside.view.brush") == [start, start + 3]
    for chip in browser.find_elements("css selector", "#found-units button")[:1]:
        chip.click()
    keys = webdriver.Keys
    browser.find_element("id", "inside-text").send_keys(keys.ESCAPE)
    until(lambda: browser.execute_script("return document.getElementById('found').hidden"))
    browser.find_element("id", "inside-text").send_keys(keys.ARROW_RIGHT, keys.SHIFT + keys.ARROW_RIGHT + keys.ARROW_RIGHT)
    assert browser.execute_script("const [a, b] = charlm.inside.view.brush; return b - a") == 3


def test_pointing_at_a_character_lights_up_what_matters(browser):
    tab(browser, "matters")
    place = PAGE_TEXT.index("the cat") + 6
    webdriver.ActionChains(browser).move_to_element(
        browser.find_elements("css selector", "#matters-text span")[place]
    ).perform()
    until(lambda: text_of(browser, "matters-title") == "For t")
    lit = browser.execute_script("return charlm.matters.influences(arguments[0])", place)
    assert [each["place"] for each in lit] == list(range(place - 1, place - 51, -1)) and max(each["value"] for each in lit) == 1


def test_what_was_typed_can_be_looked_into(browser, page_model):
    tab(browser, "read")
    browser.execute_script("charlm.read.input.value = arguments[0]; charlm.read.update()", TEXT[:50])
    until(lambda: browser.execute_script("return charlm.read.nats.length") == 50)
    tab(browser, "inside")
    browser.find_element("id", "inside-typed").click()
    until(lambda: browser.execute_script("return charlm.inside.activations.chars.length") == 50)
    values = browser.execute_script("return Array.from(charlm.inside.activations.unit('layer_0.gate_f', 4))")
    np.testing.assert_allclose(values, page_model.states(TEXT[:50], gates=True)["layer_0.gate_f"][:, 4], atol=1e-4)
    browser.find_element("id", "inside-given").click()
    until(lambda: browser.execute_script("return charlm.inside.activations.chars.length") == len(PAGE_TEXT))


def test_no_symbol_becomes_markup_and_control_characters_are_named(browser):
    tab(browser, "read")
    browser.execute_script("charlm.read.input.value = arguments[0]; charlm.read.update()", PAGE_TEXT)
    until(lambda: browser.execute_script("return charlm.read.nats.length") == len(PAGE_TEXT))
    for name in ("write", "read", "inside", "matters"):
        tab(browser, name)
    assert browser.title == "a <img src=x onerror=alert(1)> run" == text_of(browser, "name")
    assert browser.execute_script("return document.querySelectorAll('img').length + document.scripts.length") == 3
    browser.execute_script("charlm.write.controls.prompt.value = arguments[0]; charlm.write.start()", PAGE_TEXT)
    until(lambda: "per second" in text_of(browser, "write-status"))
    for name in ("inside-text", "matters-text", "write-output"):
        shown = text_of(browser, name)
        assert ATTACK in shown and "U+202E" in shown and "U+0000" in shown and "U+200D" in shown
        assert not set(shown) & set("\0\u202e\u202d\u200d\ufeff")


@pytest.mark.parametrize("width", [1280, 390])
def test_no_panel_is_wider_than_the_window(browser, width):
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for name in ("write", "read", "inside", "matters"):
        tab(browser, name)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
