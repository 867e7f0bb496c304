"""The choice of devices (`mesh.auto`): it depends on config and cores, a run records it, and every later start follows it."""

import json

import jax
import pytest
from conftest import start

from charlm.config import default_config, to_json
from charlm.parallel.mesh import num_sharing_devices
from charlm.runs import devices
from charlm.runs.devices import choose_devices
from charlm.system.errors import ConfigError
from charlm.system.machine import num_cores


def config_with(**changes):
    config = default_config()
    config.update_from_flattened_dict({"mesh.auto": True, "model.hidden_size": 64, "batching.batch_size": 32} | changes)
    return config


@pytest.mark.parametrize(
    "changes, count",
    [
        ({}, 4),
        ({"model.hidden_size": 257}, 1),
        ({"batching.batch_size": 18}, 2),
        ({"batching.batch_size": 13}, 1),
        ({"batching.batch_size": 15}, 1),
        ({"batching.batch_size": 24}, 3),
        ({"optimizer.accumulation_steps": 2}, 2),
        ({"optimizer.accumulation_steps": 8}, 1),
    ],
)
def test_small_models_share_batches_that_leave_each_device_enough_rows(changes, count):
    assert num_sharing_devices(config_with(**changes), 4) == count


def test_a_config_without_auto_or_with_a_number_is_not_changed(tmp_path):
    for changes in ({"mesh.auto": False}, {"mesh.data": 1}, {"mesh.auto": False, "mesh.data": 3}):
        config = config_with(**changes)
        before = to_json(config)
        choose_devices(config, tmp_path)
        assert to_json(config) == before


def test_a_new_run_uses_the_devices_that_there_are_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "num_cores", lambda: 4)
    config = config_with()
    choose_devices(config, tmp_path)
    assert config.mesh.data == jax.device_count() == 1
    assert "JAX already has 1 device(s), so the run uses 1 of 4" in capsys.readouterr().err


def test_a_run_that_exists_keeps_its_devices(tmp_path, monkeypatch):
    for recorded, count in ((None, 1), (1, 1), (2, 2)):
        monkeypatch.setattr(devices, "recorded_devices", lambda path, recorded=recorded: recorded or 1)
        (tmp_path / "config.json").touch()
        config = config_with()
        if count > jax.device_count():
            with pytest.raises(ConfigError, match="among 2 devices, and this process has 1: start Python again"):
                choose_devices(config, tmp_path)
        else:
            choose_devices(config, tmp_path)
            assert config.mesh.data == count


@pytest.mark.slow
@pytest.mark.skipif(num_cores() < 2, reason="one core cannot be two devices")
def test_a_run_records_its_devices_and_keeps_them(run, small_config, tmp_path):
    """The processes that train have JAX's devices to choose. This process has one device."""
    path = tmp_path / "run"
    flags = f"--config={small_config}", f"--workdir={path}", "--config.mesh.auto", "--config.batching.batch_size=16"

    def in_another_process(name, *argv):
        process = start(name, *argv)
        out, err = process.communicate()
        assert process.returncode == 0, err
        return out + err

    assert "device(s)\n" in in_another_process("train", *flags, "--config.train.steps=20")
    config = json.loads((path / "config.json").read_text())
    assert config["mesh"]["data"] == 2
    longer = "--config.train.steps=40", "--extend"
    code, _, err = run("train", *flags, *longer)
    assert code == 2 and "shares its batches among 2 devices, and this process has 1" in err, err
    assert "device(s); from step 20" in in_another_process("train", *flags, *longer)
    files = {name: json.loads((path / f"{name}.json").read_text()) for name in ("config", "manifest", "result")}
    (tmp_path / "results.jsonl").write_text(json.dumps({"run": "a", **files}))
    assert "the same to the bit" in in_another_process("reproduce", f"--result={tmp_path / 'results.jsonl'}", "--run=a")
