"""The article's experiments in small: their logic, and what the methods do on each."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from benchmarks import datasets
from benchmarks.article import __main__ as command
from benchmarks.article import (
    checks,
    claims,
    figures,
    pruning,
    published,
    report,
    results,
    runs,
    tables,
)
from benchmarks.article.methods import (
    METHODS,
    SETTINGS,
    VARIANTS,
    Settings,
    settings_of,
)
from benchmarks.problems import (
    NAMES,
    classification,
    ksvd,
    least_squares,
    sparco,
    sparse_coding,
)
from benchmarks.problems.base import Problem
from prunadag_optax import evaluation, masks, prunadag
from prunadag_optax.methods import frank_wolfe
from tests import reference
from tests.helpers import enable_x64

WRITTEN = SETTINGS["written"]
ZETA = WRITTEN.zeta
SMALL = (8, 80)  # rows and columns of the least squares here
LIMIT = 400
CONTINUOUS = ("Adagrad", "FW2")  # these converge within it


@pytest.fixture(autouse=True)
def double_precision():
    with enable_x64():
        yield


def mean_rho(problem, method, sparsities, count=3, limit=None):
    data = runs.batch(problem, count, WRITTEN.start)
    limit = limit or problem.max_iterations
    _, measured = runs.run(problem, data, method, limit, WRITTEN)
    where = [pruning.SPARSITIES.index(s) for s in sparsities]
    return np.asarray(measured.rho).mean(0)[where]


# What the methods do, a small slice of each family.


def test_least_squares_v3_can_be_pruned():
    problem = least_squares.problem("A1", rows=30, columns=300)
    rho = {
        method: mean_rho(problem, method, [0.1, 0.2], limit=5000)
        for method in ("v3", "Adagrad", "relevant_only")
    }
    assert np.all(rho["v3"] < 1e-4 * rho["Adagrad"])
    assert np.all(rho["v3"] < 1e-2 * rho["relevant_only"])


def test_sparco_v3_can_be_pruned():
    problem = sparco.problem("SPARCO 11")
    v3 = mean_rho(problem, "v3", [0.1, 0.2], count=2, limit=3000)
    adagrad = mean_rho(problem, "Adagrad", [0.1, 0.2], count=2, limit=3000)
    assert np.all(v3 < 1e-4 * adagrad)


def digits_dictionary() -> Problem:
    """Sparse coding of scikit-learn's 8 x 8 digits."""
    signals = load_digits().data.T / 16
    return Problem(
        name="MNIST",
        family="sparse_coding",
        size=120,
        shared=ksvd.learn(signals, 120, 5, 3),
        instance=lambda seed: signals[:, seed],
        loss=sparse_coding.loss,
        radius_1=10.0,
        radius_2=20.0,
    )


def test_sparse_coding_v1_can_be_pruned():
    problem = digits_dictionary()
    v1, adagrad, relevant_only = (
        mean_rho(problem, method, [0.2, 0.3, 0.4], limit=3000)
        for method in ("v1", "Adagrad", "relevant_only")
    )
    assert np.all(v1 < 0.2 * adagrad)
    assert np.all(v1 < 0.5 * relevant_only)


def test_classifiers_keep_their_accuracy(monkeypatch):
    digits = load_digits()
    small = datasets.Examples(digits.data, digits.target)
    monkeypatch.setattr(datasets, "mnist", lambda: small)
    problem = classification.problem("MNIST", samples=500)
    data = runs.batch(problem, 3, WRITTEN.start)
    accuracy = {}
    for method in ("v3", "Adagrad"):
        _, measured = runs.run(problem, data, method, 300, WRITTEN)
        accuracy[method] = np.asarray(measured.accuracy).mean(0)
    dense, heavily = (pruning.SPARSITIES.index(s) for s in (0.0, 0.85))
    assert accuracy["v3"][dense] > 0.8
    assert accuracy["v3"][heavily] > accuracy["v3"][dense] - 0.1
    assert accuracy["v3"][heavily] > accuracy["Adagrad"][heavily]


