"""A run of a sweep on one node of a Ray cluster, as a trial of Ray Tune.

The trial starts a separate process that trains the run (`ray_worker`), and follows it through its metrics.jsonl. A run that is
restarted, after a failure or by the same command, continues from its own checkpoint.
"""

import contextlib
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray import tune

from charlm.config import to_json
from charlm.runs.tracking import read_metrics
from charlm.sweeps.overrides import Floats
from charlm.sweeps.plan import Plan, Run
from charlm.system.errors import RunFailed
from charlm.system.files import write_text
from charlm.system.machine import num_cores

# The result by which schedulers and the search compare trials: the lowest validation loss so far.
METRIC = "val_nats_per_char"
# Seconds between two readings of a run's metrics.
_POLL_SECONDS = 0.5


class Trial(tune.Trainable):
    """A trial of Tune that trains a run in a separate process and reads its progress from its folder."""

    def setup(self, config: dict[str, Any], plan: Plan, folder: Path, cwd: str, cpus: int) -> None:
        """Start the process of a run.

        Args:
            config: the config of the trial (`run_of_trial`).
            plan: the plan of the sweep.
            folder: the sweep's folder, an absolute path.
            cwd: the folder in which the command was started. Relative paths in a config start from it.
            cpus: the number of cores for the run.
        """
        self._plan, self._folder, self._cwd, self._cpus = plan, folder, cwd, cpus
        self._start(config)

    def _start(self, config: dict[str, Any]) -> None:
        run, self._process, self._open = run_of_trial(self._plan, config), None, contextlib.ExitStack()
        self._path, self._best, self._step, self._refused = self._folder / run.name, math.inf, 0, run.refused
        self._num_steps = run.config.train.steps  # None if `train.epochs` sets the length, which then depends on the text.
        if run.refused:  # A search suggested an invalid config. The file lets `Plan.runs_in` find the run and list its failure.
            self._path.mkdir(parents=True, exist_ok=True)
            write_text(self._path / "config.json", to_json(run.config))
            return
        cores = self._open.enter_context(_reserve_cores(self._cpus))
        logs = self._folder / "logs"
        logs.mkdir(exist_ok=True)
        log = self._open.enter_context(open(logs / f"{run.name}.txt", "a", encoding="utf-8"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "charlm.sweeps.ray_worker"],
            cwd=self._cwd if os.path.isdir(self._cwd) else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        request = {
            "config": to_json(run.config),
            "cell": run.config.model.cell,
            "workdir": str(self._path),
            "cores": sorted(cores),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another run in the same actor, because the start of an actor takes half of the start of a run."""
        self.cleanup()
        self._start(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation or for the end of the run; return the result for Tune.

        Returns:
            The metric, `step` and `done`. At the end also `over`, or the `reason` of a failure.

        Raises:
            RunFailed: the process was lost. Tune then restarts the trial.
        """
        if self._refused:
            return self._result(reason=self._refused)
        while True:
            code = self._process.poll()
            for line in read_metrics(self._path / "metrics.jsonl"):
                if line["split"] == "val" and line["step"] > self._step:
                    self._step, self._best = line["step"], min(self._best, line["nats_per_char"])
                    # The last evaluation is reported with the end of the run, because no scheduler may stop the run there.
                    if self._step != self._num_steps:
                        return self._result()
            if code == 0:
                return self._result(over=True)
            if code is not None:
                output = self._process.stdout.read().strip()
                if code < 0 or not output:
                    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                    raise RunFailed(f"the process of the run {how}")
                return self._result(reason=json.loads(output.splitlines()[-1])["reason"])
            time.sleep(_POLL_SECONDS)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Do nothing, because the run saves its own checkpoints."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing, because the run restores its own checkpoints."""

    def _result(self, **final: Any) -> dict[str, Any]:
        """Return a result for Tune. The trial is done if there are final values."""
        return {METRIC: self._best, "step": self._step, "done": bool(final), **final}

    def cleanup(self) -> None:
        """Stop the process after it has saved, unless it has ended already, and release its cores."""
        if self._process:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
        self._open.close()


def run_of_trial(plan: Plan, config: dict[str, Any]) -> Run:
    """Return the run of a trial.

    Args:
        plan: the plan of the sweep.
        config: the config of the trial: the overrides of a run of the plan, or the values that Optuna suggests.
    """
    if "overrides" in config:
        return plan.run(config["overrides"])
    drawn_from = plan.overrides.distributions
    return plan.run({k: drawn_from[k].round(v) if isinstance(drawn_from[k], Floats) else v for k, v in config.items()})


@contextlib.contextmanager
def _reserve_cores(count: int) -> Iterator[set[int]]:
    """Reserve cores of this machine, and yield them. No two runs share a core, unless there are too few cores.

    A run computes with all cores that it may use, and its bits depend on their number. Ray counts cores but binds no process to
    them.
    """
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(num_cores()))
    folder = Path(tempfile.gettempdir()) / f"charlm-cores-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    free: list[int] = []
    with contextlib.ExitStack() as stack:
        for core in usable:
            lock = stack.enter_context(open(folder / str(core), "a"))
            with contextlib.suppress(BlockingIOError):
                if len(free) < count:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    free.append(core)
        yield {*free, *[core for core in usable if core not in free][: count - len(free)]}
