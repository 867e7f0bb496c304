"""The devices that programs are compiled for. None of them needs to be present.

JAX compiles ahead of time for a described device (`jax.experimental.topologies`). For a TPU this needs the package `libtpu`;
for an NVIDIA GPU the plugin of JAX and three packages of CUDA, without their dependencies. Installed beside JAX they slow down
every start of it on a machine that has no such device, so they lie in a folder of their own, `$CHARLM_COMPILERS`:

    pip install -c constraints.txt --no-deps --target FOLDER libtpu jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc \
        nvidia-nvvm nvidia-cuda-crt
"""

import importlib.util
import os
import sys
from pathlib import Path

# The facts of an NVIDIA H100 SXM5 with 80 GB, as the fields of XLA's GpuTargetConfigProto (NVIDIA's "H100 Tensor Core GPU
# Architecture"; the limits of a block and of a core are those of compute capability 9.0 in the CUDA programming guide).
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# The modules that compiling for a target needs.
NEEDS = {"h100": ("jax_plugins.xla_cuda13", "nvidia"), "v5e": ("libtpu",)}
# The devices of a mesh: four GPUs with NVLink, or the smallest slice of a TPU v5e that has four chips.
MESH_SIZE = 4


def missing(target: str) -> list[str]:
    """Return the modules that compiling for a target needs and that are not installed."""
    folder = os.environ.get("CHARLM_COMPILERS")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    return [name for name in NEEDS[target] if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # Its parent is missing.
        return False


def _find(package: str, pattern: str) -> Path:
    """Return the file or folder of a package, or of a part of it, that matches a pattern."""
    folders = importlib.util.find_spec(package).submodule_search_locations
    return next(found for folder in folders for found in Path(folder).glob(pattern))


def prepare(target: str) -> None:
    """Set what the compiler of a target reads from the environment. Call it before JAX starts.

    Raises:
        SystemExit: a package is missing.
    """
    if absent := missing(target):
        sys.exit(f"{target}: {', '.join(absent)} not found; experiments/accelerators/targets.py says what to install")
    if target == "v5e":
        # Without these, libtpu asks the cloud's metadata server which TPU it runs on.
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
        os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        os.environ["TPU_LIBRARY_PATH"] = str(_find("libtpu", "libtpu.so"))
        return
    root = _find("nvidia", "*/nvvm/libdevice").parents[1]
    # Without a device nothing can be timed, so the compiler chooses the kernels of products by its own estimates.
    flags = f"--xla_gpu_cuda_data_dir={root} --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ |= {"JAX_PLATFORMS": "cpu,cuda", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    os.environ["PATH"] = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"


def devices(target: str) -> list:
    """Return four described devices of a target."""
    from jax.experimental import topologies

    if target == "v5e":
        return list(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices)
    shape = {"topology_name": "h100", "topology": f"1x1x{MESH_SIZE}"}
    return list(topologies.get_topology_desc(platform="cuda", target_config=H100, **shape).devices)
