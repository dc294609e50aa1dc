"""The same program at smaller sizes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prunadag_optax.structure import program
from prunadag_optax.structure.groups import Structure, trace
from prunadag_optax.structure.program import JVP, VJP, Equation, Program
from prunadag_optax.structure.rules import POSITIONAL, Axis
from prunadag_optax.structure.trees import (
    Keep,
    checked_keep,
    checked_shapes,
    not_traced,
    removed_atoms,
    still_dividing,
)

Masks = list[np.ndarray | None]


def small_apply(structure: Structure, keep: Keep) -> Callable[..., Any]:
    """The model as a function of the smaller variables.

    The jaxpr of `apply` is run with the shapes that are left, so that the function
    equals the model whose removed units are masked: a LayerNorm still divides by the
    size that it had, attention still scales by the head dimension that it had.

    Args:
      structure: of `trace`.
      keep: group's name -> bool[size], True for the units that stay. Groups that are
        not named stay whole.

    Returns:
      (small variables, *inputs) -> output, for inputs of any batch size; `jax.jit`,
      `jax.grad`, `jax.vmap` and `jax.export` apply. The small variables are those of
      `shrink`.

    Raises:
      ValueError: if the structure was declared, or `keep` does not fit.

    >>> import jax, jax.numpy as jnp
    >>> from prunadag_optax import structure
    >>> def apply(params, x):
    ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
    >>> params = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
    >>> s = structure.trace(apply, params, jnp.ones((1, 3)))
    >>> keep = {"in": [True, False] * 4}
    >>> small = structure.shrink(s, keep, params)
    >>> structure.small_apply(s, keep)(small, jnp.ones((1, 3)))
    Array([[12., 12.]], dtype=float32)
    """
    not_traced(structure, "small_apply")
    kept = checked_keep(structure, keep)
    known: dict[Any, Small] = {}

    def apply(variables, *inputs):
        checked_shapes(structure, kept, variables)
        leaves, treedef = jax.tree.flatten((variables, inputs))
        key = (treedef, tuple(str(jax.typeof(leaf)) for leaf in leaves))
        if key not in known:
            known[key] = Small(_at(structure, kept, variables, inputs), kept)
        return known[key](leaves)

    return apply


def _at(
    structure: Structure,
    keep: Mapping[str, np.ndarray],
    variables: Any,
    inputs: tuple[Any, ...],
) -> Structure:
    """The structure at other inputs or dtypes, traced again if they differ."""
    traced = not_traced(structure, "small_apply")
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(variables)]
    structs, treedef = jax.tree.flatten(traced.variables)
    given = jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), inputs)
    known = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), traced.inputs)
    if given == known and dtypes == [struct.dtype for struct in structs]:
        return structure
    full = [
        jax.ShapeDtypeStruct(struct.shape, dtype)
        for struct, dtype in zip(structs, dtypes, strict=True)
    ]
    again = trace(
        traced.apply,
        jax.tree.unflatten(treedef, full),
        *inputs,
        state=traced.state,
        freeze=traced.freeze,
    )
    wrong = [name for name in keep if _places(structure, name) != _places(again, name)]
    if wrong:
        shapes = [list(jnp.shape(leaf)) for leaf in jax.tree.leaves(inputs)]
        raise ValueError(
            f"At inputs of shapes {shapes} the model does not have the group "
            f"{wrong[0]!r} that it had when it was traced, so its units cannot be "
            "removed there. Trace the model at these inputs: structure.trace(apply, "
            "variables, *inputs)."
        )
    return again


def _places(structure: Structure, name: str) -> list[Any]:
    """Where a group's units are; empty if there is no such group."""
    return [
        (member.path, member.axis, member.positions.tolist())
        for group in structure.groups
        if group.name == name
        for member in group.members
    ]


