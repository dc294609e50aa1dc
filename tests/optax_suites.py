"""optax's own generic tests, made to test prunAdag in every variant, and the methods.

optax ships the tests that its optimizers must pass. Their lists of optimizers are read
by decorators when the module is executed, so each suite is executed here from the
installed source, with our list put before the line that first reads it. Nothing in the
installed package is changed, and line numbers in tracebacks agree with it.
"""

import importlib.util
import pathlib
import types
import unittest
import warnings

import jax
import jax.numpy as jnp
import optax
from packaging.version import Version

import prunadag_optax
from prunadag_optax import masks
from prunadag_optax.methods import (
    ac_dc,
    bregman,
    dual_averaging,
    dynamic_sparse,
    frank_wolfe,
    hard_thresholding,
    powerpropagation,
    proximal,
    sparse_momentum,
    straight_through,
)
from prunadag_optax.methods.penalties import regularisers

# The convergence targets have 2 to 7 components, so relevant=0.1 is T = 1: each step
# moves the component with the largest gradient, and the others only as far as they are
# acceptable or decreasable. That solves all four targets: a component left behind has
# the largest gradient sooner or later.
#
# The learning rates suit the Rosenbrock valley, down which T = 1 zigzags: 1.5 is amid
# the range [1.2, 2] that works, and 1.2 amid [0.8, 1.75] with momentum. The other
# targets converge from 0.3 on.
PLAIN = {"learning_rate": 1.5, "relevant": 0.1}
AVERAGED = {"learning_rate": 1.2, "relevant": 0.1, "momentum": 0.9}

# Entries for the 10,000 steps of alias_test.
SETTINGS = [
    PLAIN | {"variant": "v1"},
    PLAIN | {"variant": "v3"},
    PLAIN | {"variant": "relevant_only"},
    PLAIN | {"variant": "v3", "scope": "leaf"},
    # In the valley v2 and v4 shrink the component that is not relevant by |x|/(k+1),
    # however small the gradients are. The steps that win this back are slow: without
    # momentum 10,000 leave an error of about the tolerance.
    AVERAGED | {"variant": "v2"},
    AVERAGED | {"variant": "v4"},
    AVERAGED | {"variant": "v4", "scope": "leaf", "accumulator_dtype": "float32"},
]
# More for the 30,000 steps of contrib's tests, which v2 and v4 end at a third of it.
MORE_SETTINGS = [
    PLAIN | {"variant": "v2"},
    PLAIN | {"variant": "v4"},
    PLAIN | {"variant": "v1", "accumulator_dtype": "float32"},
    AVERAGED | {"variant": "v1"},
    AVERAGED | {"variant": "v3"},
    AVERAGED | {"variant": "relevant_only"},
]
ALL_SETTINGS = SETTINGS + MORE_SETTINGS
# The two suites test much the same, so the second leaves out most of what the first
# has, save the defaults; that and more of it is slow.
CONTRIB_SETTINGS = [SETTINGS[1]]
SLOW_SETTINGS = [SETTINGS[3], MORE_SETTINGS[0], MORE_SETTINGS[1], MORE_SETTINGS[4]]


# The other methods. Where their arguments are no learning rate and numbers that
# `inject_hyperparams` can inject, functions of such arguments.


def prox_rms(
    learning_rate: optax.ScalarOrSchedule, regulariser: regularisers.Regulariser
) -> optax.GradientTransformation:
    def metric(state):
        return jax.tree.map(lambda nu: jnp.sqrt(nu + 1e-8), state.nu)

    return proximal.proxgen(
        learning_rate, regulariser, direction=optax.scale_by_rms(), metric=metric
    )


def thresholded_adam(
    learning_rate: optax.ScalarOrSchedule, k, scope="global"
) -> optax.GradientTransformation:
    base = optax.adam(learning_rate)
    return hard_thresholding.iterative_hard_thresholding(
        base, k, scope=scope, where=masks.everything
    )


