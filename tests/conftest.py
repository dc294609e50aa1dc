"""Test configuration: devices, strict ranks, no plots, how hard XLA optimises.

The tests see what users run: one device. Those of sharded programs, in `sharding/`, run
in a process of their own with eight:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/sharding
"""

import ctypes
import gc
import importlib.metadata
import os
import pathlib
import sys

# On a busy machine the threads of several devices may take long to meet, and XLA would
# end the process after 40 seconds. jax 0.10 knows the flag, 0.6 would end at once.
_DEVICES = "--xla_force_host_platform_device_count"
_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds"
_flags = os.environ.get("XLA_FLAGS", "")
_jaxlib = tuple(int(n) for n in importlib.metadata.version("jaxlib").split(".")[:2])
if _DEVICES in _flags and _PATIENCE not in _flags and _jaxlib >= (0, 10):
    os.environ["XLA_FLAGS"] = f"{_flags} {_PATIENCE}=600"
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.compiling import compiling  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# What is imported stays, and compiling makes many small objects: a twentieth of the
# time went into looking at them.
gc.freeze()
gc.set_threshold(100_000, 20, 100)

collect_ignore = [] if jax.device_count() >= 8 else ["sharding"]

# Tests of numbers to the last bit, of compiled programs and of their speed.
OPTIMISED = {
    "test_convergence",
    "test_engine",
    "test_pallas",
    "test_speed",
}


# These take a minute or more.
LONG = {
    "test_algorithm",
    "test_article",
    "test_distributed",
    "test_hard_thresholding",
    "test_linen",
    "test_models",
    "test_notebooks",
    "test_one_set",
    "test_optax_suites",
    "test_properties",
    "test_proximal",
    "test_pruning_aware",
    "test_readme",
    "test_reload",
    "test_small",
    "test_sweep",
}


def pytest_collection_modifyitems(items):
    """The long files come first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


# Compiled programs.

_STATM = pathlib.Path("/proc/self/statm")
_MOST = 3 * 2**29


def resident() -> int:
    """The bytes of memory that this process has, where the system is Linux."""
    if not _STATM.exists():
        return 0
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def let_go():
    """The programs compiled so far, and the memory that the C library has kept."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """A long module would fill several GiB; what it needs again is compiled again."""
    if resident() > _MOST:
        let_go()


@pytest.fixture(autouse=True, scope="module")
def _compilation(request):
    """All others compile quickly.

    What a module has compiled goes when it ends: the programs of all modules together
    would take many GiB.
    """
    plain = request.module.__name__.rpartition(".")[2] not in OPTIMISED
    with compiling(quickly=plain):
        yield
    let_go()
