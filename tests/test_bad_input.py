"""Wrong arguments: a ValueError that names the argument, the value and what is allowed.

Each table of what is refused has beside it the values at the edge of what is accepted.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax import (
    capped,
    classify,
    evaluation,
    kth_largest_magnitude,
    masks,
    plotting,
    prunadag,
    scale_by_prunadag,
)
from prunadag_optax._common.checks import NO_PARAMS_MSG
from prunadag_optax._core.algorithm import Settings, classification_at
from tests.helpers import refused

NAN, INF = float("nan"), float("inf")
X = jnp.array([1.0, -2.0, 3.0])
TREE = {"a": X, "b": X}
KEEP = jnp.array([True, False, True])


def total(params):
    return optax.tree.sum(params)


# The transformation's arguments.

RELEVANT = (
    "relevant must be a fraction in (0, 1] as a float, a count >= 1 as an integer, or "
    "a schedule"
)
VARIANT = (
    "variant must be one of ['relevant_only', 'v1', 'v2', 'v3', 'v4'] or a pair of "
    "functions (lower, upper); got"
)
RELEVANCE = (
    "relevance must be one of ['gradient', 'magnitude', 'taylor'] or a function "
    "(gradients, params) -> scores; got"
)
SCOPE = "scope must be 'global' or 'leaf'; got"
DTYPE = "accumulator_dtype must be None or one of float16, bfloat16, float32, float64;"
ALLOWED = {
    "relevant": f"{RELEVANT} count -> value of either; got",
    "variant": VARIANT,
    "relevance": RELEVANCE,
    "scope": SCOPE,
    "accumulation": "accumulation must be 'optimisable' or 'all'; got",
    "initial_weight": "initial_weight must be a finite number > 0; got",
    "learning_rate": "learning_rate must be a finite number >= 0; got",
    "decrease_schedule": "decrease_schedule must be a finite number >= 0; got",
    "momentum": "momentum must be a finite number >= 0 and < 1; got",
    "accumulator_dtype": f"{DTYPE} got",
}
BAD = {
    "relevant": [0, -3, 0.0, -0.5, 1.5, NAN, INF, True, np.True_, "x", None, 1j, [1]],
    "variant": ["v5", "", None, 3, ["v3"], abs, (abs,), (abs, abs, abs), (abs, 1.0)],
    "relevance": ["x", "Gradient", None, 3],
    "scope": ["x", "Global", None, ("global",)],
    "accumulation": ["x", "All", None, True],
    "initial_weight": [0, 0.0, -0.01, NAN, INF, None, "x", True],
    "learning_rate": [-1, -1e-9, NAN, INF, None, "x", True],
    "decrease_schedule": [-1, -1e-9, NAN, INF, "x", True],
    "momentum": [1.0, 1, -0.1, 2.0, NAN, "x", True],
    "accumulator_dtype": [
        "int32",
        jnp.int32,
        "complex64",
        "float8_e4m3fn",
        bool,
        "garbage",
        3,
    ],
}
GOOD = {
    "relevant": [
        1e-9,
        1.0,
        1,
        3,
        np.int64(3),
        np.float32(0.5),
        jnp.asarray(0.5),
        jnp.asarray(2),
        lambda count: 2,
        lambda count: jnp.where(count < 10, 3, 1),
        optax.linear_schedule(1.0, 0.1, 100),
    ],
    "variant": [
        "v1",
        "v2",
        "v3",
        "v4",
        "relevant_only",
        capped("v1"),
        (lambda x, statistics: 0 * x, lambda x, statistics: x),
    ],
    "relevance": ["gradient", "magnitude", "taylor", lambda gradients, params: params],
    "scope": ["global", "leaf"],
    "accumulation": ["optimisable", "all"],
    "initial_weight": [1e-9, 1, np.float32(0.5), jnp.asarray(0.5)],
    "learning_rate": [0, 0.0, 10, jnp.asarray(0.5), optax.constant_schedule(0.1)],
    "decrease_schedule": [
        None,
        0,
        1.0,
        jnp.asarray(0.5),
        lambda count: 1 / (count + 1),
    ],
    "momentum": [None, 0, 0.0, 0.999, jnp.asarray(0.9)],
    "accumulator_dtype": [
        None,
        "float16",
        "bfloat16",
        jnp.float32,
        np.dtype("float32"),
    ],
}


def rows(table):
    return [
        pytest.param(name, value, id=f"{name}-{i}")
        for name, values in table.items()
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize("make", [prunadag, scale_by_prunadag])
@pytest.mark.parametrize(("name", "value"), rows(BAD))
def test_an_argument_out_of_range(make, name, value):
    with refused(ALLOWED[name], f" {value!r}."):
        make(**{name: value})


@pytest.mark.parametrize(("name", "value"), rows(GOOD))
def test_an_argument_in_range(name, value):
    tx = prunadag(**{name: value})
    updates, _ = tx.update(X, tx.init(X), X)
    assert jnp.isfinite(updates).all()


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_a_count_above_the_number_of_parameters(scope):
    tx = prunadag(relevant=7, scope=scope)
    seven, six = [jnp.ones(3), jnp.ones((2, 2))], [jnp.ones(2), jnp.ones((2, 2))]
    updates, _ = tx.update(seven, tx.init(seven), seven)
    assert all((leaf != 0).all() for leaf in updates)
    if scope == "global":
        with refused(RELEVANT, "got the count 7, more than the 6 parameters"):
            tx.init(six)
    else:  # a leaf that has fewer is relevant altogether
        updates, _ = tx.update(six, tx.init(six), six)
        assert all((leaf != 0).all() for leaf in updates)


@pytest.mark.parametrize(
    ("schedule", "value"),
    [
        (optax.linear_schedule(100, 10, 50), "100.0"),
        (lambda count: 3.0, "3.0"),
        (lambda count: 0, "0"),
        (lambda count: 1.5, "1.5"),
        (lambda count: jnp.nan, "nan"),
        (lambda count: True, "True"),
        (lambda count: None, "None"),
    ],
)
def test_a_schedule_of_relevant_out_of_range(schedule, value):
    with refused(RELEVANT, f"the schedule returned {value} at step 0", "integers"):
        prunadag(relevant=schedule)


def test_a_schedule_of_relevant_that_is_not_scalar():
    with refused(RELEVANT, "the schedule returned"):
        prunadag(relevant=lambda count: jnp.array([1, 2]))


@pytest.mark.parametrize("wrong", [{"variant": "v5"}, {"scope": "x"}, {"relevance": 3}])
def test_classify_names_its_argument(wrong):
    ((name, value),) = wrong.items()
    with refused(ALLOWED[name], f" {value!r}."):
        classify(X, X, X, **wrong)


@pytest.mark.parametrize("relevant", [0, -3, 1.5, 0.0, NAN, True])
def test_classify_checks_relevant(relevant):
    with refused(RELEVANT, f"{relevant!r}"):
        classify(X, X, X, relevant=relevant)


def test_capped_names_its_argument():
    with refused(VARIANT, "'v5'."):
        capped("v5")


# Trees that the transformation is given.


@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool"])
@pytest.mark.parametrize("relevance", ["gradient", "magnitude", "taylor"])
class TestLeavesThatAreNotRealFloats:
    def test_params(self, relevance, dtype):
        tx = prunadag(relevance=relevance)
        wrong = {"a": X, "b": X.astype(dtype)}
        with refused(f"params['b'] has dtype {dtype}", "real", "float32, float64"):
            tx.init(wrong)
        with refused(f"params['b'] has dtype {dtype}", "real", "float32, float64"):
            tx.update(TREE, tx.init(TREE), wrong)

    def test_updates(self, relevance, dtype):
        tx = prunadag(relevance=relevance)
        wrong = {"a": X, "b": X.astype(dtype)}
        with refused(f"updates['b'] has dtype {dtype}", "real", "float32, float64"):
            tx.update(wrong, tx.init(TREE), TREE)


@pytest.mark.parametrize(
    ("updates", "parts"),
    [
        ({"a": X}, ["updates and params must have the same tree structure; got"]),
        ([X, X], ["same tree structure; got [0], [1] in updates only; ['a']"]),
        ({"a": X, "b": None}, ["updates and params must have the same tree structure"]),
        (None, ["updates and params must have the same tree structure; got"]),
        (
            {"a": X, "b": X[:1]},
            ["updates['b'] and params['b'] must have the same shape; got (1,)", "(3,)"],
        ),
        ({"a": X, "b": X[None]}, ["must have the same shape; got (1, 3) and (3,)"]),
    ],
)
def test_updates_that_do_not_match_params(updates, parts):
    tx = prunadag()
    with refused(*parts):
        tx.update(updates, tx.init(TREE), TREE)
    if updates is not None:
        with refused(parts[0].replace("updates", "gradients")):
            classification_at(updates, scale_by_prunadag().init(TREE), TREE, Settings())


def test_a_state_that_does_not_match_params():
    tx = prunadag()
    for params in (X[:1], X[None]):
        with refused("state", "params", "(3,)", f"{params.shape}"):
            tx.update(params, tx.init(X), params)


@pytest.mark.parametrize(
    "scores", [lambda g, x: x[:1], lambda g, x: {"a": x}, lambda g, x: [x, x]]
)
def test_scores_that_do_not_match_params(scores):
    tx = prunadag(relevance=scores)
    with refused("relevance", "params"):
        tx.update(X, tx.init(X), X)


def test_params_missing():
    with refused(NO_PARAMS_MSG):
        prunadag().update(X, prunadag().init(X))
    with refused(NO_PARAMS_MSG):
        masks.keep_pruned(KEEP).update(X, masks.keep_pruned(KEEP).init(X))


# Selection.


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "k must be in 1..3, the size of tree; got 0."),
        (-1, "k must be in 1..3, the size of tree; got -1."),
        (4, "k must be in 1..3, the size of tree; got 4."),
        (True, "k must be an integer or an integer array; got True."),
        (np.True_, "k must be an integer or an integer array; got np.True_."),
        (1.0, "k must be an integer or an integer array; got 1.0."),
        (None, "k must be an integer or an integer array; got None."),
        (np.ones(()), "k must be an integer or an integer array; got array(1.)."),
        (np.array([1, 2]), "k must be an integer or"),
    ],
)
def test_kth_largest_magnitude_refuses_k(k, message):
    with refused(message):
        kth_largest_magnitude(X, k)


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, 3),
        (3, 1),
        (np.int64(2), 2),
        (jnp.asarray(2), 2),
        # An array may be traced, so it is clipped to 1..n, not checked.
        (jnp.asarray(0), 3),
        (jnp.asarray(9), 1),
    ],
)
def test_kth_largest_magnitude_accepts_k(k, expected):
    assert kth_largest_magnitude(X, k) == expected


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "tree has no elements"),
        ({"a": None}, "tree has no elements"),
        ({"a": jnp.ones((0, 3))}, "tree has no elements"),
        ([X, jnp.arange(3)], "tree has a leaf of dtype int32; magnitudes are compared"),
        ([X, X + 1j], "dtype complex64; magnitudes are compared for float16, bfloat16"),
        ([KEEP], "tree has a leaf of dtype bool"),
    ],
)
def test_kth_largest_magnitude_refuses_a_tree(tree, message):
    with refused(message):
        kth_largest_magnitude(tree, 1)


# Masks.

SPARSITY = "must be a finite number >= 0 and <= 1; got"


@pytest.mark.parametrize("function", [masks.magnitude_mask, masks.prune])
class TestSparsity:
    @pytest.mark.parametrize("value", [-0.1, 1.1, 2, NAN, INF, True, "x", None, [0.5]])
    def test_out_of_range(self, function, value):
        with refused(f"sparsity {SPARSITY} {value!r}."):
            function(X, value)

    @pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, np.float32(0.5)])
    def test_in_range(self, function, value):
        mask = function(X, value)
        mask = mask[1] if function is masks.prune else mask
        # Of the magnitudes 1, 2 and 3.
        expected = {0: [True] * 3, 0.5: [False, False, True], 1: [False] * 3}
        assert mask.tolist() == expected[float(value)]

    def test_an_array_is_clipped(self, function):
        # It may be traced, so it cannot be checked.
        for value, same in [(-0.1, 0), (1.1, 1)]:
            clipped, expected = function(X, jnp.asarray(value)), function(X, same)
            jax.tree.map(np.testing.assert_array_equal, clipped, expected)

    def test_unknown_scope(self, function):
        with refused("scope must be 'global', 'leaf' or a function", "'row'."):
            function(X, 0.5, scope="row")

    def test_a_leaf_that_is_not_a_real_float(self, function):
        params = {"a": X, "steps": jnp.arange(3)}
        with refused("params['steps'] has dtype int32", "`where`"):
            function(params, 0.5, where=masks.everything)


STRUCTURE = "mask must have the tree structure of params, with None for leaves"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"a": KEEP}, STRUCTURE),
        ({"a": KEEP, "c": KEEP}, STRUCTURE),
        ({"a": KEEP, "b": KEEP, "c": KEEP}, STRUCTURE),
        ([KEEP, KEEP], STRUCTURE),
        ({"a": KEEP, "b": [KEEP]}, STRUCTURE),
        (KEEP, STRUCTURE),
        ({"a": KEEP, "b": KEEP[:1]}, "mask['b'] must have the shape (3,)"),
        ({"a": KEEP, "b": True}, "mask['b'] must have the shape (3,)"),
        (
            {"a": KEEP, "b": X},
            "mask['b'] must be bool (True = keep) or None; got dtype",
        ),
        ({"a": KEEP, "b": KEEP.astype(int)}, "mask['b'] must be bool (True = keep)"),
    ],
)
@pytest.mark.parametrize(
    "function",
    [
        masks.apply_mask,
        masks.finalise,
        evaluation.summary,
        lambda params, mask: masks.keep_pruned(mask).init(params),
        lambda params, mask: masks.keep_pruned(lambda _: mask).init(params),
    ],
    ids=["apply_mask", "finalise", "summary", "keep_pruned", "keep_pruned of function"],
)
def test_a_mask_that_does_not_fit(function, mask, message):
    with refused(message):
        function(TREE, mask)


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        ({"a": KEEP, "b": KEEP}, [2, 2, 4]),
        ({"a": KEEP, "b": None}, [2, 3, 5]),
        ({"a": None, "b": None}, [3, 3, 6]),
    ],
)
def test_a_mask_that_fits(mask, kept):
    tx = masks.keep_pruned(mask)
    updates, _ = tx.update(TREE, tx.init(TREE), TREE)
    updated = optax.apply_updates(TREE, updates)
    for pruned in (masks.apply_mask(TREE, mask), masks.finalise(TREE, mask), updated):
        for name, count in zip("ab", kept, strict=False):
            assert (pruned[name] != 0).tolist() == [True, count == 3, True]
    assert evaluation.summary(TREE, mask).columns["kept"] == kept


# Evaluation.


def curve(params, sparsities):
    return evaluation.pruning_curve(total, params, sparsities, progress=False)


def error(params, sparsities):
    return evaluation.pruning_error(total, params, sparsities)


@pytest.mark.parametrize("function", [curve, error])
class TestSparsities:
    @pytest.mark.parametrize("value", [-0.1, 1.1, 2, NAN, True, "x", None])
    def test_out_of_range(self, function, value):
        with refused(f"sparsities {SPARSITY} {value!r}."):
            function(X, [0.5, value])

    @pytest.mark.parametrize("empty", [[], (), np.array([]), range(0)])
    def test_none(self, function, empty):
        with refused("sparsities must hold at least one value; got none."):
            function(X, empty)

    @pytest.mark.parametrize("kind", [list, tuple, np.array, iter])
    def test_in_range(self, function, kind):
        # The sum of 1, -2 and 3: all of it, its largest term, none of it.
        result = function(X, kind([0.0, 0.5, 1.0]))
        if function is curve:
            assert result.sparsities == (0.0, 0.5, 1.0)
            assert result.values["metric"] == (2.0, 3.0, 0.0)
        else:
            np.testing.assert_allclose(result.omega**2, [0, 1, 2], rtol=1e-6)
            np.testing.assert_allclose(result.rho**2, [3, 3, 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("metric", "parts"),
    [
        (lambda x: x, ["shape (3,) for 'metric'"]),
        (lambda x: {"loss": x.sum(), "all": x}, ["shape (3,) for 'all'"]),
        (lambda x: None, ["None", "'metric'"]),
    ],
)
def test_a_metric_that_is_not_a_scalar(metric, parts):
    with refused("metric_fn must return scalars; got", *parts):
        evaluation.pruning_curve(metric, X, [0.5], progress=False)


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        (lambda x: x.sum(), {"metric": (2.0, 3.0)}),
        (lambda x: 1, {"metric": (1, 1)}),
        (lambda x: x[:1], {"metric": (1.0, 0.0)}),
        (lambda x: {"a": 0.5, "b": x[0]}, {"a": (0.5, 0.5), "b": (1.0, 0.0)}),
    ],
)
def test_a_metric_that_is_a_scalar(metric, values):
    curve = evaluation.pruning_curve(metric, X, [0.0, 0.5], progress=False)
    assert curve.values == values


def test_summary_needs_gradients_and_state_together():
    state = prunadag().init(X)
    with refused("gradients was given without state; give both or neither."):
        evaluation.summary(X, gradients=X)
    with refused("state was given without gradients; give both or neither."):
        evaluation.summary(X, state=state)
    assert "optimisable" not in evaluation.summary(X).columns
    both = evaluation.summary(X, gradients=X, state=state)
    assert "optimisable" in both.columns


@pytest.mark.parametrize(("copies", "found"), [(0, 0), (2, 2)])
def test_summary_needs_one_prunadag_state(copies, found):
    state = [optax.adam(0.1).init(X)] + copies * [prunadag().init(X)]
    with refused(f"state must hold one ScaleByPrunadagState; got {found} in it."):
        evaluation.summary(X, gradients=X, state=state)


def test_summary_needs_trees_that_match():
    state = prunadag().init(X)
    with refused("state.optimisable_weight and params must have the same shape; got"):
        evaluation.summary(X[:2], gradients=X[:2], state=state)
    with refused("gradients and params must have the same shape; got (2,) and (3,)"):
        evaluation.summary(X, gradients=X[:2], state=state)


@pytest.mark.parametrize("wrong", [{"variant": "v5"}, {"scope": "x"}, {"relevance": 3}])
def test_summary_passes_settings_on(wrong):
    ((name, value),) = wrong.items()
    with refused(ALLOWED[name], f" {value!r}."):
        evaluation.summary(X, gradients=X, state=prunadag().init(X), **wrong)


# Plotting.

CURVE = evaluation.PruningCurve((0.0, 0.9), {"accuracy": (0.95, 0.94)})
ERROR = evaluation.PruningError(rho=jnp.array([1.0, 2.0]), omega=jnp.array([3.0, 4.0]))


@pytest.fixture
def ax():
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_unknown_metric(ax):
    with refused("metric must be one of ['accuracy'] for curve 'mine'; got 'loss'."):
        plotting.plot_curves({"mine": CURVE}, metric="loss", ax=ax)
    with refused("metric must be one of ['accuracy']", "got 'loss'."):
        plotting.plot_curves(CURVE, ax=ax, metric="loss")


@pytest.mark.parametrize("measure", ["tau", "Rho", "", None])
def test_unknown_measure(ax, measure):
    with refused(f"measure must be 'rho' or 'omega'; got {measure!r}."):
        plotting.plot_errors([0.0, 0.9], ERROR, measure=measure, ax=ax)


@pytest.mark.parametrize(("measure", "drawn"), [("rho", [1, 2]), ("omega", [3, 4])])
def test_known_measure(ax, measure, drawn):
    plotting.plot_errors([0.0, 0.9], ERROR, measure=measure, ax=ax)
    assert ax.get_lines()[0].get_ydata().tolist() == drawn
    assert measure in ax.get_ylabel()


@pytest.mark.parametrize("dtype", ["bool", "int8", "int32"])
def test_scores_that_are_no_floats(dtype):
    tx = prunadag(
        relevance=lambda g, x: jax.tree.map(lambda leaf: leaf.astype(dtype), g)
    )
    params = jnp.ones(3)
    with pytest.raises(ValueError, match=f"a leaf of dtype {dtype}; magnitudes are"):
        tx.update(params, tx.init(params), params)
