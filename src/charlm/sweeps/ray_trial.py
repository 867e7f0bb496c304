"""A run of a sweep on one node of a Ray cluster: what Ray Tune starts there, in place of training itself.

The run is a process of its own (`charlm.worker`), watched through its metrics.jsonl. Begun again, after a failure or by the
same command, it goes on from its own checkpoint.
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
from charlm.runs.workdir import write_text
from charlm.sweeps.overrides import Floats
from charlm.sweeps.plan import Plan, Run
from charlm.system.errors import RunFailed
from charlm.system.machine import num_cores

# The lowest validation loss so far, which schedulers and the search go by.
METRIC = "val_nats_per_char"
# Seconds between two looks at a run's metrics.
_POLL = 0.5


class Trial(tune.Trainable):
    """A run, as Tune sees it: a process that is watched through what it leaves on disk."""

    def setup(self, config: dict[str, Any], plan: Plan, folder: Path, cwd: str, cpus: int) -> None:
        """Start it. `cwd` is where the command was called, from which paths in a config count."""
        self._plan, self._folder, self._cwd, self._cpus = plan, folder, cwd, cpus
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        run, self._process, self._open = run_of(self._plan, config), None, contextlib.ExitStack()
        self._path, self._best, self._step, self._refused = self._folder / run.name, math.inf, 0, run.refused
        if run.refused:  # A search suggested what breaks a rule; the table shows it by its config.
            self._path.mkdir(parents=True, exist_ok=True)
            write_text(self._path / "config.json", to_json(run.config))
            return
        cores = self._open.enter_context(_cores(self._cpus))
        logs = self._folder / "logs"
        logs.mkdir(exist_ok=True)
        log = self._open.enter_context(open(logs / f"{run.name}.txt", "a", encoding="utf-8"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "charlm.worker"],
            cwd=self._cwd if os.path.isdir(self._cwd) else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        order = {"config": to_json(run.config), "workdir": str(self._path), "cores": sorted(cores)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another run: of the seconds that a run takes to begin half are those of a new actor of Ray."""
        self.cleanup()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next validation, or for the end."""
        if self._refused:
            return self._found(reason=self._refused)
        while True:
            code = self._process.poll()
            for line in read_metrics(self._path / "metrics.jsonl"):
                if line["split"] == "val" and line["step"] > self._step:
                    self._step, self._best = line["step"], min(self._best, line["nats_per_char"])
                    return self._found()
            if code == 0:
                return self._found(over=True)
            if code is not None:
                said = self._process.stdout.read().strip()
                if code < 0 or not said:
                    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                    raise RunFailed(f"the process of the run {how}")
                return self._found(reason=json.loads(said.splitlines()[-1])["reason"])
            time.sleep(_POLL)

    def save_checkpoint(self, checkpoint_dir: str) -> dict:
        """Nothing: the run keeps checkpoints of its own."""
        return {}

    def load_checkpoint(self, checkpoint: dict | None) -> None:
        """The run finds its checkpoints itself."""

    def _found(self, **more: Any) -> dict[str, Any]:
        return {METRIC: self._best, "step": self._step, "done": bool(more), **more}

    def cleanup(self) -> None:
        """Have the process save and end, if it has not ended yet, and let its cores go."""
        if self._process:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
        self._open.close()


def run_of(plan: Plan, config: dict[str, Any]) -> Run:
    """The run of a trial: an entry of the grid, or what Optuna suggests."""
    if "overrides" in config:
        return plan.run(config["overrides"])
    draws = plan.overrides.draws
    return plan.run({k: draws[k].rounded(v) if isinstance(draws[k], Floats) else v for k, v in config.items()})


@contextlib.contextmanager
def _cores(wanted: int) -> Iterator[set[int]]:
    """So many cores of this machine, such as no other run of a sweep has, as far as there are.

    A run computes with as many cores as it may use, and its bits depend on their number. Ray counts cores and binds nobody to
    them.
    """
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(num_cores()))
    folder = Path(tempfile.gettempdir()) / f"charlm-cores-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    free: list[int] = []
    with contextlib.ExitStack() as stack:
        for core in here:
            lock = stack.enter_context(open(folder / str(core), "a"))
            with contextlib.suppress(BlockingIOError):
                if len(free) < wanted:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    free.append(core)
        yield {*free, *[core for core in here if core not in free][: wanted - len(free)]}
