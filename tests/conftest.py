"""Fixtures and helpers of the tests: a small text, a small config, and the commands in this process or in another one."""

import atexit
import gc
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Many tests start processes. If Python may not write byte code, each of them compiles the sources of JAX again, which takes
# as long as the rest of a small run. A temporary folder then holds the byte code for all processes of the tests.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode, sys.pycache_prefix = False, tempfile.mkdtemp()
    atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jax
import pytest
from hypothesis import settings

from charlm import evaluate, explore, export, import_torch, report, reproduce, sample, serve, sweep, train
from charlm.config import cli
from charlm.runs import tracking

# The commands set it too: tracing creates many objects that stay, so a search for garbage after every 700 of them is slow.
gc.set_threshold(50_000)
# Most of the time of the tests is the compilation of many small programs. It takes a quarter of the time without LLVM's
# optimizations, without XLA's newer emitters of fusions (jax 0.11 has no flag for them), and without dividing a program into
# parts that LLVM compiles separately. The tests compare results with each other and with references, so they need no particular
# optimization. XLA_FLAGS in the environment overrides this.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)
# The same examples every time. No deadline, because the first example waits for the compiler.
settings.register_profile("charlm", deadline=None, derandomize=True)
# More examples for the properties of damaged files: pytest -m fuzz --hypothesis-profile=more (or thorough).
settings.register_profile("more", settings.get_profile("charlm"), max_examples=500)
settings.register_profile("thorough", settings.get_profile("charlm"), max_examples=10_000)
settings.load_profile("charlm")

COMMANDS = {"train": train.main, "sample": sample.main, "evaluate": evaluate.main, "reproduce": reproduce.main}
COMMANDS |= {"sweep": sweep.main, "report": report.main, "export": export.main}
COMMANDS |= {"import_torch": import_torch.main, "explore": explore.main, "serve": serve.main}
SMALL = """
from charlm.config import default_config

def get_config():
    config = default_config()
    config.data.path = {text!r}
    config.batching.batch_size = 4
    config.batching.seq_len = 8
    config.model.hidden_size = 16
    config.model.embedding_size = 8
    config.eval.num_streams = 5
    config.eval.context = 4
    config.sample.length = 30
    config.train.steps = 40
    config.train.log_every = 10
    config.train.eval_every = 20
    config.train.checkpoint_every = 10
    config.train.sample_every = 20
    config.train.steps_per_dispatch = 7
    return config
"""


def pytest_collection_modifyitems(items):
    """Run the slowest files first, so that no worker is left with one of them at the end."""
    longest = ["ray_executor", "loop", "mesh", "cells", "untrusted", "sweep", "hostile_records", "docs", "explore_in_browser"]
    longest = [f"test_{name}.py" for name in (*longest, "hostile_workdir", "language_model", "step", "exchange", "faults")]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keep the cache of these tests apart from all others, and share compiled programs between their processes."""
    os.environ["CHARLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    compiled = {
        "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(session / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in compiled.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    # Now the devices are fixed, so no config with `mesh.auto` gives this process several of them.
    assert jax.device_count() == 1


@pytest.fixture(scope="session", autouse=True)
def curves_drawn_once():
    """Draw curves.png once for each sequence of lines with the same keys: drawing takes half of the time of a small run.

    Later runs with such lines get a copy of the picture. Runs in other processes draw their own.
    """
    sound, drawn = tracking.draw_curves, {}

    def draw_curves(lines, path):
        kind = tuple((*sorted(line), line["split"], math.isfinite(line["nats_per_char"])) for line in lines)
        if kind not in drawn:
            sound(lines, path)
            drawn[kind] = path.read_bytes()
        path.write_bytes(drawn[kind])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "draw_curves", draw_curves)
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Return the path of a text of about 6,000 characters: words drawn from a small lexicon."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(30)]
    text = "".join(draw.choice(words) + draw.choice("  \n") for _ in range(1200))
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_config(text_file, tmp_path_factory) -> Path:
    """Return the path of a config file that trains in a second."""
    path = tmp_path_factory.mktemp("configs") / "small.py"
    path.write_text(SMALL.format(text=str(text_file)), encoding="utf-8")
    return path


@pytest.fixture
def run(capfd):
    """Return a function that runs a command in this process: run("train", "--flag=value") -> (exit code, stdout, stderr)."""

    def run_command(name: str, *argv: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.run(COMMANDS[name], argv)
        return (code, *capfd.readouterr())

    return run_command


def start(name: str, *argv: str, **env: str) -> subprocess.Popen:
    """Start a command in a separate process, with some changes of the environment."""
    command = [sys.executable, "-m", f"charlm.{name}", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env)


@pytest.fixture
def x64():
    """Enable double precision for one test."""
    with jax.enable_x64(True):
        yield
