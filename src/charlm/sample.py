"""Sample text from a trained model.

    python -m charlm.sample --workdir DIR [--prompt TEXT] [--length N] [--num_samples N] [--temperature X] [--top_k K]
        [--top_p P] [--greedy] [--seed S] [--dtype float32|bfloat16] [--checkpoint best|latest|STEP]

The text goes to stdout as it is drawn. Everything else goes to stderr.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import flags

from charlm.config import cli
from charlm.config.rules import LARGEST_SEED, check
from charlm.data.vocab import Vocab
from charlm.runs.trained_model import load_model
from charlm.runs.workdir import load_run
from charlm.system.errors import ConfigError
from charlm.system.progress import say
from charlm.system.streams import write_output


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = _define_flags()
    cli.parse(values, argv, __doc__)
    run = load_run(cli.required(values, "workdir"))
    config = copy.deepcopy(run.config)
    for name in config.sample:
        if getattr(values, name) is not None:
            config.sample[name] = getattr(values, name)
    check(config, "the flags")
    if not 0 <= values.seed <= LARGEST_SEED:
        raise ConfigError(f"--seed is {values.seed}; it must lie between 0 and {LARGEST_SEED}")
    trained = load_model(run, values.checkpoint)
    prompt, pieces = trained.sample(config.sample, values.seed)
    say(f"charlm: {run.path}, checkpoint of step {trained.step}, seed {values.seed}")
    sys.stdout.reconfigure(encoding="utf-8")
    write_samples(pieces, run.vocab, config.sample.num_samples, prompt, write_output)


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    flags.DEFINE_string("prompt", None, "the text to continue", flag_values=values)
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
    flags.DEFINE_string("dtype", None, "dtype of the weights: float32 or bfloat16", flag_values=values)
    flags.DEFINE_integer("seed", 0, "the seed; another seed draws another text", flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step", flag_values=values)
    return values


def write_samples(
    pieces: Iterator[np.ndarray], vocab: Vocab, num_samples: int, prompt: str, write: Callable[[str], None]
) -> None:
    """Write the first sample as it is drawn, then the other samples. A line end follows each sample."""
    decoders = [vocab.decoder() for _ in range(num_samples)]
    later = [[prompt] for _ in range(num_samples)]
    write(prompt)
    for piece in pieces:
        for n, ids in enumerate(piece):
            text = decoders[n](ids)
            if n:
                later[n].append(text)
            else:
                write(text)
    write("\n")
    for texts in later[1:]:
        write("".join(texts) + "\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
