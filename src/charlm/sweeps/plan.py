"""From a sweep file to the runs that it asks for, each with a name and a config, checked before anything is trained."""

import copy
import hashlib
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_dict

from charlm.config import cli, flatten
from charlm.config.rules import check, check_keys, differing_keys, parse_json, resolve, set_key, unknown_key
from charlm.sweeps.overrides import Overrides
from charlm.system.errors import ConfigError

_LONGEST_NAME = 120


class Run(NamedTuple):
    """A run of a sweep.

    Attributes:
        name: of its folder, made of what it changes: the same for as long as that is the same.
        overrides: dotted key -> value.
        config: that it has, or would have.
        refused: why it breaks a rule of configs, in one line.
    """

    name: str
    overrides: Overrides
    config: config_dict.ConfigDict
    refused: str | None


class Plan(NamedTuple):
    """What a sweep file asks for.

    Attributes:
        where: the file, for messages.
        base: the config that all runs begin with.
        overrides: what each changes; a `Sampled` if they were drawn.
    """

    where: str
    base: config_dict.ConfigDict
    overrides: Sequence[Overrides]

    def runs(self) -> list[Run]:
        """The runs. Raises ConfigError if two are the same, or a value is of the wrong type."""
        runs = [self.run(each) for each in self.overrides]
        names = [run.name for run in runs]
        if len(twice := sorted({name for name in names if names.count(name) > 1})):
            raise ConfigError(f"{self.where}: {len(twice)} runs stand in it more than once, the first is {twice[0]}")
        return runs

    def runs_in(self, folder: Path) -> list[Run]:
        """The runs that a folder holds, of any values within the ranges of this plan (`Sampled`)."""
        found, draws = [], self.overrides.draws
        for path in sorted(folder.glob("*/config.json")):
            there, _ = parse_json(path.read_text(encoding="utf-8"), str(path))
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in flatten(there)}
            run = self.run({key: values[key] for key in draws})
            same = run.name == path.parent.name and not differing_keys(there, run.config)
            if same and all(draw.holds(values[key]) for key, draw in draws.items()):
                found.append(run)
        return found

    def run(self, overrides: Overrides) -> Run:
        """One run. Raises ConfigError if a value is of the wrong type."""
        last = {key: key.rsplit(".")[-1] for each in self.overrides for key in each}
        shown = {key: key if list(last.values()).count(last[key]) > 1 else last[key] for key in last}
        name, refused = run_name({shown[key]: value for key, value in overrides.items()}), None
        config = copy.deepcopy(self.base)
        for key, value in overrides.items():
            set_key(config, key, value, f"{self.where}, run {name}")
        try:
            check(config, f"{self.where}, run {name}")
            resolve(config)
        except ConfigError as error:
            refused = str(error)
        return Run(name, dict(overrides), config.lock(), refused)


def load_plan(path: Path) -> Plan:
    """Read a sweep file, which is Python and runs.

    Raises:
        ConfigError: it is missing or broken, or a key is unknown.
    """
    base, overrides = _base_and_overrides(path)
    known = dict(flatten(base))
    for key in sorted({key for each in overrides for key in each}):
        if key not in known:
            raise ConfigError(f"{path}: {unknown_key(key)}")
    return Plan(str(path), base, overrides)


def _base_and_overrides(path: Path) -> tuple[config_dict.ConfigDict, Sequence[Overrides]]:
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
    return base, overrides


def run_name(overrides: Mapping[str, Any]) -> str:
    """`learning_rate=0.004,seed=1`: fit for a folder, and short; a longer one ends in a hash of the whole."""
    whole = ",".join(f"{key}={_shown(value)}" for key, value in overrides.items()) or "base"
    name = re.sub(r"[^\w.=,+-]", "_", whole)
    if name == whole and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
