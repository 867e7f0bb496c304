"""Train one run of a sweep in a separate process. A Ray trial starts this module (`ray_trial`).

The process reads one line of JSON from stdin, with the config, the workdir and the cores that it may use. When stdin ends,
because the parent process closed it or has died, the run is saved and stopped as by SIGTERM. If the run fails, the process
prints the reason to stdout, as JSON, in its last line.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from charlm.config import cli
from charlm.config.rules import from_json
from charlm.runs.loop import train
from charlm.runs.outcome import failure_reason
from charlm.system.errors import ConfigError, Exit, WorkdirInUse
from charlm.system.machine import request_determinism
from charlm.system.modules import import_module_of


def main(argv: Sequence[str]) -> None:
    """Train the run that stdin describes. Raises Exit(1) if it fails."""
    if argv:
        raise ConfigError(f"stray argument {argv[0]!r}; the run to train is read from stdin")
    order = json.loads(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, order["cores"])
    import_module_of(order["cell"], "cell")
    config = from_json(order["config"], "stdin")
    if config.train.deterministic:
        request_determinism()
    threading.Thread(target=_stop_at_end_of_stdin, daemon=True).start()
    if reason := failure_reason(lambda: _train_when_free(config.lock(), Path(order["workdir"]))):
        print(json.dumps({"reason": reason}))
        raise Exit(1)


def _stop_at_end_of_stdin() -> None:
    """Wait for the end of stdin, then send SIGTERM to this process."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _train_when_free(config: ConfigDict, workdir: Path) -> None:
    """Train as soon as the folder is not locked. A process of an earlier start may still be saving there."""
    while True:
        try:
            return train(config, workdir)
        except WorkdirInUse:
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(cli.run(main))
