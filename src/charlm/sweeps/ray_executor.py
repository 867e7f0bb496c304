"""Train the runs of a sweep on a Ray cluster, by Ray Tune: several at a time, with retries, schedulers and a search.

Each run is a process of its own (`charlm.worker`), which Tune watches through the run's metrics.jsonl. The sweep's workdir must
be on a disk that all nodes see; a run that is begun again, after a failure or by the same command, goes on from its checkpoint
there. Tune's own folder is only scratch.
"""

import contextlib
import logging
import math
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from charlm.runs import checkpoint, outcome, workdir
from charlm.runs.start import prepare
from charlm.sweeps.options import RayOptions
from charlm.sweeps.overrides import Floats, Integers
from charlm.sweeps.plan import Plan, Run
from charlm.system.errors import ConfigError, Exit
from charlm.system.machine import num_cores
from charlm.system.progress import say

try:
    # Unless it is told not to, Ray reports how it is used, and begins each run in another folder, at a low priority.
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_worker_niceness": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    }.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import tune

    from charlm.sweeps.ray_trial import METRIC, Trial, run_of
except ImportError as error:
    raise ConfigError(f"--executor ray needs the extra ray (pip install 'charlm[ray]'): {error}") from None


def train_on_ray(runs: Sequence[Run], folder: Path, plan: Plan, options: RayOptions) -> dict[str, str]:
    """Train runs on a cluster, each in its folder; {name: why} of those that failed.

    With `options.search` `optuna`, these are the unfinished ones of a search, and the plan's are `Sampled`. It goes on until
    there are as many runs in the folder as the plan has, with values that Optuna suggests after it was told how those before
    ended.

    Raises:
        ConfigError: there is no such cluster, or no node of it has what a run needs.
        Exit: a signal came; everything is saved.
    """
    if not runs and options.search == "file":
        return {}
    with _connected(options):
        failed = _fit(runs, folder, plan, options) if runs else {}
        if options.search == "optuna":
            before = plan.runs_in(folder)
            if (left := len(plan.overrides) - len(before)) > 0:
                failed |= _fit(before, folder, plan, options, suggest=left)
    return failed


