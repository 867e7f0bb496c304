import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlm.runs.checkpoint import Checkpoints, DamagedCheckpoint
from charlm.runs.flat_state import flatten_state, sha256, unflatten_state
from charlm.system.errors import WorkdirError


def tree(seed):
    draw = np.random.default_rng(seed)
    return {
        "params": {"layer": {"W": jnp.asarray(draw.normal(size=(3, 4)), jnp.float32)}, "b": jnp.asarray(draw.normal(size=2))},
        "count": jnp.asarray(seed, jnp.int32),
        "carry": ((jnp.asarray(draw.normal(size=(2, 3)), jnp.float32),),),
        "empty": (),
    }


def save(workdir, steps, best=None):
    checkpoints = Checkpoints(workdir)
    for step in steps:
        checkpoints.save(step, tree(step), {"loss": step / 7}, best)
    checkpoints.wait()
    return checkpoints


def test_restore_returns_what_was_saved(tmp_path):
    save(tmp_path, [5]).close()
    flat, meta = Checkpoints(tmp_path).restore(5)
    restored = unflatten_state(tree(0), flat)
    assert jax.tree.structure(restored) == jax.tree.structure(tree(5))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), restored, jax.tree.map(np.asarray, tree(5)))
    assert meta == {"step": 5, "best_step": None, "progress": {"loss": 5 / 7}}


def test_a_donated_array_may_be_overwritten_while_it_is_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = {"a": jnp.arange(1 << 20, dtype=jnp.float32)}
    change = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
    checkpoints.save(1, state, {}, None)
    jax.block_until_ready(change(state))
    checkpoints.wait()
    assert (checkpoints.restore(1)[0]["a"] == np.arange(1 << 20)).all()


def test_the_best_and_the_two_latest_are_kept(tmp_path):
    checkpoints = save(tmp_path, [1, 2], best=2)
    for step in (3, 4, 5, 6):
        checkpoints.save(step, tree(step), {}, 2)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.find("best", print)[1]["step"] == 2
    assert checkpoints.find("latest", print)[1]["step"] == checkpoints.find("6", print)[1]["step"] == 6
    checkpoints.save(7, tree(7), {}, 7)
    checkpoints.wait()
    assert checkpoints.steps() == [6, 7] and checkpoints.find("best", print)[1]["step"] == 7


def data_files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 0)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def test_every_flipped_byte_that_matters_is_detected(tmp_path):
    """A flipped byte in any file either raises an error, or is never read and leaves the state as it was."""
    save(tmp_path, [5]).close()
    wrong = []
    for path in data_files(tmp_path / "checkpoints" / "5"):
        size = path.stat().st_size
        for at in sorted({0, size // 3, size // 2, size - 2}):
            flip(path, at)
            try:
                flat, _ = Checkpoints(tmp_path).restore(5)
                if sha256(flat) != sha256(flatten_state(tree(5))):
                    wrong.append((path, at))
            except DamagedCheckpoint:
                pass
            flip(path, at)
    assert not wrong
    Checkpoints(tmp_path).restore(5)


def damage(folder):
    """Flip a byte in the middle of the largest data file."""
    path = max(folder.glob("**/d/*"), key=lambda p: p.stat().st_size)
    flip(path, path.stat().st_size // 2)


def test_restore_latest_skips_a_damaged_checkpoint_and_reports_it(tmp_path):
    save(tmp_path, [1, 2]).close()
    damage(tmp_path / "checkpoints" / "2" / "state")
    said = []
    checkpoints = Checkpoints(tmp_path)
    flat, meta = checkpoints.restore_latest(said.append)
    assert meta["step"] == 1 and sha256(flat) == sha256(flatten_state(tree(1)))
    assert len(said) == 1 and str(tmp_path / "checkpoints" / "2") in said[0] and "continuing from step 1," in said[0]
    assert checkpoints.steps() == [1] and [p.name for p in (tmp_path / "damaged").iterdir()] == ["2"]
    checkpoints.save(2, tree(2), {}, 1)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2] and checkpoints.find("latest", print)[1]["step"] == 2


def test_the_best_is_found_although_the_latest_is_damaged(tmp_path):
    save(tmp_path, [1, 2], best=1).close()
    damage(tmp_path / "checkpoints" / "2" / "state")
    said = []
    assert Checkpoints(tmp_path).find("best", said.append)[1]["step"] == 1
    assert len(said) == 1 and str(tmp_path / "checkpoints" / "2") in said[0]
    shutil.rmtree(tmp_path / "checkpoints")
    save(tmp_path, [3, 4], best=1).close()
    assert Checkpoints(tmp_path).find("best", said.append)[1]["step"] == 4
    assert said[1:] == [
        f"{tmp_path / 'checkpoints'} no longer holds the best checkpoint, step 1; using step 4, the latest of the others"
    ]


@pytest.mark.parametrize("content", ['{"init_timestamp_nsecs": []}', '{"custom_metadata": {}, "0": 1}', "[]", ""])
def test_a_checkpoint_that_orbax_cannot_list_does_not_prevent_new_ones(tmp_path, content, capfd):
    """The damaged checkpoint is not the latest, so the run itself never reads it."""
    save(tmp_path, [10, 20], best=10).close()
    (tmp_path / "checkpoints" / "10" / "_CHECKPOINT_METADATA").write_text(content)
    checkpoints = save(tmp_path, [30], best=10)
    assert checkpoints.steps()[-2:] == [20, 30] and checkpoints.find("latest", print)[1]["step"] == 30
    # The damaged checkpoint is kept, and a message says so if it was moved.
    moved = (tmp_path / "damaged" / "10").is_dir()
    assert (10 in checkpoints.steps()) != moved
    assert ("10 is damaged; moved into " in capfd.readouterr().err) == moved


def test_a_damaged_checkpoint_without_a_predecessor_is_an_error_and_is_kept(tmp_path):
    save(tmp_path, [2]).close()
    damage(tmp_path / "checkpoints" / "2" / "state")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(DamagedCheckpoint, match="no undamaged one precedes it"):
        checkpoints.restore_latest(print)
    assert checkpoints.steps() == [2]


def test_a_missing_checkpoint_is_an_error(tmp_path):
    assert Checkpoints(tmp_path).steps() == []
    with pytest.raises(WorkdirError, match="holds no checkpoint yet"):
        Checkpoints(tmp_path).find("best", print)
    assert not (tmp_path / "checkpoints").exists()
    save(tmp_path, [3]).close()
    with pytest.raises(WorkdirError, match="--checkpoint is '4'; it must be best, latest or one of 3"):
        Checkpoints(tmp_path).find("4", print)


def test_a_state_of_another_shape_is_refused(tmp_path):
    other = tree(1) | {"carry": ((jnp.zeros((2, 4)),),)}
    with pytest.raises(WorkdirError, match=r"carry.0.0 should be float32\[2, 4\], found float32\[2, 3\]"):
        unflatten_state(other, flatten_state(tree(1)))


def test_the_sha256_depends_on_names_types_shapes_and_bytes():
    a = np.arange(6, dtype=np.float32)
    variants = [{"a": a}, {"b": a}, {"a": a.astype(np.float64)}, {"a": a.reshape(2, 3)}, {"a": a + 1}, {"a": a, "b": a}]
    assert len({sha256(v) for v in variants}) == len(variants)
    assert sha256({"a": a, "b": a + 1}) == sha256({"b": a + 1, "a": a})
    assert sha256({"a": a}, {"x": 1}) != sha256({"a": a}, {"x": 2})
