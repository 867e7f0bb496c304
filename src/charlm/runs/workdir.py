"""The files of a run's folder: config.json, vocab.json, manifest.json, result.json, and the lock file."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from charlm.config import LENGTH_KEYS, to_json
from charlm.config.rules import check_extension, describe_differences, differing_keys, from_json
from charlm.data.corpus import Corpus
from charlm.data.text import file_sha256
from charlm.data.vocab import Vocab
from charlm.parallel import processes
from charlm.system.errors import ConfigError, FolderLost, WorkdirError, WorkdirInUse
from charlm.system.files import read_json, read_text, write_text
from charlm.system.machine import cpu_model, git_commit, num_cores

_LOCK = ".lock"
# The text of a run that got its text from Python (`fit`).
TEXT_FILE = "text.txt"
# Files that are written before config.json.
_BEFORE_CONFIG = {_LOCK, TEXT_FILE, "vocab.json", "manifest.json"}
_PACKAGES = ("charlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml-collections", "numpy", "grain")


class Run(NamedTuple):
    """A run on disk, without its checkpoints.

    Attributes:
        path: the run's folder.
        config: the run's config, locked.
        vocab: the vocabulary of its corpus.
        manifest: what its numbers depend on besides the config (`make_manifest`).
    """

    path: Path
    config: ConfigDict
    vocab: Vocab
    manifest: dict[str, Any]


def load_run(path: str | Path, name: str = "--workdir") -> Run:
    """Read the config, the vocabulary and the manifest of a run. No code from the folder is executed.

    Args:
        path: the run's folder.
        name: the flag or the key that names the folder, for messages.

    Raises:
        WorkdirError: the folder is not a run, or its files cannot be read.
        ConfigError: config.json breaks a rule.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        found = "is not a run: it has no config.json" if path.is_dir() else "does not exist"
        near = ", ".join(sorted(p.parent.as_posix() for p in Path("runs").glob("*/config.json")))
        raise WorkdirError(f"{name} {path} {found}; {'there are ' + near if near else 'train a run first'}")
    config = from_json(read_text(path / "config.json"), str(path / "config.json"))
    if not (path / "manifest.json").exists() and (path / "model.safetensors").exists():
        raise WorkdirError(f"{name} {path} is an exported model, not a run; charlm.import_torch makes a run of it")
    manifest = read_json(path / "manifest.json")
    if not isinstance(manifest, dict):
        raise WorkdirError(f"{path / 'manifest.json'} holds no JSON object")
    vocab = read_vocab(path / "vocab.json", config, manifest.get("vocab_sha256"))
    return Run(path, config.lock(), vocab, manifest)


def read_vocab(file: Path, config: ConfigDict, sha256: str | None) -> Vocab:
    """Return the vocabulary in a JSON file.

    Args:
        file: the file.
        config: the config of the run.
        sha256: the hash of the vocabulary that the parameters belong to (`Vocab.sha256`); None if it is not on record.

    Raises:
        WorkdirError: the file holds no vocabulary, or another one.
    """
    try:
        vocab = Vocab.from_json(read_json(file))
    except ValueError as error:
        raise WorkdirError(f"{file} is not a vocabulary: {error}") from None
    if vocab.kind != config.data.vocab or sha256 not in (None, vocab.sha256()):
        raise WorkdirError(f"{file} was changed: it is another vocabulary than the one that the model was trained with")
    return vocab


def check_same_run(run: Run, config: ConfigDict, corpus: Corpus, extend: bool) -> None:
    """Check that training `config` on `corpus` may continue this run.

    Args:
        run: the run on disk.
        config: the config to train.
        corpus: the corpus to train on.
        extend: allow a greater length (`charlm.config.LENGTH_KEYS`).

    Raises:
        ConfigError: the configs differ in keys that may not change when a run is resumed.
        WorkdirError: the run was started with another corpus.
    """
    if extend:
        check_extension(run.config, config, str(run.path))
    elif keys := differing_keys(run.config, config):
        longer = set(keys) <= set(LENGTH_KEYS)
        hint = "--extend continues the run, or choose another --workdir" if longer else "choose another --workdir"
        raise ConfigError(f"{run.path} holds a run of another config: {describe_differences(run.config, config, keys)}; {hint}")
    check_corpus(run.path, run.manifest, corpus, run.vocab)


