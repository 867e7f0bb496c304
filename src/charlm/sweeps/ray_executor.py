"""Train the runs of a sweep on a Ray cluster with Ray Tune: several at a time, with retries, schedulers and a search.

A separate process trains each run (`ray_trial`, `ray_worker`). The sweep's workdir must be on a disk that all nodes share. A
run that is restarted, after a failure or by the same command, continues from its checkpoint there. Tune's own folder is
temporary.
"""

import contextlib
import logging
import math
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from charlm.runs import flat_state, outcome, workdir
from charlm.runs.checkpoint import Checkpoints
from charlm.runs.start import prepare
from charlm.sweeps.options import RayOptions
from charlm.sweeps.overrides import Distribution, Floats, Integers
from charlm.sweeps.plan import Plan, Run
from charlm.system.errors import ConfigError, Exit
from charlm.system.machine import num_cores
from charlm.system.progress import say

try:
    # By default Ray sends usage statistics, starts each run in another folder, and lowers its priority.
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

    from charlm.sweeps.ray_trial import METRIC, Trial, run_of_trial
except ImportError as error:
    raise ConfigError(f"--executor ray needs the extra ray (pip install 'charlm[ray]'): {error}") from None


def train_on_ray(runs: Sequence[Run], folder: Path, plan: Plan, options: RayOptions) -> dict[str, str]:
    """Train runs on a cluster, each in its own subfolder; return {name: reason} of the runs that failed.

    With `options.search` `optuna` the runs are first trained, and then runs with values that Optuna suggests, until the folder
    holds as many runs as the plan. Optuna knows the results of all earlier runs.

    Args:
        runs: the unfinished runs: those of the plan, or of an earlier search in the folder.
        folder: the sweep's folder.
        plan: the plan of the sweep. A search needs the distributions of its overrides (`Sampled`).
        options: the options of the executor.

    Raises:
        ConfigError: the cluster does not answer, or none of its nodes has the cores and GPUs that a run needs.
        Exit: a signal came; everything is saved.
    """
    if not runs and options.search == "file":
        return {}
    with _connected(options):
        failed = _tune(runs, folder, plan, options) if runs else {}
        if options.search == "optuna":
            done = plan.runs_in(folder)
            if (left := len(plan.overrides) - len(done)) > 0:
                failed |= _tune(done, folder, plan, options, num_suggestions=left)
    return failed


