"""The corpus of a run, with the vocabulary that the run starts from, and with a text that the run's folder holds."""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from charlm.data.corpus import Corpus, load_corpus
from charlm.data.vocab import Vocab
from charlm.runs.workdir import TEXT_FILE, check_text, load_run
from charlm.system.errors import ConfigError, CorpusError, MissingSymbol, WorkdirError
from charlm.system.files import write_text

# The value of `data.path` of a run that got its text as a string (`fit`). The folder of the run may be moved.
RUN_TEXT = f"{{workdir}}/{TEXT_FILE}"


def base_vocab_key(config: ConfigDict) -> tuple[str, str | None]:
    """Return (key, folder) of the run whose vocabulary a run starts from; the folder is None if there is none."""
    if config.data.vocab_from is not None:
        return "data.vocab_from", config.data.vocab_from
    return "train.init_from", config.train.init_from


def load_run_corpus(
    config: ConfigDict,
    path: Path | None = None,
    manifest: Mapping[str, Any] | None = None,
    text: str | None = None,
) -> Corpus:
    """Return the corpus of a run, encoded with the vocabulary that it starts from.

    Args:
        config: the run's config.
        path: the run's folder.
        manifest: of a run that exists: it holds the vocabulary that the run started from, so the other run may be gone.
        text: the text of a run that got it as a string; None: the folder holds it.

    Raises:
        CorpusError: the text cannot be read, or `data.vocab_from` lacks a symbol.
        WorkdirError: the other run cannot be read, or the folder holds another text.
        ConfigError: the other run has another kind of vocabulary.
    """
    if config.data.path != RUN_TEXT:
        return _load(config, config.data, manifest)
    data = copy.deepcopy(config.data)
    with tempfile.TemporaryDirectory() as folder, data.unlocked():
        if text is None:
            if path is None:
                raise CorpusError(f"data.path is {RUN_TEXT!r}, a text in a run's folder, and there is no folder")
            data.path = str(path / TEXT_FILE)
        else:
            if path is not None:
                check_text(path, text)
            data.path = str(Path(folder) / TEXT_FILE)
            write_text(Path(data.path), text)
        return _load(config, data, manifest)._replace(name=TEXT_FILE)


def _load(config: ConfigDict, data: ConfigDict, manifest: Mapping[str, Any] | None) -> Corpus:
    """Return the corpus of `data`, which is `config.data`, or names the text in the run's folder."""
    key, source = base_vocab_key(config)
    if source is None:
        return load_corpus(data)
    if manifest is not None and "base_vocab" in manifest:
        try:
            base = Vocab.from_json(manifest["base_vocab"])
        except ValueError as error:
            raise WorkdirError(f"the base_vocab of manifest.json is not a vocabulary: {error}") from None
    else:
        base = load_run(source, key).vocab
    if base.kind != data.vocab:
        raise ConfigError(f"data.vocab is {data.vocab!r}, but {key} {source} has a vocabulary of {base.kind}")
    try:
        return load_corpus(data, base)
    except MissingSymbol as error:
        raise CorpusError(f"{key} {source}: {error}; train.init_from alone adds the symbols of the text") from None
