"""Export a model for other programs: safetensors, PyTorch, ONNX or StableHLO.

    python -m charlm.export --workdir DIR --format safetensors|torch|onnx|stablehlo --output PATH
        [--checkpoint best|latest|STEP] [--batch B] [--window T]

`safetensors` writes a folder, which `charlm.load` reads too. The other formats write one file.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from charlm.config import cli
from charlm.exchange.formats import FORMATS, export_model
from charlm.system.errors import ConfigError
from charlm.system.progress import say


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    flags.DEFINE_string("format", None, ", ".join(FORMATS), flag_values=values)
    flags.DEFINE_string("output", None, "the new folder of safetensors, or the new file", flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step", flag_values=values)
    cli.define_cell_module(values)
    flags.DEFINE_integer(
        "batch", 1, "for stablehlo: the number of texts at a time", flag_values=values, lower_bound=1, upper_bound=1 << 16
    )
    flags.DEFINE_integer(
        "window",
        64,
        "for stablehlo: the symbols of a call of the scorer",
        flag_values=values,
        lower_bound=1,
        upper_bound=1 << 16,
    )
    cli.parse(values, argv, __doc__)
    format, output = cli.required(values, "format"), Path(cli.required(values, "output"))
    if format not in FORMATS:
        raise ConfigError(f"--format is {format!r}; it must be one of {', '.join(FORMATS)}")
    for name in ("batch", "window"):
        if values[name].present and format != "stablehlo":
            raise ConfigError(f"--{name} is for --format stablehlo; {format} takes any batch and length")
    from charlm.exchange.folder import load

    model = load(cli.required(values, "workdir"), values.checkpoint, values.cell_module)
    export_model(model, format, output, values.batch, values.window)
    say(f"charlm: {model!r} is in {output}")
    if model.boundary is not None and format in ("torch", "onnx"):
        say(f"{output} has no resets: start each document from a state of zeros, with symbol {model.boundary}, the boundary")


if __name__ == "__main__":
    sys.exit(cli.run(main))
