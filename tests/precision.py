"""Double precision for a block of code, under the name that each jax gives it."""

import jax


def enable_x64(on: bool = True):
    """Context in which jax computes in float64, or in float32."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    return jax.experimental.enable_x64(on)
