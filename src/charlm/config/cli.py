"""The one entry of every command: flags and config in, errors to exit codes.

Exit codes: 0 done; 1 the run itself failed; 2 the user's input is at fault; 130 and 143 stopped by SIGINT and SIGTERM.
"""

import contextlib
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags, logging
from ml_collections import config_dict, config_flags

from charlm.config import default_config, flatten
from charlm.config.rules import check, check_keys, unknown_key
from charlm.parallel import processes
from charlm.system.cache import enable_compilation_cache
from charlm.system.errors import ConfigError, Exit, RunFailed, UserError


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command's main function on its arguments and return the exit code."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what is as it should be.
    enable_compilation_cache()
    code = _run(command, sys.argv[1:] if argv is None else argv)
    if code in (1, 2):
        processes.exit_job(code)
    return code


def _run(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    try:
        command(argv)
        sys.stdout.flush()
        return 0
    except UserError as error:
        _say(error)
        return 2
    except RunFailed as error:
        _say(error)
        return 1
    except Exit as ended:
        return ended.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; nothing is wrong. Keep Python from saying so at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _say(error: Exception) -> None:
    print(f"charlm: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def parse(values: flags.FlagValues, argv: Sequence[str], usage: str) -> flags.FlagValues:
    """Parse flags, none of them global.

    Raises:
        ConfigError: unknown flags (with the nearest match), wrong values, stray arguments.
    """
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
    try:
        rest = values(["charlm", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, [name for name in values if len(name) > 1], 1)
        hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
        raise ConfigError(f"unknown flag --{error.flagname}; {hint}") from None
    except flags.Error as error:
        raise ConfigError(_flag_error(error)) from None
    if values.help:
        print(_help(values, usage))
        raise Exit(0)
    if rest:
        raise ConfigError(f"stray argument {rest[0]!r}; flags are written --NAME=VALUE")
    return values


def required(values: flags.FlagValues, name: str) -> str:
    """The value of a flag that a command cannot do without."""
    if getattr(values, name) is None:
        raise ConfigError(f"--{name} is missing; --help lists the flags")
    return getattr(values, name)


def _help(values: flags.FlagValues, usage: str) -> str:
    lines = [usage.strip(), "", "flags:"]
    for name in sorted(set(values) - {"h", "help"}):
        flag = values[name]
        if flag.name == name:
            default = "" if flag.default is None else f" (default {flag.default})"
            lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(lines)


def parse_with_config(values: flags.FlagValues, argv: Sequence[str], usage: str) -> config_dict.ConfigDict:
    """Parse flags and `--config FILE --config.KEY=VALUE ...` into a checked, locked config.

    `values` already holds the command's own flags; the config file is Python and runs.

    Raises:
        ConfigError: the file is missing or broken, a key is unknown or has the wrong type, a value breaks a rule.
    """
    _check_override_names(argv)
    path = _config_path(argv)
    try:
        config_flags.DEFINE_config_file("config", None, "the config file", flag_values=values, sys_argv=["charlm", *argv])
        parse(values, argv, usage)
        config = values.config
        if config is not None:
            config.lock()  # The flag hides a file that could not be read until it is used.
    except (ConfigError, Exit):
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(_config_file_error(path, error)) from None
    if not path:
        raise ConfigError("--config is missing; try --config configs/quickstart.py")
    if not isinstance(config, config_dict.ConfigDict):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}; it must return default_config(), changed")
    check_keys(config, path)
    check(config, path)
    return config.lock()


def _config_path(argv: Sequence[str]) -> str:
    for i, argument in enumerate(argv):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
            return match[1] if match[1] is not None else "".join(argv[i + 1 : i + 2])
    return ""


def _check_override_names(argv: Sequence[str]) -> None:
    known = {key for key, _ in flatten(default_config())}
    for argument in argv:
        match = re.match(r"--?(no)?config\.([^=]*)", argument)
        if match and match[2] not in known:
            raise ConfigError(unknown_key(match[2]))


def _config_file_error(path: str, error: Exception) -> str:
    """One line for whatever went wrong while a config file was read."""
    if not path:
        return "--config is empty; name a config file"
    file = path.split(":", 1)[0]
    if not os.path.exists(file):
        near = [p.as_posix() for p in sorted(Path("configs").glob("*.py")) if p.name != "__init__.py"]
        close = difflib.get_close_matches(file, near, 1, 0.5) or difflib.get_close_matches("configs/" + file, near, 1, 0.5)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(near) or 'no configs/*.py here'}"
        return f"the config file {file} does not exist; {hint}"
    if isinstance(error, SyntaxError):
        return f"{file}, line {error.lineno}: {error.msg}: {(error.text or '').strip()}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if _same_file(frame.filename, file)]
    where = f"{file}, line {lines[-1]}" if lines else file
    if near := re.search(r'Did you mean "([^"]*)" instead of "([^"]*)"', str(error)):
        return f"{where}: unknown config key {near[2]}; did you mean {near[1]}?"
    if isinstance(error, AttributeError) and (key := re.search(r'Key "([^"]*)" does not exist', str(error))):
        return f"{where}: unknown config key {key[1]}"
    last = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    return f"{where}: {type(error).__name__}: {last}"


def _same_file(a: str, b: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(a, b)
    return False


def _flag_error(error: Exception) -> str:
    """One line for a flag's wrong value; for `--config`, from the traceback that config_flags puts into the message."""
    if "Error whilst parsing config file" in str(error):
        frames = re.findall(r'File "([^"]*)", line (\d+), in get_config', str(error))
        where = f"{frames[-1][0]}, line {frames[-1][1]}: " if frames else ""
        return where + str(error).strip().splitlines()[-1]
    return re.sub(r"^flag (--\S+?)=(.*): ", r"flag \1 is \2; ", " ".join(str(error).split()))