# The loop.


@settings(max_examples=50, deadline=None)
@given(limit=st.integers(1, 20_000), points=st.integers(3, 300))
def test_recording_points_rise_from_0_to_the_limit(limit, points):
    found = runs.recording_points(limit, points)
    assert (found[0], found[-1]) == (0, limit)
    assert np.all(np.diff(found) > 0)
    assert len(found) <= points + 1


def transcribed(problem, method, seed, limit):
    """The iterations, x and norms of a run, in plain NumPy."""
    matrix, target = problem.instance(seed)
    x, norms, count = problem.start(seed), [], 0
    accumulated = np.full(problem.size, ZETA**2)
    chosen = reference.Settings(relevant=problem.relevant, variant=method, zeta=ZETA)
    state = reference.initial_state([x], chosen)
    while True:
        gradient = matrix.T @ (matrix @ x - target)
        norms.append(np.linalg.norm(gradient))
        if count == limit or norms[-1] <= runs.TOLERANCE:
            return count, x, norms
        if method in VARIANTS:
            [x], state, _ = reference.step([x], [gradient], state, chosen)
        elif method == "Adagrad":
            accumulated += gradient**2
            x = x - gradient / np.sqrt(accumulated)
        else:
            largest = np.argsort(np.abs(gradient))[-problem.relevant :]
            length = np.linalg.norm(gradient[largest])
            radius = problem.radius_1 if method == "FW1" else problem.radius_2
            v = np.zeros(problem.size)
            v[largest] = -radius * gradient[largest] / length
            eta = 1 / (count + 1)
            if method == "FW2":
                eta = min(problem.rescale * length / np.linalg.norm(v - x), 1.0)
            x = x + eta * (v - x)
        count += 1


@pytest.fixture(scope="module")
def small():
    """Least squares of a few components, and all methods' runs on it."""
    problem = least_squares.problem("A1", *SMALL)
    # ||A|| is smaller than in the article's A1: so FW2 converges within the limit.
    problem = dataclasses.replace(problem, rescale=0.01)
    with enable_x64():
        data = runs.batch(problem, 3, WRITTEN.start)
        outcomes = {
            method: runs.run(problem, data, method, LIMIT, WRITTEN)
            for method in METHODS
        }
    return problem, data, outcomes


@pytest.mark.parametrize("method", METHODS)
def test_runs_are_those_of_a_plain_loop(small, method):
    problem, _, outcomes = small
    outcome, _ = outcomes[method]
    # Rounding differs, and no step of prunAdag is a continuous function: the first
    # iterations are compared, in which the differences have had no time to grow.
    points = runs.recording_points(LIMIT)
    early = points <= 20
    for seed in range(2):
        count, x, norms = transcribed(problem, method, seed, LIMIT)
        np.testing.assert_allclose(
            outcome.trace.gradient_norm[seed][early],
            np.array(norms)[points[early]],
            rtol=1e-6,
        )
        if method in CONTINUOUS:
            assert 20 < count < LIMIT
            assert abs(int(outcome.iterations[seed]) - count) <= 1
            np.testing.assert_allclose(outcome.x[seed], x, atol=1e-7)


@pytest.mark.parametrize("method", ["v4", *CONTINUOUS])
def test_a_run_is_the_same_alone_and_does_not_move_when_it_is_done(small, method):
    problem, data, outcomes = small
    together, _ = outcomes[method]
    points = runs.recording_points(LIMIT)
    early = points <= 20
    ends = np.asarray(together.iterations)
    first = int(ends.argmin())
    instance = jax.tree.map(lambda a: a[first], data.instances)

    @jax.jit
    def solve(start, instance, chosen):
        def loss(x):
            return problem.loss((), instance, x)

        return runs.solve(loss, method, chosen, start, points)

    alone = solve(data.starts[first], instance, settings_of(problem, WRITTEN))
    np.testing.assert_allclose(
        alone.trace.gradient_norm[early],
        together.trace.gradient_norm[first][early],
        rtol=1e-6,
    )
    if method in CONTINUOUS:
        # The others went on for long, with this one in the same batch.
        assert ends[first] < sorted(ends)[1] - 5
        assert abs(int(alone.iterations) - ends[first]) <= 1
        np.testing.assert_allclose(alone.x, together.x[first], atol=1e-7)
        after = together.trace.gradient_norm[first][points >= ends[first]]
        assert len(set(np.asarray(after).tolist())) == 1
        assert 0 < float(after[0]) <= runs.TOLERANCE


