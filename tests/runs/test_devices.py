"""The choice of devices (`mesh.auto`): it depends on config and cores, a run records it, and every later start follows it."""

import json
import os

import jax
import pytest
from conftest import start

from charlm.config import default_config, to_json
from charlm.parallel.mesh import num_sharing_devices
from charlm.runs import devices
from charlm.runs.devices import choose_devices
from charlm.system.errors import ConfigError


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
    assert "the run uses 1 of 4 devices" in capsys.readouterr().err


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
def test_a_run_records_its_devices_and_continues_with_them(run, small_config, tmp_path):
    flags = f"--config={small_config}", f"--workdir={tmp_path / 'run'}", "--config.mesh.auto", "--config.batching.batch_size=16"

    def train_on_two_devices(*more):
        xla_flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
        process = start("train", *flags, *more, XLA_FLAGS=xla_flags)
        _, err = process.communicate()
        assert process.returncode == 0, err
        return err

    assert "2 of 2 device(s)" in train_on_two_devices("--config.train.steps=20")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mesh"]["data"] == 2
    longer = "--config.train.steps=40", "--extend"
    code, _, err = run("train", *flags, *longer)
    assert code == 2 and "shares its batches among 2 devices, and this process has 1" in err, err
    assert "2 of 2 device(s); from step 20" in train_on_two_devices(*longer)
