"""Load a trained model from a workdir."""

from pathlib import Path

from charlm.nn.model import CharLM
from charlm.runs.checkpoint import Checkpoints
from charlm.runs.flat_state import eval_params, state_shapes
from charlm.runs.language_model import LanguageModel
from charlm.runs.memory import check_memory
from charlm.runs.workdir import load_run
from charlm.system.progress import say


def load_model(path: str | Path, checkpoint: str | int = "best", name: str = "--workdir") -> LanguageModel:
    """Load a trained model from a workdir. No code from the folder is executed.

    Args:
        path: the run's folder.
        checkpoint: `best`, `latest` or a step.
        name: the flag or the key that names the folder, for messages.

    Raises:
        WorkdirError: the folder is not a run, there is no such checkpoint, or it is damaged.
        ConfigError: config.json breaks a rule, or the model does not fit into memory.
    """
    run = load_run(path, name)
    check_memory(run.config, run.vocab.size, training=False)
    checkpoints = Checkpoints(run.path, lambda: state_shapes(run.config, run.vocab.size))
    flat, meta = checkpoints.find(str(checkpoint), say)
    params = eval_params(flat, CharLM.from_config(run.config.model, run.vocab.size))
    return LanguageModel(run.config, run.vocab, params, meta["step"], run.path, run.manifest)
