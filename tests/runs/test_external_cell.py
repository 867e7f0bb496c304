"""A cell from outside the package: `model.cell` is `module:name`, and only the user's own words import the module."""

import importlib
import json
import sys

import jax
import numpy as np
import pytest
from models import small_model

import charlm
from charlm.system.errors import ConfigError

MODULE = '''
"""An Elman network with zoneout (Krueger et al. 2017) of one half."""

import jax.numpy as jnp

from charlm.nn.cell import Cell, Matrix


def update(params, x_HB, carry, dot, noise_HB):
    h_HB, new_HB = carry[0], jnp.tanh(x_HB + dot("W_h", carry[0]))
    return ((h_HB + new_HB) / 2 if noise_HB is None else jnp.where(noise_HB < 0.5, h_HB, new_HB),)


zoneout = Cell(update, gates=("h",), matrices=(Matrix("W_h"),), noise=1)
not_a_cell = update
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Put a module with a cell on the path of this process and of its children, and return its name."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "cell_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield "cell_of_mine"
    sys.modules.pop("cell_of_mine", None)


def test_a_run_with_a_cell_of_a_module_needs_the_module_to_be_named(run, small_config, tmp_path, module):
    path = tmp_path / "run"
    cell = f"--config.model.cell={module}:zoneout"
    assert run("train", f"--config={small_config}", f"--workdir={path}", cell)[0] == 0
    assert json.loads((path / "config.json").read_text())["model"]["cell"] == f"{module}:zoneout"
    for command in (
        ("sample", f"--workdir={path}", "--length=10"),
        ("evaluate", f"--workdir={path}"),
        ("reproduce", f"--workdir={path}"),
        ("report", f"--workdir={path}"),
    ):
        sys.modules.pop(module)  # As in a new process.
        code, _, err = run(*command)
        assert code == 2 and err.count("\n") == 1 and module in err and "--cell_module" in err, err
        assert module not in sys.modules, "a name in a workdir imports nothing"
        code, _, err = run(*command, f"--cell_module={module}")
        assert code == 0, err
    sys.modules.pop(module)
    with pytest.raises(ConfigError, match="cell_module"):
        charlm.load(path)
    assert charlm.load(path, cell_module=module).sample(length=5, seed=1)


def test_an_exported_model_needs_the_module_to_be_named(run, tmp_path, module):
    pytest.importorskip("safetensors", reason="the extra `export` is not installed")
    importlib.import_module(module)
    path, exported = tmp_path / "run", tmp_path / "exported"
    model = small_model(f"{module}:zoneout")
    model.save(path)
    command = "export", f"--workdir={path}", "--format=safetensors", f"--output={exported}"
    sys.modules.pop(module)
    code, _, err = run(*command)
    assert code == 2 and err.count("\n") == 1 and "--cell_module" in err, err
    assert run(*command, f"--cell_module={module}")[0] == 0
    sys.modules.pop(module)
    with pytest.raises(ConfigError, match="cell_module"):
        charlm.load(exported)
    jax.tree.map(np.testing.assert_array_equal, charlm.load(exported, cell_module=module).params, model.params)


@pytest.mark.slow
def test_a_killed_run_with_noise_ends_with_the_same_bits(run, small_config, tmp_path, module):
    results = []
    for name, lengths in (("whole", [40]), ("parts", [20, 40])):
        for steps in lengths:
            flags = f"--config.model.cell={module}:zoneout", f"--config.train.steps={steps}", "--extend"
            assert run("train", f"--config={small_config}", f"--workdir={tmp_path / name}", *flags)[0] == 0
        results.append(json.loads((tmp_path / name / "result.json").read_text())["params_sha256"])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "cell, message",
    [
        ("cell_of_mine:missing", "is no charlm.nn.cell.Cell"),
        ("cell_of_mine:not_a_cell", "is no charlm.nn.cell.Cell"),
        ("no_such_module:cell", "the module 'no_such_module' of a cell cannot be imported: ModuleNotFoundError"),
        ("cell_of_mine", "must be one of"),
        (":zoneout", "cannot be imported"),
        ("os:system", "is no charlm.nn.cell.Cell"),
    ],
)
def test_a_name_without_a_cell_is_one_line(run, small_config, tmp_path, module, cell, message):
    code, _, err = run("train", f"--config={small_config}", f"--workdir={tmp_path / 'run'}", f"--config.model.cell={cell}")
    assert code == 2 and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, key",
    [
        (("--config.model.cell=min_gru", "--config.model.recurrent_dropout=0.1"), "model.recurrent_dropout"),
        (("--config.model.cell=indrnn", "--config.model.recurrent_init=lecun_normal"), "model.recurrent_init"),
        (("--config.model.cell=gru", "--config.model.forget_bias=2.0"), "model.forget_bias"),
    ],
)
def test_a_key_without_a_meaning_for_the_cell_is_refused(run, small_config, tmp_path, flags, key):
    code, _, err = run("train", f"--config={small_config}", f"--workdir={tmp_path / 'run'}", *flags)
    assert code == 2 and err.count("\n") == 1 and key in err, err
