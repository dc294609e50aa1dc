"""The package against the NumPy transcription of Algorithm 2.1, step by step.

Every step starts from the transcription's iterate and weights, so rounding does not
grow from step to step. In float64 the classes are the same and steps, bounds and
weights agree to 1e-12; in float32 classes may differ only where a component stands
within rounding of a bound or of the threshold.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax import (
    Bounds,
    ScaleByPrunadagState,
    capped,
    classify,
    prunadag,
    scale_by_prunadag,
)
from prunadag_optax._core.algorithm import Settings as PackageSettings
from prunadag_optax._core.algorithm import classification_at
from tests import reference
from tests.compiling import compiling
from tests.helpers import enable_x64
from tests.reference import Info, Settings, State

SIZE, ITERATIONS = 60, 300
VARIANTS = ["v1", "v2", "v3", "v4", "relevant_only"]
SHAPES = {"vector": [(60,)], "tree": [(5, 6), (), (29,)]}


def least_squares():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(20, SIZE))
    b = a @ rng.normal(size=SIZE)
    return lambda x: a.T @ (a @ x - b)


def logistic():
    rng = np.random.default_rng(2)
    a = rng.normal(size=(80, SIZE))
    y = rng.uniform(size=80) < 1 / (1 + np.exp(-a @ rng.normal(size=SIZE)))
    return lambda x: a.T @ (1 / (1 + np.exp(-a @ x)) - y) / 80


PROBLEMS = {"least squares": least_squares, "logistic": logistic}


# Schedules that Python and jax evaluate alike: an int32 divided is a float32 in jax,
# added to a float it is in full precision.
def falling_rate(k):
    return 2.0 / (k + 30.0) ** 0.5


def falling_fraction(k):
    return 0.1 + 0.9 * (1 - (k + 0.0) / ITERATIONS) ** 3


def falling_count(k):
    return SIZE - k // 6


def slow_decrease(k):
    return 1 / (k + 1.0) ** 0.5


SETTINGS = {
    **{variant: Settings(variant=variant) for variant in VARIANTS},
    "quarter": Settings(relevant=0.25),
    "count": Settings(relevant=7),
    "rate": Settings(learning_rate=0.05),
    "rate v4": Settings(learning_rate=0.05, variant="v4", zeta=0.5),
    "magnitude": Settings(relevance="magnitude", relevant=falling_fraction),
    "taylor": Settings(relevance="taylor", variant="v4"),
    "momentum": Settings(momentum=0.9),
    "momentum taylor": Settings(
        momentum=0.9, relevance="taylor", relevant=falling_fraction, learning_rate=0.05
    ),
    "schedules": Settings(
        learning_rate=falling_rate, relevant=falling_count, decrease=slow_decrease
    ),
    "all gradients": Settings(accumulation="all"),
    "all gradients v4": Settings(accumulation="all", variant="v4", relevant=7),
    "constant decrease": Settings(decrease=0.01, variant="v4", momentum=0.5),
}
# One of each kind of relevance, and schedules.
FEW = {*VARIANTS, "count", "magnitude", "taylor", "schedules"}
# A single vector is one leaf, so there the scopes cannot differ.
LAYOUTS = [("vector", "global"), ("tree", "leaf"), ("tree", "global")]
# Every variant in every layout; the rest in each scope.
CASES = [
    pytest.param(name, *layout, id="-".join([name, *layout]))
    for name in SETTINGS
    for layout in LAYOUTS[: 3 if name in VARIANTS else 2]
]


@dataclasses.dataclass(frozen=True)
class Iteration:
    x: list[np.ndarray]
    g: list[np.ndarray]
    state: State
    next_state: State
    info: Info


@functools.cache
def reference_run(problem: str, layout: str, settings: Settings) -> list[Iteration]:
    gradient = PROBLEMS[problem]()
    shapes = SHAPES[layout]
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])[:-1]

    def leaves(flat):
        parts = np.split(flat, ends)
        return [p.reshape(shape) for p, shape in zip(parts, shapes, strict=True)]

    # The article's start: T nonzero entries, normalised to length 1.
    rng = np.random.default_rng(3)
    start = np.zeros(SIZE)
    start[rng.choice(SIZE, SIZE // 10, replace=False)] = rng.normal(size=SIZE // 10)
    x = leaves(start / np.linalg.norm(start))
    state = reference.initial_state(x, settings)
    iterations = []
    for _ in range(ITERATIONS):
        g = leaves(gradient(np.concatenate([leaf.ravel() for leaf in x])))
        x_next, next_state, info = reference.step(x, g, state, settings)
        iterations.append(Iteration(x, g, state, next_state, info))
        x, state = x_next, next_state
    return iterations


def tree(leaves: list[Any]) -> Any:
    return leaves[0] if len(leaves) == 1 else dict(zip("abc", leaves, strict=True))


def package_state(state: State, settings: Settings) -> ScaleByPrunadagState:
    return ScaleByPrunadagState(
        count=np.int32(state.k),
        optimisable_weight=tree(state.w_O),
        decreasable_weight=tree(state.w_D),
        mu=None if settings.momentum is None else tree(state.m),
    )


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def arguments(settings: Settings) -> dict[str, Any]:
    names = "learning_rate", "relevant", "variant", "relevance", "momentum", "scope"
    return {
        "decrease_schedule": settings.decrease,
        **{name: getattr(settings, name) for name in names},
    }


@functools.cache
def compiled(settings: Settings, **changes: Any) -> Any:
    """A loop over iterations, each from its own inputs, compiled once a setting."""
    inspect = {**arguments(settings), **changes}
    tx = scale_by_prunadag(
        **inspect, initial_weight=settings.zeta, accumulation=settings.accumulation
    )

    def one(args):
        g, state, x = args
        updates, new_state = tx.update(g, state, x)
        return (
            updates,
            new_state,
            classification_at(g, state, x, PackageSettings(**inspect)),
        )

    return jax.jit(lambda inputs: jax.lax.map(one, inputs))


def package_steps(iterations, settings: Settings, **changes: Any) -> Any:
    """What the package makes of each of the transcription's iterations.

    Returns the updates, the new states, and the classes for inspection, all stacked.
    """
    inputs = stacked(
        [(tree(i.g), package_state(i.state, settings), tree(i.x)) for i in iterations]
    )
    # With few optimisations XLA computes the average of the gradients once for its T-th
    # largest and once for the comparison with that, and rounds the two in its own ways.
    with compiling(quickly=settings.momentum is None):
        return compiled(settings, **changes)(inputs)


def assert_same(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual: Any, expected: Any, floor: float = 0) -> None:
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12, atol=floor),
        actual,
        expected,
    )


def collect(iterations: list[Iteration], *names: str) -> list[Any]:
    """Fields of `Info` as the package's trees, stacked over the iterations."""
    infos = [i.info for i in iterations]
    return [stacked([tree(getattr(info, name)) for info in infos]) for name in names]


