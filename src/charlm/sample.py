"""Sample text from a trained model.

    python -m charlm.sample --workdir DIR [--prompt TEXT | --prompt_file FILE] [--prompts_at_once N]
        [--length N] [--num_samples N] [--temperature X] [--top_k K] [--top_p P] [--greedy] [--stop TEXT] [--seed S]
        [--dtype float32|bfloat16] [--checkpoint best|latest|STEP] [--novelty] [--json]

The text goes to stdout as it is drawn. Everything else goes to stderr. For a run with `data.documents` each sample is a
document. With `--novelty` the samples are compared with the training text.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from charlm.config import cli, default_config
from charlm.system.errors import ConfigError
from charlm.system.modules import import_module
from charlm.system.progress import say
from charlm.system.streams import write_output


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = _define_flags()
    cli.parse(values, argv, __doc__)
    from charlm.exchange.folder import load
    from charlm.runs.prompts import draw_each, read_prompts

    import_module(values.corpus_module, "corpus")
    model = load(cli.required(values, "workdir"), values.checkpoint, values.cell_module)
    corpus = model.corpus() if values.novelty else None
    named = {name: getattr(values, name) for name in default_config().sample}
    if values.prompt_file is None:
        if values.prompts_at_once != 1:
            raise ConfigError("--prompts_at_once needs --prompt_file")
        drawn = [model.draw(named, values.seed, values.stop)]
    elif values.prompt is not None:
        raise ConfigError("--prompt and --prompt_file exclude each other; give one of them")
    else:
        prompts = read_prompts(Path(values.prompt_file))
        drawn = draw_each(model, prompts, named, values.seed, values.stop, values.prompts_at_once)
    say(f"charlm: {model.path}, checkpoint of step {model.num_steps}, seed {values.seed}")
    sys.stdout.reconfigure(encoding="utf-8")
    write = (lambda text: None) if values.json else write_output
    samples = [(prompt, text) for prompt, pieces in drawn for text in write_samples(pieces, prompt, write)]
    length = values.length or model.config.sample.length
    was_cut = None
    if model.boundary is not None:
        was_cut = [len(model.vocab.encode(text)) >= length for _, text in samples]
        if cut := sum(was_cut):
            say(f"{cut} of {len(samples)} samples were cut at --length {length}, before the end of a document")
        samples = [("", prompt + text) for prompt, text in samples]  # The prompt is a part of the document.
    texts = [text for _, text in samples]
    found: dict[str, Any] = {"samples": [{"text": text} for text in texts]}
    if corpus is not None:
        from charlm.inference.novelty import describe_novelty

        found = describe_novelty(texts, model.vocab, corpus.train, model.boundary, was_cut)
        if not values.json:
            _say_novelty(found)
    if values.json:
        each = [{"prompt": prompt, **sample} for (prompt, _), sample in zip(samples, found["samples"])]
        write_output(json.dumps({**found, "samples": each}) + "\n")


def _say_novelty(found: Mapping[str, Any]) -> None:
    """Write on stderr what `describe_novelty` returns."""
    samples = found["samples"]
    for number, each in enumerate(samples, 1):
        known = "in the training text" if each["in_training_text"] else "new"
        say(f"sample {number}: {known}; its longest copy has {each['longest_copy']} characters: {each['copy']!r}")
    say(f"{found['new']:.1%} of {len(samples)} samples are new: they are not in the training text")


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    flags.DEFINE_string("prompt", None, "the text to continue", flag_values=values)
    flags.DEFINE_string("prompt_file", None, "a UTF-8 file of prompts, one a line; each has one sample", flag_values=values)
    flags.DEFINE_integer("prompts_at_once", 1, "draw up to N prompts of --prompt_file together", flag_values=values)
    flags.DEFINE_integer("random_prompt", None, "without --prompt: take N symbols of the training text", flag_values=values)
    flags.DEFINE_integer(
        "window", None, "read the last N symbols again for each symbol that is drawn; 0: carry the state", flag_values=values
    )
    flags.DEFINE_integer("length", None, "number of characters to draw (bytes for the byte vocabulary)", flag_values=values)
    flags.DEFINE_integer("num_samples", None, "number of samples, drawn at the same time", flag_values=values)
    flags.DEFINE_float("temperature", None, "below 1: more probable text; above 1: more varied text", flag_values=values)
    flags.DEFINE_integer("top_k", None, "draw from the k most probable symbols", flag_values=values)
    flags.DEFINE_float(
        "top_p", None, "draw from the most probable symbols whose probabilities reach p together", flag_values=values
    )
    flags.DEFINE_bool("greedy", None, "take the most probable symbol", flag_values=values)
    flags.DEFINE_string("stop", None, "end a sample before this text", flag_values=values)
    flags.DEFINE_bool("novelty", False, "say what each sample has in common with the training text", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
    flags.DEFINE_string("dtype", None, "dtype of the weights: float32 or bfloat16", flag_values=values)
    flags.DEFINE_integer("seed", 0, "the seed; another seed draws another text", flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step", flag_values=values)
    cli.define_cell_module(values)
    cli.define_corpus_module(values)
    return values


def write_samples(pieces: Iterator[list[str]], prompt: str, write: Callable[[str], None]) -> list[str]:
    """Write the first sample as it is drawn, then the other samples, and return them. A line end follows each sample.

    Args:
        pieces: the new text of each sample.
        prompt: the text that each sample continues.
        write: called with each piece of the output.
    """
    drawn: list[list[str]] = []
    write(prompt)
    for texts in pieces:
        write(texts[0])
        drawn.append(texts)
    write("\n")
    samples = ["".join(parts) for parts in zip(*drawn)]
    for text in samples[1:]:
        write(prompt + text + "\n")
    return samples


if __name__ == "__main__":
    sys.exit(cli.run(main))
