"""Random small networks: three independent ways to know what belongs together."""

import collections
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prunadag_optax import structure
from tests.helpers import enable_x64

BATCH, INPUTS, OUTPUTS = 3, 5, 2
X = np.random.default_rng(0).normal(size=(BATCH, INPUTS)).astype(np.float32)

# A network is a list of steps (operation, a, b, n): each appends a value (batch, units)
# computed from the values number a and b; all functions are 0 at 0, so that a masked
# unit adds nothing to a reduction either. `Arrays` runs it on arrays, `Sets` on sets of
# atoms.


class Arrays:
    """The operations on (batch, units) arrays."""

    def __init__(self, params):
        self.params = params

    def parameter(self, name, *shape):
        del shape
        return self.params[name]

    def size(self, x):
        return x.shape[1]

    def dense(self, x, kernel):
        return jnp.tanh(x @ kernel)

    def scale(self, x, vector):
        return x * vector[None]

    def add(self, x, y):
        return x + jnp.tanh(y)

    def gate(self, x, y):
        return x * jax.nn.sigmoid(y)

    def concat(self, x, y):
        return jnp.concatenate([x, y], axis=1)

    def take(self, x, start, stop, step):
        return x[:, start:stop:step]

    def roll(self, x, n):
        return jnp.roll(x, n, axis=1)

    def shuffle(self, x, n):
        return x.reshape(len(x), n, -1).transpose(0, 2, 1).reshape(len(x), -1)

    def pool(self, x, n):
        return x.reshape(len(x), n, -1).sum(2)

    def outer(self, x, y):
        return (x[:, :, None] * y[:, None, :]).reshape(len(x), -1)

    def normalise(self, x):
        return x / (1 + jnp.sum(x * x, axis=1, keepdims=True))

    def turn(self, x):
        return x[:, ::-1]


class Sets:
    """The operations on lists of frozensets of atoms, one for each position.

    An equation between two positions replaces an atom by the set that is opposite.
    """

    def __init__(self):
        self.of = {}
        self.params = {}
        self.values = []
        self.is_undecided = False

    def fresh(self, n):
        start = len(self.of)
        self.of.update(dict.fromkeys(range(start, start + n)))
        return [frozenset([atom]) for atom in range(start, start + n)]

    def resolved(self, atoms):
        parts = (
            atoms_of
            for atom in atoms
            for atoms_of in [
                frozenset([atom])
                if self.of[atom] is None
                else self.resolved(self.of[atom])
            ]
        )
        return frozenset().union(*parts)

    def unify(self, first, second):
        pairs = list(zip(first, second, strict=True))
        # Frozen positions first, then what comes down to one atom.
        for is_last in (False, True):
            for a, b in sorted(pairs, key=lambda pair: min(map(len, pair))):
                a, b = self.resolved(a), self.resolved(b)
                left, right = a - b, b - a
                if left and right and min(len(left), len(right)) > 1:
                    self.is_undecided |= is_last
                elif len(left) == 1:
                    self.of[next(iter(left))] = right
                elif right and len(right) == 1:
                    self.of[next(iter(right))] = left
                else:
                    self.of.update({atom: frozenset() for atom in left | right})
        return [self.resolved(a) for a in first]

    def seen(self, axis):
        self.values.append(axis)
        if len(axis) == 1:
            self.of.update({atom: frozenset() for atom in self.resolved(axis[0])})
        return axis

    def parameter(self, name, *shape):
        axes = self.params[name] = [self.fresh(n) for n in shape]
        return axes if len(shape) > 1 else axes[0]

    def size(self, x):
        return len(x)

    def dense(self, x, kernel):
        self.unify(x, kernel[0])
        return kernel[1]

    def combine(self, x, y):
        return self.unify(x, y)

    scale = add = gate = combine

    def concat(self, x, y):
        return x + y

    def take(self, x, start, stop, step):
        return x[start:stop:step]

    def roll(self, x, n):
        return self.seen(x[-n:]) + self.seen(x[:-n])

    def grid(self, x, n):
        """The two axes whose product an axis is, rows and columns."""
        x = [self.resolved(atoms) for atoms in x]
        columns = len(x) // n
        if columns == 1:
            return x, [frozenset()]
        if n == 1:
            return [frozenset()], x
        rows = [frozenset.intersection(*x[i * columns :][:columns]) for i in range(n)]
        lines = [frozenset.intersection(*x[j::columns]) for j in range(columns)]
        if [a | b for a in rows for b in lines] != x:
            rows, lines = self.fresh(n), self.fresh(columns)
            self.unify(x, [a | b for a in rows for b in lines])
        return rows, lines

    def shuffle(self, x, n):
        rows, lines = self.grid(x, n)
        self.seen(rows)
        self.seen(lines)
        return self.outer(lines, rows)

    def pool(self, x, n):
        rows, lines = self.grid(x, n)
        self.seen(lines)
        return self.seen(rows)

    def outer(self, x, y):
        return [self.resolved(a) | self.resolved(b) for a in x for b in y]

    def normalise(self, x):
        return x

    def turn(self, x):
        return x[::-1]


