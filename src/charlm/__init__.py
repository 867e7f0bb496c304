"""Character-level recurrent language models in JAX: train, resume, score, sample and sweep.

    import charlm

    model = charlm.load("runs/quickstart")
    print(model.sample("HAMLET:", length=300, temperature=0.8, seed=1))

`python -m charlm` lists the commands. This module imports nothing until a name is used, so `import charlm` takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charlm.config import default_config
    from charlm.exchange.folder import load
    from charlm.inference.text_score import ScoreDifference, TextScore
    from charlm.runs.fit import fit
    from charlm.runs.language_model import LanguageModel
    from charlm.serving.page import write_page

__all__ = ["LanguageModel", "ScoreDifference", "TextScore", "default_config", "fit", "load", "write_page"]

# Name -> the module that defines it.
_MODULES = {
    "LanguageModel": "charlm.runs.language_model",
    "ScoreDifference": "charlm.inference.text_score",
    "TextScore": "charlm.inference.text_score",
    "default_config": "charlm.config",
    "fit": "charlm.runs.fit",
    "load": "charlm.exchange.folder",
    "write_page": "charlm.serving.page",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'charlm' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
