"""One sample for each of many prompts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charlm.system.errors import ConfigError
from charlm.system.files import read_text

if TYPE_CHECKING:
    from charlm.runs.language_model import LanguageModel


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a UTF-8 file, one a line.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    text = read_text(path, ConfigError).removeprefix("\ufeff").replace("\r\n", "\n")
    if not text:
        raise ConfigError(f"the file of prompts {path} is empty; it must hold one prompt a line")
    return text.removesuffix("\n").split("\n")


def draw_each(
    model: "LanguageModel", prompts: Sequence[str], named: Mapping[str, Any], seed: int, stop: str | None = None
) -> list[tuple[str, Iterator[list[str]]]]:
    """Return (prompt, iterator over the new text) for each prompt, as `LanguageModel.draw` does for one sample.

    All prompts are checked before anything is drawn. The sample of the i-th prompt has the random key of the i-th of several
    samples of one prompt, so it does not depend on the other prompts.

    Args:
        model: the model.
        prompts: the texts to continue.
        named: values for the other keys of `config.sample`.
        seed: the seed.
        stop: the string that ends a sample.

    Raises:
        ConfigError: an argument is out of range, or a prompt is empty or has a symbol outside the vocabulary.
    """
    for name in ("num_samples", "random_prompt"):
        if named.get(name) is not None:
            raise ConfigError(f"{name} is {named[name]!r}, but each of several prompts has one sample; leave it out")
    drawn = []
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {i + 1} of {len(prompts)} is empty; it must be text")
        try:
            drawn.append(model.draw({**named, "prompt": prompt, "num_samples": 1}, seed, stop, first=i))
        except ConfigError as error:
            raise ConfigError(f"prompt {i + 1} of {len(prompts)}: {error}") from None
    return drawn


def sample_each(
    model: "LanguageModel", prompts: Sequence[str], named: Mapping[str, Any], seed: int, stop: str | None = None
) -> list[str]:
    """Return the text that continues each prompt, without the prompt. See `draw_each`."""
    return ["".join(text for (text,) in pieces) for _, pieces in draw_each(model, prompts, named, seed, stop)]
