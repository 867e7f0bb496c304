"""Records of a sweep that are wrong or hostile: nothing of them becomes markup, and no file outside the folder is shown."""

import html
import json
import math
import shutil

import pytest
from altered import FEW, altered
from hypothesis import HealthCheck, given, settings
from test_page import record

from charlm.runs.tracking import read_metrics
from charlm.sweeps import results
from charlm.sweeps.page import write_page_of_run, write_page_of_sweep
from charlm.system.errors import UserError

ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def write_records(folder, records):
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


def write_hostile_sweep(folder):
    """Write a sweep in which every string is an attack."""
    records = []
    for k in range(3):
        each = record(f"{ATTACK.replace('/', '_')}{k}", {ATTACK: ATTACK, f"model.{ATTACK}": k}, 1.5 + k, ATTACK, ATTACK)
        each["result"] |= {"params_sha256": ATTACK, "status": ATTACK, ATTACK: ATTACK}
        each["config"], each["manifest"] = {"model": {ATTACK: ATTACK}}, {ATTACK: ATTACK}
        records.append(each)
        (folder / each["run"]).mkdir()
        (folder / each["run"] / "samples.jsonl").write_text(json.dumps({"step": 1, "text": ATTACK}) + "\n")
        lines = [{"step": s, "split": "val", "chars": 10 * s, "nats_per_char": 2.0 / s, ATTACK: 1.0} for s in range(1, 9)]
        (folder / each["run"] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_records(folder, records)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromedriver"), reason="Chromium or its driver is not installed")
def test_no_string_of_a_record_becomes_markup(tmp_path, run, small_config):
    pytest.importorskip("selenium")
    from selenium.webdriver import ActionChains

    from experiments.page import measure

    (tmp_path / "sweep").mkdir()
    write_hostile_sweep(tmp_path / "sweep")
    write_page_of_sweep(tmp_path / "sweep")
    one = tmp_path / f"run {ATTACK.replace('/', '_')}"
    assert run("train", f"--config={small_config}", f"--workdir={one}", "--config.train.steps=20")[0] == 0
    manifest, result = (json.loads((one / f"{name}.json").read_text()) for name in ("manifest", "result"))
    (one / "manifest.json").write_text(json.dumps(manifest | {ATTACK: ATTACK}))
    (one / "result.json").write_text(json.dumps(result | {ATTACK: ATTACK, "status": ATTACK}))
    with open(one / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 20, "split": "val", "chars": 9, "nats_per_char": 1.0, ATTACK: 2.0}) + "\n")
    (one / "samples.jsonl").write_text(json.dumps({"step": 1, "text": ATTACK}) + "\n")
    write_page_of_run(one)
    with measure.browser() as driver:
        for page in (tmp_path / "sweep" / "report.html", one / "report.html"):
            measure.open_page(driver, page)
            deep = """
                function deep(root, found = []) {
                    root.querySelectorAll("*").forEach(e => { found.push(e); if (e.shadowRoot) deep(e.shadowRoot, found) })
                    return found
                }
            """
            # Select a row, and move over everything that may show a tooltip.
            for selector in (".slick-cell", "canvas", ".slick-header-column"):
                find = f"return deep(document).filter(e => e.matches('{selector}') && e.getBoundingClientRect().width > 0)"
                for element in driver.execute_script(deep + find)[:6]:
                    ActionChains(driver).move_to_element(element).perform()
                    if selector == ".slick-cell":
                        element.click()
            images = driver.execute_script(deep + "return deep(document).filter(e => e.tagName == 'IMG').length")
            assert "owned" not in driver.title.replace(page.parent.name, "") and images == 0
            shown = "return deep(document).some(e => e.innerText && e.innerText.includes('onerror'))"
            assert driver.execute_script(deep + shown), "the attack is shown as text"


@pytest.mark.parametrize("name", ["../secret", "/etc", "a/b", "", ".", "..", "a\0b", "a" * 256, "\ud800"])
def test_a_run_outside_the_folder_of_the_sweep_is_refused(run, tmp_path, name):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "samples.txt").write_text("=== step 1 ===\nsecret text\n")
    folder = tmp_path / "sweep"
    folder.mkdir()
    write_records(folder, [record(name, {"seed": 1}, 1.5)])
    code, _, err = run("report", f"--workdir={folder}")
    assert code == 2 and err.count("\n") == 1 and "results.jsonl, line 1: run is " in err, err
    assert not (folder / "report.html").exists()


def test_files_of_a_run_that_are_a_link_or_unreadable_are_left_out_of_the_page(run, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "samples.txt").write_text("=== step 1 ===\nsecret text\n")
    folder = tmp_path / "sweep"
    (folder / "b" / "metrics.jsonl").mkdir(parents=True)
    (folder / "b" / "samples.jsonl").mkdir()
    (folder / "a").symlink_to(tmp_path / "secret")
    write_records(folder, [record("a", {"seed": 1}, 1.5), record("b", {"seed": 10**400}, 1.6)])
    code, _, err = run("report", f"--workdir={folder}")
    assert code == 0 and f"{folder / 'a'} is a link" in err and "b/metrics.jsonl" in err and "b/samples.jsonl" in err
    assert "secret text" not in (folder / "report.html").read_text()


