"""Test configuration: devices, strict ranks, no plots, how hard XLA optimises."""

import importlib.metadata
import os

# Before jax starts: the sharding tests need several devices. On a busy machine their
# threads may take long to meet, and XLA would end the process after 40 seconds. jax
# 0.10 knows the flag, 0.6 would end at once.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    * (int(importlib.metadata.version("jaxlib").split(".")[1]) >= 10),
)
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests of numbers to the last bit, of compiled programs and of their speed.
OPTIMISED = {
    "test_algorithm",
    "test_backend",
    "test_convergence",
    "test_pallas",
    "test_properties",
    "test_sharding",
    "test_speed",
    "test_stochastic",
    "test_sweep",
}


@pytest.fixture(autouse=True, scope="module")
def _compilation(request):
    """All others compile in three quarters of the time with few optimisations."""
    before = jax.config.read("jax_disable_most_optimizations")
    plain = request.module.__name__.rpartition(".")[2] not in OPTIMISED
    jax.config.update("jax_disable_most_optimizations", plain)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
