"""The rules for a text of separate documents (`data.documents`), and the keys that it determines."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ml_collections import ConfigDict

from charlm.config.defaults import default_config
from charlm.data.sources import counts_symbols

# Keys that have no meaning for documents: their values that are allowed besides the default, and why.
_WITHOUT_MEANING = {
    "data.separator": ("\n", "a file ends its last document, so no text is put between two files: leave it at its default"),
    "batching.reset_prob": (0, "the state is reset at every boundary and nowhere else: leave it at its default, or set 0"),
    "eval.context": (0, "each document is scored from the initial state: leave it at its default, or set 0"),
    "sample.random_prompt": (None, "a place in the text may lie between two documents: set sample.prompt"),
    "sample.window": (0, "the state of a document is carried from its beginning"),
}


def check_documents(values: Mapping[str, Any], refuse: Callable[[str, str], NoReturn]) -> None:
    """Check the keys that `data.documents` concerns. `refuse` is called with a key and what would work, and raises."""
    if not values["data.documents"]:
        return
    if any("\ud800" <= char <= "\udfff" for char in values["data.documents"]):
        refuse("data.documents", "it must be lines, or a separator in UTF-8")
    if values["batching.layout"] != "stream":
        refuse("batching.layout", "with data.documents it must be stream")
    if values["data.split"] is not None and counts_symbols(values["data.split"]):
        refuse("data.split", "with data.documents it must be three fractions, because documents are not cut")
    if values["model.recurrence"] == "cudnn":
        refuse("model.recurrence", "with data.documents it must be scan or auto: cuDNN has no resets in a window")
    defaults = default_config()
    for key, (also, why) in _WITHOUT_MEANING.items():
        group, name = key.split(".")
        if values[key] not in (defaults[group][name], also):
            refuse(key, f"it has no meaning with data.documents: {why}")


def resolve_documents(config: ConfigDict) -> None:
    """Set the keys that `data.documents` determines."""
    if config.data.documents:
        config.model.recurrence, config.batching.reset_prob, config.eval.context = "scan", 0.0, 0
