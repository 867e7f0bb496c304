"""The training command, which kills itself (SIGKILL) at a place that is given.

    python experiments/faults/victim.py PHASE NUMBER DELAY [flags of charlm.train ...]

It dies DELAY seconds after it enters a phase for the NUMBER-th time. The phases: `begin` (the workdir is made), `steps` (a
dispatch), `evaluation`, `sample`, `save` (which goes on in the background), `end` (the result is about to be written).
"""

import os
import signal
import sys
import threading
from collections.abc import Callable

from charlm import train
from charlm.config import cli
from charlm.runs import checkpoint, host, loop, workdir

PHASES = ("begin", "steps", "evaluation", "sample", "save", "end")


def die_in(phase: str, number: int, delay: float) -> None:
    """Lay the trap."""
    entered = 0

    def trapped(work: Callable) -> Callable:
        def entering(*args, **kwargs):
            nonlocal entered
            entered += 1
            if entered == number:
                timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()
            return work(*args, **kwargs)

        return entering

    def making(make: Callable) -> Callable:
        return lambda *args: trapped(make(*args))

    if phase == "begin":
        workdir.create_run = trapped(workdir.create_run)
    elif phase == "steps":
        loop.compile_train_chunk = making(loop.compile_train_chunk)
    elif phase == "evaluation":
        loop.make_scorer = making(loop.make_scorer)
    elif phase == "sample":
        host.sample_text = trapped(host.sample_text)
    elif phase == "save":
        checkpoint.Checkpoints.save = trapped(checkpoint.Checkpoints.save)
    elif phase == "end":
        workdir.write_result = trapped(workdir.write_result)
    else:
        raise SystemExit(f"no phase {phase}; there are {', '.join(PHASES)}")


if __name__ == "__main__":
    die_in(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    sys.exit(cli.run(train.main, sys.argv[4:]))
