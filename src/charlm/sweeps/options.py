"""The options of the executor `ray`."""

from typing import NamedTuple


class RayOptions(NamedTuple):
    """How the executor `ray` uses a cluster.

    Attributes:
        ray_address: `local` starts Ray on this machine; `auto` finds the cluster of this node; else HOST:PORT.
        cpus_per_run: cores reserved for each run.
        gpus_per_run: GPUs reserved for each run.
        retries: how often a run is restarted after its process or node was lost.
        scheduler: `none`, or `asha` or `median`, which stop runs that fall behind.
        search: `file` trains the runs of the sweep file; `optuna` trains as many runs, with values that Optuna suggests.
    """

    ray_address: str = "local"
    cpus_per_run: int = 1
    gpus_per_run: float = 0.0
    retries: int = 3
    scheduler: str = "none"
    search: str = "file"