def test_reached_is_the_first_iteration_below_a_tolerance(small):
    problem, _, outcomes = small
    outcome, _ = outcomes["FW2"]
    _, _, norms = transcribed(problem, "FW2", 0, LIMIT)
    for tolerance, reached in zip(runs.TOLERANCES, outcome.reached[0], strict=True):
        first = next(k for k, norm in enumerate(norms) if norm <= tolerance)
        assert abs(int(reached) - first) <= 1
    slow, _ = outcomes["FW1"]
    assert np.all(np.asarray(slow.reached)[:, -1] == -1)
    assert np.all(np.asarray(slow.iterations) == LIMIT)


def test_trace_counts_components_and_classes(small):
    problem, data, outcomes = small
    outcome, _ = outcomes["v1"]
    optimisable, _, decreasable = np.moveaxis(np.asarray(outcome.trace.classes), -1, 0)
    assert np.all(optimisable + decreasable == problem.size)
    assert np.all(optimisable >= problem.relevant)
    for i, delta in enumerate(runs.DELTAS):
        for column, x in ((0, data.starts), (-1, outcome.x)):
            np.testing.assert_allclose(
                outcome.trace.below[:, column, i],
                np.mean(np.abs(np.asarray(x)) < delta, axis=1),
            )


def test_starts_have_length_1():
    problem = least_squares.problem("A1", *SMALL)
    for start, nonzeros in (("sparse", problem.relevant), ("dense", problem.size)):
        x = np.asarray(runs.batch(problem, 3, start).starts)
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1)
        assert np.all(np.count_nonzero(x, axis=1) == nonzeros)
        assert len(np.unique(x[:, x.any(axis=0)], axis=0)) == 3
    with pytest.raises(ValueError, match=r"'sparse', 'dense'.*'none'"):
        runs.batch(problem, 1, "none")


def test_adagrad_is_prunadag_with_everything_relevant():
    problem = least_squares.problem("A1", *SMALL)
    data = runs.batch(problem, 1, WRITTEN.start)
    instance = jax.tree.map(lambda a: a[0], data.instances)
    gradient = jax.jit(jax.grad(lambda x: problem.loss((), instance, x)))
    ours = METHODS["Adagrad"](settings_of(problem, WRITTEN))
    theirs = prunadag(1.0, relevant=1.0, initial_weight=ZETA)
    xs = [data.starts[0]] * 2
    states = [tx.init(xs[0]) for tx in (ours, theirs)]
    for _ in range(30):
        for i, tx in enumerate((ours, theirs)):
            updates, states[i] = tx.update(gradient(xs[i]), states[i], xs[i])
            xs[i] = optax.apply_updates(xs[i], updates)
        np.testing.assert_allclose(xs[0], xs[1], rtol=1e-9, atol=1e-12)


def test_evaluate_is_the_packages_pruning_error():
    a, b = np.random.default_rng(0).normal(size=(2, 40))

    def loss(x):
        return jnp.sum(b**2 * (x - a) ** 4)

    x = jnp.asarray(np.roll(a, 1))
    found = jax.jit(lambda x: pruning.evaluate(loss, jnp.sum, x))(x)
    rho, omega = evaluation.pruning_error(loss, x, (0.0, 0.35, 0.9))
    where = np.array([pruning.SPARSITIES.index(s) for s in (0.0, 0.35, 0.9)])
    np.testing.assert_allclose(found.rho[where], rho, rtol=1e-10)
    np.testing.assert_allclose(found.omega[where], omega, rtol=1e-10)
    sums = [masks.prune(x, s)[0].sum() for s in (0.0, 0.35, 0.9)]
    np.testing.assert_allclose(found.accuracy[where], sums)


