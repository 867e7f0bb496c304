"""Objects from outside the package, such as a cell or a corpus of one's own. Their names in a config are `module:name`.

A config may come from somebody else, so a name alone imports nothing. The user must have written it or named the module.
"""

import importlib
import sys
from typing import Any

from charlm.system.errors import ConfigError


def find_imported(name: str, flag: str) -> Any:
    """Return the object `module:name` of a module that is imported already; None if the module has no such object.

    Args:
        name: `module:name`.
        flag: the flag that names the module, for the message.

    Raises:
        ConfigError: the module is not imported.
    """
    module, _, attribute = name.partition(":")
    if module not in sys.modules:
        raise ConfigError(f"its module is not imported; name {module[:100]} with --{flag}, or import it first in Python")
    return getattr(sys.modules[module], attribute, None)


def import_module_of(name: Any, what: str) -> None:
    """Import the module of an object `module:name` in a config that the user wrote. Raises as `import_module` does."""
    if isinstance(name, str) and ":" in name:
        import_module(name.partition(":")[0], what)


def import_module(module: str | None, what: str) -> None:
    """Import a module that the user named; None: do nothing.

    Args:
        module: its dotted name.
        what: what it holds, for messages: a cell or a corpus.

    Raises:
        ConfigError: the module cannot be imported.
    """
    if module is None:
        return
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # A module is any code, so it may raise anything.
        found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"the module {module[:100]!r} of a {what} cannot be imported: {found}") from None
