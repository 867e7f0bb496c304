"""Write one page about a run or a sweep. The page needs no server and no network.

    python -m charlm.report --workdir DIR

The page of a sweep, DIR/report.html, has a table of its runs to sort and filter, their curves, the loss against each swept key,
samples of the best runs, and the commands that reproduce the selected runs. The page of a run has its curves, its result, its
samples, its config and its manifest.
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
    flags.DEFINE_string("workdir", None, "the folder of a run or of a sweep", flag_values=values)
    cli.define_cell_module(values)
    cli.parse(values, argv, __doc__)
    from charlm.sweeps.page import write_page

    import_module(values.cell_module, "cell")
    say(f"{write_page(Path(cli.required(values, 'workdir')))}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
