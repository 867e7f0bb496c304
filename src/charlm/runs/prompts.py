"""One sample for each of many prompts."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from charlm.inference.decoding import SampleDecoder
from charlm.inference.rows import Row, RowBatch, fetch_pieces
from charlm.runs.sample_options import Start, with_sample_options
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
    model: "LanguageModel",
    prompts: Sequence[str],
    named: Mapping[str, Any],
    seed: int,
    stop: str | None = None,
    at_once: int = 1,
) -> list[tuple[str, Iterator[list[str]]]]:
    """Return (prompt, iterator over the new text) for each prompt, as `LanguageModel.draw` does for one sample.

    All prompts are checked before anything is drawn. The sample of the i-th prompt has the random key of the i-th of several
    samples of one prompt, so it does not depend on the other prompts.

    By default the prompts are drawn one after another, because a product with the states of several texts is rounded in another
    way than a product with one state. Drawn together, a text is the same unless rounding decides between two symbols.

    Args:
        model: the model.
        prompts: the texts to continue.
        named: values for the other keys of `config.sample`.
        seed: the seed.
        stop: the string that ends a sample.
        at_once: the most prompts that are drawn together. The iterators must then be used in the order of the prompts.

    Raises:
        ConfigError: an argument is out of range, or a prompt is empty or has a symbol outside the vocabulary.
    """
    for name in ("num_samples", "random_prompt"):
        if named.get(name) is not None:
            raise ConfigError(f"{name} is {named[name]!r}, but each of several prompts has one sample; leave it out")
    if at_once < 1:
        raise ConfigError(f"prompts_at_once is {at_once}; it must be at least 1")
    at_once = min(at_once, len(prompts))
    starts = []
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {i + 1} of {len(prompts)} is empty; it must be text")
        try:
            starts.append(model.start({**named, "prompt": prompt, "num_samples": 1}, seed, stop, first=i))
        except ConfigError as error:
            raise ConfigError(f"prompt {i + 1} of {len(prompts)}: {error}") from None
    if at_once <= 1:
        return [(start.prompt, model.draw_from(start)) for start in starts]
    together = {**named, "prompt": prompts[0], "num_samples": at_once}
    with_sample_options(model.config, together, seed, stop, model.vocab.size)  # Checks the memory.
    return [(start.prompt, pieces) for start, pieces in zip(starts, _draw_together(model, starts, at_once))]


def _draw_together(model: "LanguageModel", starts: Sequence[Start], at_once: int) -> list[Iterator[list[str]]]:
    """Return an iterator over the new text for each prompt. Up to `at_once` prompts share a batch.

    When a text is complete, the next prompt takes its row, so short texts do not wait for long ones.
    """
    batch = RowBatch(starts[0].sampler, model.params, model.vocab.size, [at_once])
    key_data = (np.asarray(jax.random.key_data(start.keys_N))[0] for start in starts)
    rows = [Row(each.ids, each.length, len(each.ids), key, each.settings, False) for each, key in zip(starts, key_data)]
    decoders = [SampleDecoder(model.vocab, start.stops) for start in starts]
    drawn: list[list[str]] = [[] for _ in starts]
    waiting, active = collections.deque(range(len(starts))), []

    def draw_block() -> None:
        active[:] = [i for i in active if not rows[i].done]
        while waiting and len(active) < at_once:
            active.append(waiting.popleft())
        for i, piece in zip(active, fetch_pieces(batch.dispatch([rows[i] for i in active]))):
            if piece is not None:
                drawn[i].append(decoders[i].feed(piece.ids) + (decoders[i].flush() if piece.last else ""))
                rows[i].closed = decoders[i].stopped

    def pieces_of(i: int) -> Iterator[list[str]]:
        while drawn[i] or not rows[i].done:
            while not drawn[i]:
                draw_block()
            text = "".join(drawn[i])
            drawn[i].clear()
            yield [text]

    return [pieces_of(i) for i in range(len(starts))]