def aware_adam(
    learning_rate: optax.ScalarOrSchedule, density, gradient_at="params"
) -> optax.GradientTransformation:
    return prunadag_optax.pruning_aware(
        optax.adam(learning_rate),
        density,
        gradient_at=gradient_at,
        where=masks.everything,
    )


def rigl_adam(
    learning_rate: optax.ScalarOrSchedule, density
) -> optax.GradientTransformation:
    return dynamic_sparse.rigl(
        optax.adam(learning_rate),
        density,
        every=50,
        end=200,
        layer_budget="uniform",
        where=masks.everything,
    )


def straight_adam(
    learning_rate: optax.ScalarOrSchedule, density
) -> optax.GradientTransformation:
    return straight_through.straight_through(
        optax.adam(learning_rate), density, where=masks.everything
    )


def alternating_adam(
    learning_rate: optax.ScalarOrSchedule, density
) -> optax.GradientTransformation:
    return ac_dc.ac_dc(
        optax.adam(learning_rate),
        density,
        warm_up=10,
        phase=20,
        last=50,
        total_steps=200,
        where=masks.everything,
    )


def powers(
    learning_rate: optax.ScalarOrSchedule, alpha
) -> optax.GradientTransformation:
    return powerpropagation.powerpropagation(
        optax.adam(learning_rate), alpha, where=masks.everything
    )


def gsm(
    learning_rate: optax.ScalarOrSchedule,
    compression,
    momentum,
    weight_decay,
    nesterov=False,
    accumulator_dtype=None,
) -> optax.GradientTransformation:
    return sparse_momentum.gsm(
        learning_rate,
        compression,
        momentum,
        weight_decay,
        nesterov=nesterov,
        accumulator_dtype=accumulator_dtype,
        where=masks.everything,
    )


def fw2(
    learning_rate: optax.ScalarOrSchedule, radius, support
) -> optax.GradientTransformation:
    return frank_wolfe.fw2(radius, support, learning_rate)


FACTORIES = {
    "prunadag": prunadag_optax.prunadag,
    "aware_adam": aware_adam,
    "prox_adam": proximal.prox_adam,
    "prox_rms": prox_rms,
    "prox_sgd": proximal.prox_sgd,
    "rmda": dual_averaging.rmda,
    "ramda": dual_averaging.ramda,
    "conditional_gradient": frank_wolfe.conditional_gradient,
    "fw2": fw2,
    "thresholded_adam": thresholded_adam,
    "rigl_adam": rigl_adam,
    "straight_adam": straight_adam,
    "alternating_adam": alternating_adam,
    "powers": powers,
    "gsm": gsm,
    "linbreg": bregman.linbreg,
    "adabreg": bregman.adabreg,
}


def one_group(path, leaf):
    del path, leaf
    return ()


