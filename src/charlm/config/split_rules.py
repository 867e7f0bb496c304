"""The rules for the keys that say which text is for training, validation and test."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from charlm.data.sources import counts_symbols


def check_split(values: Mapping[str, Any], refuse: Callable[[str, str], NoReturn]) -> None:
    """Check `data.split`, `data.val_path` and `data.test_path`.

    Args:
        values: dotted key -> value.
        refuse: (key, what would work) raises the ConfigError.
    """
    split = values["data.split"]
    has_files = values["data.path"] is not None or values["data.url"] is not None
    if values["data.path"] is not None and ":" in values["data.corpus"]:
        refuse("data.path", f"data.corpus is {values['data.corpus']!r}; set only one of the two keys")
    for key in ("data.val_path", "data.test_path"):
        if values[key] is not None and not has_files:
            refuse(key, "it belongs to data.path or data.url, and neither is set")
    if split is None:
        return
    if not _is_split(split):
        refuse(
            "data.split", "it must be three fractions (train, val, test) that sum to 1, or three integers, with train above 0"
        )
    if values["data.val_path"] is not None:
        refuse("data.split", "with data.val_path the text is not split, so data.split must be unset")
    if values["data.test_path"] is not None and split[2]:
        refuse("data.split", "data.test_path is the test text, so the third part must be 0")
    if values["data.lowercase"] and values["data.vocab"] == "bytes" and counts_symbols(split):
        refuse("data.split", "numbers of bytes are those of the file, so data.lowercase must be False")


def _is_split(split: list[Any]) -> bool:
    """Return whether a value is a split: three fractions, or three numbers of symbols."""
    if len(split) != 3 or any(isinstance(part, bool) or not isinstance(part, int | float) or part < 0 for part in split):
        return False
    return bool(split[0]) and (counts_symbols(split) or abs(sum(split) - 1) <= 1e-6)