OPERATIONS = (
    "dense", "dense", "scale", "add", "gate", "concat", "take", "roll", "shuffle",
    "pool", "outer", "normalise", "turn",
)  # fmt: skip


def run(ops, steps, x):
    """A network; what no step reads goes to the output."""
    values, unread = [x], []

    def dense(value, name, size):
        kernel = ops.parameter(name, ops.size(value), size)
        return ops.dense(value, kernel)

    for index, (name, a, b, n) in enumerate(steps):
        parameter = f"{index}_{name}"
        a, b = a % len(values), b % len(values)
        x, y = values[a], values[b]
        size = ops.size(x)
        unread = [number for number in unread if number != a]
        if name in ("add", "gate", "concat", "outer"):
            unread = [number for number in unread if number != b]
        if name in ("add", "gate") and ops.size(y) != size:
            y = dense(y, f"{parameter}_y", size)
        if name == "dense" or size < 3 or (name == "outer" and size * ops.size(y) > 30):
            value = dense(x, parameter, 3 + n)
        elif name == "scale":
            value = ops.scale(x, ops.parameter(parameter, size))
        elif name in ("add", "gate", "concat", "outer"):
            value = getattr(ops, name)(x, y)
        elif name == "take":
            start, step = n % 2, 1 + n // 2 % 2
            value = ops.take(x, start, size - n // 3 if size > 4 else size, step)
        elif name == "roll":
            value = ops.roll(x, 1 + n % (size - 1))
        elif name in ("shuffle", "pool"):
            factors = [k for k in range(2, size) if size % k == 0] or [size]
            value = getattr(ops, name)(x, factors[n % len(factors)])
        else:
            value = getattr(ops, name)(x)
        if isinstance(ops, Sets):
            ops.seen(value)
        values.append(value)
        unread.append(len(values) - 1)
    total = None
    for number in unread:
        output = dense(values[number], f"out{number}", OUTPUTS)
        if isinstance(ops, Sets):
            ops.unify(output, [frozenset()] * OUTPUTS)
        else:
            total = output if total is None else total + output
    return total


class Shapes(Sets):
    """Only the shapes of the parameters."""

    def parameter(self, name, *shape):
        axes = super().parameter(name, *shape)
        self.shapes = {**getattr(self, "shapes", {}), name: shape}
        return axes


def network(steps):
    """Random parameters of a network, and its function."""
    shapes = Shapes()
    run(shapes, steps, [frozenset()] * INPUTS)
    rng = np.random.default_rng(1)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in shapes.shapes.items()
    }
    return params, lambda params, x: run(Arrays(params), steps, x)


def units_of(found):
    """Where each unit of each group is: {(path, axis, position), ...}."""
    return {
        frozenset(
            (member.path, member.axis, int(position))
            for member in group.members
            for position in member.positions[unit]
        )
        for group in found.groups
        for unit in range(group.size)
    }


