"""Train a model.

    python -m charlm.train --config FILE [--workdir DIR] [--extend] [--config.KEY=VALUE ...]
        [--coordinator=auto | --coordinator=HOST:PORT --num_processes=N --process_id=I]

The same command on an unfinished run continues from its last checkpoint.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from charlm.config import cli


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder; default: runs/<config file's stem>", flag_values=values)
    flags.DEFINE_bool(
        "extend", False, "continue a finished run up to a larger train.steps, train.epochs or train.seconds", flag_values=values
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "for several processes: HOST:PORT of process 0, or auto in SLURM, Kubernetes, Open MPI and TPU pods",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "for several processes: their number, unless auto", flag_values=values)
    flags.DEFINE_integer("process_id", None, "for several processes: the index of this one, unless auto", flag_values=values)
    config = cli.parse_with_config(values, argv, __doc__)
    from charlm.parallel import processes
    from charlm.runs.loop import train

    stem = Path(values["config"].config_filename.split(":")[0]).stem
    with processes.initialized(values.coordinator, values.num_processes, values.process_id):
        train(config, values.workdir or f"runs/{stem}", values.extend)


if __name__ == "__main__":
    sys.exit(cli.run(main))