# Both problems in a row: they share their compilation.
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("name", "layout", "scope"), CASES)
def test_float64_agrees_with_the_transcription(problem, name, layout, scope):
    settings = dataclasses.replace(SETTINGS[name], scope=scope)
    iterations = reference_run(problem, layout, settings)
    with enable_x64():
        updates, new_state, classes = package_steps(iterations, settings)
    R, A, O, D, a, step = collect(iterations, "R", "A", "O", "D", "a", "step")  # noqa: E741
    assert_same(classes.relevant, R)
    assert_same(classes.acceptable, A)
    assert_same(classes.optimisable, O)
    assert_same(classes.decreasable, D)
    # An average of gradients may cancel: its error is relative to what went in.
    floor = 0 if settings.momentum is None else 1e-15
    assert_close(classes.lower, a)
    assert_close(jax.tree.map(lambda u: -np.asarray(u), updates), step, floor)
    expected = stacked([package_state(i.next_state, settings) for i in iterations])
    assert_close(new_state, expected, floor)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_comparison_has_every_class_in_it(name):
    # Otherwise agreement would say little.
    settings = SETTINGS[name]
    runs = [reference_run(problem, "vector", settings) for problem in PROBLEMS]
    R, A, D, step, radius, a = (
        np.stack([getattr(i.info, field)[0] for run in runs for i in run])
        for field in ("R", "A", "D", "step", "radius", "a")
    )
    assert R.any()
    assert A.any() or settings.variant == "relevant_only"
    moved = D & (step != 0)
    assert moved.any()
    assert (D & ~moved).any()
    # Both halves of the minimum in (17), too; a = |x| d_k keeps inside the radius.
    assert (moved & (a <= radius)).any()
    assert (moved & (a > radius)).any() or settings.variant in ("v2", "v4")


