"""The entry point of every command: it parses flags and the config, and turns errors into exit codes.

Exit codes: 0 success; 1 the run failed; 2 the user's input is wrong; 130 and 143 stopped by SIGINT and SIGTERM.

A command imports JAX, and what needs it, after its flags are parsed. The help and an error in a flag do not wait for it.
"""

import contextlib
import difflib
import gc
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from logging import getLogger
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from charlm.config import default_config, flatten
from charlm.config.modules import import_modules
from charlm.system.errors import ConfigError, Exit, RunFailed, UserError, is_out_of_memory, short
from charlm.system.progress import say
from charlm.system.streams import discard_output, prepare_streams, write_output

# Python looks for garbage whenever this many objects are new. Its own number, 700, makes the start slower: imports and the
# tracing of programs create many objects, and most of them stay.
_GARBAGE_THRESHOLD = 50_000


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run the main function of a command and return the exit code.

    Args:
        command: the main function. It takes the arguments.
        argv: the arguments; None: those of the process.
    """
    prepare_streams()
    gc.set_threshold(_GARBAGE_THRESHOLD)
    # Orbax and its event loop also log what is intended, and errors that charlm reports in one line.
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel("CRITICAL")
    code = _run(command, sys.argv[1:] if argv is None else argv)
    if code in (1, 2) and "jax" in sys.modules:  # Without JAX the process does not belong to a job yet.
        from charlm.parallel import processes

        processes.exit_job(code)
    return code


def _run(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run a command, print its error if there is one, and return the exit code."""
    try:
        command(argv)
        return 0
    except UserError as error:
        _print_error(error)
        return 2
    except RunFailed as error:
        _print_error(error)
        return 1
    except Exit as error:
        return error.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # The reader of stdout (head, less) has closed the pipe, which is no error.
        discard_output()
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        _print_error(f"cannot use {short(os.fsdecode(error.filename))}: {error.strerror}")
        return 2
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _print_error("out of memory; lower model.hidden_size, batching.batch_size or batching.seq_len, or use another machine")
        return 1


