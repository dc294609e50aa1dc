"""A jaxpr as a flat list of equations over numbered values.

Calls that only group equations (jit, remat, closed calls) are inlined. A loop or a
branch keeps its bodies as programs over the same table of values. A function with a
derivative of its own keeps the derivative as one more body: inlined, `relu` would have
the gradient 0.5 at 0.

This is the only module that looks into jaxprs. It uses `jax.extend` and parameters of
equations, which may change from one release of JAX to the next.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util

# Equations that only group others.
_GROUPING = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_lin",
}
# Functions with a derivative of their own.
JVP, VJP = "custom_jvp_call", "custom_vjp_call"
# Where the bodies of loops and branches are.
_BODIES: dict[str, Callable[[dict[str, Any]], Sequence[Any]]] = {
    "scan": lambda params: [params["jaxpr"]],
    "cond": lambda params: params["branches"],
    "while": lambda params: [params["cond_jaxpr"], params["body_jaxpr"]],
}


class Values:
    """The values of a program and of its bodies: types, and the known constants."""

    def __init__(self) -> None:
        self.types: list[Any] = []
        self.constants: dict[int, Any] = {}

    def new(self, type_: Any) -> int:
        """The number of a new value of a type."""
        self.types.append(type_)
        return len(self.types) - 1

    def constant(self, value: Any) -> int:
        """The number of a new value that is known."""
        number = self.new(jax.typeof(value))
        self.constants[number] = value
        return number

    def shape(self, number: int) -> tuple[Any, ...]:
        """The shape of a value."""
        return tuple(getattr(self.types[number], "shape", ()))


@dataclasses.dataclass(frozen=True)
class Equation:
    """One primitive applied to numbered values."""

    primitive: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: dict[str, Any]
    bodies: tuple["Program", ...]
    source: Any

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name


class Program:
    """A jaxpr's equations, inlined.

    Args:
      values: the table that the values are added to.
      closed: the jaxpr with its constants.
      with_rules: whether functions with a derivative of their own keep it. Inside such
        a derivative they do not: it may call the function itself.
    """

    def __init__(self, values: Values, closed: Any, with_rules: bool = True) -> None:
        self._values, self._with_rules = values, with_rules
        self.equations: list[Equation] = []
        self.inputs = tuple(values.new(var.aval) for var in closed.jaxpr.invars)
        self.outputs = self._inline(closed, self.inputs)

    def _inline(
        self, closed: Any, inputs: Sequence[int], source: Any = None
    ) -> tuple[int, ...]:
        jaxpr, constants = (
            getattr(closed, "jaxpr", closed),
            getattr(closed, "consts", ()),
        )
        env = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update(
            zip(jaxpr.constvars, map(self._values.constant, constants), strict=True)
        )

        def number(var):
            is_literal = isinstance(var, core.Literal)
            return self._values.constant(var.val) if is_literal else env[var]

        for equation in jaxpr.eqns:
            read = tuple(map(number, equation.invars))
            env.update(
                zip(equation.outvars, self._add(equation, read, source), strict=True)
            )
        return tuple(map(number, jaxpr.outvars))

    def _add(
        self, equation: Any, inputs: tuple[int, ...], source: Any
    ) -> tuple[int, ...]:
        name = equation.primitive.name
        # What JAX's own functions are made of may not know the user's line.
        if source is None or own_line(equation.source_info) is not None:
            source = equation.source_info
        bodies = tuple(_BODIES.get(name, lambda params: ())(equation.params))
        if name in (JVP, VJP):
            rule = _rule(equation) if self._with_rules else None
            if rule is None:
                return self._inline(_called(equation.params), inputs, source)
            bodies = (_called(equation.params), rule)
        elif name in _GROUPING:
            return self._inline(_called(equation.params), inputs, source)
        outputs = tuple(self._values.new(var.aval) for var in equation.outvars)
        is_rule = name in (JVP, VJP)
        self.equations.append(
            Equation(
                equation.primitive,
                inputs,
                outputs,
                dict(equation.params),
                tuple(
                    Program(
                        self._values, body, self._with_rules and not (is_rule and k)
                    )
                    for k, body in enumerate(bodies)
                ),
                source,
            )
        )
        return outputs


def trace(function: Callable[..., Any], *arguments: Any) -> tuple[Values, Program, Any]:
    """The program of a function at the shapes of its arguments.

    Args:
      function: what is traced.
      *arguments: pytrees of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      The table of values, the program, and the output's pytree of shapes.
    """
    closed, output = jax.make_jaxpr(function, return_shape=True)(*arguments)
    values = Values()
    return values, Program(values, closed), output


def bind(primitive: Any, params: dict[str, Any], *operands: Any) -> list[Any]:
    """Applies a primitive.

    Args:
      primitive: the primitive.
      params: the parameters of its equation.
      *operands: its inputs.

    Returns:
      Its outputs, always as a list.
    """
    bound = primitive.get_bind_params(params)
    # Up to JAX 0.7: the functions to call and the rest.
    functions, bound = bound if isinstance(bound, tuple) else ((), bound)
    outputs = primitive.bind(*functions, *operands, **bound)
    return list(outputs) if primitive.multiple_results else [outputs]


def is_float(type_: Any) -> bool:
    """Whether values of a type have derivatives."""
    return jnp.issubdtype(type_.dtype, jnp.inexact)


def where(source: Any) -> str:
    """The user's line that an equation comes from.

    Args:
      source: the equation's source.

    Returns:
      "file.py:12 (function)", the innermost line outside installed packages if there is
      one.
    """
    frames = source_info_util.summarize(source, num_frames=60).splitlines()[::-1]
    frame = own_line(source) or next(iter(frames), "an unknown line")
    place, _, function = frame.partition(" ")
    file, *numbers = place.rsplit("/", 1)[-1].split(":")
    return f"{':'.join([file, *numbers[:1]])} {function}".strip()


def own_line(source: Any) -> str | None:
    """The innermost line outside installed packages, or None."""
    frames = source_info_util.summarize(source, num_frames=60).splitlines()[::-1]
    own = (frame for frame in frames if "-packages" not in frame and ":" in frame)
    return next(own, None)


def _called(params: dict[str, Any]) -> Any:
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return next(params[name] for name in names if name in params)


def _rule(equation: Any) -> Any:
    """The derivative that a function brings along, as a jaxpr.

    For a custom_jvp: (inputs, tangents of the float inputs) -> tangents of the outputs;
    for a custom_vjp: (inputs, cotangents of the outputs) -> those of the float inputs.
    None where an output has no derivative; such a function is inlined.
    """
    inputs = [var.aval for var in equation.invars]
    outputs = [var.aval for var in equation.outvars]
    is_moved = [is_float(type_) for type_ in inputs]
    if not all(map(is_float, outputs)) or not any(is_moved):
        return None

    def structs(types):
        return [jax.ShapeDtypeStruct(type_.shape, type_.dtype) for type_ in types]

    def of_floats(operands):
        def function(*floats):
            rest = iter(floats)
            mixed = [
                next(rest) if moved else operand
                for operand, moved in zip(operands, is_moved, strict=True)
            ]
            return bind(equation.primitive, equation.params, *mixed)

        return function, [
            x for x, moved in zip(operands, is_moved, strict=True) if moved
        ]

    def tangents(operands, directions):
        function, floats = of_floats(operands)
        return jax.jvp(function, floats, directions)[1]

    def cotangents(operands, directions):
        function, floats = of_floats(operands)
        return jax.vjp(function, *floats)[1](directions)

    floats = [type_ for type_, moved in zip(inputs, is_moved, strict=True) if moved]
    if equation.primitive.name == JVP:
        return jax.make_jaxpr(tangents)(structs(inputs), structs(floats))
    return jax.make_jaxpr(cotangents)(structs(inputs), structs(outputs))
