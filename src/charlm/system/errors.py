"""How a command ends early: the user's input is wrong, the run failed, or the command is finished or was asked to stop."""


class UserError(Exception):
    """An error in the user's input. Its message is one line: the key or file, what was found, and what would work.

    The commands print the message without a traceback and exit with 2.
    """


class ConfigError(UserError):
    """An error in a config file, a config key or a command-line flag."""


class CorpusError(UserError):
    """An error in a text: it is missing, unreadable or too short, or contains symbols outside the vocabulary."""


class MissingSymbol(CorpusError):
    """A symbol of a text is not in the vocabulary."""


class WorkdirError(UserError):
    """An error in a workdir or in one of its checkpoints."""


class WorkdirInUse(WorkdirError):
    """Another process trains in the workdir."""


class RunFailed(Exception):
    """The run itself failed, for example because its loss is not finite. The commands exit with 1."""


class FolderLost(RunFailed):
    """The folder of the run was moved or deleted, so nothing more can be written into it."""


class Exit(Exception):
    """The command ends with this exit code: it printed its help, or it received a signal and saved everything."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the host or the device has too little memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def short(text: str, most: int = 200) -> str:
    """Return a text in printable characters, shortened to `most` of them, for a message of one line."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= most else f"{text[:most]}..."