@pytest.mark.parametrize(
    ("name", "scope"),
    # The comparison in float64 has the classes of all other settings.
    [
        pytest.param(name, "leaf", marks=() if name in FEW else pytest.mark.slow)
        for name in SETTINGS
    ]
    + [(name, "global") for name in VARIANTS],
)
def test_classify_finds_the_sets_of_the_transcription(name, scope):
    settings = dataclasses.replace(SETTINGS[name], scope=scope)
    iterations = reference_run("logistic", "tree", settings)
    direction, weight = collect(iterations, "direction", "weight")
    x = stacked([tree(i.x) for i in iterations])
    steps = range(ITERATIONS)
    numbers = {
        "decrease": np.array([reference.decrease_at(settings, k) for k in steps]),
        "learning_rate": np.array(
            [float(reference.at(settings.learning_rate, k)) for k in steps]
        ),
        "relevant": np.array([reference.at(settings.relevant, k) for k in steps]),
    }
    kinds = {
        "variant": settings.variant,
        "relevance": settings.relevance,
        "scope": scope,
    }

    def one(args):
        direction, x, weight, numbers = args
        return classify(direction, x, weight, **numbers, **kinds)

    with enable_x64():
        classes = jax.jit(lambda args: jax.lax.map(one, args))(
            (direction, x, weight, numbers)
        )
    R, A, O, D, a = collect(iterations, "R", "A", "O", "D", "a")  # noqa: E741
    assert_same(classes.relevant, R)
    assert_same(classes.acceptable, A)
    assert_same(classes.optimisable, O)
    assert_same(classes.decreasable, D)
    assert_close(classes.lower, a)


def disagreement(inputs, settings: Settings) -> float:
    """How much of the float32 classification differs; asserts that rounding did it.

    The inputs (x, g, state) of each iteration are rounded to float32, and then
    classified by the package in float32 and by the transcription in float64.
    """
    iterations = []
    for x, g, state in inputs:
        x, g, w_O, w_D = (
            [leaf.astype(np.float32) for leaf in leaves]
            for leaves in (x, g, state.w_O, state.w_D)
        )
        state = State(state.k, w_O, w_D, state.m)
        _, next_state, info = reference.step(x, g, state, settings)
        iterations.append(Iteration(x, g, state, next_state, info))
    updates, _, classes = package_steps(iterations, settings)

    def flat(leaves):
        # One row an iteration.
        rows = [np.reshape(x, (len(iterations), -1)) for x in jax.tree.leaves(leaves)]
        return np.concatenate(rows, 1)

    names = "R", "A", "S", "a", "b", "score", "threshold", "direction", "weight", "step"
    R, A, S, a, b, score, threshold, direction, weight, step = map(
        flat, collect(iterations, *names)
    )
    relevant, acceptable = flat(classes.relevant), flat(classes.acceptable)
    eps = np.finfo(np.float32).eps

    # A product is rounded once, a gradient or a parameter never.
    rounding = eps if settings.relevance == "taylor" else 0
    wrong_relevant = relevant != R
    far = np.abs(score - threshold) > 2 * rounding * threshold
    assert not (wrong_relevant & far).any()

    # Where R differs so do S and the norms; those iterations are compared no further.
    same = (relevant == R).all(axis=1, keepdims=True)
    wrong = same & (acceptable != A)
    # A few roundings in length and bound, and in v1 and v3 two sums of squares.
    norms = R.shape[1] if settings.variant in ("v1", "v3", "relevant_only") else 0
    length = np.abs(settings.learning_rate * direction / weight)
    near = np.abs(length - a) <= (5 + norms) * eps * a
    near |= np.abs(length - b) <= 5 * eps * b
    assert (S & near)[wrong].all()
    # Classified and taken, a step is rounded twice: it keeps to b but for that.
    assert (np.abs(flat(updates)) <= b * (1 + 2 * eps))[acceptable].all()
    agree = same & ~wrong
    np.testing.assert_allclose(
        -flat(updates)[agree], step[agree], rtol=(5 + norms) * eps
    )
    return (wrong_relevant | wrong).mean()


