"""Checkpoints whose arrays are sharded over devices: the bits and the sha256 do not depend on the devices."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from charlm.parallel import mesh as meshes
from charlm.runs import orbax_files
from charlm.runs.checkpoint import Checkpoints, DamagedCheckpoint
from charlm.runs.flat_state import flatten_state, name_leaves, sha256

DEVICES = 4


def host_state(seed=0):
    draw = np.random.default_rng(seed)
    return {
        "params": {
            "W_h": draw.normal(size=(64, 256)).astype(np.float32),
            "W_o": draw.normal(size=(512, 12)).astype(np.float32),
        },
        "bf16": draw.normal(size=(8, 1024)).astype(jax.numpy.bfloat16),
        "odd": draw.normal(size=(7, 3)).astype(np.float32),
        "count": np.int32(seed),
    }


def place(state, count):
    """Return (shardings, state) on the first `count` devices, sharded as `mesh.shard_params` does."""
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, meshes.param_spec(x.shape, mesh)), state)
    return name_leaves(shardings), jax.tree.map(jax.device_put, state, shardings)


def sharded(workdir, count=1):
    return Checkpoints(workdir, None, place(host_state(), count)[0])


def save(workdir, step, count=1, shards=True):
    """Save a state that is overwritten before it is on disk; return the sha256 that the checkpoint records."""
    shardings, state = place(host_state(step), count)
    checkpoints = Checkpoints(workdir, None, shardings if shards else None)
    checkpoints.save(step, state, {"loss": step / 7}, None)
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state))
    checkpoints.wait()
    checkpoints.close()
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["sha256"]


def check_numbers_of_devices(folder):
    """Save with 0, 2 and 4 devices and restore with 0, 1 and 4; print how many pairs were compared."""
    state, pairs, recorded = host_state(5), 0, set()
    for writers in (0, 2, DEVICES):
        workdir = folder / str(writers)
        workdir.mkdir()
        recorded.add(save(workdir, 5, max(writers, 1), shards=writers > 0))
        for readers in (0, 1, DEVICES):
            found, meta = Checkpoints(workdir).restore(5) if readers == 0 else sharded(workdir, readers).restore(5)
            assert meta == {"step": 5, "best_step": None, "progress": {"loss": 5 / 7}}
            assert sha256(found) == sha256(flatten_state(state))
            if readers:
                assert {name: each.sharding for name, each in found.items()} == place(state, readers)[0]
                assert readers == 1 or not found["params.W_h"].is_fully_replicated
            pairs += 1
    assert len(recorded) == 1, recorded
    print(pairs)


def test_bits_and_sha256_do_not_depend_on_the_devices(tmp_path):
    """0 devices mean complete arrays, as every run without sharded parameters saves them."""
    code = f"import pathlib, test_sharded_checkpoint as t; t.check_numbers_of_devices(pathlib.Path({str(tmp_path)!r}))"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES}"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["9"]


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def alter_sha256(folder):
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"sha256": "0" * 64}))


def alter_progress(folder):
    path = folder / "meta" / "metadata"
    path.write_text(path.read_text().replace("progress", "Progress"))


def truncate(folder):
    largest = max((each for each in folder.rglob("*") if each.is_file()), key=lambda each: each.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def flip(folder):
    damage(max((each for each in folder.rglob("*") if each.is_file()), key=lambda each: each.stat().st_size))


@pytest.mark.parametrize("change", [alter_sha256, alter_progress, truncate, flip])
def test_damaged_shards_are_refused_and_the_run_continues_from_an_earlier_checkpoint(tmp_path, change):
    for step in (1, 2):
        save(tmp_path, step)
    change(tmp_path / "checkpoints" / "2")
    for checkpoints in (sharded(tmp_path), Checkpoints(tmp_path)):
        with pytest.raises(DamagedCheckpoint, match="checkpoints/2 "):
            checkpoints.restore(2)
        with pytest.raises(DamagedCheckpoint, match="checkpoints/2 "):
            checkpoints.check(2)
        assert checkpoints.latest_is_damaged()
    said = []
    found, meta = sharded(tmp_path).restore_latest(said.append)
    assert meta["step"] == 1 and sha256(found) == sha256(flatten_state(host_state(1)))
    assert len(said) == 1 and "continuing from step 1" in said[0] and (tmp_path / "damaged" / "2").is_dir()
    save(tmp_path, 2)
    assert not sharded(tmp_path).latest_is_damaged()


def test_a_checkpoint_that_orbax_cannot_list_does_not_prevent_shards(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA").write_text("[]")
    save(tmp_path, 2)
    assert sharded(tmp_path).restore(2)[1]["step"] == 2


def test_a_checkpoint_is_checked_a_few_arrays_at_a_time(tmp_path, monkeypatch):
    """The size of the arrays that are in memory at once changes neither what is read nor the result."""
    save(tmp_path, 1)
    reads, sound = [], orbax_files.StateOnDisk._read
    monkeypatch.setattr(orbax_files.StateOnDisk, "_read", lambda self, names: reads.append(names) or sound(self, names))
    for few, expected in ((1, 5), (70_000, 3), (1 << 28, 1)):
        monkeypatch.setattr(orbax_files, "_FEW_BYTES", few)
        reads.clear()
        Checkpoints(tmp_path).check(1)
        assert len(reads) == expected and sorted(name for names in reads for name in names) == sorted(name_leaves(host_state()))


def test_a_sharded_array_is_not_copied_to_be_placed():
    shardings, state = place({"a": np.arange(6.0, dtype=np.float32)}, 1)
    (sharding,), mesh = shardings.values(), next(iter(shardings.values())).mesh
    assert meshes.put_tree(mesh, state, {"a": sharding})["a"] is state["a"]
    other = NamedSharding(mesh, P("data"))
    moved = meshes.put_tree(mesh, state, {"a": other})["a"]
    assert moved.sharding == other and (np.asarray(moved) == np.arange(6)).all()
