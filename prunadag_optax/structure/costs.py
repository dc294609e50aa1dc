"""Parameters and floating-point operations, as XLA counts them, at any sizes."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from prunadag_optax._common import tables
from prunadag_optax.structure.groups import Structure, Traced
from prunadag_optax.structure.program import JVP, VJP, Equation, Program
from prunadag_optax.structure.rules import CUMULATIVE, ELEMENTWISE, REDUCTIONS
from prunadag_optax.structure.trees import (
    Keep,
    checked_keep,
    position_masks,
    removed_atoms,
)

# Operations that XLA counts for each element, where it is not one. What is
# transcendental is counted apart, and many functions are a polynomial beside it.
_OPERATIONS = {
    **dict.fromkeys(["copy", "copy_p", "name", "pvary", "sharding_constraint"], 0),
    **dict.fromkeys(["stop_gradient", "atan", "atan2", "cbrt", "erf", "exp"], 0),
    **dict.fromkeys(["expm1", "log", "log1p", "rsqrt", "sqrt", "cos", "sin"], 0),
    **dict.fromkeys(["pow", "tan", "tanh"], 0),
    **dict.fromkeys(["acos", "cosh", "logistic"], 3),
    **{"conj": 4, "asin": 5, "atanh": 6, "acosh": 7, "sinh": 10, "asinh": 11},
    **{"nextafter": 24, "erf_inv": 37, "lgamma": 53, "erfc": 62, "digamma": 73},
    **dict.fromkeys(["bessel_i0e", "bessel_i1e"], 83),
    **dict.fromkeys(["igamma", "igammac"], 183),
    **{"polygamma": 260, "regularized_incomplete_beta": 291},
}
# A number of jax.random's default generator.
_RANDOM = 31
_FILLS = jax.lax.GatherScatterMode.FILL_OR_DROP
# Counted for each element of the input, not of the output.
_OF_INPUT = ("fft", "sort", "ragged_dot", "ragged_dot_general")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model takes.

    Attributes:
      params: the number of values in the variables.
      flops: floating-point operations of one call at the traced inputs, of which a
        multiplication and an addition are two; None for a declared structure.
      units: group's name -> (params, flops) that one unit fewer saves.
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
    transcendental functions are not counted. A `scan` counts its body once for each
    step, a `while` loop once, and a branch as the dearest of its bodies. Primitives
    that tracing does not know count nothing.

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
    kept = checked_keep(structure, {} if keep is None else keep)
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
        return Cost(params, count(removed_atoms(structure, keep)))

    return costs


class _Counter:
    """The operations of a program as sums of products of sizes of axes."""

    def __init__(self, traced: Traced) -> None:
        self._tracer, self._values = traced.tracer, traced.tracer.values
        # Axes with the same sets have the same size.
        self._kinds: dict[bytes, int] = {}
        self._ids: list[np.ndarray] = []
        self._known: dict[int, int] = {}
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
        # What nothing is made from is not run.
        needed = set(program.outputs)
        for equation in reversed(program.equations):
            name, params = equation.name, equation.params
            if needed.isdisjoint(equation.outputs):
                continue
            needed.update(equation.inputs)
            if equation.bodies:
                self._add_bodies(equation, times)
                continue
            sizes = [self._shape(number) for number in equation.inputs]
            output = self._shape(equation.outputs[0]) if equation.outputs else []
            if name == "dot_general":
                (summed, _), _ = params["dimension_numbers"]
                self._term(2 * times, *output, *self._along(equation, summed))
            elif name == "conv_general_dilated":
                self._add_convolution(equation, times)
            elif name in REDUCTIONS:
                self._term(times, *sizes[0])
                self._term(-times, *output)
            elif name in ("argmax", "argmin"):
                # Comparisons of values and of their numbers.
                self._term(9 * times, *sizes[0])
                self._term(-9 * times, *output)
            elif name.startswith("reduce_window"):
                positions = math.prod(params["window_dimensions"])
                self._term(times * (positions - 1), *output)
            elif name in CUMULATIVE:
                # As a window of all positions.
                each = 8 if name == "cumlogsumexp" else 1
                size = self._values.shape(equation.inputs[0])[params["axis"]]
                self._term(times * each * (size - 1), *output)
            elif name == "integer_pow":
                power = abs(params["y"])
                products = max(power.bit_length() + power.bit_count() - 2, 0)
                self._term(times * (products + (params["y"] < 0)), *output)
            elif name == "gather" and params["mode"] == _FILLS:
                self._term(3 * times, *sizes[1])
                self._term(times, *output)
            elif name.startswith("scatter") and name != "scatter":
                self._term(times, *sizes[2])
            elif name == "random_bits":
                # All are drawn before some are left out.
                self._term(times * _RANDOM * math.prod(params["shape"]))
            else:
                each = self._each(equation)
                self._term(times * each, *(sizes[0] if name in _OF_INPUT else output))

    def _each(self, equation: Equation) -> float:
        """Operations for each element."""
        name, params = equation.name, equation.params
        if name == "bitcast_convert_type":
            return 1
        if name == "fft":
            return 8 * math.prod(n.bit_length() - 1 for n in params["fft_lengths"])
        if name == "sort":
            numbers = math.prod(self._values.shape(equation.inputs[0]))
            return (numbers - 1).bit_length()
        if name.startswith("ragged_dot"):
            # Dense for each group, behind a mask.
            _, right, groups = map(self._values.shape, equation.inputs)
            return groups[-1] * (2 * right[-1] + 4)
        return _OPERATIONS.get(name, 1) if name in ELEMENTWISE else 0

    def _along(self, equation: Equation, axes: Any) -> list[int]:
        left = self._tracer.of(equation.inputs[0])
        return [self._kind(left[axis]) for axis in axes if len(left[axis]) != 1]

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
    """Pairs of an output and a kernel position that meet a value of the image."""
    place = np.arange(out)[:, None] * stride + np.arange(kernel) * dilation - low
    return int(
        ((place >= 0) & (place <= (image - 1) * spread) & (place % spread == 0)).sum()
    )
