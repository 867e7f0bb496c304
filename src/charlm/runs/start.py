"""Start a run: check that its config can be trained on this machine, and that the folder is free or holds this run."""

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from charlm.config import to_json
from charlm.config.modules import import_modules
from charlm.config.rules import check, check_keys, resolve
from charlm.data.batching import Layout, make_layout
from charlm.data.corpus import Corpus
from charlm.data.documents import document_positions
from charlm.inference.prompt import make_prompt
from charlm.inference.scorer import min_text_length
from charlm.nn import cudnn
from charlm.parallel import processes
from charlm.runs import checkpoint, outcome, warm_start, workdir
from charlm.runs.devices import choose_devices, request_devices
from charlm.runs.flat_state import state_shapes
from charlm.runs.run_corpus import load_run_corpus
from charlm.runs.tracking import check_trackers
from charlm.system.errors import ConfigError, Exit, FolderLost, RunFailed, UserError, WorkdirError
from charlm.system.files import write_text
from charlm.system.progress import say

# The step counter is an int32.
_MAX_STEPS = (1 << 31) - 1


class Prepared(NamedTuple):
    """A config that can be trained on this machine, with its text, its layout and its number of steps.

    Attributes:
        source: what a new run starts from (`train.init_from`); None for a run that exists, and for random first parameters.
        text: the text that a new run keeps in its folder; None if `config.data` names it.
    """

    config: ConfigDict
    corpus: Corpus
    layout: Layout
    num_steps: int
    source: warm_start.Source | None = None
    text: str | None = None


def prepare(config: ConfigDict, path: Path | None = None, text: str | None = None, side_by_side: bool = False) -> Prepared:
    """Check a config, load its text and check that the config can be trained on it. Writes no workdir.

    Args:
        config: from `charlm.config.default_config()`.
        path: the folder of the run.
        text: the text of a run that keeps it in its folder.
        side_by_side: several runs train at once, each of them on one device.

    Raises:
        UserError: the config or the text does not allow it.
    """
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"the config is of type {type(config).__name__}; it must come from charlm.config.default_config()")
    config = copy.deepcopy(config)  # The caller may change its own later.
    check_keys(config, "the config")
    import_modules(config)
    check(config, "the config")
    with config.unlocked():
        resolve(config)
    config.lock()
    request_devices(config)
    if path is not None:
        choose_devices(config, path, side_by_side)
    exists = path is not None and (path / "config.json").exists()
    manifest = workdir.load_run(path).manifest if exists else None
    corpus = load_run_corpus(config, path, manifest, text)
    source = None if exists else warm_start.load_source(config, corpus.vocab)
    boundaries = None if corpus.boundary is None else document_positions(corpus.train, corpus.boundary)
    if boundaries is not None and len(boundaries) < 3:
        found = f"data.documents is {config.data.documents!r}, which leaves {max(len(boundaries) - 1, 0)} document(s)"
        raise ConfigError(f"{found} of {corpus.name} for training; it must be lines, or a separator that occurs in the text")
    layout = make_layout(config.batching, config.seed, len(corpus.train), boundaries)
    num_steps = _num_steps(config, layout)
    shortest = min_text_length(config.batching)
    if len(corpus.val) < shortest and config.train.patience is not None and config.train.best_by == "val":
        raise ConfigError(f"train.patience needs {shortest} characters to validate on; data.split leaves {len(corpus.val)}")
    make_prompt(config, corpus.vocab, corpus.train, config.seed)
    check_trackers(config)
    if config.model.recurrence == "cudnn" and not cudnn.is_available():
        device = jax.devices()[0].device_kind
        raise ConfigError(f"model.recurrence is 'cudnn', which needs an NVIDIA GPU; found {device}; auto chooses what works")
    return Prepared(config, corpus, layout, num_steps, source, text)


@contextlib.contextmanager
def open_run(path: Path, prepared: Prepared, extend: bool = False) -> Iterator[bool]:
    """Lock a folder and make it into this run, or check that it holds this run; yield whether there is anything left to do.

    Raises:
        UserError: the folder holds something else. Nothing was written.
        RunFailed: the run in the folder has diverged.
    """
    with workdir.lock(path):
        yield _create_or_check(path, prepared, extend)


def _create_or_check(path: Path, prepared: Prepared, extend: bool) -> bool:
    config, corpus, layout, num_steps, source, text = prepared
    if not (path / "config.json").exists():
        workdir.create_run(path, config, corpus, warm_start.start_record(config, source), text)
        return True
    run = workdir.load_run(path)
    workdir.check_same_run(run, config, corpus, extend)
    if num_steps < (before := _num_steps(run.config, layout)):
        raise ConfigError(f"{path} holds a run of {before} steps; {num_steps} are fewer, and --extend only lengthens")
    if extend and not _is_at_least(config.train.seconds, run.config.train.seconds):
        raise ConfigError(
            f"{path} holds a run of train.seconds {run.config.train.seconds}; {config.train.seconds} are fewer, and "
            "--extend only lengthens"
        )
    if result := workdir.read_result(path):
        if outcome.is_over(path, result, config, num_steps):
            checkpoints = checkpoint.Checkpoints(path, lambda: state_shapes(config, corpus.vocab.size))
            # A run that a limit on time or a scheduler has ended would not end at the same step again.
            if result["stopped_by"] not in (None, "train.patience") or not checkpoints.latest_is_damaged():
                return False
            say("its last checkpoint is damaged, so the steps since the one before it are trained again")
        (path / "result.json").unlink()
    write_text(path / "config.json", to_json(config))
    if changed := workdir.manifest_differences(run.manifest, workdir.make_manifest(corpus)):
        say(f"{path} was started elsewhere, so its bits may change: {', '.join(changed)}")
    return True


@contextlib.contextmanager
def record_failure(config: ConfigDict, path: Path) -> Iterator[None]:
    """Write into result.json that the run failed if an error ends it. Turn an error of the disk into RunFailed."""
    before = workdir.identity(path)
    try:
        yield
    except (UserError, Exit, FolderLost):
        raise
    except OSError as error:
        if lost := workdir.folder_lost(path, before):
            raise lost from None
        _mark_failed(path, config)
        reason = error.strerror or error
        raise RunFailed(f"cannot write to {path}: {reason}; the same command continues from the last checkpoint") from None
    except Exception:
        _mark_failed(path, config)
        raise


def _mark_failed(path: Path, config: ConfigDict) -> None:
    """Write result.json, unless it exists already or cannot be written."""
    with contextlib.suppress(OSError, WorkdirError):
        if processes.is_primary() and path.is_dir() and workdir.read_result(path) is None:
            steps = checkpoint.Checkpoints(path).steps()
            result = outcome.make_result("failed", steps[-1] if steps else 0, config, outcome.Progress())
            workdir.write_result(path, result)


def _num_steps(config: ConfigDict, layout: Layout) -> int:
    """Return the length of a run."""
    num_steps = config.train.steps or config.train.epochs * layout.steps_per_epoch
    if num_steps > _MAX_STEPS:
        raise ConfigError(f"train.epochs {config.train.epochs} are {num_steps:.3g} steps; at most {_MAX_STEPS} can be counted")
    return math.ceil(num_steps)


def _is_at_least(limit: float | None, other: float | None) -> bool:
    """Return whether a limit is at least another limit; None is no limit."""
    return limit is None or (other is not None and limit >= other)
