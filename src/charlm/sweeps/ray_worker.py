"""One run of a sweep, in a process of its own: what a worker of a cluster starts (`charlm.cluster`).

It reads a line of JSON from its stdin: the config, the workdir, the cores that it may use. When its stdin comes to its end,
because whoever started it has closed it or is no more, the run is saved and stopped as by SIGTERM. If the run fails, the
reason is the last line on stdout, as JSON.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ml_collections import config_dict

from charlm.config import cli
from charlm.config.rules import from_json
from charlm.runs.loop import train
from charlm.runs.outcome import failure_reason
from charlm.system.errors import ConfigError, Exit, FolderInUse
from charlm.system.machine import request_determinism


def main(argv: Sequence[str]) -> None:
    """Train the run that stdin tells of. Raises Exit(1) if it fails."""
    if argv:
        raise ConfigError(f"stray argument {argv[0]!r}; what is to be trained is read from stdin")
    order = json.loads(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, order["cores"])
    config = from_json(order["config"], "stdin")
    if config.train.deterministic:
        request_determinism()
    threading.Thread(target=_stop_at_the_end_of_stdin, daemon=True).start()
    if reason := failure_reason(lambda: _train_when_free(config.lock(), Path(order["workdir"]))):
        print(json.dumps({"reason": reason}))
        raise Exit(1)


def _stop_at_the_end_of_stdin() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _train_when_free(config: config_dict.ConfigDict, workdir: Path) -> None:
    """Train, once a process of an earlier start, which may still be saving, has left the folder."""
    while True:
        try:
            return train(config, workdir)
        except FolderInUse:
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(cli.run(main))
