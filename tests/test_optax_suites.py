"""optax's own generic tests, run against prunAdag in every variant, and the methods."""

import jax
import jax.numpy as jnp
import pytest

import prunadag_optax
from tests.optax_suites import (
    ALL_SETTINGS,
    CONTRIB_SETTINGS,
    FACTORIES,
    METHODS,
    MORE_METHODS,
    SETTINGS,
    SLOW_SETTINGS,
    entries,
    label,
    suite,
)


@pytest.fixture(autouse=True)
def _restore_x64():
    """The float64 suite turns x64 off at the end of a test, if the test gets there."""
    before = jax.config.read("jax_enable_x64")
    yield
    jax.config.update("jax_enable_x64", before)


def _contrib_test(settings):
    return suite(
        "contrib/_common_test.py",
        "ContribTest",
        "_ALL_OPTIMIZERS_UNDER_TEST = tuple(",
        {
            "_MAIN_OPTIMIZERS_UNDER_TEST": entries(
                settings, wrapper_name=None, wrapper_kwargs=None
            ),
            "_OTHER_OPTIMIZERS_UNDER_TEST": [],
        },
        lookup="_get_opt_factory",
    )


def _alias_test(settings):
    return suite(
        "_src/alias_test.py",
        "AliasTest",
        "def _get_opt(",
        {"_OPTIMIZERS_UNDER_TEST": tuple(entries(settings))},
        # The optimizers whose complex cases are skipped, by name.
        edits=[
            (
                "if opt_name in (\n        'fromage',",
                f"if opt_name in (\n        *{tuple(FACTORIES)!r}, 'fromage',",
                2,
            )
        ],
        lookup="_get_opt",
        # Names optimizers of optax and their arguments; test_accumulator_dtype is for
        # ours.
        without="test_explicit_dtype",
    )


ContribTest = _contrib_test(CONTRIB_SETTINGS)
AliasTest = _alias_test(SETTINGS)


# Classes of their own, so that they can be marked.
@pytest.mark.slow
class ContribMethodsTest(_contrib_test([*SLOW_SETTINGS, *METHODS, *MORE_METHODS])):
    pass


@pytest.mark.slow
class AliasMethodsTest(_alias_test(METHODS + MORE_METHODS)):
    pass


Float64Test = suite(
    "_src/float64_test.py",
    "Float64Test",
    "class Float64Test(",
    {
        "ALL_MODULES": [
            (f"{make.__name__}_{label(s)}", make, s)
            for make in (prunadag_optax.prunadag, prunadag_optax.scale_by_prunadag)
            for s in ALL_SETTINGS
        ]
        + [(name, FACTORIES[name], s) for name, s in METHODS]
    },
)


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=label)
def test_complex_parameters_are_refused(settings):
    # In place of the cases that the alias suite skips.
    tx = prunadag_optax.prunadag(**settings)
    params = jnp.array([1 + 1j, 1 - 1j])
    refused = pytest.raises(ValueError, match="params has dtype complex64; allowed are")
    with refused:
        tx.init(params)
    with refused:
        tx.update(params, tx.init(params.real), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("accumulator_dtype", ["bfloat16", "float16", "float32", None])
def test_accumulator_dtype(dtype, accumulator_dtype):
    tx = prunadag_optax.scale_by_prunadag(
        momentum=0.9, accumulator_dtype=accumulator_dtype
    )
    params = jnp.array([1.0, -2.0, 3.0], dtype)
    before = tx.init(params)
    updates, after = tx.update(params, before, params)
    assert updates.dtype == params.dtype
    for state in (before, after):
        count, *accumulators, _ = jax.tree.leaves(state)
        assert count.dtype == jnp.int32
        assert [x.dtype for x in accumulators] == 3 * [accumulator_dtype or dtype]
    assert before.threshold_hint.dtype == after.threshold_hint.dtype
