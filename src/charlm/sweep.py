"""Train many runs from one file.

    python -m charlm.sweep --sweep FILE [--workdir DIR] [--executor sequential|vmap|ray] [--dry_run]

A sweep file has a function `get_sweep()`, which returns a config, or the path of a config file, and what each run changes:

    from charlm.sweep import product

    def get_sweep():
        return "configs/quickstart.py", product({"optimizer.learning_rate": [1e-3, 4e-3], "seed": [0, 1, 2]})

Every run has a workdir of its own in that of the sweep. A run that is finished is not done again, so that the same command goes
on with a sweep that was stopped. Exit codes: 0 all runs are finished; 1 some failed.
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from charlm import cli, report, results, together, train
from charlm.errors import ConfigError, RunFailed
from charlm.locks import waited_for
from charlm.machine import ask_for_determinism, num_cores
from charlm.outcome import why_failed
from charlm.overrides import Sampled, chain, choice, integer, log_uniform, product, sample, uniform_between, zipped
from charlm.plan import Plan, Run, load_plan
from charlm.progress import say

# What sweep files are written with, and the command.
__all__ = ["chain", "choice", "integer", "log_uniform", "main", "product", "sample", "uniform_between", "zipped"]

EXECUTORS = ("sequential", "vmap", "ray")
# Flags of --executor ray alone.
_OF_RAY = ("ray_address", "cpus_per_run", "gpus_per_run", "retries", "scheduler", "search")
# (runs, the sweep's workdir) -> {name: why} of those that failed. Exit, after a signal, ends it.
Executor = Callable[[Sequence[Run], Path], dict[str, str]]


def one_by_one(runs: Sequence[Run], workdir: Path) -> dict[str, str]:
    """Train runs one after another (an `Executor`)."""
    failed = {}
    for number, run in enumerate(runs, 1):
        say(f"run {number} of {len(runs)}: {run.name}")
        if reason := why_failed(lambda run=run: train.train(run.config, workdir / run.name)):
            failed[run.name] = reason
            say(f"{run.name} failed: {reason}")
    return failed


def side_by_side(runs: Sequence[Run], workdir: Path) -> dict[str, str]:
    """Train runs that differ in numbers alone as one program, the others one after another (an `Executor`)."""
    groups, alone = together.groups_of(runs)
    for run, why in alone:
        say(f"{run.name} is trained by itself: {why}")
    failed = {}
    for group in groups:
        say(f"{len(group)} runs as one program: {group[0].name} to {group[-1].name}")
        found: dict[str, str] = {}
        reason = why_failed(lambda group=group, found=found: found.update(together.train_together(group, workdir)))
        failed |= {run.name: reason for run in group} if reason else found
    return failed | one_by_one([run for run, _ in alone], workdir)


def main(argv: Sequence[str]) -> None:
    """The command."""
    values = flags.FlagValues()
    flags.DEFINE_string("sweep", None, "the sweep file", flag_values=values)
    flags.DEFINE_string(
        "workdir", None, "the sweep's folder; default runs/<name of the sweep file's folder>", flag_values=values
    )
    flags.DEFINE_enum("executor", "sequential", EXECUTORS, "how the runs are trained", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "list the runs and train none", flag_values=values)
    _define_flags_of_ray(values)
    cli.parse(values, argv, __doc__)
    path = Path(cli.required(values, "sweep"))
    plan = load_plan(path)
    _check_flags_of_ray(values, plan)
    if values.dry_run:
        for run in plan.runs():
            refused = f"  REFUSED: {run.refused}" if run.refused else ""
            print(f"{run.name}  {json.dumps(run.overrides, default=list)}{refused}")
        return
    workdir = Path(values.workdir or f"runs/{path.absolute().parent.name}")
    # A search begins with the runs that it has begun before.
    list_runs = functools.partial(plan.runs_in, workdir) if values.search == "optuna" else plan.runs
    runs = list_runs()
    if any(run.config.train.deterministic for run in runs):
        ask_for_determinism()
    execute = _executor(values, plan)
    workdir.mkdir(parents=True, exist_ok=True)
    with waited_for(workdir / ".lock", "training this sweep"):
        failed = {run.name: run.refused for run in runs if run.refused}
        to_do = [run for run in runs if not run.refused and not results.is_finished(workdir / run.name, run.config)]
        if finished := len(runs) - len(to_do) - len(failed):
            say(f"{finished} of {len(runs)} runs are finished")
        try:
            failed |= execute(to_do, workdir)
        finally:
            if runs := list_runs():
                _write_records(runs, workdir, failed)
    say(f"{workdir}: summary.csv, sweep.png, report.html")
    if failed:
        first = next(iter(failed))
        raise RunFailed(f"{len(failed)} of {len(runs)} runs failed; the first is {first}: {failed[first]}")


def _write_records(runs: Sequence[Run], workdir: Path, failed: dict[str, str]) -> None:
    """Table, plot and page. Raises RunFailed if they cannot be written."""
    try:
        results.write(runs, workdir, failed)
        report.write_report_of_sweep(workdir)
    except OSError as error:
        raise RunFailed(f"cannot write to {workdir}: {error.strerror or error}; the same command writes it anew") from None


def _define_flags_of_ray(values: flags.FlagValues) -> None:
    flags.DEFINE_string("ray_address", "local", "ray: HOST:PORT, auto, or local, which starts Ray here", flag_values=values)
    flags.DEFINE_integer("cpus_per_run", 1, "ray: cores that each run has to itself", 1, flag_values=values)
    flags.DEFINE_float("gpus_per_run", 0, "ray: GPUs that each run has to itself", 0, flag_values=values)
    flags.DEFINE_integer(
        "retries", 3, "ray: how often a run is begun again whose process or node is lost", 0, flag_values=values
    )
    flags.DEFINE_enum(
        "scheduler", "none", ["none", "asha", "median"], "ray: how runs that fall behind are stopped", flag_values=values
    )
    flags.DEFINE_enum(
        "search", "file", ["file", "optuna"], "ray: the file's runs, or values that Optuna suggests", flag_values=values
    )


def _check_flags_of_ray(values: flags.FlagValues, plan: Plan) -> None:
    if values.executor != "ray" and (given := [name for name in _OF_RAY if values[name].present]):
        raise ConfigError(f"--{given[0]} is for --executor ray; found --executor {values.executor}")
    if values.search == "optuna" and not isinstance(plan.overrides, Sampled):
        raise ConfigError(f"{plan.where}: --search optuna needs runs that come from sample() alone, which knows their ranges")


def _executor(values: flags.FlagValues, plan: Plan) -> Executor:
    if values.executor == "sequential":
        return one_by_one
    if values.executor == "vmap":
        together.use_all_cores(num_cores())
        return side_by_side
    from charlm import cluster  # Needs Ray, which comes with an extra.

    options = cluster.Options(**{name: values[name].value for name in _OF_RAY})
    return functools.partial(cluster.train_on_ray, plan=plan, options=options)


if __name__ == "__main__":
    sys.exit(cli.run(main))
