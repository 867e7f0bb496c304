import os

import jax
import pytest

from charlm.system import machine
from charlm.system.errors import ConfigError

FLAG = "--xla_gpu_deterministic_ops=true"


@pytest.fixture
def backend(monkeypatch):
    """Return a function that simulates JAX's default backend; None means that JAX has not initialised its backends."""

    def simulate(name):
        monkeypatch.setattr(machine.xla_bridge, "backends_are_initialized", lambda: name is not None)
        monkeypatch.setattr(jax, "default_backend", lambda: name)

    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    return simulate


@pytest.mark.parametrize("name", [None, "cpu"])
def test_the_determinism_flag_is_added_once(backend, name):
    backend(name)
    for _ in range(2):
        machine.request_determinism()
        assert os.environ["XLA_FLAGS"] == f"--xla_other=1 {FLAG}"


def test_a_request_after_a_gpu_is_initialised_is_refused_every_time(backend):
    backend("gpu")
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"^train.deterministic is True, but .* restart Python with XLA_FLAGS={FLAG} "):
            machine.request_determinism()
        assert os.environ["XLA_FLAGS"] == "--xla_other=1"


def test_a_gpu_that_was_initialised_with_the_flag_is_accepted(backend, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", FLAG)
    backend("gpu")
    machine.request_determinism()
    assert os.environ["XLA_FLAGS"] == FLAG
