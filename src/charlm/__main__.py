"""List the commands of charlm.

    python -m charlm

Each command is a module of its own: python -m charlm.COMMAND --help lists its flags.
"""

import importlib.util
import sys
from collections.abc import Sequence

COMMANDS = ("train", "sample", "evaluate", "reproduce", "sweep", "report")


def main(argv: Sequence[str]) -> int:
    """Print the commands with what each is for; return the exit code."""
    if argv and argv[0] in COMMANDS:
        print(f"charlm: write python -m charlm.{argv[0]}, with a dot", file=sys.stderr)
        return 2
    if argv and argv[0] not in ("-h", "--help", "help"):
        print(f"charlm: unknown command {argv[0]!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    print("Character-level recurrent language models in JAX. The commands:\n")
    for name in COMMANDS:
        print(f"  python -m charlm.{name:10}  {_summary(name)}")
    print("\npython -m charlm.COMMAND --help lists the flags of a command.")
    return 0


def _summary(name: str) -> str:
    """Return the first line of a command's docstring, without an import of the command, which takes a second."""
    spec = importlib.util.find_spec(f"charlm.{name}")
    source = spec.loader.get_source(f"charlm.{name}")
    return source.split('"""', 2)[1].splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