def test_the_commands_of_the_page_are_quoted_for_a_shell(tmp_path):
    write_records(tmp_path, [record("$(touch owned)`x`", {"seed": 1}, 1.5)])
    write_page_of_sweep(tmp_path)
    page = html.unescape((tmp_path / "report.html").read_text())
    assert "--run '$(touch owned)`x`'" in page and '--run "$(' not in page


@pytest.mark.parametrize(
    "change",
    [
        {"run": 3},
        {"overrides": [1]},
        {"result": "x"},
        {"result": {"val_nats_per_char": "low"}},
        {"result": {"steps": [1]}},
        {"status": None},
        {"config": 3},
        {"reason": {}},
        {"overrides": {"seed": {"a": 1}}},
    ],
)
def test_a_record_of_wrong_types_is_one_line(run, tmp_path, change):
    write_records(tmp_path, [record("seed=1", {"seed": 1}, 1.5) | change])
    code, _, err = run("report", f"--workdir={tmp_path}")
    assert code == 2 and err.count("\n") == 1 and "results.jsonl, line 1" in err, err


SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
# The kinds of tables that were drawn. Drawing takes a third of a second, and most altered records give a table of a known kind.
DRAWN = set()
METRICS = [{"step": 10, "split": "val", "chars": 320, "nats_per_char": 2.5, "seconds": 1.0}]


@pytest.mark.fuzz
@settings(SHARED, max_examples=FEW)
@given(content=altered(record("seed=1", {"seed": 1, "model.cell": "gru"}, 1.5)))
def test_an_altered_record_is_read_or_refused(tmp_path, content):
    (tmp_path / "results.jsonl").write_bytes(content)
    try:
        records = results.read_records(tmp_path / "results.jsonl")
    except UserError as error:
        assert "\n" not in str(error)
        return
    keys = results.swept_keys(records)
    rows = [results.row_of(each, keys) for each in records]
    assert all(isinstance(row["run"], str) and "/" not in row["run"] for row in rows)
    kind = repr([[(key, kind_of(value)) for key, value in row.items()] for row in rows])
    if kind not in DRAWN:
        DRAWN.add(kind)
        results.draw_sweep(records, keys, {row["run"]: METRICS for row in rows}, tmp_path / "sweep.png")
        write_page_of_sweep(tmp_path)


def kind_of(value):
    """Return what drawing may depend on: the type of a value, its sign, and whether it is finite; whether a string is plain."""
    if isinstance(value, str):
        return "text", value.isprintable(), value.isascii(), bool(value)
    if isinstance(value, (int, float)):
        return type(value), math.isfinite(value), value > 0, abs(value) > 1e300
    return type(value)


@pytest.mark.fuzz
@SHARED
@given(content=altered(METRICS[0]))
def test_altered_metrics_are_read_or_left_out(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content + b"\n" + json.dumps(METRICS[0]).encode() + b"\n")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1] == METRICS[0]
    for line in lines:
        assert isinstance(line["step"], int) and isinstance(line["nats_per_char"] + line["chars"] / 1e6, float)


def test_a_damaged_run_is_a_row_and_does_not_hide_the_others(run, small_config, tmp_path):
    path, folder = tmp_path / "sweep.py", tmp_path / "w"
    text = "def get_sweep():\n    return {!r}, [{{'train.steps': 10, 'seed': seed}} for seed in (0, 1)]\n"
    path.write_text(text.format(str(small_config)))
    assert run("sweep", f"--sweep={path}", f"--workdir={folder}")[0] == 0
    (folder / "steps=10,seed=0" / "config.json").write_text('{"a":' * 986 + "1" + "}" * 986)
    code, _, err = run("sweep", f"--sweep={path}", f"--workdir={folder}")
    assert code == 1 and "1 of 2 runs failed; the first is steps=10,seed=0" in err and "Traceback" not in err, err
    rows = (folder / "summary.csv").read_text().splitlines()
    assert "failed" in rows[1] and "config.json" in rows[1] and "completed" in rows[2]


def test_the_table_of_another_sweep_file_is_kept(run, small_config, tmp_path):
    path, folder = tmp_path / "sweep.py", tmp_path / "w"
    for steps in (1, 2):
        path.write_text(f"def get_sweep():\n    return {str(small_config)!r}, [{{'train.steps': {steps}}}]\n")
        code, _, err = run("sweep", f"--sweep={path}", f"--workdir={folder}")
        assert code == 0, err
    assert "1 runs of" in err and "are not in this sweep file, for example steps=1" in err
    assert "steps=1" in (folder / "summary.csv.1").read_text() and "steps=2" in (folder / "summary.csv").read_text()
    assert results.read_records(folder / "results.jsonl.1")[0]["run"] == "steps=1"


@pytest.mark.parametrize(
    "body, message",
    [
        ("    return 'CONFIG', [{1: 2}]\n", "a list of {dotted key: value}"),
        ("    raise SystemExit(0)\n", "line 2: SystemExit: 0"),
        ("    raise BaseException('no')\n", "line 2: BaseException: no"),
        ("    raise GeneratorExit\n", "line 2: GeneratorExit"),
    ],
)
def test_a_sweep_file_that_does_anything_is_one_line(run, small_config, tmp_path, body, message):
    path = tmp_path / "sweep.py"
    path.write_text("def get_sweep():\n" + body.replace("CONFIG", str(small_config)))
    code, _, err = run("sweep", f"--sweep={path}", f"--workdir={tmp_path / 'w'}")
    assert code == 2 and message in err and err.count("\n") == 1, err