STEPS = st.lists(
    st.tuples(
        st.sampled_from(OPERATIONS), st.integers(0, 9), st.integers(0, 9),
        st.integers(0, 5),
    ),
    min_size=2, max_size=9,
)  # fmt: skip
FEW = hypothesis.settings(
    max_examples=25, deadline=None, derandomize=True, database=None
)
MANY = hypothesis.settings(FEW, max_examples=100)


@FEW
@hypothesis.given(steps=STEPS, seed=st.integers(0, 99))
def test_permuted_and_smaller_networks_compute_the_same(steps, seed):
    params, apply = network([("dense", 0, 0, 3), *steps])
    found = structure.trace(apply, params, X)
    structure.check(found, params, X, tolerance=1e-5)
    rng = np.random.default_rng(seed)
    keep = {}
    for group in found.groups:
        mask = rng.random(group.size) < 0.6
        mask[rng.integers(group.size)] = True
        keep[group.name] = mask
    structure.check(found, params, X, keep=keep, tolerance=1e-5)


@MANY
@hypothesis.given(steps=STEPS)
def test_the_units_are_those_of_sets_written_out(steps):
    """The same sets by another program: positions one by one, no arrays, no jaxpr."""
    steps = [("dense", 0, 0, 3), *steps]
    params, apply = network(steps)
    sets = Sets()
    run(sets, steps, [frozenset()] * INPUTS)
    # Two products that do not come down to one atom are refined; not here.
    hypothesis.assume(not sets.is_undecided)
    places, occurrences = {}, {}
    for path, axes in sets.params.items():
        sets.values += axes
        for axis, positions in enumerate(axes):
            for position, atoms in enumerate(positions):
                for atom in sets.resolved(atoms):
                    places.setdefault(atom, set()).add((path, axis, position))
    for number, value in enumerate(sets.values):
        for atoms in value:
            for atom in sets.resolved(atoms):
                occurrences.setdefault(atom, []).append(number)
    # What occurs as no other atom does would be a group of a single unit.
    alike = collections.Counter(tuple(occurrences[atom]) for atom in places)
    expected = {
        frozenset(places[atom])
        for atom in places
        if alike[tuple(occurrences[atom])] > 1
    }
    assert units_of(structure.trace(apply, params, X)) == expected


def test_the_written_out_sets_meet_all_operations():
    # An oracle that is always undecided would agree with anything.
    rng = np.random.default_rng(0)
    decided = products = 0
    for _ in range(60):
        steps = [
            (str(rng.choice(OPERATIONS)), *rng.integers(0, 6, 3).tolist())
            for _ in range(6)
        ]
        sets = Sets()
        run(sets, [("dense", 0, 0, 3), *steps], [frozenset()] * INPUTS)
        decided += not sets.is_undecided
        products += any(
            len(sets.resolved(atoms)) > 1
            for axes in sets.params.values()
            for axis in axes
            for atoms in axis
        )
    assert decided > 40
    assert products > 10


# Brute force.

