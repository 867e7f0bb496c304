"""The documentation: generated blocks are current, links lead somewhere, snippets and commands run."""

import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import COMMANDS
from models import small_model

from charlm.config import cli, default_config, flatten
from charlm.exchange.formats import export_model

ROOT = Path(__file__).parents[2]
PAGES = {page.name: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
LINKED = [*PAGES.values(), *sorted((ROOT / "docs" / "reference").glob("*.md"))]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)

# Every character of the prompts in the documentation occurs in it.
TEXT = "The quick brown fox jumps over the lazy dog. HAMLET: pack my box with five dozen liquor jugs! Once more.\n" * 60
# The text whose sha256 docs/extending.md gives.
HAPPY = "Happy families are all alike; every unhappy family is unhappy in its own way.\n" * 200
# Appended to every config file, so that a command takes a second.
SMALL = """

_get_config = get_config


def get_config(*arguments):
    config = _get_config(*arguments)
    if config.data.url is None:
        config.data.{key} = {value!r}
        config.data.split = (0.8, 0.1, 0.1)
    config.batching.batch_size = 4
    config.batching.seq_len = 16
    config.model.hidden_size = config.model.embedding_size = 8
    config.eval.num_streams = 8
    config.sample.length = 20
    config.train.steps = 4
    config.train.log_every = config.train.eval_every = config.train.checkpoint_every = 2
    config.train.sample_every = 0
    return config
"""


class Block(NamedTuple):
    """A block of code.

    Attributes:
        language: of a fenced block; "" for an indented one.
        text: its lines.
        not_run: the reason in a comment `<!-- not run: REASON -->` above it.
    """

    language: str
    text: str
    not_run: str | None

    def commands(self) -> list[str]:
        """The lines that call charlm, each with the lines that continue it."""
        lines = self.text.replace("\\\n", "").splitlines() if self.language in ("", "bash") else []
        return [line for line in lines if "python -m charlm." in line]


