import json
import os
import time

import jax
import pytest
from conftest import start

from charlm.system import cache
from charlm.system.machine import num_cores


@pytest.fixture
def no_compilation_cache(monkeypatch):
    """Configure JAX as it is when the user has not chosen a folder for compiled programs."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_environment_determines_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "chosen"))
    assert cache.cache_dir() == tmp_path / "chosen"
    monkeypatch.delenv("CHARLM_CACHE")
    assert cache.cache_dir() == tmp_path / "xdg" / "charlm"


def test_old_programs_are_deleted_and_a_chosen_folder_is_kept(no_compilation_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path))
    folder = tmp_path / "compiled" / f"{num_cores()}_cores"
    folder.mkdir(parents=True)
    for name, age in (("old", 31), ("new", 29)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age * 86400,) * 2)
    cache.enable_compilation_cache()
    assert [entry.name for entry in folder.iterdir()] == ["new"]
    assert jax.config.jax_compilation_cache_dir == str(folder)
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "another"))
    cache.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(folder) and not (tmp_path / "another").exists()


@pytest.mark.slow
def test_runs_reuse_compiled_programs_and_have_the_same_bits_even_if_the_cache_is_damaged(small_config, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    entries, shas = [], []
    for name in ("first", "second"):
        process = start("train", "--config", str(small_config), "--workdir", str(tmp_path / name))
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        entries.append(sorted((tmp_path / "cache" / "compiled").rglob("*-cache")))
        shas.append(json.loads((tmp_path / name / "result.json").read_text())["params_sha256"])
        if name == "first":  # Damage two entries of three: one is cut, one has a wrong bit.
            for k, path in enumerate(entries[0]):
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= k % 3 == 1
                path.write_bytes(data if k % 3 else data[: len(data) // 2])
    assert entries[0] and entries[0] == entries[1] and shas[0] == shas[1]
