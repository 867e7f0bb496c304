"""The house as a whole: what every module must keep to."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import charlm
from charlm.__main__ import COMMANDS

SOURCE = Path(charlm.__file__).parent
ROOMS = {"config", "data", "exchange", "inference", "nn", "parallel", "runs", "serving", "sweeps", "system", "training"}


def public_functions(tree: ast.Module):
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (each for each in node.body if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"))
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_public_functions_are_typed_and_documented(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for function in public_functions(ast.parse(text)):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        bare = [each.arg for each in arguments if each.annotation is None and each.arg not in ("self", "cls")]
        assert not bare, f"{path.name}: {function.name}() has arguments without types: {bare}"
        assert function.returns is not None, f"{path.name}: {function.name}() has no return type"


def test_the_door_holds_only_the_rooms_and_the_commands():
    found = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert found == ROOMS | {f"{name}.py" for name in (*COMMANDS, "__init__", "__main__")} | {"py.typed"}
    for name in COMMANDS:
        assert len((SOURCE / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 130, name


def test_the_list_of_commands_names_each_with_its_purpose():
    found = subprocess.run([sys.executable, "-m", "charlm"], capture_output=True, text=True)
    assert found.returncode == 0
    for name in COMMANDS:
        (line,) = (line for line in found.stdout.splitlines() if f"charlm.{name} " in line)
        assert len(line.split(maxsplit=3)[3]) > 10
    wrong = subprocess.run([sys.executable, "-m", "charlm", "tarin"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("charlm: unknown command 'tarin'; the commands are train,")


def test_importing_charlm_imports_nothing_that_takes_time():
    code = "import charlm, charlm.config, sys; print({'jax', 'flax', 'optax', 'matplotlib', 'orbax'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "set()\n", found
