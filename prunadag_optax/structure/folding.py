"""Constants of removed units, moved into the next bias."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prunadag_optax.structure import program
from prunadag_optax.structure.checking import relative, without_state
from prunadag_optax.structure.groups import Structure, paths_of
from prunadag_optax.structure.program import Equation
from prunadag_optax.structure.small import Small, small_apply
from prunadag_optax.structure.trees import (
    Keep,
    checked_keep,
    not_traced,
    position_masks,
    shrink,
    zeroed,
)

# What a bias passes through before it is added, and an output before it gets one.
_CARRYING = ("broadcast_in_dim", "reshape", "squeeze", "convert_element_type")
_PRODUCTS = ("dot_general", "conv_general_dilated")


def fold(
    structure: Structure, keep: Keep, variables: Any, *inputs: Any
) -> tuple[Any, float]:
    """Moves what removed units would still say into the biases after them.

    A unit without incoming weights is not silent: it passes on act(bias). That
    constant, times the outgoing weights, is added to the next bias, or taken from the
    next running mean. This is exact where the unit is constant: after dense layers and
    convolutions without padding, but not at the border of padded ones.

    Args:
      structure: of `trace`.
      keep: group's name -> bool[size].
      variables: the variables, in full.
      *inputs: example inputs, on which the constants are read.

    Returns:
      The variables with other biases, still in full - `shrink` them - and the largest
      deviation of the small model from the full one whose removed units have their
      incoming weights zeroed and their biases kept, relative to the largest output.

    Raises:
      ValueError: if the structure was declared, or `keep` does not fit.

    >>> import jax, jax.numpy as jnp
    >>> from prunadag_optax import structure
    >>> def apply(p, x):
    ...     return jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["v"] + p["c"][None]
    >>> params = {
    ...     "w": jnp.ones((3, 4)),
    ...     "b": jnp.ones(4),
    ...     "v": jnp.ones((4, 2)),
    ...     "c": jnp.zeros(2),
    ... }
    >>> s = structure.trace(apply, params, jnp.ones((1, 3)))
    >>> keep = {"w": [True, True, True, False]}
    >>> folded, deviation = structure.fold(s, keep, params, jnp.ones((1, 3)))
    >>> folded["c"].tolist(), deviation
    ([1.0, 1.0], 0.0)
    """
    kept = checked_keep(structure, keep)
    leaves = dict(zip(paths_of(variables), jax.tree.leaves(variables), strict=True))
    masks = position_masks(structure, kept)
    for path, axis in _incoming(structure, masks):
        leaves[path] = zeroed(leaves[path], {axis: masks[path][axis]})
    treedef = jax.tree.structure(variables)
    recorder = _Recorder(structure, {})
    expected = recorder([*leaves.values(), *jax.tree.leaves(inputs)])

    paths = list(structure.shapes)
    folded = dict(zip(paths, jax.tree.leaves(variables), strict=True))
    for equation, operands in recorder.products:
        for side, summed, gone in _read(structure, masks, equation):
            constant = _constant(operands[1 - side], summed[1 - side], gone)
            given = [*operands]
            given[1 - side] = constant
            (said,) = program.bind(equation.primitive, equation.params, *given)
            bias = _next_bias(structure, equation.outputs[0])
            if bias is None:
                continue
            path, sign = bias
            shape = folded[path].shape
            middle = tuple(size // 2 for size in said.shape[: said.ndim - len(shape)])
            if said[middle].shape == shape:
                folded[path] = folded[path] + sign * said[middle].astype(
                    folded[path].dtype
                )
    result = jax.tree.unflatten(treedef, list(folded.values()))
    small = small_apply(structure, kept)(shrink(structure, kept, result), *inputs)
    return result, relative(
        without_state(structure, small), without_state(structure, expected)
    )


class _Recorder(Small):
    """Runs the whole program and keeps the operands of its products."""

    def __init__(self, structure: Structure, keep: Mapping[str, np.ndarray]) -> None:
        super().__init__(structure, keep)
        self.products: list[tuple[Equation, list[Any]]] = []
        self._outermost = {
            id(e) for e in not_traced(structure, "fold").program.equations
        }

    def _apply(self, equation: Equation, operands: list[Any]) -> list[Any]:
        if equation.name in _PRODUCTS and id(equation) in self._outermost:
            self.products.append((equation, operands))
        return super()._apply(equation, operands)


def _summed(equation: Equation) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes over which a product sums, of its two operands."""
    numbers = equation.params["dimension_numbers"]
    if equation.name == "dot_general":
        return numbers[0]
    return (numbers.lhs_spec[1],), (numbers.rhs_spec[1],)


def _incoming(
    structure: Structure, masks: Mapping[str, Mapping[int, np.ndarray]]
) -> Iterator[tuple[str, int]]:
    """The axes along which weights, and not biases, make removed units."""
    traced = not_traced(structure, "fold")
    paths = list(structure.shapes)
    operands = {
        axis.origin
        for equation in traced.program.equations
        if equation.name in _PRODUCTS
        for number in equation.inputs
        for axis in traced.tracer.of(number)
    }
    for path, axes in masks.items():
        for axis in axes:
            origin = paths.index(path), axis
            if origin in operands and origin not in traced.tracer.consumed:
                yield path, axis


def _read(
    structure: Structure,
    masks: Mapping[str, Mapping[int, np.ndarray]],
    equation: Equation,
) -> Iterator[tuple[int, tuple[Any, Any], np.ndarray]]:
    """Where a product reads removed units: the weights' side, the axes, which go."""
    tracer = not_traced(structure, "fold").tracer
    paths = list(structure.shapes)
    summed = _summed(equation)
    if len(summed[0]) != 1 or equation.params.get("feature_group_count", 1) != 1:
        return
    for side in (0, 1):
        origin = tracer.of(equation.inputs[side])[summed[side][0]].origin
        mask = (
            None if origin is None else masks.get(paths[origin[0]], {}).get(origin[1])
        )
        if mask is not None:
            yield side, (summed[0][0], summed[1][0]), ~mask


def _constant(value: Any, axis: int, gone: np.ndarray) -> Any:
    """What the removed units say at the first place, and zeros for the others."""
    moved = jnp.moveaxis(value, axis, -1)
    first = moved.reshape(-1, moved.shape[-1])[0]
    constant = jnp.where(gone, first, jnp.zeros((), value.dtype))
    return jnp.moveaxis(jnp.broadcast_to(constant, moved.shape), -1, axis)


def _next_bias(structure: Structure, number: int) -> tuple[str, int] | None:
    """The variable that is added to a value next, or taken from it: path and sign."""
    traced = not_traced(structure, "fold")
    equations = traced.program.equations
    while True:
        users = [equation for equation in equations if number in equation.inputs]
        if len(users) != 1:
            return None
        (user,) = users
        if user.name in ("add", "add_any", "sub"):
            others = [other for other in user.inputs if other != number]
            path = _variable(structure, others[0]) if others else None
            if path is None or (user.name == "sub" and user.inputs[0] != number):
                return None
            return path, -1 if user.name == "sub" else 1
        if user.name != "convert_element_type":
            return None
        number = user.outputs[0]


def _variable(structure: Structure, number: int) -> str | None:
    """The path of the variable that a value is, up to its shape."""
    traced = not_traced(structure, "fold")
    made_by = {
        output: equation
        for equation in traced.program.equations
        for output in equation.outputs
    }
    while number in made_by and made_by[number].name in _CARRYING:
        number = made_by[number].inputs[0]
    inputs = traced.program.inputs[: len(structure.shapes)]
    return list(structure.shapes)[inputs.index(number)] if number in inputs else None
