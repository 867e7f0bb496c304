"""Write one page that holds a model: it writes, reads, and shows what each unit does. It needs no server and no network.

    python -m charlm.explore --workdir DIR [--text FILE] [--length N] [--output page.html] [--dtype float32|float16]
        [--checkpoint best|latest|STEP]

The page is one HTML file to open or to mail. It contains the weights, computes the model in the browser, and shows the
activations of a text: of --text, or of the beginning of the run's validation text. With the same seed it writes the text of
`python -m charlm.sample`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from charlm.config import cli
from charlm.system.modules import import_module
from charlm.system.progress import say


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    flags.DEFINE_string("text", None, "a UTF-8 text file to show; otherwise the run's validation text", flag_values=values)
    flags.DEFINE_integer(
        "length", 2000, "the number of characters of the text to show", lower_bound=2, upper_bound=100_000, flag_values=values
    )
    flags.DEFINE_string("output", None, "the page; otherwise explore.html in the run's folder", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "the dtype of the weights in the page", flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step", flag_values=values)
    cli.define_cell_module(values)
    cli.define_corpus_module(values)
    cli.parse(values, argv, __doc__)
    from charlm.exchange.folder import load
    from charlm.serving.page import write_page

    import_module(values.corpus_module, "corpus")
    workdir = Path(cli.required(values, "workdir"))
    output = Path(values.output) if values.output else workdir / "explore.html"
    model = load(workdir, values.checkpoint, values.cell_module)
    write_page(model, output, values.text, values.length, values.dtype)
    say(f"{output}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