@contextlib.contextmanager
def _connected(options: RayOptions) -> Iterator[None]:
    """Connect to the cluster, or start one on this machine.

    Tune stops cleanly on SIGINT, so SIGTERM is turned into SIGINT.

    Raises:
        ConfigError: the cluster does not answer, or none of its nodes has the cores and GPUs that a run needs.
        Exit: SIGINT or SIGTERM came.
    """
    local = {"num_cpus": num_cores(), "include_dashboard": False} if options.ray_address == "local" else {}
    try:
        ray.init(address=options.ray_address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--ray_address {options.ray_address}: no Ray cluster answers there: {first}") from None
    terminated = []

    def catch(number: int, frame: FrameType | None) -> None:
        del frame
        terminated.append(number)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGTERM, catch)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= options.cpus_per_run and node.get("GPU", 0) >= options.gpus_per_run for node in nodes):
            most = {kind: max(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
            raise ConfigError(
                f"no node has --cpus_per_run {options.cpus_per_run} and --gpus_per_run {options.gpus_per_run:g}; the largest "
                f"numbers on a node are {most['CPU']:g} and {most['GPU']:g}"
            )
        yield
    except KeyboardInterrupt:
        say("stopped; the same command continues from here")
        raise Exit(128 + (signal.SIGTERM if terminated else signal.SIGINT)) from None
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _tune(runs: Sequence[Run], folder: Path, plan: Plan, options: RayOptions, num_suggestions: int = 0) -> dict[str, str]:
    """Train runs with Tune; return {name: reason} of the runs that failed.

    Without `num_suggestions` the runs themselves are trained. With it, the runs are done, and Tune trains as many other runs,
    with values that Optuna suggests.
    """
    folder = folder.absolute()
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # `_Reporter` prints one line where Tune prints many.
    scratch = folder / ".tune"
    shutil.rmtree(scratch, ignore_errors=True)  # A sweep that was killed leaves it behind.
    to_train = plan.runs() if num_suggestions else runs
    longest = max((_num_steps(run) for run in to_train if not run.refused), default=1)
    reporter = _Reporter(plan, num_suggestions or len(runs))
    trial = tune.with_parameters(Trial, plan=plan, folder=folder, cwd=os.getcwd(), cpus=options.cpus_per_run)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": options.cpus_per_run, "gpu": options.gpus_per_run}),
        param_space=None if num_suggestions else {"overrides": tune.grid_search([run.overrides for run in runs])},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            num_samples=num_suggestions or 1,
            search_alg=_optuna_search(runs, folder, plan) if num_suggestions else None,
            scheduler=_scheduler(options.scheduler, longest),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="runs",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=options.retries),
            callbacks=[reporter],
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for run in reporter.stopped:
        _write_stopped_result(run, folder / run.name, options.scheduler)
    if reporter.num_left:  # Tune catches SIGINT and returns normally.
        raise KeyboardInterrupt
    return reporter.failed


class _Reporter(tune.Callback):
    """Prints which runs start and end, and records how they end.

    Attributes:
        num_left: the number of runs that have not ended.
        failed: name -> reason of the runs that failed.
        stopped: the runs that the scheduler stopped.
    """

    def __init__(self, plan: Plan, num_runs: int):
        self._plan, self.num_left = plan, num_runs
        self.failed: dict[str, str] = {}
        self.stopped: list[Run] = []

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        say(f"{run_of_trial(self._plan, trial.config).name} starts")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run, result = run_of_trial(self._plan, trial.config), trial.last_result
        how = "is finished"
        if result.get("reason"):
            self.failed[run.name], how = result["reason"], f"failed: {result['reason']}"
        elif not result.get("over"):
            self.stopped.append(run)
            how = "fell behind and was stopped"
        self._report_end(run, how, result.get(METRIC, math.inf))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.status == trial.ERROR:  # A trial that Tune restarts has another status.
            run, lines = run_of_trial(self._plan, trial.config), str(trial.get_error()).strip().splitlines()
            self.failed[run.name] = f"{lines[-1][:300]}; started {max(1, trial.num_failures)} times"
            self._report_end(run, f"failed: {self.failed[run.name]}", math.inf)

    def _report_end(self, run: Run, how: str, loss: float) -> None:
        self.num_left -= 1
        scored = f", validation loss {loss:.4f} nats per character" if math.isfinite(loss) else ""
        say(f"{run.name} {how}{scored}; {self.num_left} runs are left")


def _optuna_search(done: Sequence[Run], folder: Path, plan: Plan) -> Any:
    """Return Optuna's search over the distributions of a plan, with the results of the runs that are done."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    def to_optuna(distribution: Distribution) -> Any:
        if isinstance(distribution, Floats):
            return optuna.distributions.FloatDistribution(distribution.low, distribution.high, log=distribution.log)
        if isinstance(distribution, Integers):
            return optuna.distributions.IntDistribution(distribution.low, distribution.high)
        return optuna.distributions.CategoricalDistribution(distribution.values)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    losses = {run.name: (workdir.read_result(folder / run.name) or {}).get("val_nats_per_char") for run in done}
    known = [run for run in done if losses[run.name] is not None]
    return OptunaSearch(
        {key: to_optuna(distribution) for key, distribution in plan.overrides.distributions.items()},
        metric=METRIC,
        mode="min",
        points_to_evaluate=[run.overrides for run in known] or None,
        evaluated_rewards=[losses[run.name] for run in known] or None,
        # The seed changes with every start, so a search that is continued does not suggest its first values again.
        seed=plan.overrides.seed + len(done),
    )


def _scheduler(name: str, longest: int) -> Any:
    """Return a scheduler of Tune for runs of at most `longest` steps; None for `none`.

    `asha` (Li et al. 2020) compares the runs after a ninth and after a third of the steps, and keeps the best third each time.
    `median` compares them from a ninth of the steps on.
    """
    grace = max(1, longest // 9)
    if name == "asha":
        # `max_t` leaves out a third comparison, at the end of the longest runs, where nothing is left to stop.
        schedule = {"max_t": 9 * grace - 1, "grace_period": grace, "reduction_factor": 3, "stop_last_trials": False}
        return tune.schedulers.ASHAScheduler(time_attr="step", **schedule)
    if name == "median":
        return tune.schedulers.MedianStoppingRule(time_attr="step", grace_period=grace)
    return None


def _num_steps(run: Run) -> int:
    """Return the length of a run in steps. It depends on the text if the config sets `train.epochs`."""
    return run.config.train.steps or prepare(run.config).num_steps


def _write_stopped_result(run: Run, path: Path, scheduler: str) -> None:
    """Write result.json for a run that a scheduler stopped at its latest checkpoint, unless the run ended by itself first."""
    if workdir.read_result(path):
        return
    flat, meta = Checkpoints(path).find("latest", say)
    params = {name.removeprefix("params."): value for name, value in flat.items() if name.startswith("params.")}
    size, progress = sum(value.size for value in params.values()), outcome.Progress.from_saved(meta["progress"])
    result = outcome.make_result("stopped_early", meta["step"], run.config, progress, size)
    workdir.write_result(path, result | {"stopped_by": scheduler, "params_sha256": flat_state.sha256(params)})
