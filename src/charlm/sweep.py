"""Train many runs from one file.

    python -m charlm.sweep --sweep FILE [--workdir DIR] [--executor sequential|vmap] [--dry_run]

A sweep file has a function `get_sweep()`, which returns a config, or the path of a config file, and what each run changes:

    from charlm.sweep import product

    def get_sweep():
        return "configs/quickstart.py", product({"optimizer.learning_rate": [1e-3, 4e-3], "seed": [0, 1, 2]})

Every run has a workdir of its own in that of the sweep. A run that is finished is not done again, so that the same command goes
on with a sweep that was stopped. Exit codes: 0 all runs are finished; 1 some failed.
"""

import copy
import hashlib
import itertools
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_dict

from charlm import cli, report, results, together, train
from charlm.batching import uniform
from charlm.config import check, check_keys, flatten, set_key, unknown_key
from charlm.errors import ConfigError, Exit, RunFailed, UserError
from charlm.locks import waited_for
from charlm.machine import num_cores
from charlm.progress import say

Overrides = dict[str, Any]
# From a number in [0, 1) to a value.
Draw = Callable[[float], Any]
_LONGEST_NAME = 120


def product(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """Every combination of the values of some keys, the last key's changing fastest."""
    return [dict(zip(values, each)) for each in itertools.product(*values.values())]


def zipped(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """The first value of every key, then the second of every key, and so on. Raises ConfigError unless all have as many."""
    if len(counts := {key: len(each) for key, each in values.items()}) and len(set(counts.values())) > 1:
        raise ConfigError(f"zipped() needs as many values for every key; found {counts}")
    return [dict(zip(values, each)) for each in zip(*values.values())]


def chain(*parts: Sequence[Overrides]) -> list[Overrides]:
    """The runs of each part, one part after another."""
    return list(itertools.chain(*parts))


def sample(num_runs: int, draws: Mapping[str, Draw], seed: int = 0) -> list[Overrides]:
    """Random values: run k's depend on the seed and on k alone, so that a longer sweep begins with a shorter one's runs."""
    found = []
    for run in range(num_runs):
        numbers = uniform(seed, run, len(draws)).tolist()
        found.append({key: draw(number) for (key, draw), number in zip(draws.items(), numbers)})
    return found


def log_uniform(low: float, high: float) -> Draw:
    """A number whose logarithm is uniform, rounded to four digits, so that it can be read."""
    return lambda number: float(f"{math.exp(math.log(low) + number * math.log(high / low)):.4g}")


def uniform_between(low: float, high: float) -> Draw:
    """A number, rounded to four digits."""
    return lambda number: float(f"{low + number * (high - low):.4g}")


def integer(low: int, high: int) -> Draw:
    """A whole number from low to high, both included."""
    return lambda number: low + int(number * (high - low + 1))


def choice(values: Sequence[Any]) -> Draw:
    """One of some values."""
    return lambda number: values[int(number * len(values))]


class Run(NamedTuple):
    """A run of a sweep: its name, what it changes, its config; or why it cannot be one.

    Attributes:
        name: of its folder, made of what it changes: the same for as long as that is the same.
        overrides: dotted key -> value.
        config: None where `refused` says why there is none.
        refused: one line.
    """

    name: str
    overrides: Overrides
    config: config_dict.ConfigDict | None
    refused: str | None = None


def load_sweep(path: Path) -> list[Run]:
    """The runs of a sweep file, which is Python and runs.

    Raises:
        ConfigError: it is missing or broken, a key is unknown or of the wrong type, or two runs are the same.
    """
    base, overrides = _base_and_overrides(path)
    keys = {key for each in overrides for key in each}
    known = dict(flatten(base))
    for key in sorted(keys):
        if key not in known:
            raise ConfigError(f"{path}: {unknown_key(key)}")
    shown = {key: key.rsplit(".")[-1] for key in keys}
    shown = {key: key if list(shown.values()).count(last) > 1 else last for key, last in shown.items()}
    runs = []
    for each in overrides:
        name, refused = run_name({shown[key]: value for key, value in each.items()}), None
        config = copy.deepcopy(base)
        for key, value in each.items():
            set_key(config, key, value, f"{path}, run {name}")
        try:
            check(config, f"{path}, run {name}")
        except ConfigError as error:
            config, refused = None, str(error)
        runs.append(Run(name, dict(each), config.lock() if config else None, refused))
    names = [run.name for run in runs]
    if len(twice := sorted({name for name in names if names.count(name) > 1})):
        raise ConfigError(f"{path}: {len(twice)} runs stand in it more than once, the first is {twice[0]}")
    return runs


def _base_and_overrides(path: Path) -> tuple[config_dict.ConfigDict, list[Overrides]]:
    if not path.is_file():
        raise ConfigError(f"--sweep {path} is no file")
    scope = {"__name__": "sweep", "__file__": str(path)}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
        found = scope["get_sweep"]()
    except ConfigError:
        raise
    except KeyError as error:
        if error.args != ("get_sweep",):
            raise ConfigError(f"{path}: KeyError: {error}") from None
        raise ConfigError(f"{path} has no function get_sweep()") from None
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {frames[-1].lineno}" if frames else f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"{path}{where}: {type(error).__name__}: {error}") from None
    fits = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Sequence)
    if not fits or not all(isinstance(each, Mapping) for each in found[1]):
        raise ConfigError(f"{path}: get_sweep() must return a config or the path of one, and a list of {{dotted key: value}}")
    base, overrides = found
    if not overrides:
        raise ConfigError(f"{path}: get_sweep() returns no runs")
    if isinstance(base, str | Path):
        base = cli.parse_with_config(flags.FlagValues(), [f"--config={base}"], "")
    if not isinstance(base, config_dict.ConfigDict):
        raise ConfigError(f"{path}: get_sweep() returned {type(base).__name__} as its config")
    check_keys(base, str(path))
    return base, [dict(each) for each in overrides]


def run_name(overrides: Mapping[str, Any]) -> str:
    """`learning_rate=0.004,seed=1`: fit for a folder, and short; a longer one ends in a hash of the whole."""
    whole = ",".join(f"{key}={_shown(value)}" for key, value in overrides.items()) or "base"
    name = re.sub(r"[^\w.=,+-]", "_", whole)
    if name == whole and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def one_by_one(runs: Sequence[Run], workdir: Path) -> dict[str, str]:
    """Train runs one after another; {name: why} of those that failed. Exit, after a signal, ends it."""
    failed = {}
    for number, run in enumerate(runs, 1):
        say(f"run {number} of {len(runs)}: {run.name}")
        if reason := why_failed(lambda run=run: train.train(run.config, workdir / run.name)):
            failed[run.name] = reason
            say(f"{run.name} failed: {reason}")
    return failed


def why_failed(what: Callable[[], None]) -> str | None:
    """Why something failed, in one line, or None; a traceback is shown where nobody thought of the error."""
    try:
        what()
    except Exit:
        raise
    except (UserError, RunFailed) as error:
        return str(error)
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return "out of memory"
        traceback.print_exc()
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


def side_by_side(runs: Sequence[Run], workdir: Path) -> dict[str, str]:
    """Train runs that differ in numbers alone as one program, the others one after another; as `one_by_one`."""
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


EXECUTORS = {"sequential": one_by_one, "vmap": side_by_side}


def main(argv: Sequence[str]) -> None:
    """The command."""
    values = flags.FlagValues()
    flags.DEFINE_string("sweep", None, "the sweep file", flag_values=values)
    flags.DEFINE_string(
        "workdir", None, "the sweep's folder; default runs/<name of the sweep file's folder>", flag_values=values
    )
    flags.DEFINE_enum("executor", "sequential", list(EXECUTORS), "how the runs are trained", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "list the runs and train none", flag_values=values)
    cli.parse(values, argv, __doc__)
    path = Path(cli.required(values, "sweep"))
    runs = load_sweep(path)
    if values.dry_run:
        for run in runs:
            print(
                f"{run.name}  {json.dumps(run.overrides, default=list)}" + (f"  REFUSED: {run.refused}" if run.refused else "")
            )
        return
    if values.executor == "vmap":
        together.use_all_cores(num_cores())
    workdir = Path(values.workdir or f"runs/{path.absolute().parent.name}")
    failed = {run.name: run.refused for run in runs if run.refused}
    workdir.mkdir(parents=True, exist_ok=True)
    with waited_for(workdir / ".lock", "training this sweep"):
        to_do = [run for run in runs if not run.refused and not results.is_finished(workdir / run.name, run.config)]
        if finished := len(runs) - len(to_do) - len(failed):
            say(f"{finished} of {len(runs)} runs are finished")
        try:
            failed |= EXECUTORS[values.executor](to_do, workdir)
        finally:
            results.write(runs, workdir, failed)
            report.write_report_of_sweep(workdir)
    say(f"{workdir}: summary.csv, sweep.png, report.html")
    if failed:
        first = next(iter(failed))
        raise RunFailed(f"{len(failed)} of {len(runs)} runs failed; the first is {first}: {failed[first]}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