TINY = {
    "chain": (
        {"a": (2, 3), "bias": (3,), "b": (3, 4), "out": (4, 2)},
        lambda p, x: (
            jnp.tanh(jnp.tanh(x @ p["a"] + p["bias"][None]) @ p["b"]) @ p["out"]
        ),
    ),
    "residual": (
        {"a": (2, 3), "b": (3, 3), "out": (3, 2)},
        lambda p, x: (x @ p["a"] + jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])) @ p["out"],
    ),
    "gate": (
        {"a": (2, 4), "b": (2, 4), "out": (4, 2)},
        lambda p, x: ((x @ p["a"]) * jax.nn.sigmoid(x @ p["b"])) @ p["out"],
    ),
    "halves": (
        {"a": (2, 4), "out": (2, 2)},
        lambda p, x: (lambda h: h[:, :2] * jax.nn.sigmoid(h[:, 2:]) @ p["out"])(
            x @ p["a"]
        ),
    ),
    "every other": (
        {"a": (2, 4), "scale": (2,), "out": (2, 2)},
        lambda p, x: (
            lambda h: (h[:, ::2] * p["scale"][None] + jnp.tanh(h[:, 1::2])) @ p["out"]
        )(x @ p["a"]),
    ),
    "concatenated": (
        {"a": (2, 2), "b": (2, 2), "c": (4, 3), "out": (3, 2)},
        lambda p, x: (
            jnp.tanh(
                jnp.concatenate([jnp.tanh(x @ p["a"]), jnp.sin(x @ p["b"])], 1) @ p["c"]
            )
            @ p["out"]
        ),
    ),
    "turned": (
        {"a": (2, 4), "b": (2, 4), "out": (4, 2)},
        lambda p, x: (x @ p["a"])[:, ::-1] * jax.nn.sigmoid(x @ p["b"]) @ p["out"],
    ),
    "tied": (
        {"a": (2, 4), "bias": (4,)},
        lambda p, x: jnp.tanh(x @ p["a"] + p["bias"][None]) @ p["a"].T,
    ),
    "normalised": (
        {"a": (2, 4), "scale": (4,), "out": (4, 2)},
        lambda p, x: (
            (lambda h: h / (1 + (h * h).sum(1, keepdims=True)) * p["scale"][None])(
                x @ p["a"]
            )
            @ p["out"]
        ),
    ),
}


def exchanges(size):
    """All orders of some positions that exchange none, one or two pairs of them."""
    orders = (np.array(order) for order in itertools.permutations(range(size)))
    return [order for order in orders if (order[order] == np.arange(size)).all()]


@pytest.mark.parametrize("name", TINY)
def test_a_search_finds_the_same_exchanges(name):
    """All ways to exchange two units are those that the groups allow, and no others.

    Each axis of each parameter stays as it is or has pairs of its positions exchanged,
    in all combinations. A combination leaves the output of a network with random
    weights exactly if it exchanges whole units of groups: two units wherever they
    occur, in any number of groups at once. So no coupling is missing, none is
    superfluous, and what is frozen is frozen for a reason.
    """
    shapes, apply = TINY[name]
    with enable_x64():
        rng = np.random.default_rng(2)
        params = {
            key: jnp.asarray(rng.normal(size=shape)) for key, shape in shapes.items()
        }
        x = jnp.asarray(rng.normal(size=(6, 2)))
        axes = [
            (key, axis) for key, shape in shapes.items() for axis in range(len(shape))
        ]
        orders = []
        for key, axis in axes:
            orders.append(exchanges(shapes[key][axis]))
        combinations = list(itertools.product(*orders))
        stacked = [
            jnp.asarray(np.stack(column)) for column in zip(*combinations, strict=True)
        ]

        def exchanged(*orders):
            moved = dict(params)
            for (key, axis), order in zip(axes, orders, strict=True):
                moved[key] = jnp.take(moved[key], order, axis=axis)
            return jnp.abs(apply(moved, x) - apply(params, x)).max()

        deviations = np.asarray(jax.jit(jax.vmap(exchanged))(*stacked))
        found = structure.trace(apply, params, x)
    unchanged = deviations < 1e-12
    # Nothing in between: the answer does not depend on the tolerance.
    assert (deviations[~unchanged] > 1e-6).all()
    allowed = set()
    choices = [exchanges(group.size) for group in found.groups]
    for choice in itertools.product(*choices):
        moved = {(key, axis): np.arange(shapes[key][axis]) for key, axis in axes}
        for group, order in zip(found.groups, choice, strict=True):
            for member in group.members:
                order_of_axis = moved[member.path, member.axis]
                order_of_axis[member.positions] = member.positions[order]
        allowed.add(tuple(tuple(moved[axis].tolist()) for axis in axes))
    searched = [
        tuple(tuple(order.tolist()) for order in orders) for orders in combinations
    ]
    allowed &= set(searched)
    assert len(allowed) > 1
    assert {
        key for key, same in zip(searched, unchanged, strict=True) if same
    } == allowed