@contextlib.contextmanager
def _connected(options: RayOptions) -> Iterator[None]:
    """Be a driver of the cluster. Raises Exit after SIGINT, which Tune knows how to end at, and SIGTERM, made into one."""
    here = {"num_cpus": num_cores(), "include_dashboard": False} if options.ray_address == "local" else {}
    try:
        ray.init(address=options.ray_address, log_to_driver=False, logging_level=logging.ERROR, **here)
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--ray_address {options.ray_address}: no Ray cluster answers there: {first}") from None
    terminated = []

    def catch(number, frame):
        del frame
        terminated.append(number)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGTERM, catch)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= options.cpus_per_run and node.get("GPU", 0) >= options.gpus_per_run for node in nodes):
            most = {kind: max(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
            raise ConfigError(
                f"no node has --cpus_per_run {options.cpus_per_run} and --gpus_per_run {options.gpus_per_run:g}; the most are "
                f"{most['CPU']:g} and {most['GPU']:g}"
            )
        yield
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        raise Exit(128 + (signal.SIGTERM if terminated else signal.SIGINT)) from None
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _fit(runs: Sequence[Run], folder: Path, plan: Plan, options: RayOptions, suggest: int = 0) -> dict[str, str]:
    """Have Tune train the runs, or, with `suggest`, so many others than these, which are done."""
    folder = folder.absolute()
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # `_Watch` says in a line what it says in many.
    scratch = folder / ".tune"
    shutil.rmtree(scratch, ignore_errors=True)  # That of a sweep that was killed.
    longest = max((_num_steps(run) for run in (plan.runs() if suggest else runs) if not run.refused), default=1)
    watch = _Watch(plan, suggest or len(runs))
    trial = tune.with_parameters(Trial, plan=plan, folder=folder, cwd=os.getcwd(), cpus=options.cpus_per_run)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": options.cpus_per_run, "gpu": options.gpus_per_run}),
        param_space=None if suggest else {"overrides": tune.grid_search([run.overrides for run in runs])},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            num_samples=suggest or 1,
            search_alg=_optuna(runs, folder, plan) if suggest else None,
            scheduler=_scheduler(options.scheduler, longest),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="runs",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=options.retries),
            callbacks=[watch],
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for run in watch.fell_behind:
        _mark_stopped(run, folder / run.name, options.scheduler)
    if watch.left:  # Tune catches SIGINT and returns as if all were well.
        raise KeyboardInterrupt
    return watch.failed


class _Watch(tune.Callback):
    """Says which runs begin and end, and remembers how.

    Attributes:
        left: how many have not ended.
        failed: name -> why.
        fell_behind: those that the scheduler stopped.
    """

    def __init__(self, plan: Plan, num_runs: int):
        self._plan, self.left = plan, num_runs
        self.failed: dict[str, str] = {}
        self.fell_behind: list[Run] = []

    def on_trial_start(self, iteration, trials, trial, **info):
        say(f"{run_of(self._plan, trial.config).name} begins")

    def on_trial_complete(self, iteration, trials, trial, **info):
        run, found = run_of(self._plan, trial.config), trial.last_result
        how = "is over"
        if found.get("reason"):
            self.failed[run.name], how = found["reason"], f"failed: {found['reason']}"
        elif not found.get("over"):
            self.fell_behind.append(run)
            how = "fell behind and is stopped"
        self._over(run, how, found.get(METRIC, math.inf))

    def on_trial_error(self, iteration, trials, trial, **info):
        if trial.status == trial.ERROR:  # Not if it is begun again.
            run, lines = run_of(self._plan, trial.config), str(trial.get_error()).strip().splitlines()
            self.failed[run.name] = f"{lines[-1][:300]}; begun {max(1, trial.num_failures)} times"
            self._over(run, f"failed: {self.failed[run.name]}", math.inf)

    def _over(self, run: Run, how: str, loss: float) -> None:
        self.left -= 1
        scored = f", validation loss {loss:.4f} nats per character" if math.isfinite(loss) else ""
        say(f"{run.name} {how}{scored}; {self.left} runs are left")


def _optuna(done: Sequence[Run], folder: Path, plan: Plan) -> Any:
    """Optuna's search over the ranges of a plan, told of the runs that are done."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    def distribution(draw: Any) -> Any:
        if isinstance(draw, Floats):
            return optuna.distributions.FloatDistribution(draw.low, draw.high, log=draw.log)
        if isinstance(draw, Integers):
            return optuna.distributions.IntDistribution(draw.low, draw.high)
        return optuna.distributions.CategoricalDistribution(draw.values)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    losses = {run.name: (workdir.read_result(folder / run.name) or {}).get("val_nats_per_char") for run in done}
    known = [run for run in done if losses[run.name] is not None]
    return OptunaSearch(
        {key: distribution(draw) for key, draw in plan.overrides.draws.items()},
        metric=METRIC,
        mode="min",
        points_to_evaluate=[run.overrides for run in known] or None,
        evaluated_rewards=[losses[run.name] for run in known] or None,
        # Another one each time, or a search that goes on would begin with the first one's values again.
        seed=plan.overrides.seed + len(done),
    )


def _scheduler(name: str, longest: int) -> Any:
    """Both look first after a ninth of the steps; ASHA (Li et al. 2020) again after a third, and keeps a third each time."""
    grace = max(1, longest // 9)
    if name == "asha":
        return tune.schedulers.ASHAScheduler(time_attr="step", max_t=longest + 1, grace_period=grace, reduction_factor=3)
    if name == "median":
        return tune.schedulers.MedianStoppingRule(time_attr="step", grace_period=grace)
    return None


def _num_steps(run: Run) -> int:
    return run.config.train.steps or prepare(run.config).num_steps


def _mark_stopped(run: Run, path: Path, by: str) -> None:
    """Have result.json say that a scheduler stopped a run, as of its latest checkpoint."""
    flat, meta = checkpoint.Checkpoints(path).find("latest", say)
    params = {name.removeprefix("params."): value for name, value in flat.items() if name.startswith("params.")}
    size, progress = sum(value.size for value in params.values()), outcome.Progress.from_saved(meta["progress"])
    result = outcome.make_result("stopped_early", meta["step"], run.config, progress, size)
    workdir.write_result(path, result | {"stopped_by": by, "params_sha256": checkpoint.sha256(params)})