def test_methods_take_the_problems_numbers():
    chosen = Settings(2, 0.3, 2.0, 3.0, 5.0, 0.1)
    x, g = jnp.zeros(4), jnp.array([3.0, -4.0, 0.1, 0.2])
    for name, tx in (
        ("v3", prunadag(1.0, 2, initial_weight=0.3)),
        ("FW1", frank_wolfe.fw1(3.0, 2, 2.0)),
        ("FW2", frank_wolfe.fw2(5.0, 2, 0.1)),
    ):
        own = METHODS[name](chosen)
        found, _ = own.update(g, own.init(x), x)
        expected, _ = tx.update(g, tx.init(x), x)
        np.testing.assert_array_equal(found, expected)


# Tables and claims, from made-up results.


def made_up(family: str, rho: dict[str, float] | None = None, count: int = 4):
    """Results in which each method has one rho at every sparsity, the same in all."""
    levels = {method: 10.0 + i for i, method in enumerate(METHODS)} | (rho or {})
    points = len(runs.recording_points(100))
    methods = {
        method: {
            "iterations": np.full(count, 100),
            "reached": np.full((count, 3), 100),
            "rho": np.full((count, len(pruning.SPARSITIES)), level),
            "omega": np.full((count, len(pruning.SPARSITIES)), level),
            "norms": np.full((3, points), level, np.float32),
            "below": np.full((3, points, len(runs.DELTAS)), 0.5, np.float32),
        }
        for method, level in levels.items()
    }
    for method, quantities in methods.items():
        if method in VARIANTS:
            quantities["classes"] = np.full((3, points, 3), 7, np.float32)
        if family == "classification":
            quantities["accuracy"] = 0.8 + 0 * quantities["rho"]
        if family == "sparse_coding":
            quantities["digits"] = np.zeros((1 + len(command.SHOWN), 784), np.float32)
    about = {
        "family": family,
        "runs": count,
        "quick": False,
        "missing": {},
        "problems": {name: {"limit": 100} for name in NAMES[family]},
        "digits": command.SHOWN,
        "seconds": 60.0,
        "command": "made up",
        "environment": {
            "backend": "cpu",
            "architecture": "none",
            "cores": 1,
            "versions": {"jax": "0"},
        },
    }

    def copy():
        return {m: {k: a.copy() for k, a in q.items()} for m, q in methods.items()}

    influence = {}
    if family == "least_squares":
        influence = {"n/20": {m: copy()[m] for m in command.INFLUENCED}}
    return results.Family(about, {name: copy() for name in NAMES[family]}, influence)


def verdict_of(found, words):
    [claim] = [claim for claim in found if words in claim.text]
    return claim.verdict


@given(passed=st.lists(st.booleans(), min_size=1), needed=st.floats(0.01, 1))
def test_verdict_follows_the_share_of_the_checks(passed, needed):
    found = checks.verdict([checks.Check("", p) for p in passed], needed)
    share = sum(passed) / len(passed)
    if all(passed):
        assert found == "holds"
    if found == "holds":
        assert share >= needed - 1e-6
    elif found == "holds in part":
        assert needed / 2 - 1e-6 <= share < needed
    else:
        assert found == "does not hold"
        assert share < needed / 2


@pytest.mark.parametrize(
    ("won", "expected"),
    [(6, "holds"), (5, "holds"), (3, "holds in part"), (2, "does not hold")],
)
def test_v3_must_win_five_of_six_cases(won, expected):
    family = made_up("least_squares")
    for name in list(family.problems)[:won]:
        family.problems[name]["v3"]["rho"][:] = 1.0
    found = claims.claims({"least_squares": family})
    assert verdict_of(found, "five of six") == expected


