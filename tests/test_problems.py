"""The problems of the article: their operators, their data, and what runs on them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from benchmarks import datasets, problems
from benchmarks.problems import (
    classification,
    ksvd,
    least_squares,
    sparco,
    sparse_coding,
)
from prunadag_optax import prunadag
from tests.helpers import enable_x64

CASES = list(least_squares.MATRICES)
SPARCO = list(sparco.OPERATORS)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture
def fake_data(monkeypatch, tmp_path):
    """Small data sets in place of the real ones, and a cache of their own."""
    rng = np.random.default_rng(0)

    def digits():
        # Half of the pixels are off everywhere, as the borders of MNIST are.
        images = rng.integers(256, size=(300, 784)) * (np.arange(784) % 2)
        return datasets.Examples(images.astype(np.uint8), np.arange(300) % 10)

    def rows(columns):
        labels = np.where(rng.random(90) < 0.5, -1.0, 1.0)
        features = rng.normal(size=(90, columns)) + labels[:, None]
        return datasets.Examples(features, labels)

    sets = {"mnist": digits(), "a9a": rows(12), "reged0": rows(15), "musk1": rows(9)}
    for name, examples in sets.items():
        monkeypatch.setattr(datasets, name, lambda examples=examples: examples)
    monkeypatch.setenv("PRUNADAG_CACHE", str(tmp_path))


# Made once: the larger ones take a second.
recovery = functools.cache(sparco.problem)


def small(family):
    if family == "least_squares":
        return [least_squares.problem(name, 6, 30) for name in CASES]
    if family == "sparco":
        return [recovery(name) for name in ("SPARCO 3", "SPARCO 9")]
    if family == "sparse_coding":
        return [sparse_coding.problem(40, 20, 3, 2)]
    return [classification.problem(name, 60) for name in classification.NAMES]


def dense(problem):
    """The matrix of a SPARCO problem, column by column."""
    operator = sparco.OPERATORS[problem.name]
    columns = jax.vmap(lambda x: operator(problem.shared.matrix, x))
    return np.asarray(columns(jnp.eye(problem.size))).T


# Every family.


@pytest.mark.parametrize("family", list(problems.NAMES))
@pytest.mark.slow
def test_runs_batch_and_repeat(fake_data, family):
    with enable_x64():
        for problem in small(family):
            instances = [problem.instance(seed) for seed in (3, 4, 3)]
            jax.tree.map(np.testing.assert_array_equal, instances[0], instances[2])
            starts = np.stack([problem.start(seed) for seed in (3, 4, 3)])
            np.testing.assert_array_equal(starts[0], starts[2])
            assert not np.array_equal(starts[0], starts[1])
            for leaf in jax.tree.leaves((problem.shared, instances)):
                assert leaf.dtype == np.float64
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *instances)
            gradient = jax.grad(problem.loss, argnums=2)
            batched = jax.jit(jax.vmap(gradient, (None, 0, 0)))
            found = batched(problem.shared, stacked, starts)
            assert found.shape == (3, problem.size)
            assert found.dtype == np.float64
            for instance, start, row in zip(instances, starts, found, strict=True):
                one = gradient(problem.shared, instance, jnp.asarray(start))
                np.testing.assert_allclose(row, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", list(problems.NAMES))
@pytest.mark.parametrize("variant", ["v3", "adagrad"])
def test_methods_reduce_the_loss(fake_data, family, variant):
    with enable_x64():
        for problem in small(family):
            tx = (
                optax.adagrad(1.0, 1e-4, eps=0.0)
                if variant == "adagrad"
                else prunadag(1.0, problem.relevant, variant=variant)
            )
            instance = problem.instance(0)
            loss = lambda x, p=problem, i=instance: p.loss(p.shared, i, x)  # noqa: E731

            def step(_, carry, tx=tx, loss=loss):
                x, state = carry
                updates, state = tx.update(jax.grad(loss)(x), state, x)
                return optax.apply_updates(x, updates), state

            start = jnp.asarray(problem.start(0))
            first = (start, tx.init(start))
            x, _ = jax.jit(lambda c, f=step: jax.lax.fori_loop(0, 300, f, c))(first)
            assert loss(x) < 0.75 * loss(start)


@given(SEEDS, st.integers(1, 200))
def test_start(seed, size):
    problem = dataclasses.replace(small("least_squares")[0], size=size, relevant=0)
    assert problem.relevant == max(1, size // 10)
    start = problem.start(seed)
    assert np.count_nonzero(start) == problem.relevant
    np.testing.assert_allclose(np.linalg.norm(start), 1.0)


@pytest.mark.parametrize("relevant", [-1, 31])
def test_relevant_out_of_range(relevant):
    with pytest.raises(ValueError, match=f"relevant .* size = 30, got {relevant}"):
        dataclasses.replace(small("least_squares")[0], relevant=relevant)


def test_problems_by_family_and_name(fake_data):
    for family in ("least_squares", "sparco", "classification"):
        built = problems.problems(family, problems.NAMES[family][:2])
        assert [p.name for p in built] == list(problems.NAMES[family][:2])
        assert {p.family for p in built} == {family}
    with pytest.raises(ValueError, match=r"family must be one of .* got 'sparc'"):
        problems.problems("sparc")
    with pytest.raises(ValueError, match=r"names must be among .* got \['A7'\]"):
        problems.problems("least_squares", ["A1", "A7"])
    for build in (least_squares.problem, sparco.problem, classification.problem):
        with pytest.raises(ValueError, match=r"name must be one of .* got 'A7'"):
            build("A7")


@pytest.mark.parametrize("family", ["sparse_coding", "classification"])
def test_missing_data_comes_through(monkeypatch, family):
    def absent():
        raise datasets.MissingData("not there")

    monkeypatch.setattr(datasets, "mnist", absent)
    with pytest.raises(datasets.MissingData, match="not there"):
        problems.problems(family, ["MNIST"], quick=True)


# Least squares.


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(CASES), SEEDS)
def test_equations_are_consistent(name, seed):
    matrix, target = least_squares.problem(name, 8, 40).instance(seed)
    assert matrix.shape == (8, 40)
    solution = np.linalg.lstsq(matrix, target)[0]
    np.testing.assert_allclose(matrix @ solution, target, atol=1e-9)
    rows = matrix @ matrix.T
    if name in ("A2", "A4", "A6"):
        np.testing.assert_allclose(rows, np.eye(8), atol=1e-12)
    if name == "A3":
        np.testing.assert_allclose(rows, 40 / 8 * np.eye(8), atol=1e-12)
        for k in range(0, 40, 8):
            block = matrix[:, k : k + 8]
            np.testing.assert_allclose(block.T @ block, np.eye(8), atol=1e-12)
    if name == "A5":
        assert set(np.unique(matrix)) == {-1.0, 1.0}
    if name == "A6":
        # A row of the transform is the transform of nothing but one unit vector.
        units = np.asarray(scipy.fft.dct(matrix, norm="ortho", axis=1))
        places = np.argmax(units, axis=1)
        np.testing.assert_allclose(units, np.eye(40)[places], atol=1e-12)
        assert len(set(places)) == 8


def test_least_squares_loss_and_sizes():
    full = problems.problems("least_squares")
    assert {(p.size, p.relevant) for p in full} == {(1000, 100)}
    assert full[0].instance(0).matrix.shape == (100, 1000)
    with enable_x64():
        for problem in small("least_squares"):
            matrix, target = equations = problem.instance(1)
            x = np.random.default_rng(0).normal(size=problem.size)
            value, gradient = jax.value_and_grad(problem.loss, 2)(
                (), equations, jnp.asarray(x)
            )
            residual = matrix @ x - target
            np.testing.assert_allclose(value, residual @ residual / 2)
            np.testing.assert_allclose(gradient, matrix.T @ residual, atol=1e-9)


# SPARCO.


@pytest.mark.parametrize("name", SPARCO)
def test_sparco_gradient_is_the_adjoint(name):
    with enable_x64():
        problem, operator = recovery(name), sparco.OPERATORS[name]
        matrix, target, _ = problem.shared
        rng = np.random.default_rng(0)
        x, r = rng.normal(size=problem.size), rng.normal(size=target.size)
        forward, adjoint = jax.vjp(lambda x: operator(matrix, x), jnp.asarray(x))
        np.testing.assert_allclose(forward @ r, x @ adjoint(jnp.asarray(r))[0])
        # And against the formula, the transform written out.
        np.testing.assert_allclose(forward, written_out(name, matrix, x), atol=1e-9)
        gradient = jax.grad(problem.loss, 2)(problem.shared, (), jnp.asarray(x))
        expected = adjoint(forward - target)[0]
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def written_out(name, matrix, x):
    if name == "SPARCO 9":
        return np.array([x[: i + 1].sum() for i in range(x.size)])
    if name in ("SPARCO 7", "SPARCO 11"):
        return matrix @ x
    n = x.size // 2
    k, j = np.mgrid[:n, :n]
    dct = np.sqrt(2 / n) * np.cos(np.pi * (2 * j + 1) * k / (2 * n))
    dct[0] /= np.sqrt(2)
    signal = dct.T @ x[:n] + x[n:]
    return signal if matrix is None else matrix @ signal


@pytest.mark.parametrize(
    ("name", "shape", "nonzeros", "squared_norm", "tolerance"),
    [
        # A A^T = 2 I; the square of 1 / (2 sin(pi / (4 * 128 + 2))) for the inverse of
        # a difference; (sqrt(n) + sqrt(m))^2 for a Gaussian matrix.
        ("SPARCO 3", (1024, 2048), 122, 2.0, 1e-9),
        ("SPARCO 5", (300, 2048), 63, 2 * (1 + np.sqrt(1024 / 300)) ** 2, 0.05),
        ("SPARCO 7", (600, 2560), 20, 1.0, 1e-9),
        ("SPARCO 9", (128, 128), 12, 0.25 / np.sin(np.pi / 514) ** 2, 1e-9),
        ("SPARCO 11", (256, 1024), 32, (32 + 16) ** 2, 0.05),
    ],
)
def test_sparco_definition(name, shape, nonzeros, squared_norm, tolerance):
    with enable_x64():
        problem = recovery(name)
        matrix, target, solution = problem.shared
        a = dense(problem)
        assert a.shape == shape
        assert (problem.size, problem.relevant) == (shape[1], shape[1] // 10)
        assert np.count_nonzero(solution) == nonzeros
        np.testing.assert_allclose(a @ solution, target, atol=1e-9)
        norm = np.linalg.eigvalsh(a @ a.T)[-1]
        np.testing.assert_allclose(norm, squared_norm, rtol=tolerance)
        if name == "SPARCO 5":
            lengths = np.linalg.norm(matrix, axis=0)
            np.testing.assert_allclose(lengths, 1.0)


def test_sparco_solutions():
    def solution(number):
        return recovery(f"SPARCO {number}").shared.solution

    unit = np.sqrt(512)
    np.testing.assert_allclose(solution(3)[[4, 12]], [4 * unit, 2 * unit])
    np.testing.assert_allclose(solution(5)[[3, 9, 20]], [2 * unit, 3 * unit, -unit])
    assert set(np.unique(solution(7))) == {-1.0, 0.0, 1.0}
    # The sample on the jump of 5 at 1/4 takes half of it, the next one the other half.
    np.testing.assert_allclose(solution(9)[31:33], [2.5, 2.5])
    np.testing.assert_allclose(np.abs(solution(9)).sum(), np.abs(sparco.JUMPS).sum())


def test_blocks():
    # Between the jumps Blocks is constant, so at size s its squared length is that of
    # the constants; published to four decimals for 128 and 1024 samples.
    for size, length in ((128, 27.8076), (1024, 78.8987)):
        signal = sparco.blocks(size)
        np.testing.assert_allclose(np.linalg.norm(signal), length, atol=6e-5)
        times = np.arange(1, size + 1) / size
        for low, high in zip(sparco.PLACES, sparco.PLACES[1:], strict=False):
            assert np.ptp(signal[(times > low) & (times < high)]) < 1e-12


# Sparse coding.


@settings(deadline=None, max_examples=10)
@given(SEEDS)
def test_update_of_atoms_reduces_the_error(seed):
    rng = np.random.default_rng(seed)
    signals = rng.normal(size=(12, 40))
    dictionary = ksvd._unit(rng.normal(size=(12, 20)))
    coded = ksvd.codes(dictionary, signals, 3)
    # An atom that nothing uses, which is replaced.
    coded[0] = 0
    assert np.count_nonzero(coded, axis=0).max() == 3
    new, new_coded = ksvd.update_atoms(dictionary, coded, signals)
    np.testing.assert_allclose(np.linalg.norm(new, axis=0), 1.0)
    assert not np.any(new_coded[coded == 0])
    before = np.linalg.norm(signals - dictionary @ coded)
    after = np.linalg.norm(signals - new @ new_coded)
    assert after < before
    cosines = new[:, 0] @ signals / np.linalg.norm(signals, axis=0)
    np.testing.assert_allclose(cosines.max(), 1.0)


def test_dictionary_of_sparse_signals_is_found():
    # Signals that are sparse in some dictionary: K-SVD codes them better than the
    # signals it started from, and the more sweeps the better.
    rng = np.random.default_rng(5)
    true = ksvd._unit(rng.normal(size=(15, 20)))
    coded = np.where(rng.random((20, 400)) < 0.1, rng.normal(size=(20, 400)), 0.0)
    signals = true @ coded

    def error(sweeps):
        dictionary = ksvd.learn(signals, 20, 3, sweeps)
        rest = signals - dictionary @ ksvd.codes(dictionary, signals, 3)
        return np.linalg.norm(rest) / np.linalg.norm(signals)

    errors = [error(sweeps) for sweeps in (0, 2, 15)]
    assert errors[2] < 0.75 * errors[0]
    assert errors[0] > errors[1] > errors[2]


def test_too_many_atoms():
    signals = np.eye(4)
    signals[:, 2] = 0
    with pytest.raises(ValueError, match=r"atoms must be at most .* 3, got 4"):
        ksvd.learn(signals, 4, 1, 1)


def test_sparse_coding(fake_data, monkeypatch, tmp_path):
    problem = sparse_coding.problem(40, 20, 3, 2)
    assert problem.shared.shape == (784, 20)
    np.testing.assert_allclose(np.linalg.norm(problem.shared, axis=0), 1.0)
    signals = sparse_coding.digits(40)
    assert signals.shape == (784, 40)
    assert (signals.min(), signals.max()) == (0.0, 1.0)
    x = np.random.default_rng(0).normal(size=20)
    with enable_x64():
        value = problem.loss(problem.shared, problem.instance(7), jnp.asarray(x))
    np.testing.assert_allclose(value, np.sum((signals[:, 7] - problem.shared @ x) ** 2))
    image = sparse_coding.digit(problem.shared, x)
    np.testing.assert_array_equal(image.ravel(), problem.shared @ x)
    # The dictionary is learned once.
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(ksvd, "learn", lambda *args: pytest.fail("learned again"))
    again = sparse_coding.problem(40, 20, 3, 2)
    np.testing.assert_array_equal(again.shared, problem.shared)


# Classification.


@given(
    hnp.arrays(
        np.int64,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.integers(-1000, 1000),
    )
)
def test_scale(features):
    scaled = classification.scale(features)
    for before, after in zip(features.T, scaled.T, strict=True):
        if np.ptp(before):
            assert (after.min(), after.max()) == (0.0, 1.0)
            np.testing.assert_allclose(
                after * np.ptp(before) + before.min(), before, atol=1e-9
            )
        else:
            assert not after.any()


def test_logistic_loss_and_accuracy(fake_data):
    with enable_x64():
        for problem in small("classification"):
            instance = problem.instance(0)
            if problem.name in classification.SAMPLED:
                assert problem.shared == ()
                (features, labels), test = instance
            else:
                chosen = instance == 1
                assert set(np.unique(instance)) == {0.0, 1.0}
                every, classes = problem.shared
                features, labels = every[chosen], classes[chosen]
                test = classification.Examples(every[~chosen], classes[~chosen])
            total = len(labels) + len(test.labels)
            share = 0.3 if problem.name == "MNIST 30:70" else 0.7
            assert len(labels) == round(share * total)
            assert set(np.unique(labels)) == {-1.0, 1.0}
            scaled = np.concatenate([features, test.features])
            assert (scaled.min(), scaled.max()) == (0.0, 1.0)
            x = np.random.default_rng(1).normal(size=problem.size)
            value = problem.loss(problem.shared, instance, jnp.asarray(x))
            expected = np.mean(
                [
                    np.log(1 + np.exp(-label * row @ x))
                    for row, label in zip(features, labels, strict=True)
                ]
            )
            np.testing.assert_allclose(value, expected)
            right = np.mean(np.where(test.features @ x > 0, 1, -1) == test.labels)
            assert problem.accuracy is not None
            accuracy = problem.accuracy(problem.shared, instance, jnp.asarray(x))
            np.testing.assert_allclose(accuracy, right)


def test_logistic_loss_does_not_overflow(fake_data):
    with enable_x64():
        for problem in small("classification"):
            instance = problem.instance(0)
            x = jnp.full(problem.size, 1e6)
            value, gradient = jax.value_and_grad(problem.loss, 2)(
                problem.shared, instance, x
            )
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))


def test_gisette_like():
    rng = np.random.default_rng(0)
    digits = rng.integers(10, size=2000)
    # Two pixels tell 4 from 9, others tell nothing, and some are never on.
    images = rng.integers(1, 256, size=(2000, 30))
    images[:, 0] = np.where(digits == 4, 200, 10)
    images[:, 1] = np.where(digits == 4, 10, 200)
    images[:, 20:] = 0
    features, labels = classification.gisette_like(images, digits, 100, 80)
    assert features.shape == (100, 80)
    assert set(np.unique(labels)) == {-1.0, 1.0}
    correlation = np.abs(
        [
            np.corrcoef(column, labels)[0, 1] if np.ptp(column) else 0.0
            for column in features.T
        ]
    )
    # The pixels 0 and 1 themselves tell all; a permuted copy never does.
    assert 2 <= np.count_nonzero(correlation > 0.999) <= 40
    # Probes have the values of a real column: all 80 columns are pairwise the same up
    # to order with at most 40 different ones.
    distinct = {tuple(np.sort(column)) for column in features.T}
    assert 20 <= len(distinct) <= 40
    again = classification.gisette_like(images, digits, 100, 80)
    np.testing.assert_array_equal(features, again.features)
