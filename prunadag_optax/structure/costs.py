"""Parameters and floating-point operations, as XLA counts them, at any sizes."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from prunadag_optax._common import tables
from prunadag_optax.structure.groups import Structure, Traced
from prunadag_optax.structure.program import JVP, VJP, Equation, Program
from prunadag_optax.structure.rules import CUMULATIVE, ELEMENTWISE, REDUCTIONS
from prunadag_optax.structure.trees import Keep, checked_keep, position_masks

# What XLA counts as a transcendental and not as an operation, or not at all.
_FREE = frozenset(
    ["atan2", "bitcast_convert_type", "cbrt", "copy", "copy_p", "cos", "erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "name", "pow", "reduce_precision", "rsqrt", "sin", "sqrt", "stop_gradient", "tan", "tanh", "real", "imag", "complex", "sharding_constraint", "pvary"]
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model takes.

    Attributes:
      params: the number of values in the variables.
      flops: floating-point operations of one call at the traced inputs, a multiplication
        and an addition counted as two; None for a declared structure.
      units: group's name -> (params, flops) that one more unit fewer would save, on
        average.
    """

    params: int
    flops: float | None
    units: Mapping[str, tuple[float, float | None]] = dataclasses.field(
        default_factory=dict
    )

    def __str__(self) -> str:
        return tables.to_text(
            {
                "group": ["in all", *self.units],
                "params": [
                    self.params,
                    *(round(params, 1) for params, _ in self.units.values()),
                ],
                "flops": [self.flops, *(flops for _, flops in self.units.values())],
            }
        )


Costs = Callable[[Mapping[str, np.ndarray]], Cost]


def cost(structure: Structure, keep: Keep | None = None) -> Cost:
    """Parameters and operations of the model, whole or with the units that stay.

    Operations are counted as XLA does before it optimises: products, sums and what is
    done to each element; taps of a convolution that fall on its padding and
    transcendental functions are not counted. A loop counts its body once for each step,
    a `while` loop once, and a branch as the dearest of its bodies.

    Args:
      structure: of `trace`, or of `declare` (then without operations).
      keep: group's name -> bool[size]; None for the whole model.

    Returns:
      The cost, in all and a unit of each group.

    >>> import jax.numpy as jnp
    >>> from prunadag_optax import structure
    >>> params = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
    >>> apply = lambda params, x: x @ params["in"] @ params["out"]
    >>> s = structure.trace(apply, params, jnp.ones((1, 3)))
    >>> structure.cost(s)
    Cost(params=40, flops=80.0, units={'in': (5.0, 10.0)})
    """
    kept = checked_keep(structure, keep or {})
    costs = costs_of(structure)
    now = costs(kept)
    units = {}
    for group in structure.groups:
        mask = kept.get(group.name, np.ones(group.size, bool))
        if mask.sum() == 1:
            continue
        fewer = mask.copy()
        fewer[np.flatnonzero(mask)[-1]] = False
        then = costs({**kept, group.name: fewer})
        flops = (
            None if now.flops is None or then.flops is None else now.flops - then.flops
        )
        units[group.name] = (float(now.params - then.params), flops)
    return dataclasses.replace(now, units=units)


def costs_of(structure: Structure) -> Costs:
    """A function from the units that stay to the cost, quick to call many times."""
    count = None if structure.traced is None else _Counter(structure.traced)

    def costs(keep: Mapping[str, np.ndarray]) -> Cost:
        masks = position_masks(structure, keep)
        params = 0
        for path, struct in structure.shapes.items():
            sizes = list(struct.shape)
            for axis, mask in masks.get(path, {}).items():
                sizes[axis] = int(mask.sum())
            params += math.prod(sizes)
        if count is None:
            return Cost(params, None)
        removed = [
            group.atoms[~keep[group.name]]
            for group in structure.groups
            if group.name in keep and group.atoms is not None
        ]
        return Cost(
            params, count(np.concatenate([np.zeros(0, int), *removed]).astype(int))
        )

    return costs