def test_converged_methods_tie():
    family = made_up("sparco", {"v3": 9e-10, "v1": 2e-10})
    found = claims.claims({"sparco": family})
    assert verdict_of(found, "four of five") == "holds"
    family = made_up("sparco", {"v3": 9e-8, "v1": 2e-10})
    found = claims.claims({"sparco": family})
    assert verdict_of(found, "four of five") == "does not hold"


def test_claims_that_nothing_was_measured_for():
    found = claims.claims({})
    assert {claim.verdict for claim in found} == {"not measured"}


def published_rho(factor):
    """Results that have the published mean times a factor in every listed cell."""
    family = made_up("least_squares")
    for (name, sparsity), cells in published.TABLE_2.items():
        column = pruning.SPARSITIES.index(sparsity)
        for method, value in cells.items():
            family.problems[name][method]["rho"][:, column] = factor * value
    return family


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(1.0, "holds"), (2.9, "holds"), (0.3, "does not hold"), (4.0, "does not hold")],
)
def test_table_2_within_a_factor_of_three(factor, expected):
    found = claims.claims({"least_squares": published_rho(factor)})
    [claim] = [c for c in found if "v2, v3, v4 on A1" in c.text]
    assert claim.verdict == expected
    # Two of the fifteen are converged in the article, and still are.
    assert len(claim.exceptions) == (0 if expected == "holds" else 13)


@pytest.mark.parametrize(
    ("points", "expected"), [(0, "holds"), (2, "holds"), (3, "does not hold")]
)
def test_table_4_within_points(points, expected):
    family = made_up("classification")
    for name, methods in family.problems.items():
        for (article, sparsity), cells in published.TABLE_4.items():
            if article == published.NAMED.get(name, name):
                column = pruning.SPARSITIES.index(sparsity)
                for method, value in cells.items():
                    methods[method]["accuracy"][:, column] = (value - points) / 100
    found = claims.claims({"classification": family})
    for words in ("MNIST, A9A", "MNIST 30:70, A9A"):
        assert verdict_of(found, words) == expected


def test_other_claims_on_results_made_to_fit():
    family = made_up("least_squares", {"relevant_only": 1e4, "Adagrad": 1e4})
    for methods in family.problems.values():
        for method, low, high in (("v1", 0.1, 50.0), ("v4", 2.0, 2.0)):
            rho = methods[method]["rho"]
            rho[:] = np.where(np.array(pruning.SPARSITIES) <= 0.3, low, high)
        for method in ("FW1", "FW2"):
            methods[method]["rho"][:, pruning.SPARSITIES.index(0.7)] = 1.0
    found = claims.claims({"least_squares": family})
    for words in ("v1 is very robust", "Near 70%", "relevant_only", "as fast"):
        assert verdict_of(found, words) == "holds", words
    for methods in family.problems.values():
        methods["v1"]["reached"][:, -1] = -1
    found = claims.claims({"least_squares": family})
    assert verdict_of(found, "as fast") == "holds in part"

    coding = made_up("sparse_coding", {"v1": 0.05})
    found = claims.claims({"sparse_coding": coding})
    assert verdict_of(found, "v1 is most robust") == "holds"
    assert verdict_of(found, "v3 and v4") == "does not hold"


def test_tables_have_the_published_beside_the_measured():
    rows = tables.table_2(published_rho(2.0))
    [row] = [
        row
        for row in rows
        if (row["problem"], row["sparsity"], row["method"]) == ("A1", 0.2, "v2")
    ]
    assert row["published"] == 1.39
    assert (row["mean"], row["median"]) == pytest.approx((2.78, 2.78))
    assert row["ratio"] == pytest.approx(2)
    assert row["deviation"] == pytest.approx(0)
    text = tables.markdown(rows, "rho")
    line = next(line for line in text.splitlines() if line.startswith("| A1 | 20%"))
    assert "2.8 ± 0" in line
    assert "article 1.39: x 2" in line
    # No published figure, no ratio.
    assert all((row["ratio"] is None) == (row["published"] is None) for row in rows)
    assert {row["method"] for row in rows if row["published"] is None} > {"FW1"}


