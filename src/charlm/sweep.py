"""Train many runs from one file.

    python -m charlm.sweep --sweep FILE [--workdir DIR] [--executor sequential|vmap|ray] [--dry_run]

A sweep file has a function `get_sweep()`. It returns a config, or the path of a config file, and the changes of each run:

    from charlm.sweep import product

    def get_sweep():
        return "configs/quickstart.py", product({"optimizer.learning_rate": [1e-3, 4e-3], "seed": [0, 1, 2]})

Each run has its own folder in the folder of the sweep. A finished run is not trained again, so the same command continues a
sweep that was stopped. Exit codes: 0: all runs are finished; 1: some runs failed.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from charlm.config import cli
from charlm.sweeps.executors import EXECUTORS
from charlm.sweeps.options import RayOptions
from charlm.sweeps.overrides import Sampled, chain, choice, integer, log_uniform, product, sample, uniform_between, zipped
from charlm.system.errors import ConfigError
from charlm.system.streams import write_output

if TYPE_CHECKING:
    from charlm.sweeps.plan import Plan

# The functions for sweep files, and the command.
__all__ = ["chain", "choice", "integer", "log_uniform", "main", "product", "sample", "uniform_between", "zipped"]


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = flags.FlagValues()
    flags.DEFINE_string("sweep", None, "the sweep file", flag_values=values)
    flags.DEFINE_string(
        "workdir", None, "the sweep's folder; default: runs/<name of the sweep file's folder>", flag_values=values
    )
    flags.DEFINE_enum("executor", "sequential", list(EXECUTORS), "how the runs are trained", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "list the runs and train none of them", flag_values=values)
    _define_ray_flags(values)
    cli.parse(values, argv, __doc__)
    from charlm.sweeps.plan import load_plan
    from charlm.sweeps.run import run_sweep

    path = Path(cli.required(values, "sweep"))
    plan = load_plan(path)
    _check_ray_flags(values, plan)
    if values.dry_run:
        _list_runs(plan)
        return
    options = RayOptions(**{name: values[name].value for name in RayOptions._fields})
    run_sweep(plan, Path(values.workdir or f"runs/{path.absolute().parent.name}"), values.executor, options)


def _list_runs(plan: "Plan") -> None:
    for run in plan.runs():
        refused = f"  REFUSED: {run.refused}" if run.refused else ""
        write_output(f"{run.name}  {json.dumps(run.overrides, default=list)}{refused}\n")


def _define_ray_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "ray_address", "local", "ray: HOST:PORT, auto, or local, which starts Ray on this machine", flag_values=values
    )
    flags.DEFINE_integer("cpus_per_run", 1, "ray: cores reserved for each run", 1, flag_values=values)
    flags.DEFINE_float("gpus_per_run", 0, "ray: GPUs reserved for each run", 0, flag_values=values)
    flags.DEFINE_integer(
        "retries", 3, "ray: how often a run is restarted after its process or node was lost", 0, flag_values=values
    )
    flags.DEFINE_enum(
        "scheduler", "none", ["none", "asha", "median"], "ray: how runs that fall behind are stopped", flag_values=values
    )
    flags.DEFINE_enum(
        "search", "file", ["file", "optuna"], "ray: the file's runs, or values that Optuna suggests", flag_values=values
    )


def _check_ray_flags(values: flags.FlagValues, plan: "Plan") -> None:
    if values.executor != "ray" and (given := [name for name in RayOptions._fields if values[name].present]):
        raise ConfigError(f"--{given[0]} needs --executor ray; found --executor {values.executor}")
    if values.search == "optuna" and not isinstance(plan.overrides, Sampled):
        raise ConfigError(f"{plan.where}: --search optuna needs runs that come from sample() alone, which knows their ranges")


if __name__ == "__main__":
    sys.exit(cli.run(main))