class Small:
    """A traced program without the units that are removed."""

    def __init__(self, structure: Structure, keep: Mapping[str, np.ndarray]) -> None:
        traced = not_traced(structure, "small_apply")
        self._traced, self._tracer = traced, traced.tracer
        self._values = traced.tracer.values
        self._alive = self._tracer.labels.alive(removed_atoms(structure, keep))
        self._masks: dict[int, np.ndarray | None] = {}

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """The output, from the leaves of the smaller variables and of the inputs."""
        outputs = self._run(self._traced.program, leaves)
        return jax.tree.unflatten(jax.tree.structure(self._traced.output), outputs)

    def mask(self, axis: Axis) -> np.ndarray | None:
        """Which positions stay; None if all of them do."""
        if id(axis) not in self._masks:
            mask = None
            if axis.ids is not None:
                mask = self._alive[self._tracer.resolved(axis)]
            self._masks[id(axis)] = None if mask is None or mask.all() else mask
        return self._masks[id(axis)]

    def masks(self, number: int) -> Masks:
        """The masks of a value's axes."""
        return [self.mask(axis) for axis in self._tracer.of(number)]

    def shape(self, number: int) -> tuple[Any, ...]:
        """The shape that is left of a value."""
        sizes = zip(self._values.shape(number), self.masks(number), strict=True)
        return tuple(size if mask is None else int(mask.sum()) for size, mask in sizes)

    def _cut(self, value: Any, number: int) -> Any:
        for axis, mask in enumerate(self.masks(number)):
            if mask is not None:
                value = jnp.take(value, np.flatnonzero(mask), axis=axis)
        return value

    def _run(self, body: Program, inputs: Sequence[Any]) -> list[Any]:
        env = dict(zip(body.inputs, inputs, strict=True))

        def read(number):
            if number not in env:
                env[number] = self._cut(self._values.constants[number], number)
            return env[number]

        for equation in body.equations:
            outputs = self._apply(
                equation, [read(number) for number in equation.inputs]
            )
            for number, value in zip(equation.outputs, outputs, strict=True):
                if tuple(jnp.shape(value)) != self.shape(number):
                    raise AssertionError(
                        f"{equation.name} at {program.where(equation.source)} gave "
                        f"{jnp.shape(value)} where {self.shape(number)} is left."
                    )
                env[number] = value
        return [read(number) for number in body.outputs]

    def _apply(self, equation: Equation, operands: list[Any]) -> list[Any]:
        name, params = equation.name, dict(equation.params)
        if name in _CALLS:
            return _CALLS[name](self, equation, operands)
        if name == "slice":
            return [self._slice(equation, operands[0])]
        if name in POSITIONAL:
            outputs = program.bind(equation.primitive, params, *operands)
            return [
                self._cut(value, number)
                for value, number in zip(outputs, equation.outputs, strict=True)
            ]
        if name == "sharding_constraint":
            # What is left of an axis may no longer fill all devices equally.
            if not isinstance(params["sharding"], jax.sharding.NamedSharding):
                return operands
            shape = self.shape(equation.outputs[0])
            params["sharding"] = still_dividing(params["sharding"], shape)
        params.update(self._sizes(equation))
        return program.bind(equation.primitive, params, *operands)

    def _sizes(self, equation: Equation) -> dict[str, Any]:
        """The parameters of an equation in which sizes stand."""
        name, params = equation.name, equation.params
        if name == "broadcast_in_dim":
            return {"shape": self.shape(equation.outputs[0])}
        if name == "reshape":
            return {"new_sizes": self.shape(equation.outputs[0])}
        if name == "split":
            along = params["axis"]
            return {
                "sizes": tuple(self.shape(number)[along] for number in equation.outputs)
            }
        if name == "conv_general_dilated":
            groups = self.mask(self._tracer.conv_groups[equation.outputs[0]])
            count = (
                params["feature_group_count"] if groups is None else int(groups.sum())
            )
            return {"feature_group_count": count}
        if name in ("gather", "dynamic_slice"):
            old, new = (
                self._values.shape(equation.inputs[0]),
                self.shape(equation.inputs[0]),
            )
            sizes = zip(params["slice_sizes"], old, new, strict=True)
            return {
                "slice_sizes": tuple(b if size == a else size for size, a, b in sizes)
            }
        return {}

    def _slice(self, equation: Equation, operand: Any) -> Any:
        """The positions of a slice that are left, as a slice where they are one."""
        params = equation.params
        start, stop = list(params["start_indices"]), list(params["limit_indices"])
        stride = list(params["strides"] or [1] * len(start))
        scattered = {}
        for axis, mask in enumerate(self.masks(equation.inputs[0])):
            if mask is None:
                continue
            chosen = np.arange(start[axis], stop[axis], stride[axis])
            index = (np.cumsum(mask) - 1)[chosen[mask[chosen]]]
            steps = set(np.diff(index).tolist()) or {1}
            if index.size and len(steps) == 1:
                start[axis], stride[axis] = int(index[0]), steps.pop()
                stop[axis] = int(index[-1]) + 1
            else:
                scattered[axis] = index
                start[axis], stop[axis], stride[axis] = 0, int(mask.sum()), 1
        value = lax.slice(operand, start, stop, stride)
        for axis, index in scattered.items():
            value = jnp.take(value, index, axis=axis)
        return value

    def _scan(self, equation: Equation, operands: list[Any]) -> list[Any]:
        params, (body,) = equation.params, equation.bodies
        first = params["num_consts"]
        last = first + params["num_carry"]
        constants, initial, stacked = (
            operands[:first],
            operands[first:last],
            operands[last:],
        )

        def step(carry, xs):
            outputs = self._run(body, [*constants, *carry, *xs])
            return outputs[: last - first], outputs[last - first :]

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry, outputs = lax.scan(step, initial, stacked, **options)
        return [*carry, *outputs]

    def _while(self, equation: Equation, operands: list[Any]) -> list[Any]:
        condition, body = equation.bodies
        first = equation.params["cond_nconsts"]
        last = first + equation.params["body_nconsts"]
        return lax.while_loop(
            lambda carry: self._run(condition, [*operands[:first], *carry])[0],
            lambda carry: self._run(body, [*operands[first:last], *carry]),
            operands[last:],
        )

    def _cond(self, equation: Equation, operands: list[Any]) -> list[Any]:
        branches = [
            lambda *args, body=body: self._run(body, args) for body in equation.bodies
        ]
        return lax.switch(operands[0], branches, *operands[1:])

    def _own_jvp(self, equation: Equation, operands: list[Any]) -> list[Any]:
        function, rule = equation.bodies

        def own_rule(primals, tangents):
            floats = [
                t for t, p in zip(tangents, primals, strict=True) if program.is_float(p)
            ]
            return tuple(wrapped(*primals)), tuple(self._run(rule, [*primals, *floats]))

        wrapped = jax.custom_jvp(lambda *args: tuple(self._run(function, args)))
        wrapped.defjvp(own_rule)
        return list(wrapped(*operands))

    def _own_vjp(self, equation: Equation, operands: list[Any]) -> list[Any]:
        function, rule = equation.bodies

        def forward(*args):
            return tuple(self._run(function, args)), args

        def backward(args, cotangents):
            floats = iter(self._run(rule, [*args, *cotangents]))
            return tuple(
                next(floats)
                if program.is_float(arg)
                else np.zeros(jnp.shape(arg), jax.dtypes.float0)
                for arg in args
            )

        wrapped = jax.custom_vjp(lambda *args: tuple(self._run(function, args)))
        wrapped.defvjp(forward, backward)
        return list(wrapped(*operands))


_CALLS: dict[str, Callable[[Small, Equation, list[Any]], list[Any]]] = {
    "scan": Small._scan,
    "while": Small._while,
    "cond": Small._cond,
    JVP: Small._own_jvp,
    VJP: Small._own_vjp,
}
