"""Rewrite the generated blocks of README.md, docs/*.md and experiments/*/README.md.

    python docs/generate.py             rewrite every block
    python docs/generate.py --check     exit with 1 and name each block that is out of date

A block lies between `<!-- generated: NAME -->` and `<!-- end generated -->`. Each NAME is a key of `BLOCKS`. The functions here
read the comments and docstrings of the code; those of `measurements` read the records of the experiments.
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measurements
from measurements import ROOT, markdown_table

SOURCE = ROOT / "src" / "charlm"
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->)(.*?)(<!-- end generated -->)", re.DOTALL)
# From top to bottom, as in the layers of pyproject.toml.
ROOMS = ("exchange", "serving", "sweeps", "runs", "config", "inference", "training", "data", "parallel", "nn", "system")


def pages() -> list[Path]:
    """Return the files that may hold blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "experiments").glob("*/README.md"))]


def rewrite(text: str) -> tuple[str, list[str]]:
    """Return the text with current blocks, and the names of the blocks that changed. Raises KeyError for an unknown block."""
    changed = []

    def current(match: re.Match) -> str:
        start, name, old, end = match.groups()
        content = BLOCKS[name]()
        new = f"\n\n{content}\n\n" if "\n" in content else content
        if new != old:
            changed.append(name)
        return f"{start}{new}{end}"

    return BLOCK.sub(current, text), changed


def main() -> int:
    """Rewrite or check all blocks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a block is out of date")
    check = parser.parse_args().check
    stale = False
    for path in pages():
        old = path.read_text(encoding="utf-8")
        new, changed = rewrite(old)
        for name in changed:
            print(f"{path.relative_to(ROOT)}: the block {name} {'is out of date' if check else 'is rewritten'}")
        stale |= bool(changed)
        if changed and not check:
            path.write_text(new, encoding="utf-8")
    if check and stale:
        print("run python docs/generate.py")
    return int(check and stale)


# Blocks from the code. Each function returns a block.


def configuration() -> str:
    """Every key with its default and its meaning, from the comments of the default config. A table for each group."""
    from charlm.config import default_config, flatten

    config = default_config()
    values, groups, above = dict(flatten(config)), {"config": ""}, []
    tables: dict[str, list[list[str]]] = {}
    source = (SOURCE / "config" / "defaults.py").read_text(encoding="utf-8")
    for line in map(str.strip, source.split("def default_config", 1)[1].split("return config", 1)[0].splitlines()):
        if line.startswith("# "):
            above.append(line[2:])
            continue
        if match := re.match(r"config\.(\w+) = (\w+) = config_dict", line):
            groups[match[2]] = f"{match[1]}."
        elif match := re.match(r"(\w+)\.(\w+) = .*?(?:  # (.*))?$", line):
            group, key, meaning = groups[match[1]], groups[match[1]] + match[2], " ".join(above)
            rows = tables.setdefault(group.rstrip("."), [])
            # A comment above a key that has a comment of its own describes all the keys that follow.
            if meaning and match[3]:
                rows.append([f"*{_escaped(meaning)}*", "", ""])
            rows.append([f"`{key}`", _default(config, key, values.pop(key)), _escaped(match[3] or meaning)])
        above = []
    if values:
        raise SystemExit(f"no line of defaults.py was recognised for {', '.join(values)}")
    headed = ((f"### {group}\n\n" if group else "", rows) for group, rows in tables.items())
    return "\n\n".join(heading + markdown_table(["key", "default", "meaning"], rows) for heading, rows in headed)


def _default(config: Any, key: str, value: Any) -> str:
    if value is not None:
        return f"`{json.dumps(value) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value}`"
    *path, name = key.split(".")
    for part in path:
        config = config[part]
    return f"unset ({config.get_type(name).__name__})"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]


def commands() -> str:
    """The commands, from their docstrings."""
    from charlm.__main__ import COMMANDS

    rows = [[f"`python -m charlm.{name}`", first_line(SOURCE / f"{name}.py")] for name in COMMANDS]
    return markdown_table(["command", "purpose"], rows)


def configs() -> str:
    """The config files, from their docstrings."""
    rows = [[f"`configs/{path.name}`", first_line(path)] for path in sorted((ROOT / "configs").glob("*.py"))]
    return markdown_table(["file", "content"], rows)


def modules() -> str:
    """The modules of every room, from their docstrings."""
    files = [path for room in ROOMS for path in sorted((SOURCE / room).glob("[!_]*.py"))]
    rows = [[f"`{path.relative_to(SOURCE).as_posix()}`", _escaped(first_line(path))] for path in files]
    return markdown_table(["module", "content"], rows)


def resumable_keys() -> str:
    """The keys that may change between two starts of a run."""
    from charlm.config import RESUMABLE_KEYS

    return "\n".join(f"- `{key}`" for key in RESUMABLE_KEYS)


def length_keys() -> str:
    """The keys that `--extend` may raise."""
    from charlm.config import LENGTH_KEYS

    return ", ".join(f"`{key}`" for key in LENGTH_KEYS)


def traced_hyperparameters() -> str:
    """The keys in which the runs of one compiled program may differ."""
    from charlm.training.state import TRACED_HYPERPARAMETERS

    return "\n".join(f"- `{key}`" for key in TRACED_HYPERPARAMETERS)


BLOCKS: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "commands": commands,
    "configs": configs,
    "modules": modules,
    "resumable-keys": resumable_keys,
    "length-keys": length_keys,
    "traced-hyperparameters": traced_hyperparameters,
    **measurements.BLOCKS,
}

if __name__ == "__main__":
    sys.exit(main())
