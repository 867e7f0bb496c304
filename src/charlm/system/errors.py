"""How a command can end before its end: the user's input is at fault, the run itself failed, or it is told to stop."""


class UserError(Exception):
    """What a user caused and can put right: one line that names the key or file, what was found, what would work.

    The commands print it without a traceback and exit with 2.
    """


class ConfigError(UserError):
    """A config file, a config key or a command-line flag."""


class CorpusError(UserError):
    """A text: missing, unreadable, too short, or with symbols outside the vocabulary."""


class WorkdirError(UserError):
    """A workdir or a checkpoint in it."""


class FolderInUse(WorkdirError):
    """Another process trains in the workdir."""


class RunFailed(Exception):
    """The run itself failed (its loss is not finite, say). The commands exit with 1."""


class Exit(Exception):
    """The command is over, with this exit code: help was shown, or a signal came and everything is saved."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code