def manifest_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two manifests on which the bits of a result may depend, one string for each.

    The corpus is not compared (`check_corpus` does that), nor is the git commit.
    """
    pairs = [("device", then.get("device_kind"), now["device_kind"])]
    pairs += [(key, then.get(key), now[key]) for key in ("device_count", "cpu_model", "cpu_cores", "process_count")]
    packages = then.get("packages")
    pairs += [
        (name, packages.get(name) if isinstance(packages, dict) else None, now["packages"][name]) for name in now["packages"]
    ]
    return [f"{name} ({before} then, {after} now)" for name, before, after in pairs if before != after]


def check_corpus(name: str | Path, manifest: Mapping[str, Any], corpus: Corpus, vocab: Vocab | None = None) -> None:
    """Raise WorkdirError if a corpus is not the one that a run was started with.

    Args:
        name: the name of the run, for the message.
        manifest: the manifest of the run.
        corpus: the corpus to compare.
        vocab: the vocabulary of the run, if it is to be compared too. With another one, every id would be another symbol.
    """
    if "corpus_sha256" not in manifest:
        raise WorkdirError(f"{name} has no record of a training text; score a file with evaluate --text")
    if manifest.get("corpus_sha256") != corpus.sha256:
        raise WorkdirError(
            f"the corpus {corpus.name} is not what the run in {name} was started with: sha256 {corpus.sha256[:16]}... now, "
            f"{str(manifest.get('corpus_sha256'))[:16]}... then; restore the corpus, or choose another --workdir"
        )
    if vocab is not None and vocab != corpus.vocab:
        raise WorkdirError(
            f"the corpus {corpus.name} has another vocabulary than the run in {name}: {corpus.vocab.size} symbols now, "
            f"{vocab.size} in vocab.json; restore vocab.json, or score a file with evaluate --text"
        )


def create_run(
    path: Path,
    config: ConfigDict,
    corpus: Corpus,
    start: Mapping[str, Any] = MappingProxyType({}),
    text: str | None = None,
) -> Run:
    """Turn a locked, empty folder into a run. config.json is written last and marks the folder as a run.

    Args:
        path: the folder.
        config: the config of the run.
        corpus: its corpus.
        start: what the manifest keeps of the run that it starts from.
        text: its text, if the folder is to hold it.
    """
    if text is not None:
        check_text(path, text)
        write_text(path / TEXT_FILE, text)
    manifest = make_manifest(corpus) | start
    write_text(path / "vocab.json", json.dumps(corpus.vocab.to_json()) + "\n")
    write_text(path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    write_text(path / "config.json", to_json(config))
    return Run(path, config, corpus.vocab, manifest)


def make_manifest(corpus: Corpus) -> dict[str, Any]:
    """Return what a run's numbers depend on besides its config: versions, devices, cores, corpus, and the git commit."""
    devices = jax.devices()
    return {
        "packages": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "cpu_model": cpu_model(),
        "cpu_cores": num_cores(),
        "process_count": jax.process_count(),
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "vocab_size": corpus.vocab.size,
        "vocab_sha256": corpus.vocab.sha256(),
        "git_commit": git_commit(),
    }


def check_text(path: Path, text: str) -> None:
    """Raise WorkdirError if a run's folder holds another text."""
    file = path / TEXT_FILE
    if os.path.lexists(file) and file_sha256(file) != hashlib.sha256(text.encode()).hexdigest():
        raise WorkdirError(f"{file} is another text than the one that is given; choose another folder")


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def check_name(path: Path) -> None:
    """Raise WorkdirError if the name of a new folder is not UTF-8: some of the libraries that write into it need UTF-8."""
    if any("\ud800" <= character <= "\udfff" for character in str(path)):
        raise WorkdirError(f"--workdir {path} is not UTF-8; choose another name")


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Lock a folder against other processes. Create the folder if it does not exist.

    The operating system releases the lock when the process ends, for whatever reason.

    Raises:
        WorkdirInUse: another process holds the lock.
        WorkdirError: the folder holds something other than a run, or cannot be written to.
    """
    check_name(path)
    if path.exists() and not path.is_dir():
        raise WorkdirError(f"--workdir {path} is a file; name a folder")
    if path.is_dir() and not (path / "config.json").exists():
        foreign = sorted({p.name for p in path.iterdir() if p.suffix != ".partial"} - _BEFORE_CONFIG)
        if foreign:
            raise WorkdirError(f"--workdir {path} is not a run and not empty: it holds {foreign[0]!r}; choose another")
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / _LOCK, "a")
    except OSError as error:
        raise WorkdirError(f"cannot write to --workdir {path}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirInUse(f"another process is training in {path}; wait for it, or choose another --workdir") from None
        except OSError as error:
            raise WorkdirError(f"cannot lock {path / _LOCK}: {error.strerror}; choose a --workdir on another disk") from None
        yield


def identity(path: Path) -> tuple[int, int] | None:
    """Return what identifies a folder: its device and inode number; None if there is no folder."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def folder_lost(path: Path, before: tuple[int, int] | None) -> FolderLost | None:
    """Return the error for a run whose folder was moved or deleted; None if the folder is in its place.

    Args:
        path: the run's folder.
        before: its `identity` when training began.
    """
    if not processes.is_primary() or identity(path) == before:
        return None
    return FolderLost(
        f"{path} was moved or deleted while the run was trained; if it was moved, the same command continues there with "
        "another --workdir"
    )


# Key of result.json -> the types of its value. Other keys may have any value.
_RESULT_TYPES = {
    "status": str,
    "steps": int,
    "best_step": int | None,
    "val_nats_per_char": float | int | None,
    "test_nats_per_char": float | int | None,
    "train_seconds": float | int,
    "stopped_by": str | None,
    "params_sha256": str | None,
}


def read_result(path: Path) -> dict[str, Any] | None:
    """Return the content of result.json in a run's folder; None if the run has not ended.

    Raises:
        WorkdirError: the file cannot be read, or a value has the wrong type.
    """
    file = path / "result.json"
    if not os.path.lexists(file):
        return None
    result = read_json(file)
    if not isinstance(result, dict):
        raise WorkdirError(f"{file} is not a JSON object; the run in {path} continues if you delete the file")
    for key, kind in _RESULT_TYPES.items():
        value = result.setdefault(key, None)
        if not isinstance(value, kind) or isinstance(value, bool):
            wrong = f"{file}: {key} is {json.dumps(value)[:100]}, which is not a result"
            raise WorkdirError(f"{wrong}; the run in {path} continues if you delete the file")
    return result


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write result.json, which says how the run ended, into a run's folder."""
    write_text(path / "result.json", json.dumps(result, indent=2) + "\n")
