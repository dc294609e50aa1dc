"""The methods to time, and the bytes that each must move.

The floor of a method is the bytes it must move, each array read or written as often as
the data flow demands and nothing else stored. prunAdag needs two passes, since no
component can be classified before the threshold and the norms of all are known: one
reads g and x; the other reads g, x, w^O, w^D and writes x, w^O, w^D.
"""

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from benchmarks import timing, trees
from experimental import pallas
from prunadag_optax import ScaleByPrunadagState, prunadag, scale_by_prunadag

RATE = 0.05
_Key = TypeVar("_Key", bound=Hashable)


class Passes(NamedTuple):
    """How often a method must read or write each kind of array in a step.

    Attributes:
      gradient: times that the gradient is read.
      params: times that the parameters are read or written.
      accumulators: sum over the accumulators of the times each is read or written.
    """

    gradient: int
    params: int
    accumulators: int


COPY = Passes(gradient=0, params=2, accumulators=0)
ADAGRAD = Passes(gradient=1, params=2, accumulators=2)
ADAM = Passes(gradient=1, params=2, accumulators=4)
PRUNADAG = Passes(gradient=2, params=3, accumulators=4)
# The average is read by both passes and written by one of them.
WITH_MOMENTUM = PRUNADAG._replace(accumulators=7)


class Optimizer(NamedTuple):
    """A method to time.

    Attributes:
      tx: the transformation.
      passes: its floor.
      accumulators: how many arrays like the parameters its state has.
      dtype: of parameters and gradient; accumulators are float32.
      step: function (params, state, gradient) -> (params, state) where it is another
        than applying the updates of `tx`.
    """

    tx: optax.GradientTransformation
    passes: Passes
    accumulators: int
    dtype: str = "float32"
    step: Callable[..., Any] | None = None


def floor_bytes(size: int, passes: Passes, dtype: str = "float32") -> int:
    """The bytes that a step must move.

    Args:
      size: n.
      passes: of the method.
      dtype: of parameters and gradient; accumulators are float32.

    Returns:
      Bytes; 36 n for prunAdag in float32.
    """
    item = jnp.dtype(dtype).itemsize
    return size * ((passes.gradient + passes.params) * item + 4 * passes.accumulators)


def optimizers(only: Collection[str] | None = None) -> dict[str, Optimizer]:
    """What is timed: the references first, then prunAdag.

    Args:
      only: names to keep beside the references; None keeps all.

    Returns:
      The methods by name.
    """
    # As an optimizer, so that it is timed like one: x + 1 in place of x.
    copy = optax.stateless(lambda g, x: jax.tree.map(jnp.ones_like, x))
    references = {
        "copy": Optimizer(copy, COPY, 0),
        "optax.adagrad": Optimizer(optax.adagrad(RATE), ADAGRAD, 1),
        "optax.adam": Optimizer(optax.adam(1e-3), ADAM, 2),
    }
    own = {}
    for scope in ("global", "leaf"):
        for variant in ("v1", "v2", "v3", "v4"):
            tx = prunadag(RATE, variant=variant, scope=scope)
            own[f"{variant}, {scope}"] = Optimizer(tx, PRUNADAG, 2)
    for relevance in ("magnitude", "taylor"):
        tx = prunadag(RATE, variant="v4", relevance=relevance)
        own[f"v4, global, {relevance}"] = Optimizer(tx, PRUNADAG, 2)
    tx = prunadag(RATE, variant="v4", momentum=0.9)
    own["v4, global, momentum"] = Optimizer(tx, WITH_MOMENTUM, 3)
    for variant in ("v3", "v4"):
        tx = prunadag(RATE, variant=variant, accumulator_dtype="float32")
        own[f"{variant}, global, bfloat16"] = Optimizer(tx, PRUNADAG, 2, "bfloat16")
    if jax.default_backend() == "gpu":
        for variant in ("v3", "v4"):
            own[f"{variant}, global, Pallas"] = with_pallas(variant)
    return references | {
        name: method for name, method in own.items() if only is None or name in only
    }


def with_pallas(variant: str) -> Optimizer:
    """The step as Pallas kernels, which on a CPU are only interpreted."""

    def step(params, state, gradient):
        weights = state.optimisable_weight, state.decreasable_weight
        params, w_o, w_d, hint = pallas.step(
            params,
            (*weights, state.threshold_hint),
            gradient,
            learning_rate=RATE,
            decrease=1.0 / (state.count + 1.0),
            variant=variant,
        )
        return params, ScaleByPrunadagState(state.count + 1, w_o, w_d, None, hint)

    tx = scale_by_prunadag(RATE, variant=variant)
    return Optimizer(tx, PRUNADAG, 2, step=step)


def optimizer_step(tx: optax.GradientTransformation) -> Any:
    """The function (params, state, gradient) -> (params, state) of an optimizer."""

    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compile_all(
    methods: Mapping[_Key, Optimizer], size: int, shapes: trees.Shapes | None = None
) -> dict[_Key, timing.Step]:
    """Compiles a step of every method on the same parameters and gradients.

    Args:
      methods: by name.
      size: n.
      shapes: of the leaves; None is a flat array.

    Returns:
      The compiled steps by name.
    """
    data = {
        dtype: jax.tree.map(
            lambda x: trees.as_tree(x, shapes), trees.random_data(size, dtype)
        )
        for dtype in sorted({method.dtype for method in methods.values()})
    }
    steps = {}
    for name, method in timing.progress(methods.items(), f"compiling, n = {size}"):
        params, gradients = data[method.dtype]
        # Copies: buffers that are donated must be the method's own.
        carry = jax.tree.map(jnp.copy, params), method.tx.init(params)
        step = method.step or optimizer_step(method.tx)
        steps[name] = timing.compile_step(step, carry, gradients)
    return steps
