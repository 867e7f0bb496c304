"""Programs that compute the same are compiled once in a process, and no others are taken for the same."""

import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from charlm.config import default_config, flatten
from charlm.config.rules import set_key
from charlm.nn.cells import CELLS
from charlm.training.chunk import train_chunk
from charlm.training.state import Program, init_state, jit_program

# Other values of keys whose values do not allow a change by one.
OTHER = {
    "model.cell": "gru",
    "model.encoding": "one_hot",
    "model.recurrent_init": "lecun_normal",
    "model.init_std": 0.1,
    "model.recurrence": "scan",
    "model.dtype": "bfloat16",
    "batching.layout": "windows",
    "batching.loss_on": "last",
    "optimizer.name": "sgd",
    "optimizer.schedule": "step_decay",
    "optimizer.loss_reduction": "sum_over_time",
    "train.metrics": ["accuracy"],
}


def changed(**changes):
    config = default_config()
    for key, value in changes.items():
        set_key(config, key.replace("__", "."), value, "test")
    return Program(config, 5, 100, carries_state=True)


@pytest.mark.parametrize(
    "key",
    [key for key, _ in flatten(default_config()) if key.split(".")[0] in ("model", "optimizer", "batching")]
    + ["train.metrics", "train.ema_decay"],
)
def test_a_change_of_a_key_that_a_program_reads_makes_another_program(key):
    value = dict(flatten(default_config()))[key]
    if key not in OTHER:
        value = not value if isinstance(value, bool) else (value or 0) + 1
    assert jit_program(train_chunk, changed(**{key: OTHER.get(key, value)})) is not jit_program(train_chunk, changed())


def test_seed_texts_and_cadences_make_no_other_program():
    same = {"seed": 3, "data.path": "x", "train.steps": 7, "train.log_every": 3, "eval.num_streams": 2, "sample.length": 9}
    assert jit_program(train_chunk, changed(**same)) is jit_program(train_chunk, changed())
    # A program cannot read these keys.
    config = jit_program(train_chunk, changed()).__wrapped__.args[0].config
    assert set(config) == {"seed", "model", "optimizer", "batching", "train"} and set(config.train) == {"metrics", "ema_decay"}


def test_functions_options_and_sizes_make_other_programs():
    program = changed()
    made = [
        jit_program(train_chunk, program),
        jit_program(init_state, program),
        jit_program(train_chunk, program, donate_argnums=0),
    ]
    made += [
        jit_program(train_chunk, program._replace(**change))
        for change in ({"vocab_size": 6}, {"num_steps": 9}, {"boundary": 1})
    ]
    made.append(jit_program(train_chunk, program._replace(carries_state=False)))
    assert len(set(map(id, made))) == len(made)


def test_programs_on_equal_meshes_with_equal_shardings_are_one():
    def on_mesh(*spec):
        mesh = Mesh(np.array(jax.devices()), ("data",))
        return jit_program(train_chunk, changed()._replace(mesh=mesh), out_shardings={"x": NamedSharding(mesh, P(*spec))})

    assert on_mesh("data") is on_mesh("data") is not on_mesh()
    assert on_mesh() is not jit_program(train_chunk, changed())


def test_a_cell_that_is_imported_again_makes_another_program(monkeypatch):
    made = []
    for _ in range(2):
        module = types.ModuleType("own")
        module.cell = CELLS["rnn"]._replace(open_gates=[])  # A list, which cannot be hashed.
        monkeypatch.setitem(sys.modules, "own", module)
        made += [jit_program(train_chunk, changed(**{"model.cell": "own:cell"})) for _ in range(2)]
    assert made[0] is made[1] is not made[2] and made[2] is made[3]
