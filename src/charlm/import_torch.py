"""Import a model from PyTorch into a workdir.

    python -m charlm.import_torch --state_dict FILE.safetensors|FILE.pt --vocab FILE --workdir DIR
        [--embedding NAME] [--head NAME]

The model is an embedding or one-hot vectors, one nn.RNN (tanh), nn.LSTM or nn.GRU of any depth, and a linear head. Nothing in
a file is executed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from charlm.config import cli
from charlm.system.progress import say


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = flags.FlagValues()
    flags.DEFINE_string("state_dict", None, "the state dict: .safetensors, .pt, .pth or .bin", flag_values=values)
    flags.DEFINE_string("vocab", None, "JSON: a list of characters, or an object of characters and ids", flag_values=values)
    flags.DEFINE_string("workdir", None, "the new workdir", flag_values=values)
    flags.DEFINE_string("embedding", None, "the name of the embedding's module, if it is not recognised", flag_values=values)
    flags.DEFINE_string("head", None, "the name of the head's module, if it is not recognised", flag_values=values)
    cli.parse(values, argv, __doc__)
    from charlm.exchange.import_torch import import_torch

    state_dict, vocab, path = (Path(cli.required(values, name)) for name in ("state_dict", "vocab", "workdir"))
    model = import_torch(state_dict, vocab, values.embedding, values.head, say)
    model.save(path, {"from": str(state_dict)})
    say(f"charlm: {model!r} is in {path}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
