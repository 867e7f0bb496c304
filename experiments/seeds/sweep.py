"""How much of a difference between two runs is luck? The quickstart with sixteen seeds."""

from charlm.sweep import product


def get_sweep():
    return "configs/quickstart.py", product({"seed": list(range(16))})