# The targets are not sparse: the penalties are weak, the balls are large, and no weight
# has to be zero. FW1 has no learning rate, which the suite of contrib asks for.
WEAK_L1 = {"regulariser": regularisers.l1(1e-4, where=masks.everything)}
WEAK_LASSO = {
    "regulariser": regularisers.group_lasso(1e-4, one_group, where=masks.everything)
}
L1 = {"regulariser": regularisers.l1(0.01, where=masks.everything)}
SLOW, FAST = {"learning_rate": 1e-3}, {"learning_rate": 0.1}
MOMENTUM = SLOW | {"momentum": 0.9, "weight_decay": 0.0}
BALL = {"radius": 1000.0, "support": 1.0}
METHODS = [
    ("aware_adam", FAST | {"density": 1.0}),
    ("prox_adam", FAST | WEAK_LASSO),
    ("prox_rms", {"learning_rate": 5e-3} | WEAK_L1),
    ("prox_sgd", SLOW | WEAK_LASSO),
    # A step of dual averaging is one from W_0, which is forgotten like 1 / t only: with
    # 1e-3 RMDA would not arrive, with 0.1 it does not stay in the valley.
    ("rmda", {"learning_rate": 0.01} | WEAK_LASSO),
    ("ramda", {"learning_rate": 0.01} | WEAK_L1),
    ("conditional_gradient", SLOW | BALL),
    ("thresholded_adam", FAST | {"k": 1.0}),
    # Dense, and with the exponent 1: no weight has to be zero, and some change sign.
    ("rigl_adam", FAST | {"density": 1.0}),
    ("straight_adam", FAST | {"density": 1.0}),
    ("alternating_adam", FAST | {"density": 1.0}),
    ("powers", FAST | {"alpha": 1.0}),
    ("gsm", MOMENTUM | {"compression": 1.5}),
    ("linbreg", SLOW | L1 | {"adaptive": bregman.Controller(0.0, every=5)}),
    ("adabreg", FAST | L1),
]
MORE_METHODS = [
    ("aware_adam", FAST | {"density": 1.0, "gradient_at": "pruned"}),
    ("fw2", SLOW | BALL),
    ("prox_adam", FAST | WEAK_L1 | {"corrected_metric": False}),
    ("prox_sgd", SLOW | WEAK_L1 | {"momentum": 0.9}),
    ("conditional_gradient", SLOW | BALL | {"ball": "k_sparse", "rescale": "relevant"}),
    ("thresholded_adam", FAST | {"k": 7, "scope": "leaf"}),
    (
        "gsm",
        MOMENTUM | {"compression": 1, "nesterov": True, "accumulator_dtype": "float32"},
    ),
    ("linbreg", SLOW | L1),
    ("linbreg", SLOW | L1 | {"delta": 2.0, "momentum": 0.5}),
    ("adabreg", FAST | L1 | {"adaptive": bregman.Controller(0.0, decay=0.95)}),
]


def suite(path, name, marker, names, *, edits=(), lookup=None, without=None):
    """A test class of optax that tests what `names` says instead of optax's own.

    Args:
      path: the test module's file inside optax.
      name: the class.
      marker: the line before which the module's own names are replaced; the line
        above it is blank.
      names: the module's names to replace, and their values.
      edits: further (old text, new text, how often the old occurs).
      lookup: the module's function from an optimizer's name to its factory.
      without: how the names of tests begin that are not about the optimizers listed.

    Returns:
      The class, or one that is skipped where optax does not ship such a module.
    """
    root = importlib.util.find_spec("optax").submodule_search_locations[0]
    file = pathlib.Path(root, path)
    if not file.exists() or Version(optax.__version__) < Version("0.2.7"):
        reason = f"optax {optax.__version__} ships no {path} like that of 0.2.7"
        missing = type(name, (unittest.TestCase,), {"test_suite": lambda self: None})
        return unittest.skip(reason)(missing)
    source = file.read_text()
    line = "globals().update(_replaced)"
    for old, new, times in [(f"\n\n{marker}", f"\n{line}\n{marker}", 1), *edits]:
        assert source.count(old) == times, (
            f"{path} of optax {optax.__version__} holds {old!r} {source.count(old)} "
            f"times, where this file expects {times}: adapt the splice to it."
        )
        source = source.replace(old, new)
    module = types.ModuleType(file.stem)
    module._replaced = names
    with warnings.catch_warnings():
        # sharding_test builds optax's own optimizers, of which noisy_sgd warns.
        warnings.filterwarnings("ignore", "Specifying a key will be required")
        exec(compile(source, str(file), "exec"), vars(module))
    if lookup:
        setattr(module, lookup, lambda *args: FACTORIES[args[-1]])
    tests = getattr(module, name)
    for test in [test for test in dir(tests) if without and test.startswith(without)]:
        delattr(tests, test)
    if jax.__version_info__ >= (0, 7, 2):  # what the sharding suite needs
        tests.skipTest = _fail_instead
    return tests


def _fail_instead(self, reason):
    # The cases for complex parameters, which are to be skipped, raise SkipTest.
    self.fail(f"the suite would skip this test: {reason}")


def entries(settings, **more):
    """Entries for the lists of optax, of settings of prunAdag or (name, settings)."""
    pairs = (s if isinstance(s, tuple) else ("prunadag", s) for s in settings)
    return [{"opt_name": name, "opt_kwargs": s, **more} for name, s in pairs]


def label(settings):
    return "_".join(str(value).replace(".", "") for value in settings.values())
