"""The executors, which train the runs of a sweep. Each executor is one entry of `EXECUTORS`.

The help of the command names the executors, so this module imports what they need when they are used.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from charlm.sweeps.options import RayOptions
from charlm.system.progress import say

if TYPE_CHECKING:
    from charlm.sweeps.plan import Plan, Run

# (runs, the sweep's folder, its plan, options) -> {name: reason} of the runs that failed. It raises Exit after a signal.
Executor = Callable[[Sequence["Run"], Path, "Plan", RayOptions], dict[str, str]]


def train_sequentially(runs: Sequence["Run"], folder: Path, plan: "Plan", options: RayOptions) -> dict[str, str]:
    """Train the runs one after another (an `Executor`)."""
    del plan, options
    return _one_after_another(runs, folder)


def train_with_vmap(runs: Sequence["Run"], folder: Path, plan: "Plan", options: RayOptions) -> dict[str, str]:
    """Train runs that differ only in traced hyperparameters as one program, the others sequentially (an `Executor`)."""
    del plan, options
    import jax

    from charlm.runs.outcome import failure_reason
    from charlm.sweeps import vmap_executor
    from charlm.system.machine import num_cores, request_cores_as_devices

    request_cores_as_devices()
    if jax.default_backend() == "cpu" and (count := jax.local_device_count()) < num_cores():
        say(f"JAX already has {count} device(s), so the runs share {count} of {num_cores()} cores")
    groups, alone = vmap_executor.group_runs(runs, folder)
    for run, why in alone:
        say(f"{run.name} is trained by itself: {why}")
    failed = {}
    for group in groups:
        say(f"{len(group)} runs as one program: {group[0].name} to {group[-1].name}")
        found: dict[str, str] = {}
        reason = failure_reason(lambda group=group, found=found: found.update(vmap_executor.train_group(group, folder)))
        failed |= {run.name: reason for run in group} if reason else found
    return failed | _one_after_another([run for run, _ in alone], folder)


def train_on_ray(runs: Sequence["Run"], folder: Path, plan: "Plan", options: RayOptions) -> dict[str, str]:
    """Train the runs on a Ray cluster (an `Executor`). Raises ConfigError if Ray is not installed."""
    from charlm.sweeps import ray_executor  # Ray is an extra.

    return ray_executor.train_on_ray(runs, folder, plan, options)


EXECUTORS: Mapping[str, Executor] = {
    "sequential": train_sequentially,
    "vmap": train_with_vmap,
    "ray": train_on_ray,
}


def _one_after_another(runs: Sequence["Run"], folder: Path) -> dict[str, str]:
    from charlm.runs.loop import train
    from charlm.runs.outcome import failure_reason

    failed = {}
    for number, run in enumerate(runs, 1):
        say(f"run {number} of {len(runs)}: {run.name}")
        if reason := failure_reason(lambda run=run: train(run.config, folder / run.name)):
            failed[run.name] = reason
            say(f"{run.name} failed: {reason}")
    return failed
