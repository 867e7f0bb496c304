"""Run the training command, and kill it with SIGKILL at a given place.

    python experiments/faults/victim.py PHASE NUMBER DELAY [flags of charlm.train ...]

The process dies DELAY seconds after it enters PHASE for the NUMBER-th time. The phases are:

- begin: the workdir is created;
- steps: training steps are dispatched;
- evaluation: a text is scored;
- sample: a sample is drawn;
- save: a checkpoint is saved, which continues in the background;
- end: the result is about to be written.
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


def set_trap(phase: str, number: int, delay: float) -> None:
    """Replace the function of a phase with one that kills the process `delay` seconds after its call number `number`."""
    entered = 0

    def with_trap(work: Callable) -> Callable:
        def work_with_trap(*args, **kwargs):
            nonlocal entered
            entered += 1
            if entered == number:
                timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()
            return work(*args, **kwargs)

        return work_with_trap

    def with_trap_in_result(make: Callable) -> Callable:
        return lambda *args: with_trap(make(*args))

    if phase == "begin":
        workdir.create_run = with_trap(workdir.create_run)
    elif phase == "steps":
        loop.compile_train_chunk = with_trap_in_result(loop.compile_train_chunk)
    elif phase == "evaluation":
        loop.make_scorer = with_trap_in_result(loop.make_scorer)
    elif phase == "sample":
        host.sample_text = with_trap(host.sample_text)
    elif phase == "save":
        checkpoint.Checkpoints.save = with_trap(checkpoint.Checkpoints.save)
    elif phase == "end":
        workdir.write_result = with_trap(workdir.write_result)
    else:
        raise SystemExit(f"unknown phase {phase}; the phases are {', '.join(PHASES)}")


if __name__ == "__main__":
    set_trap(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    sys.exit(cli.run(train.main, sys.argv[4:]))
