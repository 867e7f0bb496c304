"""The page of a sweep, used as a person would use it: headless Chromium without a network opens the page from disk."""

import shutil
import time

import pytest

from experiments.page import measure

webdriver = pytest.importorskip("selenium.webdriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromedriver"), reason="Chromium or its driver is not installed"),
]

# Bokeh's widgets are in shadow roots, into which the browser's selectors do not look.
DEEP = """
    function deep(root, selector, found = []) {
        root.querySelectorAll(selector).forEach(each => found.push(each))
        root.querySelectorAll("*").forEach(each => { if (each.shadowRoot) deep(each.shadowRoot, selector, found) })
        return found
    }
    const model = name => Bokeh.documents[0].get_model_by_name(name)
"""


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    measure.make_sweep(folder, 12, 1000)
    return folder


@pytest.fixture(scope="module")
def browser(sweep_folder):
    """Yield the browser after it has drawn the page."""
    with measure.browser() as driver:
        measure.open_page(driver, sweep_folder / "report.html")
        yield driver


def until(what):
    """Wait until a function returns a true value, and return that value."""
    give_up = time.monotonic() + 30
    while not (found := what()):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    return found


def rows(browser):
    return browser.execute_script(DEEP + "return deep(document, '.slick-row').map(row => row.innerText.replaceAll('\\n', ' '))")


def filter_by(browser, words):
    """Type words into the field above the table."""
    field = browser.execute_script(DEEP + "return deep(document, 'input')[0]")
    field.clear()
    field.send_keys(words)


def test_the_page_shows_table_curves_and_samples(browser):
    until(lambda: len(rows(browser)) == 12)
    assert "1.5000" in rows(browser)[0]
    assert browser.execute_script(DEEP + "return deep(document, 'canvas').filter(each => each.width > 200).length") >= 2
    assert "thus spoke cell=lstm,seed=0" in browser.find_element("tag name", "body").text
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_typing_filters_and_a_click_on_a_header_sorts(browser):
    filter_by(browser, "gru")
    until(lambda: len(rows(browser)) == 6)
    filter_by(browser, " ")
    until(lambda: len(rows(browser)) == 12)
    seeds = browser.execute_script(
        DEEP + "return deep(document, '.slick-header-column').find(e => e.innerText.trim() == 'seed')"
    )
    for _ in range(2):
        seeds.click()
    until(lambda: rows(browser)[0].split()[1] == "11" and rows(browser)[-1].split()[1] == "0")


def test_selecting_a_row_shows_its_command(browser, sweep_folder):
    until(lambda: len(rows(browser)) == 12)
    browser.execute_script(DEEP + "return deep(document, '.slick-row')[0].querySelector('.slick-cell')").click()
    shown = until(lambda: browser.execute_script(DEEP + "return model('chosen').text.includes('pre') && model('chosen').text"))
    assert f"python -m charlm.reproduce --result {sweep_folder.as_posix()}/results.jsonl --run" in shown


def test_hovering_over_a_curve_names_its_run(browser):
    where = """
        const view = Bokeh.index.find_one(model("curves")), box = view.el.getBoundingClientRect()
        const source = view.model.renderers[0].data_source
        const point = [view.frame.x_scale.compute(source.data.xs[0][300]), view.frame.y_scale.compute(source.data.ys[0][300])]
        return [Math.round(box.x + point[0]), Math.round(box.y + point[1])]
    """
    x, y = browser.execute_script("window.scrollTo(0, 0)" + DEEP + where)
    action = webdriver.ActionChains(browser)
    action.w3c_actions.pointer_action.move_to_location(x, y - 3).move_to_location(x, y)
    action.perform()
    tips = (
        "return deep(document, '.bk-tooltip-custom, .bk-Tooltip, .bk-tooltip-row-value').map(each => each.innerText).join(' ')"
    )
    assert "seed=" in until(lambda: browser.execute_script(DEEP + tips))
