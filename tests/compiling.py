"""How hard XLA optimises what the tests compile, here and in other processes."""

import contextlib
import importlib.metadata

import jax
import pytest
from jax._src import compiler

JAXLIB = tuple(int(n) for n in importlib.metadata.version("jaxlib").split(".")[:2])
# Loops are written by the older of XLA's two generators of code, in a third of the
# time, and a program is compiled as one piece. jax has no settings for these that can
# be others in the next file.
QUICK: dict[str, bool | int] = {}
if JAXLIB >= (0, 10):
    QUICK |= {
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }

_options = compiler.get_compile_options


def _quick_options(*args, **kwargs):
    options = _options(*args, **kwargs)
    options.env_option_overrides = [*options.env_option_overrides, *QUICK.items()]
    return options


@contextlib.contextmanager
def compiling(*, quickly: bool):
    """As a user compiles, or in a third of the time and with few optimisations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", quickly)
    with pytest.MonkeyPatch.context() as patch:
        if quickly:
            patch.setattr(compiler, "get_compile_options", _quick_options)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


def as_here(flags: str = "") -> dict[str, str]:
    """Variables with which another process compiles to the same bits as this one.

    Args:
      flags: for XLA, besides.
    """
    quickly = jax.config.read("jax_disable_most_optimizations")
    quick = [f"--{name}={str(on).lower()}" for name, on in QUICK.items() if quickly]
    return {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quickly)),
        "XLA_FLAGS": " ".join([*quick, flags]).strip(),
    }