@functools.cache
def blocks_of(page: Path) -> list[Block]:
    blocks, above = [], ""
    lines = iter(page.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if fence := re.fullmatch(r"```(\w*)", line):
            text = "".join(f"{each}\n" for each in iter(lines.__next__, "```"))
            reason = re.fullmatch(r"<!-- not run: (.+) -->", above)
            blocks.append(Block(fence[1] or "text", text, reason and reason[1]))
        elif line.startswith("    "):
            blocks.append(Block("", f"{line[4:]}\n", None))
        above = line.strip() or above
    return blocks


def commands_of(page: Path) -> list[list[str]]:
    """The words of every call of charlm on a page: [module, flag, ...]."""
    lines = [line for block in blocks_of(page) for line in block.commands()]
    parts = [part for line in lines for part in line.split("&&") if "python -m charlm." in part]
    return [shlex.split(part[part.index("-m charlm.") + 3 :], comments=True) for part in parts]


@pytest.fixture
def generate(monkeypatch):
    """The module docs/generate.py, and how it is called."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    return importlib.import_module("generate")


def test_the_generated_blocks_are_current(generate, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 0, capsys.readouterr().out


def test_the_check_names_the_page_and_the_block_that_is_out_of_date(generate, monkeypatch, capsys, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(old := "Keys: <!-- generated: length-keys -->none<!-- end generated -->.\n")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "pages", lambda: [page])
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 1 and page.read_text() == old
    assert "page.md: the block length-keys is out of date" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generate.main() == 0 and "`train.steps`" in (new := page.read_text())
    assert generate.rewrite(new) == (new, [])


def test_every_block_is_on_a_page(generate):
    text = "".join(page.read_text(encoding="utf-8") for page in generate.pages())
    assert not [name for name in generate.BLOCKS if f"<!-- generated: {name} -->" not in text]
    assert text.count("<!-- generated: ") == text.count("<!-- end generated -->")


def test_the_latest_record_of_a_kind_counts(generate):
    records = [{"kind": "a", "value": 1}, {"kind": "b", "value": 2}, {"kind": "a", "value": 3}]
    latest = generate.measurements.latest(records, lambda record: record["kind"])
    assert {kind: record["value"] for kind, record in latest.items()} == {"a": 3, "b": 2}


def test_a_table_names_its_machine_or_the_machine_of_each_row(generate):
    measured, row = generate.measurements.measured, generate.measurements.Row
    one = {"machine": "2 cores, one", "date": "2026-01-02", "commit": "abc"}
    two = {"machine": "a GPU", "date": "2026-01-01"}
    alone = measured(["x"], [row(["1"], [one])], "seeds")
    assert alone.endswith("*2 cores, one; 2026-01-02; commit abc. Records: `experiments/seeds/results.jsonl`.*")
    both = measured(["x"], [row(["1"], [one]), row(["2"], [two])], "seeds")
    assert "| 1 | 2 cores, one |\n| 2 | a GPU |\n" in both and "*2026-01-01 to 2026-01-02; commit abc." in both


def anchors_of(page: Path) -> set[str]:
    """The anchors that code hosts make of the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_anchors(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text(encoding="utf-8"))):
        if not re.match(r"https?:|mailto:", target):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors_of(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_and_every_file_of_a_command_exists(name, run):
    keys = {key for key, _ in flatten(default_config())}
    written = {match[1] for block in blocks_of(PAGES[name]) if (match := re.match(r"# (\S+\.py)\n", block.text))}
    for module, *words in commands_of(PAGES[name]):
        command = module.removeprefix("charlm.")
        code, out, _ = run(command, "--help")
        assert code == 0
        flags = {"help", "config", *re.findall(r"^  --(\w+):", out, re.MULTILINE)}
        for flag, value in (word.removeprefix("--").split("=", 1) for word in words if "=" in word and word.startswith("--")):
            assert flag.removeprefix("config.") in keys if flag.startswith("config.") else flag in flags, (command, flag, value)
        for flag, value in zip(words, [*words[1:], ""]):
            if flag.startswith("--") and "=" not in flag:
                assert flag.removeprefix("--") in flags, (command, flag)
            if flag in ("--config", "--sweep") and value not in written:
                written_elsewhere = name == "extending.md" and value == "sweeps/rates/sweep.py"
                assert (ROOT / value.split(":")[0]).is_file() or written_elsewhere, (command, value)


@pytest.mark.parametrize("name", PAGES)
def test_what_is_installed_and_called_exists(name):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for block in blocks_of(PAGES[name]):
        for names in re.findall(r"pip install .*'\.\[([\w,]+)\]'", block.text):
            assert set(names.split(",")) <= extras.keys()
        for script in re.findall(r"python ((?:docs|experiments)/\S+\.py)", block.text):
            assert (ROOT / script).is_file()
    if name == "install.md":
        listed = re.findall(r"^\| `(\w+)` \|", PAGES[name].read_text(encoding="utf-8"), re.MULTILINE)
        assert set(listed) == set(extras)


@pytest.mark.parametrize("name", PAGES)
def test_snippets_are_python(name):
    for block in blocks_of(PAGES[name]):
        if block.language == "python":
            compile(block.text, name, "exec")


def test_the_pages_show_commands_and_snippets():
    assert sum(len(commands_of(page)) for page in PAGES.values()) > 30
    assert sum(block.language == "python" for page in PAGES.values() for block in blocks_of(page)) > 5


def diffs_of(page: Path) -> list[str]:
    return [block.text for block in blocks_of(page) if block.language == "diff"]


def test_the_diffs_apply():
    for diff in diffs_of(PAGES["extending.md"]):
        found = subprocess.run(["git", "apply", "--check", "-"], cwd=ROOT, input=diff, text=True, capture_output=True)
        assert found.returncode == 0, f"{found.stderr}\n{diff}"


@pytest.mark.slow
def test_the_program_of_plain_pytorch_computes_the_exported_model(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    (program,) = (block.text for block in blocks_of(PAGES["exchange.md"]) if "import torch" in block.text)
    assert "charlm" not in program
    model = small_model("gru", layers=2, text=TEXT)
    export_model(model, "safetensors", tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "exchange.md", "exec"), names := {})
    assert len(capsys.readouterr().out) == 301 and set(names["text"]) <= set(model.vocab.symbols)
    with torch.no_grad():
        h, _ = names["rnn"](names["embedding"](torch.from_numpy(model.vocab.encode(names["text"]).astype(np.int64))))
        np.testing.assert_allclose(names["head"](h).numpy(), model.step(names["text"])[0], atol=1e-5)


class Sandbox:
    """A folder in which the code of a page runs in order: small config files, a small text, and a trained quickstart.

    The commands run in this process. The code of a page that changes the package with diffs runs in one other process, which
    imports the changed package.
    """

    def __init__(self, folder: Path, page: Path):
        self.folder, self.page, self.names, self.env = folder, page, {"__name__": "page"}, dict(os.environ)
        self.data = {"key": "path", "value": "my_text.txt"}
        self.diffs = diffs_of(page)
        if self.diffs:
            self.data = {"key": "corpus", "value": "happy_families"}

    def prepare(self) -> None:
        """Write the files, and train a quickstart if the page uses one."""
        for name in ("my_text.txt", "FILE", "books/first/one.txt", "books/second/two.txt"):
            self.write(name, TEXT)
        if self.diffs:
            sha256 = re.search(r"[0-9a-f]{64}", "".join(self.diffs))[0]
            self.write(f"cache/downloads/{sha256}", HAPPY)
        for path in (ROOT / "configs").glob("*.py"):
            self.write(f"configs/{path.name}", path.read_text(encoding="utf-8"))

    def run_in_another_process(self) -> None:
        """Change a copy of the package as the diffs say, and run the page with it."""
        shutil.copytree(ROOT / "src", self.folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
        for diff in self.diffs:
            subprocess.run(["git", "apply", "-"], cwd=self.folder, input=diff, text=True, check=True)
        paths = self.folder / "src", ROOT, ROOT / "tests", Path(__file__).parent
        env = self.env | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "CHARLM_CACHE": str(self.folder / "cache")}
        code = f"import test_docs; test_docs.Sandbox(test_docs.Path.cwd(), test_docs.PAGES[{self.page.name!r}]).run_blocks()"
        found = subprocess.run([sys.executable, "-c", code], cwd=self.folder, env=env, capture_output=True, text=True)
        assert found.returncode == 0, f"{found.stdout}\n{found.stderr}"

    def run_blocks(self) -> None:
        """Run the snippets and the commands of the page in this process."""
        assert not self.diffs or Path(cli.__file__).is_relative_to(self.folder), "the changed package is imported"
        if "runs/quickstart" in self.page.read_text(encoding="utf-8"):
            self.run("python -m charlm.train --config configs/quickstart.py")
        for block in blocks_of(self.page):
            if block.not_run:
                continue
            if block.language == "python":
                if file := re.match(r"# (\S+\.py)\n", block.text):
                    self.write(file[1], block.text)
                exec(compile(block.text, self.page.name, "exec"), self.names)
            for line in block.commands():
                self.run(line)

    def write(self, name: str, text: str) -> None:
        """Write a file, and a config file with small values."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + (SMALL.format(**self.data) if "def get_config" in text else ""), encoding="utf-8")

    def run(self, line: str) -> None:
        """Run a line of a shell, in which only charlm is called."""
        words = shlex.split(line, comments=True)
        in_process = words[:2] == ["python", "-m"] and "&&" not in words and not {"vmap", "ray"} & set(words)
        if in_process:
            assert cli.run(COMMANDS[words[2].removeprefix("charlm.")], words[3:]) == 0, line
            return
        only_charlm = f'pip() {{ :; }}; python() {{ case "$2" in charlm.*) {shlex.quote(sys.executable)} "$@";; esac; }}'
        found = subprocess.run(["bash", "-c", f"{only_charlm}; {line}"], env=self.env, capture_output=True, text=True)
        assert found.returncode == 0, f"{line}\n{found.stdout}\n{found.stderr}"


# The pages that a newcomer reads first. The others are run by hand: python -m pytest -m pages
FIRST_PAGES = ("README.md", "extending.md", "python.md")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in FIRST_PAGES else pytest.mark.pages)
        for name, page in PAGES.items()
        if commands_of(page) or any(block.language == "python" for block in blocks_of(page))
    ],
)
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")  # For the snippets that draw.
    sandbox = Sandbox(tmp_path, PAGES[name])
    sandbox.prepare()
    if sandbox.diffs:
        sandbox.run_in_another_process()
    else:
        sandbox.run_blocks()
