"""The tests of sharded programs need eight devices, in a process of their own."""

import jax
import pytest

if jax.device_count() < 8:
    raise pytest.UsageError(
        "tests/sharding needs eight devices: XLA_FLAGS="
        "--xla_force_host_platform_device_count=8 python -m pytest tests/sharding"
    )