def test_published_tables_are_whole():
    assert len(published.TABLE_2) == 8
    assert len(published.TABLE_4) == 16
    assert all(set(c) == set(published.COLUMNS) for c in published.TABLE_4.values())
    assert all(
        s in pruning.SPARSITIES for _, s in published.TABLE_2 | published.TABLE_4
    )


def test_ranking_counts_the_runs_won():
    family = made_up("least_squares")
    rho = family.problems["A1"]
    rho["v4"]["rho"][:3] = 1.0  # three of four runs, and the least mean
    rho["FW1"]["rho"][3:] = 2.0
    rows = tables.ranking(family, "rho")
    at_10 = {
        row["method"]: row
        for row in rows
        if row["problem"] == "A1" and row["sparsity"] == 0.1
    }
    shares = {method: row["share of runs won"] for method, row in at_10.items()}
    assert shares == dict.fromkeys(METHODS, 0) | {"v4": 0.75, "FW1": 0.25}
    assert [m for m, row in at_10.items() if row["best mean"]] == ["v4"]
    assert "v4 (75)" in tables.ranking_markdown(rows)


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(0, 1e3), min_size=1))
def test_best_is_never_beaten(values):
    winners = results.best(values)
    lowest = min(values.values())
    assert winners
    for name, value in values.items():
        assert (name in winners) == (value <= max(lowest, results.CONVERGED))
    largest = results.best(values, largest=True)
    assert {values[name] for name in largest} == {max(values.values())}


# Files.


def test_results_survive_a_file(tmp_path):
    family = made_up("least_squares")
    results.save(family, tmp_path / "least_squares.npz")
    found = results.load_all(tmp_path, tuple(NAMES))
    assert list(found) == ["least_squares"]
    again = found["least_squares"]
    assert again.about == {**family.about, "digits": list(command.SHOWN)}
    for part in ("problems", "influence"):
        before, after = getattr(family, part), getattr(again, part)
        assert jax.tree.structure(before) == jax.tree.structure(after)
        jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.slow
def test_page_from_the_numbers_alone(tmp_path):
    for name in NAMES:
        results.save(made_up(name), tmp_path / "article" / f"{name}.npz")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.article",
            "all",
            "--figures-only",
            "--output",
            str(tmp_path),
        ],
        check=True,
    )
    written = {path.name for path in (tmp_path / "article").iterdir()}
    assert {f"{name}.png" for name in figures.FIGURES} <= written
    assert {"table_2_least_squares.csv", "ranking_sparco.csv"} <= written
    page = (tmp_path / "article.md").read_text()
    for path in written:
        if path.endswith(".png"):
            assert f"(article/{path})" in page
    assert report.READINGS in page
    assert "not measured" not in page


def test_missing_data_are_left_out(small, capsys, monkeypatch):
    monkeypatch.setattr(command, "QUICK_LIMIT", LIMIT)  # nothing to compile anew

    def build(family, names, quick):
        assert quick
        if names != ["SPARCO 7"]:
            raise datasets.MissingData(f"{family}: get {names[0]} elsewhere")
        return [small[0]]

    family = command.measure("sparco", 3, True, build, "written")
    assert list(family.problems) == ["SPARCO 7"]
    assert set(family.about["missing"]) == set(NAMES["sparco"]) - {"SPARCO 7"}
    assert "get SPARCO 3 elsewhere" in capsys.readouterr().err
    assert set(family.problems["SPARCO 7"]) == set(METHODS)
    quantities = family.problems["SPARCO 7"]["v1"]
    points = len(runs.recording_points(LIMIT))
    assert quantities["rho"].shape == (3, len(pruning.SPARSITIES))
    assert quantities["norms"].shape == (3, points)
    assert quantities["classes"].shape == (3, points, 3)
