"""What the dense layers of a model of Flax are given (needs `flax`)."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import working

_USAGE = (
    "Write scores.layer_inputs(model.apply, variables, batches) for linen, "
    "scores.layer_inputs(model, batches) for nnx."
)
_SQUARES = "input_squares"


class InputSquares(nnx.Variable):
    """The sums of squares of what a layer was given."""


def squares_of(arguments: tuple[Any, ...], no_batches: str) -> dict[str, jax.Array]:
    """The sums of squares of the inputs of each dense layer, by its path.

    Args:
      arguments: (forward, variables, batches), (model, batches) or (forward, model,
        batches), as `scores.layer_inputs` has them.
      no_batches: the message where there is no batch.

    Returns:
      From the path of a layer to the sums, of the shape of what its kernel contracts.

    Raises:
      ValueError: as `scores.layer_inputs`.
    """
    if len(arguments) == 2 and isinstance(arguments[0], nnx.Module):
        return _of_model(_call, *arguments, no_batches)
    if len(arguments) != 3 or isinstance(arguments[0], nn.Module | nnx.Module):
        got = ", ".join(type(argument).__name__ for argument in arguments)
        raise ValueError(f"arguments must be a model and data; got ({got}). {_USAGE}")
    forward, of, batches = arguments
    checks.function("forward", forward, "variables", "batch")
    if isinstance(of, nnx.Module):
        return _of_model(forward, of, batches, no_batches)
    checks.parameters("variables", of)
    return _of_variables(forward, of, batches, no_batches)


def _call(model: Any, batch: Any) -> Any:
    return model(batch)


def _sum_of_squares(x: Any, axes: tuple[int, ...]) -> jax.Array:
    """Over all axes but those that a layer contracts, which come in their order."""
    x = working(x)
    kept = [axis % x.ndim for axis in axes]
    squares = jnp.sum(x * x, [axis for axis in range(x.ndim) if axis not in kept])
    order = sorted(range(len(kept)), key=lambda i: kept[i])
    return jnp.transpose(squares, [order.index(i) for i in range(len(kept))])


def _contracted(layer: Any) -> tuple[int, ...]:
    axis = getattr(layer, "axis", -1)
    return tuple(axis) if isinstance(axis, tuple | list) else (axis,)


def _total(
    step: Callable[[Any], Any], batches: Iterable[Any], no_batches: str
) -> dict[str, jax.Array]:
    checks.batches(batches)
    total = None
    for batch in batches:
        found = step(batch)
        if not found:
            raise ValueError(
                "forward must call a dense layer: nn.Dense or nn.DenseGeneral, "
                "nnx.Linear or nnx.LinearGeneral; got a model that calls none."
            )
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError(no_batches)
    return total


# linen.


def _of_variables(
    forward: Any, variables: Any, batches: Any, no_batches: str
) -> dict[str, jax.Array]:
    @jax.jit
    def step(batch):
        found: dict[str, jax.Array] = {}

        def at_call(call, args, kwargs, context):
            layer = context.module
            dense = isinstance(layer, nn.Dense | nn.DenseGeneral)
            if dense and context.method_name == "__call__":
                x = args[0] if args else kwargs["inputs"]
                name = "/".join(layer.path)
                squares = _sum_of_squares(x, _contracted(layer))
                found[name] = found[name] + squares if name in found else squares
            return call(*args, **kwargs)

        with nn.intercept_methods(at_call):
            forward(variables, batch)
        return found

    def checked(batch):
        try:
            return step(batch)
        except jax.errors.UnexpectedTracerError:
            raise ValueError(
                "forward must call its dense layers outside of nn.scan, nn.remat and "
                "the like, which hide what a layer is given. Use a model with a loop "
                "over its layers here."
            ) from None

    return _total(checked, batches, no_batches)


# nnx.


def _of_model(
    forward: Any, model: Any, batches: Any, no_batches: str
) -> dict[str, jax.Array]:
    # A second model of the same arrays: the user's stays as it is.
    double = nnx.merge(*nnx.split(model))
    double.eval()
    for _, layer in nnx.iter_modules(double):
        if isinstance(layer, nnx.Linear | nnx.LinearGeneral):
            shape = layer.kernel[...].shape[: len(_contracted(layer))]
            dtype = working(layer.kernel[...]).dtype
            setattr(layer, _SQUARES, InputSquares(jnp.zeros(shape, dtype)))
            object.__setattr__(layer, "__class__", _summing(type(layer)))
    graph, state = nnx.split(double)

    @jax.jit
    def step(state, batch):
        model = nnx.merge(graph, state)
        forward(model, batch)
        return nnx.to_pure_dict(nnx.state(model, InputSquares))

    def by_layer(batch):
        found = jax.tree_util.tree_leaves_with_path(step(state, batch))
        return {"/".join(str(key.key) for key in path[:-1]): x for path, x in found}

    return _total(by_layer, batches, no_batches)


@functools.cache
def _summing(kind: type) -> type:
    """The class of a layer that also sums the squares of what it is given."""

    class Summing(kind):
        def __call__(self, inputs, *args, **kwargs):
            squares = getattr(self, _SQUARES)
            squares[...] += _sum_of_squares(inputs, _contracted(self))
            return super().__call__(inputs, *args, **kwargs)

    return Summing
