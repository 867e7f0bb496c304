"""Read a sweep file and plan its runs. Every run has a name and a config, which is checked before anything is trained."""

import copy
import hashlib
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from charlm.config import cli, flatten
from charlm.config.modules import import_modules
from charlm.config.rules import check, check_keys, differing_keys, parse_json, resolve, set_key, unknown_key_message
from charlm.sweeps.overrides import Overrides
from charlm.system.errors import ConfigError, UserError
from charlm.system.files import read_text
from charlm.system.progress import say

_MAX_NAME_LENGTH = 120


class Run(NamedTuple):
    """A run of a sweep.

    Attributes:
        name: the name of its folder. It is a function of the overrides (`run_name`).
        overrides: what the run changes, dotted key -> value.
        config: the base config with the overrides, locked.
        refused: the reason why the config breaks a rule, in one line; None if it does not.
    """

    name: str
    overrides: Overrides
    config: ConfigDict
    refused: str | None


class Plan(NamedTuple):
    """The content of a sweep file.

    Attributes:
        where: the path of the file, for messages.
        base: the config that the overrides change.
        overrides: one entry for each run; a `Sampled` if their values are random.
    """

    where: str
    base: ConfigDict
    overrides: Sequence[Overrides]

    def runs(self) -> list[Run]:
        """Return all runs of the file. Raises ConfigError if two runs are equal, or if a value has the wrong type."""
        runs = [self.run(each) for each in self.overrides]
        names = [run.name for run in runs]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{self.where}: {len(repeated)} runs are listed more than once, the first is {repeated[0]}")
        return runs

    def runs_in(self, folder: Path) -> list[Run]:
        """Return the runs in a folder that this plan could draw: their values lie within its ranges (`Sampled`)."""
        found, distributions = [], self.overrides.distributions
        for path in sorted(folder.glob("*/config.json")):
            try:
                recorded, _ = parse_json(read_text(path), str(path))
            except UserError as error:
                say(f"this run is left out: {error}")
                continue
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in flatten(recorded)}
            run = self.run({key: values[key] for key in distributions})
            same = run.name == path.parent.name and not differing_keys(recorded, run.config)
            if same and all(each.can_draw(values[key]) for key, each in distributions.items()):
                found.append(run)
        return found

    def run(self, overrides: Overrides) -> Run:
        """Return the run with some overrides. Raises ConfigError if a value has the wrong type."""
        # A name shows the last part of a key, or the whole key if two keys end in the same part.
        last = {key: key.rsplit(".")[-1] for each in self.overrides for key in each}
        shown = {key: key if list(last.values()).count(last[key]) > 1 else last[key] for key in last}
        name, refused = run_name({shown[key]: value for key, value in overrides.items()}), None
        config = copy.deepcopy(self.base)
        for key, value in overrides.items():
            set_key(config, key, value, f"{self.where}, run {name}")
        try:
            import_modules(config)
            check(config, f"{self.where}, run {name}")
            resolve(config)
        except ConfigError as error:
            refused = str(error)
        return Run(name, dict(overrides), config.lock(), refused)


def load_plan(path: Path) -> Plan:
    """Read a sweep file. The file is Python code and is executed.

    Raises:
        ConfigError: the file is missing or fails, or a key is unknown.
    """
    base, overrides = _base_and_overrides(path)
    known = dict(flatten(base))
    for key in sorted({key for each in overrides for key in each}):
        if key not in known:
            raise ConfigError(f"{path}: {unknown_key_message(key)}")
    return Plan(str(path), base, overrides)


def _base_and_overrides(path: Path) -> tuple[ConfigDict, Sequence[Overrides]]:
    """Execute a sweep file and return what its `get_sweep()` returns. Raises ConfigError if it is missing or fails."""
    if not path.is_file():
        raise ConfigError(f"--sweep {path} is not a file; name a Python file with a function get_sweep()")
    scope = {"__name__": "sweep", "__file__": str(path)}
    try:
        exec(compile(read_text(path, ConfigError), str(path), "exec"), scope)
        found = scope["get_sweep"]()
    except (ConfigError, KeyboardInterrupt):
        raise
    except KeyError as error:
        if error.args != ("get_sweep",):
            raise ConfigError(f"{path}: KeyError: {error}") from None
        raise ConfigError(f"{path} has no function get_sweep()") from None
    except BaseException as error:  # A sweep file is any code, so it may raise anything.
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {frames[-1].lineno}" if frames else f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"{path}{where}: {type(error).__name__}: {error}") from None
    fits = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Sequence)
    if not fits or not all(isinstance(each, Mapping) and all(isinstance(key, str) for key in each) for each in found[1]):
        raise ConfigError(f"{path}: get_sweep() must return a config or the path of one, and a list of {{dotted key: value}}")
    base, overrides = found
    if not overrides:
        raise ConfigError(f"{path}: get_sweep() returns no runs")
    if isinstance(base, str | Path):
        base = cli.parse_with_config(flags.FlagValues(), [f"--config={base}"], "")
    if not isinstance(base, ConfigDict):
        found_type = type(base).__name__
        raise ConfigError(f"{path}: get_sweep() returned {found_type} as its config; it must return a config or its path")
    check_keys(base, str(path))
    return base, overrides


def run_name(overrides: Mapping[str, Any]) -> str:
    """Return the name of a run, such as `learning_rate=0.004,seed=1`, which is also the name of its folder.

    A name that is too long, or has characters that do not belong in a path, is cut, cleaned and followed by a hash.

    Args:
        overrides: key, as it is to appear in the name -> value.
    """
    full = ",".join(f"{key}={_format(value)}" for key, value in overrides.items()) or "base"
    name = re.sub(r"[^\w.=,+-]", "_", full)
    if name == full and len(name) <= _MAX_NAME_LENGTH:
        return name
    return f"{name[: _MAX_NAME_LENGTH - 9]}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def _format(value: Any) -> str:
    """Return a value as text: a number in its shortest form, if that form is exact."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
