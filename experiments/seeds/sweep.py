"""How much do two runs differ by their seed alone? The quickstart with sixteen seeds."""

from charlm.sweep import product


def get_sweep():
    return "configs/quickstart.py", product({"seed": list(range(16))})
