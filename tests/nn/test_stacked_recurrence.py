"""The loop for accelerators computes what the loop for CPUs computes, and compiles to few kernels a step."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_recurrence as plain

from charlm.nn import recurrence
from charlm.nn.cell import Cell, Matrix, Vector, blocks
from charlm.nn.cells import CELLS
from charlm.nn.resets import Resets
from experiments.accelerators import hlo, targets

ROOT = Path(__file__).resolve().parents[2]
# The cells of the fast tests: the hand-written derivatives, and one that JAX differentiates. A cell with a parallel form has
# neither loop.
FAST = ("rnn", "lstm", "gru", "ln_gru")
LOOPED = [name for name, cell in CELLS.items() if cell.coefficients is None]
CASES = [pytest.param(name, True, marks=() if name in FAST else pytest.mark.slow) for name in LOOPED]
CASES.append(pytest.param("lstm", False, marks=pytest.mark.slow))


def check_forms(monkeypatch, cell, args, carry, **more):
    """Check that both forms of the loop agree in values and in all gradients. `more` may hold resets of an initial carry."""
    before_TB = more.pop("before_TB", None)
    both = carry, jax.tree.map(lambda each: 0.3 * each[:1].T + 0.2, carry)

    def run(params, matrices, x_TKB, both):
        resets = None if before_TB is None else Resets(jnp.asarray(before_TB), both[1])
        return recurrence.unroll(cell, params, matrices, x_TKB, both[0], jnp.float64, resets=resets, **more)

    def found(platform):
        with monkeypatch.context() as patch:
            patch.setattr(recurrence, "by_platform", lambda *args, **forms: forms[platform](*args))
            return jax.value_and_grad(plain.objective(run), (0, 1, 2, 3))(*args, both)

    # One program for both, because compiling takes the time.
    plain.close(*jax.jit(lambda: (found("elsewhere"), found("cpu")))())


@pytest.mark.parametrize("name, resets", CASES)
def test_both_forms_agree_in_values_and_gradients(x64, monkeypatch, name, resets):
    *args, carry = plain.inputs(name)
    check_forms(monkeypatch, CELLS[name], args, carry, before_TB=plain.RESET_TB if resets else None)


def test_both_forms_agree_for_a_custom_cell_with_dependent_products_and_noise(x64, monkeypatch):
    def update(params, x_proj_GB, carry, dot, noise_HB):
        h, m = carry
        x_f, x_n = blocks(x_proj_GB, 2)
        f = jax.nn.sigmoid(x_f + dot("U", dot("U", h)) + params["peephole"][:, None] * m)
        wide = dot("V", jnp.concatenate([f * h, m]))
        return jnp.where(noise_HB < 0.5, h, f * jnp.tanh(x_n * wide)), f * m + h

    matrices = (Matrix("U"), Matrix("V", 1, 2))
    cell = Cell(update, gates=("f", "n"), carries=("h", "m"), matrices=matrices, vectors=(Vector("peephole"),), noise=1)
    *args, carry = plain.inputs(cell)
    noise_THB = jnp.asarray(np.random.default_rng(0).uniform(size=(plain.T, plain.H, plain.B)))
    check_forms(monkeypatch, cell, args, carry, before_TB=plain.RESET_TB, noise_TKB=noise_THB)


CONFIG = """
from charlm.config import default_config

def get_config():
    config = default_config()
    config.batching.update(batch_size=32, seq_len=24)
    config.model.update(cell={cell!r}, hidden_size={units}, embedding_size=32, dtype={dtype!r})
    return config
"""
# Forward and backward together. A launch of a kernel takes about as long as the product of a step.
MOST_KERNELS = {"rnn": 8, "lstm": 10, "gru": 10, "ln_lstm": 24}


@pytest.mark.slow
@pytest.mark.parametrize("target", list(targets.NEEDS))
def test_the_training_steps_compile_to_few_kernels_a_step(tmp_path, target):
    for module in targets.missing(target):
        pytest.importorskip(module)
    cells = list(MOST_KERNELS)
    files = [tmp_path / f"{cell}.py" for cell in cells]
    units = 512 if target == "h100" else 128  # The number of kernels is held for the GPU, and the TPU compiles for longer.
    for cell, file in zip(cells, files):
        file.write_text(CONFIG.format(cell=cell, dtype="bfloat16" if cell == "gru" else "float32", units=units))
    script = [sys.executable, ROOT / "experiments/accelerators/compile.py", "--target", target, "--kernels"]
    found = subprocess.run([*script, *files], capture_output=True, text=True, check=True)
    kernels = {name: int(forward) + int(backward) for name, forward, backward in map(str.split, found.stdout.splitlines())}
    assert list(kernels) == cells
    assert "copies" not in found.stderr
    if target == "h100":
        assert all(kernels[cell] <= most for cell, most in MOST_KERNELS.items()), kernels


HLO = """
%body (p: (s32[], f32[8,4,16])) -> (s32[], f32[8,4,16]) {
  %p = (s32[], f32[8,4,16]) parameter(0)
  %dot.1 = f32[4,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %copy.1 = f32[8,4,16]{2,1,0} copy(%x)
  %fusion.1 = f32[4,16]{1,0} fusion(%dot.1), kind=kLoop, calls=%fused
  ROOT %tuple.1 = (s32[], f32[8,4,16]) tuple(%i, %copy.1)
}

ENTRY %main (q: f32[8,4,16]) -> f32[8,4,16] {
  %while.1 = (s32[], /*index=1*/f32[8,4,16]) while(%t), condition=%c, body=%body, metadata={op_name="jit(f)/transpose(jvp(g))/while"}, backend_config={"known_trip_count":{"n":"8"}}
}
"""  # noqa: E501


def test_the_kernels_and_copies_of_a_loop_are_counted():
    (loop,) = hlo.loops(HLO, 8)
    assert loop.backward and [each.opcode for each in loop.kernels] == ["dot", "copy", "fusion"]
    assert [each.name for each in loop.copies] == ["copy.1"]
    assert hlo.loops(HLO, 9) == []
