"""Train a model from Python: in a script, in a notebook or in a thread."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from charlm.data.text import file_sha256
from charlm.runs.host import Callback
from charlm.runs.language_model import LanguageModel
from charlm.runs.load import load_model
from charlm.runs.loop import train
from charlm.runs.workdir import TEXT_FILE
from charlm.system.errors import ConfigError, Exit, WorkdirError
from charlm.system.files import write_text


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
        progress: whether to show the progress: in a terminal and in a notebook a live line, elsewhere plain lines.
        callback: called with each line of metrics.jsonl, a dict, after it was written. It may raise KeyboardInterrupt to stop
            the run.
        extend: allow a finished run to be continued to a larger length.

    Raises:
        UserError: config, text and folder do not allow it. Nothing was written.
        RunFailed: a loss is not finite, or something cannot be written.
        KeyboardInterrupt: the run was stopped; everything is saved.
    """
    path = Path(workdir)
    try:
        with _kept_text(config, path, text) as config:
            train(config, path, extend, silent=not progress, callback=callback)
    except Exit as error:
        if error.code == 130:
            raise KeyboardInterrupt("the run was stopped; everything is saved, and the same call continues it") from None
        raise SystemExit(error.code) from None
    return load_model(path)


@contextlib.contextmanager
def _kept_text(config: ConfigDict, path: Path, text: str | None) -> Iterator[ConfigDict]:
    """Write the text into the run's folder, and yield the config that names it. Remove it if no run began."""
    if text is None:
        yield config
        return
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"the config is of type {type(config).__name__}; it must come from charlm.default_config()")
    for key in ("path", "url"):
        if config.data[key] is not None:
            raise ConfigError(f"data.{key} is {config.data[key]!r}, and a text is given too; give one of them")
    if not isinstance(text, str) or any("\ud800" <= char <= "\udfff" for char in text):
        raise ConfigError("the text must be a str of valid Unicode")
    file, is_new = path / TEXT_FILE, not path.exists()
    if path.exists() and not path.is_dir():
        raise WorkdirError(f"the workdir {path} is a file; name a folder")
    if file.exists() and file_sha256(file) != hashlib.sha256(text.encode()).hexdigest():
        raise WorkdirError(f"{file} holds another text than the one that is given; choose another folder")
    if not file.exists() and any(path.glob("*")):
        raise WorkdirError(f"{path} holds something already, but no {TEXT_FILE}; choose another folder")
    config = ConfigDict(config)
    config.data.path = str(file.absolute())
    if not file.exists():
        path.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    try:
        yield config.lock()
    finally:
        if not (path / "config.json").exists():
            file.unlink(missing_ok=True)
            if is_new:
                shutil.rmtree(path, ignore_errors=True)
