"""Choose the devices of a run (`mesh.auto`) when the run begins. The run records it as `mesh.data` and keeps it."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from charlm.parallel.mesh import num_sharing_devices
from charlm.runs import workdir
from charlm.system.errors import ConfigError
from charlm.system.machine import num_cores, request_cores_as_devices, request_determinism
from charlm.system.progress import say


def request_devices(config: ConfigDict) -> None:
    """Request the devices of a run before JAX initialises them: deterministic ones, or one for each core of a CPU.

    Raises:
        ConfigError: JAX has already initialised a GPU without deterministic operations.
    """
    if config.train.deterministic:
        request_determinism()
    if (config.mesh.auto or (config.mesh.data or 1) > 1) and not jax.distributed.is_initialized():
        request_cores_as_devices()


def choose_devices(config: ConfigDict, path: Path, side_by_side: bool = False) -> None:
    """Set `mesh.data`, if it is unset and `mesh.auto` is set: to what the run's folder records, or else to a choice.

    The choice depends only on the config and on the number of cores. A job of several processes keeps its devices.

    Args:
        config: a checked config, after `request_devices`.
        path: the folder of the run, which may not exist yet.
        side_by_side: several runs train at once, each of them on one device.

    Raises:
        ConfigError: the run in the folder needs more devices than this process has.
    """
    if not config.mesh.auto or config.mesh.data is not None or jax.distributed.is_initialized():
        return
    if (path / "config.json").exists():
        count, here = recorded_devices(path), jax.device_count()
        if count > here:
            raise ConfigError(
                f"the run in {path} shares its batches among {count} devices, and this process has {here}: start Python again, "
                f"or set mesh.data to {here}, which changes the bits"
            )
    else:
        count = 1 if side_by_side else _choice(config)
    with config.unlocked():
        config.mesh.data = count


def recorded_devices(path: Path) -> int:
    """Return how many devices the run in a folder uses; 1 if there is no run, or if the run does not say."""
    return (workdir.load_run(path).config.mesh.data or 1) if (path / "config.json").exists() else 1


def _choice(config: ConfigDict) -> int:
    """Return the number of devices that a new run should use."""
    if jax.default_backend() != "cpu":
        return 1
    found, best = (num_sharing_devices(config, devices) for devices in (jax.device_count(), num_cores()))
    if found < best:
        say(f"JAX already has {jax.device_count()} device(s), so the run uses {found} of {best}; a new process would be faster")
    return found
