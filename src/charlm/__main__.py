"""List the commands of charlm.

    python -m charlm

Each command is a module of its own: python -m charlm.COMMAND --help lists its flags.
"""

import importlib.util
import sys
from collections.abc import Sequence

from charlm.system.errors import RunFailed
from charlm.system.progress import say
from charlm.system.streams import prepare_streams, write_output

COMMANDS = ("train", "sample", "evaluate", "reproduce", "sweep", "report", "export", "import_torch", "explore", "serve")


def main(argv: Sequence[str]) -> int:
    """Print the commands with what each is for; return the exit code."""
    prepare_streams()
    if argv and argv[0] in COMMANDS:
        say(f"charlm: write python -m charlm.{argv[0]}, with a dot")
        return 2
    if argv and argv[0] not in ("-h", "--help", "help"):
        say(f"charlm: unknown command {argv[0]!r}; the commands are {', '.join(COMMANDS)}")
        return 2
    lines = ["Character-level recurrent language models in JAX. The commands:", ""]
    lines += [f"  python -m charlm.{name:12}  {_summary(name)}" for name in COMMANDS]
    lines += ["", "python -m charlm.COMMAND --help lists the flags of a command."]
    try:
        write_output("\n".join(lines) + "\n")
    except BrokenPipeError:
        pass
    except RunFailed as error:
        say(f"charlm: {error}")
        return 1
    return 0


def _summary(name: str) -> str:
    """Return the first line of a command's docstring, without an import of the command, which takes a second."""
    spec = importlib.util.find_spec(f"charlm.{name}")
    source = spec.loader.get_source(f"charlm.{name}")
    return source.split('"""', 2)[1].splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
