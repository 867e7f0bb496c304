"""Train all runs of a sweep and write its records."""

import contextlib
import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from charlm.runs.devices import request_devices
from charlm.runs.workdir import check_name
from charlm.sweeps import page, results
from charlm.sweeps.executors import EXECUTORS
from charlm.sweeps.options import RayOptions
from charlm.sweeps.plan import Plan, Run
from charlm.system.errors import RunFailed, WorkdirError
from charlm.system.locks import exclusive_lock
from charlm.system.progress import say


def run_sweep(plan: Plan, workdir: Path, executor: str = "sequential", options: RayOptions | None = None) -> None:
    """Train the runs of a plan that are not finished, each in a folder of `workdir`, and write the sweep's records.

    Args:
        plan: from `load_plan`.
        workdir: the sweep's folder.
        executor: a key of `EXECUTORS`.
        options: for the executor `ray`; None: the defaults.

    Raises:
        RunFailed: some runs failed, or the records cannot be written. The other runs are finished.
        ConfigError: the executor cannot be used here.
        Exit: a signal came; everything is saved.
    """

    options = options or RayOptions()
    check_name(workdir)

    def list_runs() -> list[Run]:
        # A search starts from the runs that the folder holds already.
        return plan.runs_in(workdir) if options.search == "optuna" else plan.runs()

    runs = list_runs()
    for run in runs:
        request_devices(run.config)
    workdir.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(workdir / ".lock", "training this sweep"):
        failed = {run.name: run.refused for run in runs if run.refused}
        unfinished = [run for run in runs if not run.refused and not results.is_finished(workdir / run.name, run.config)]
        if finished := len(runs) - len(unfinished) - len(failed):
            say(f"{finished} of {len(runs)} runs are finished")
        if options.search == "file":  # The runs of a search differ from start to start.
            _keep_other_table(runs, workdir)
        try:
            failed |= EXECUTORS[executor](unfinished, workdir, plan, options)
        finally:
            if runs := list_runs():
                _write_records(runs, workdir, failed)
    say(f"{workdir}: summary.csv, sweep.png, report.html")
    if failed:
        first = next(iter(failed))
        raise RunFailed(f"{len(failed)} of {len(runs)} runs failed; the first is {first}: {failed[first]}")


def _keep_other_table(runs: Sequence[Run], workdir: Path) -> None:
    """Keep the table of another sweep file under another name, with a message, before this sweep replaces it."""
    try:
        others = {record["run"] for record in results.read_records(workdir / "results.jsonl")} - {run.name for run in runs}
    except WorkdirError:
        return
    if others:
        number = next(k for k in itertools.count(1) if not (workdir / f"results.jsonl.{k}").exists())
        for name in ("results.jsonl", "summary.csv"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(workdir / name, workdir / f"{name}.{number}")
        say(
            f"{len(others)} runs of {workdir} are not in this sweep file, for example {min(others)}; "
            f"the previous table is now in results.jsonl.{number} and summary.csv.{number}"
        )


def _write_records(runs: Sequence[Run], workdir: Path, failed: Mapping[str, str]) -> None:
    """Write the table, the plot and the page. Raises RunFailed if they cannot be written."""
    try:
        results.write_records(runs, workdir, failed)
        page.write_page_of_sweep(workdir)
    except OSError as error:
        raise RunFailed(f"cannot write to {workdir}: {error.strerror or error}; the same command writes it again") from None
    except WorkdirError as error:
        raise RunFailed(str(error)) from None