def _print_error(error: Exception | str) -> None:
    """Print a message as one line on stderr. Escapes replace control characters, which a terminal would obey."""
    line = " ".join(str(error).split())
    say("charlm: " + "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line))


def parse(values: flags.FlagValues, argv: Sequence[str], usage: str) -> flags.FlagValues:
    """Parse flags, and return them. From then on, JAX keeps the programs that it compiles.

    Args:
        values: the definitions of the flags. The global flags of absl are not used.
        argv: the arguments.
        usage: the text at the top of the help.

    Raises:
        ConfigError: a flag is unknown, a value is invalid, or there is an argument that is not a flag.
        Exit: `--help` printed the help.
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
        write_output(_help(values, usage) + "\n")
        raise Exit(0)
    if rest:
        raise ConfigError(f"stray argument {rest[0]!r}; flags are written --NAME=VALUE")
    from charlm.system.cache import enable_compilation_cache

    enable_compilation_cache()
    return values


def define_cell_module(values: flags.FlagValues) -> None:
    """Define the flag --cell_module."""
    flags.DEFINE_string("cell_module", None, "the module to import, for a cell from outside the package", flag_values=values)


def define_corpus_module(values: flags.FlagValues) -> None:
    """Define the flag --corpus_module."""
    flags.DEFINE_string("corpus_module", None, "the module to import, for a corpus of your own", flag_values=values)


def required(values: flags.FlagValues, name: str) -> str:
    """Return the value of a flag. Raises ConfigError if it is not given."""
    if getattr(values, name) is None:
        raise ConfigError(f"--{name} is missing; --help lists the flags")
    return getattr(values, name)


def _help(values: flags.FlagValues, usage: str) -> str:
    """Return the help of a command."""
    lines = [usage.strip(), "", "flags:"]
    for name in sorted(set(values) - {"h", "help"}):
        flag = values[name]
        if flag.name == name:
            default = "" if flag.default is None else f" (default {flag.default})"
            lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(lines)


def parse_with_config(values: flags.FlagValues, argv: Sequence[str], usage: str) -> ConfigDict:
    """Parse flags and `--config FILE --config.KEY=VALUE ...`, and return the config, checked and locked.

    The config file is Python code, and this runs it.

    Args:
        values: the definitions of the other flags of the command.
        argv: the arguments.
        usage: the text at the top of the help.

    Raises:
        ConfigError: the file is missing or broken, a key is unknown or has the wrong type, or a value breaks a rule.
        Exit: `--help` printed the help.
    """
    _check_override_names(argv)
    path = _config_path(argv)
    try:
        config_flags.DEFINE_config_file("config", None, "the config file", flag_values=values, sys_argv=["charlm", *argv])
        parse(values, argv, usage)
        config = values.config
        if config is not None:
            config.lock()  # If the file could not be read, the flag raises the error only when the config is used.
    except (ConfigError, Exit):
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # A config file is any code, so it may raise anything.
        raise ConfigError(_config_file_error(path, error)) from None
    if not path:
        raise ConfigError("--config is missing; try --config configs/quickstart.py")
    from charlm.config.rules import check, check_keys

    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}; it must return a changed default_config()")
    check_keys(config, path)
    import_modules(config)
    check(config, path)
    return config.lock()


def _config_path(argv: Sequence[str]) -> str:
    """Return the value of `--config`, or "" if it is not given. Raises ConfigError if it is given twice."""
    paths = []
    for i, argument in enumerate(argv):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
            paths.append(match[1] if match[1] is not None else "".join(argv[i + 1 : i + 2]))
    if len(paths) > 1:
        raise ConfigError(f"--config is given more than once: {short(', '.join(paths))}; name one config file")
    return "".join(paths)


def _check_override_names(argv: Sequence[str]) -> None:
    """Raise ConfigError if a flag `--config.KEY` names an unknown key."""
    known = {key for key, _ in flatten(default_config())}
    for argument in argv:
        match = re.match(r"--?(no)?config\.([^=]*)", argument)
        if match and match[2] not in known:
            from charlm.config.rules import unknown_key_message

            raise ConfigError(unknown_key_message(match[2]))


def _config_file_error(path: str, error: BaseException) -> str:
    """Return the message for an error in a config file, on one line."""
    if not path:
        return "--config is empty; name a config file"
    file = path.split(":", 1)[0]
    if not os.path.exists(file):
        near = [p.as_posix() for p in sorted(Path("configs").glob("*.py")) if p.name != "__init__.py"]
        close = difflib.get_close_matches(file, near, 1, 0.5) or difflib.get_close_matches("configs/" + file, near, 1, 0.5)
        existing = f"there are {', '.join(near)}" if near else "name an existing file"
        hint = f"did you mean {close[0]}?" if close else existing
        return f"the config file {file} does not exist; {hint}"
    if isinstance(error, SyntaxError):
        line = f", line {error.lineno}" if error.lineno else ""
        return f"{file}{line}: {error.msg}{': ' + error.text.strip() if error.text else ''}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if _same_file(frame.filename, file)]
    where = f"{file}, line {lines[-1]}" if lines else file
    if near := re.search(r'Did you mean "([^"]*)" instead of "([^"]*)"', str(error)):
        return f"{where}: unknown config key {near[2]}; did you mean {near[1]}?"
    if isinstance(error, AttributeError) and (key := re.search(r'Key "([^"]*)" does not exist', str(error))):
        return f"{where}: unknown config key {key[1]}"
    last = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    return f"{where}: {type(error).__name__}{': ' + last if last else ''}"


def _same_file(a: str, b: str) -> bool:
    """Return whether both paths name the same existing file."""
    with contextlib.suppress(OSError):
        return os.path.samefile(a, b)
    return False


def _flag_error(error: Exception) -> str:
    """Return the message for the invalid value of a flag, on one line.

    For `--config` the message comes from the traceback that config_flags includes in its error.
    """
    if "Error whilst parsing config file" in str(error):
        frames = re.findall(r'File "([^"]*)", line (\d+), in get_config', str(error))
        where = f"{frames[-1][0]}, line {frames[-1][1]}: " if frames else ""
        return where + str(error).strip().splitlines()[-1]
    return short(re.sub(r"^flag (--\S+?)=(.*): ", r"flag \1 is \2; ", " ".join(str(error).split())), 500)
