"""Train a model from Python: in a script, in a notebook or in a thread."""

import copy
from pathlib import Path

from ml_collections import ConfigDict

from charlm.config.rules import check_keys
from charlm.runs.host import Callback
from charlm.runs.language_model import LanguageModel
from charlm.runs.load import load_model
from charlm.runs.loop import train
from charlm.runs.run_corpus import RUN_TEXT
from charlm.system.arguments import check_arguments
from charlm.system.errors import ConfigError, Exit
from charlm.system.progress import quiet


@check_arguments
def fit(
    config: ConfigDict,
    workdir: str | Path,
    text: str | None = None,
    *,
    progress: bool = True,
    callback: Callback | None = None,
    extend: bool = False,
) -> LanguageModel:
    """Train a model, or continue or load the run that the folder holds, and return its best model.

        config = charlm.default_config()
        config.train.steps = 500
        model = charlm.fit(config, "runs/first", text=open("my_text.txt", encoding="utf-8").read())

    The function does what the command `train` does. In the main thread, Ctrl-C and an interrupted notebook cell stop the run
    after a checkpoint was saved, and raise KeyboardInterrupt. The same call then continues the run.

    Args:
        config: from `charlm.default_config()`.
        workdir: the run's folder.
        text: the text to train on. It is kept in the folder as text.txt. None: the text that `config.data` names.
        progress: whether to show the progress: in a terminal and in a notebook a live line, elsewhere plain lines. If it is
            False, nothing at all is printed.
        callback: called with each line of metrics.jsonl, a dict, after it was written. It may raise KeyboardInterrupt to stop
            the run.
        extend: allow a finished run to be continued to a larger length.

    Raises:
        UserError: config, text and folder do not allow it. Nothing was written.
        RunFailed: a loss is not finite, or something cannot be written.
        KeyboardInterrupt: the run was stopped; everything is saved.
    """
    path = Path(workdir)
    if text is not None:
        config = _name_text(config, text)
    with quiet(not progress):
        try:
            train(config, path, extend, callback=callback, text=text)
        except Exit as error:
            if error.code == 130:
                raise KeyboardInterrupt("the run was stopped; everything is saved, and the same call continues it") from None
            raise SystemExit(error.code) from None
        return load_model(path)


def _name_text(config: ConfigDict, text: str) -> ConfigDict:
    """Return a copy of the config that names the text in the run's folder."""
    check_keys(config, "the config")
    for key in ("path", "url"):
        if config.data[key] is not None:
            raise ConfigError(f"data.{key} is {config.data[key]!r}, and a text is given too; give one of them")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ConfigError("the text must be a str of valid Unicode")
    config = copy.deepcopy(config)
    with config.unlocked():
        config.data.path = RUN_TEXT
    return config
