"""The records of the experiments: a JSON object a line in results.jsonl, which names date, machine, versions and commit."""

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from charlm.system.machine import cpu_model, git_commit, num_cores


def machine() -> str:
    """Return the name of the GPU, or the number of cores and the model of the CPU."""
    device = jax.devices()[0]
    return f"{num_cores()} cores, {cpu_model()}" if device.platform == "cpu" else device.device_kind


def machine_of(manifest: Mapping[str, Any]) -> str:
    """Return the same for the machine that a run's manifest.json names."""
    if manifest["device_kind"] != "cpu":
        return manifest["device_kind"]
    return f"{manifest['cpu_cores']} cores, {manifest['cpu_model']}"


def append(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Append a record to results.jsonl in a folder and return it. `values` may name another machine than this one."""
    record = {"date": datetime.date.today().isoformat(), "machine": values.get("machine") or machine()}
    record |= {"commit": git_commit(), "python": platform.python_version(), "jax": jax.__version__}
    try:
        record["torch"] = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        pass
    record |= values
    with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return record