FLOAT32 = {
    **{variant: Settings(variant=variant) for variant in VARIANTS},
    "rate": Settings(learning_rate=0.05),
    "magnitude": Settings(relevance="magnitude", relevant=0.25, variant="v4"),
    "taylor": Settings(relevance="taylor", variant="v4"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("layout", "scope"), LAYOUTS[:2])
@pytest.mark.parametrize("name", FLOAT32)
def test_float32_differs_only_within_rounding(problem, name, layout, scope):
    settings = dataclasses.replace(FLOAT32[name], scope=scope)
    run = reference_run(problem, layout, settings)
    assert disagreement([(i.x, i.g, i.state) for i in run], settings) < 1e-3


@pytest.mark.parametrize("bound", ["a", "b"])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_float32_on_a_bound(bound, rate):
    # The runs above seldom come near a bound, so here every length is put on one.
    rng = np.random.default_rng(4)
    settings = Settings(variant="v4", learning_rate=rate, decrease=0.25)
    x = rng.uniform(0.01, 0.9 * rate, 4000) * rng.choice([-1, 1], 4000)
    w = rng.uniform(0.5, 2, 4000)
    aim = x / rate * {"a": 0.25, "b": 1.0}[bound]
    g = aim * w / np.sqrt(1 - aim**2)  # then g / sqrt(w^2 + g^2) = aim
    g[:400] = 10.0  # relevant, and nothing else is
    state = State(3, [w], [w], [np.zeros(4000)])
    assert 0.01 < disagreement([([x], [g], state)], settings) < 0.99


@pytest.mark.parametrize("problem", PROBLEMS)
def test_bounds_written_out_give_the_named_variant_exactly(problem):
    settings = Settings(variant="v4")
    iterations = reference_run(problem, "tree", settings)
    mine = Bounds(lower=lambda x, s: x * s.decrease, upper=lambda x, s: x)
    pair = (mine.lower, mine.upper)
    named, own, plain = (
        package_steps(iterations, settings, variant=variant)
        for variant in ("v4", mine, pair)
    )
    assert_same(own, named)
    assert_same(plain, named)


def crossings(variant) -> int:
    """How many decreasable components a float32 run carries past zero."""
    gradient = least_squares()
    offset = gradient(np.zeros(SIZE)).astype(np.float32)
    matrix = np.stack([gradient(e) for e in np.eye(SIZE)], 1).astype(np.float32)
    matrix -= offset[:, None]
    tx = prunadag(variant=variant)
    start = reference_run("least squares", "vector", Settings())[0].x[0]

    def one(carry, _):
        x, state = carry
        g = matrix @ x + offset
        classes = classification_at(g, state[0], x, PackageSettings(variant=variant))
        updates, state = tx.update(g, state, x)
        new = optax.apply_updates(x, updates)
        past = classes.decreasable & (jnp.sign(new) * jnp.sign(x) < 0)
        return (new, state), jnp.sum(past)

    @jax.jit
    def run(x):
        return jax.lax.scan(one, (x, tx.init(x)), length=ITERATIONS)[1].sum()

    return int(run(start.astype(np.float32)))


@pytest.mark.parametrize("variant", ["v1", "v3", "relevant_only"])
def test_capped_never_carries_a_component_past_zero(variant):
    assert crossings(variant) > 0
    assert crossings(capped(variant)) == 0


def test_capped_leaves_v4_as_it_is():
    # There a = |x| d_k <= |x| already.
    settings = Settings(variant="v4")
    iterations = reference_run("logistic", "vector", settings)
    named, cap = (
        package_steps(iterations, settings, variant=variant)
        for variant in ("v4", capped("v4"))
    )
    assert_same(cap, named)