class _Counter:
    """The operations of a program as sums of products of sizes of axes."""

    def __init__(self, traced: Traced) -> None:
        self._tracer, self._values = traced.tracer, traced.tracer.values
        # Axes with the same sets have the same size.
        self._kinds: dict[bytes, int] = {}
        self._ids: list[np.ndarray] = []
        self._known: dict[int, int] = {}
        self._fixed: list[int] = []
        self._terms: dict[tuple[int, ...], float] = collections.defaultdict(float)
        self._add(traced.program, 1.0)

    def __call__(self, removed: np.ndarray) -> float:
        alive = self._tracer.labels.alive(removed)
        sizes = [
            int(alive[ids].sum()) if ids.size > 1 else ids.size for ids in self._ids
        ]
        return sum(
            factor * math.prod(sizes[kind] for kind in kinds)
            for kinds, factor in self._terms.items()
        )

    def _kind(self, axis: Any) -> int:
        if id(axis) not in self._known:
            ids = (
                np.zeros(1, np.int32)
                if axis.ids is None
                else self._tracer.resolved(axis)
            )
            kind = self._kinds.setdefault(ids.tobytes(), len(self._kinds))
            if kind == len(self._ids):
                self._ids.append(ids)
            self._known[id(axis)] = kind
        return self._known[id(axis)]

    def _shape(self, number: int) -> list[int]:
        return [self._kind(axis) for axis in self._tracer.of(number) if len(axis) != 1]

    def _term(self, factor: float, *kinds: int) -> None:
        self._terms[tuple(sorted(kinds))] += factor

    def _add(self, program: Program, times: float) -> None:
        for equation in program.equations:
            name = equation.name
            if equation.bodies:
                self._add_bodies(equation, times)
            elif name == "dot_general":
                (summed, _), _ = equation.params["dimension_numbers"]
                left = self._tracer.of(equation.inputs[0])
                inner = [
                    self._kind(left[axis]) for axis in summed if len(left[axis]) != 1
                ]
                self._term(2 * times, *self._shape(equation.outputs[0]), *inner)
            elif name == "conv_general_dilated":
                self._add_convolution(equation, times)
            elif name in REDUCTIONS or name in ("argmax", "argmin"):
                self._term(times, *self._shape(equation.inputs[0]))
                self._term(-times, *self._shape(equation.outputs[0]))
            elif name.startswith("reduce_window") or name in CUMULATIVE:
                sizes = equation.params.get("window_dimensions", (2,))
                self._term(
                    times * (math.prod(sizes) - 1), *self._shape(equation.outputs[0])
                )
            elif name == "integer_pow":
                power = abs(equation.params["y"])
                products = max(power.bit_length() + power.bit_count() - 2, 0)
                self._term(times * products, *self._shape(equation.outputs[0]))
            elif name in ELEMENTWISE and name not in _FREE:
                self._term(times, *self._shape(equation.outputs[0]))

    def _add_bodies(self, equation: Equation, times: float) -> None:
        name, bodies = equation.name, equation.bodies
        if name == "scan":
            self._add(bodies[0], times * equation.params["length"])
        elif name in (JVP, VJP):
            self._add(bodies[0], times)
        elif name == "while":
            for body in bodies:
                self._add(body, times)
        else:
            # The dearest branch at full size.
            before = dict(self._terms)
            tries = []
            for body in bodies:
                self._terms = collections.defaultdict(float)
                self._add(body, times)
                tries.append((self(np.zeros(0, int)), self._terms))
            best = max(tries, key=lambda entry: entry[0])[1]
            self._terms = collections.defaultdict(float, before)
            for kinds, factor in best.items():
                self._terms[kinds] += factor

    def _add_convolution(self, equation: Equation, times: float) -> None:
        params = equation.params
        numbers = params["dimension_numbers"]
        image, kernel = (self._values.shape(number) for number in equation.inputs)
        out_shape = self._values.shape(equation.outputs[0])
        taps = 1
        for axis in range(len(image) - 2):
            taps *= _valid_taps(
                image[numbers.lhs_spec[2 + axis]],
                kernel[numbers.rhs_spec[2 + axis]],
                out_shape[numbers.out_spec[2 + axis]],
                params["window_strides"][axis],
                params["padding"][axis][0],
                params["lhs_dilation"][axis],
                params["rhs_dilation"][axis],
            )
        output = self._tracer.of(equation.outputs[0])
        inner = self._tracer.of(equation.inputs[1])[numbers.rhs_spec[1]]
        kinds = [
            self._kind(output[axis])
            for axis in numbers.out_spec[:2]
            if len(output[axis]) != 1
        ]
        kinds += [self._kind(inner)] if len(inner) != 1 else []
        self._term(2 * times * taps, *kinds)


def _valid_taps(
    image: int, kernel: int, out: int, stride: int, low: int, spread: int, dilation: int
) -> int:
    """Pairs of an output position and a kernel position that meet a value of the image."""
    place = np.arange(out)[:, None] * stride + np.arange(kernel) * dilation - low
    return int(
        ((place >= 0) & (place <= (image - 1) * spread) & (place % spread == 0)).sum()
    )
