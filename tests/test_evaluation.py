"""Pruning curves, the article's rho and omega, the summary, and their plots."""

import csv
import io
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest

from prunadag_optax import evaluation, masks, plotting, prunadag
from tests.helpers import refused

SPARSITIES = [0.0, 0.3, 0.5, 0.9, 1.0]


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "dense": {"kernel": rng.normal(size=(6, 5)), "bias": rng.normal(size=5)},
        "out": rng.normal(size=(5, 3)),
    }


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def kernels(path, leaf):
    del path
    return leaf.ndim > 1


def numpy_pruned(x, sparsity):
    flat = x.ravel().copy()
    flat[np.argsort(np.abs(flat), kind="stable")[: round(sparsity * flat.size)]] = 0
    return flat.reshape(x.shape)


def test_curve_counts_are_exact_and_unprunable_leaves_stay(params):
    def metrics(pruned):
        leaves = [pruned["dense"]["kernel"], pruned["out"]]
        return {
            "zeros": sum(int((leaf == 0).sum()) for leaf in leaves),
            "bias": jnp.linalg.norm(pruned["dense"]["bias"]),
        }

    curve = evaluation.pruning_curve(metrics, params, SPARSITIES, where=kernels)
    assert curve.values["zeros"] == tuple(round(s * 45) for s in SPARSITIES)
    assert len(set(curve.values["bias"])) == 1


def test_curve_accepts_any_order_and_masks_are_nested(params):
    seen = {}

    def remember(pruned):
        kernels = pruned["dense"]["kernel"], pruned["out"]
        kept = jnp.concatenate([x.ravel() != 0 for x in kernels])
        seen[int(kept.sum())] = np.asarray(kept)
        return kept.sum()

    evaluation.pruning_curve(remember, params, [0.9, 0.1, 0.5], progress=False)
    kept = [seen[count] for count in sorted(seen)]
    assert sorted(seen) == [45 - round(s * 45) for s in (0.9, 0.5, 0.1)]
    for fewer, more in itertools.pairwise(kept):
        assert (more | ~fewer).all()


def test_curve_prints_exports_and_plots(params, tmp_path):
    norm = lambda p: {"norm": optax.tree.norm(p), "one": 1}  # noqa: E731
    curve = evaluation.pruning_curve(norm, params, SPARSITIES)
    lines = str(curve).splitlines()
    assert lines[0].split() == ["sparsity", "norm", "one"]
    assert [float(line.split()[0]) for line in lines[1:]] == SPARSITIES

    text = curve.to_csv(tmp_path / "curve.csv")
    assert (tmp_path / "curve.csv").read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [float(row["norm"]) for row in rows] == list(curve.values["norm"])
    assert json.loads(json.dumps(curve.to_dict()))["sparsity"] == SPARSITIES

    ax = plotting.plot_curves(curve, metric="norm")
    line = ax.get_lines()[0]
    np.testing.assert_allclose(line.get_xdata(), 100 * np.asarray(SPARSITIES))
    np.testing.assert_array_equal(line.get_ydata(), curve.values["norm"])
    assert ax.get_ylabel() == "norm"


def test_error_is_the_gradient_norm_and_the_root_of_the_loss_change():
    rng = np.random.default_rng(1)
    a, x = rng.normal(size=(8, 12)), rng.normal(size=12)
    b = rng.normal(size=8)

    def loss(x):
        return 0.5 * jnp.sum((a @ x - b) ** 2)

    rho, omega = evaluation.pruning_error(loss, jnp.asarray(x), SPARSITIES)
    value = lambda x: 0.5 * np.sum((a @ x - b) ** 2)  # noqa: E731
    for i, sparsity in enumerate(SPARSITIES):
        pruned = numpy_pruned(x, sparsity)
        gradient = a.T @ (a @ pruned - b)
        np.testing.assert_allclose(rho[i], np.linalg.norm(gradient), rtol=1e-5)
        change = abs(value(pruned) - value(x))
        np.testing.assert_allclose(omega[i] ** 2, change, rtol=1e-4, atol=1e-5)


def test_error_works_under_jit_and_vmap():
    target = jnp.array([3.0, 2.0, 1.0])
    loss = lambda x: jnp.sum((x - target) ** 2)  # noqa: E731
    xs = jnp.stack([target, -target, 2 * target])

    def error(x):
        return evaluation.pruning_error(loss, x, [0.4, 0.7])

    together = jax.jit(jax.vmap(error))(xs)
    apart = [error(x) for x in xs]
    for field in ("rho", "omega"):
        expected = jnp.stack([getattr(e, field) for e in apart])
        np.testing.assert_allclose(getattr(together, field), expected, rtol=1e-6)


def test_summary_counts_kept_weights_with_and_without_a_mask(params):
    pruned, mask = masks.prune(params, 0.6, where=kernels)
    with_mask = evaluation.summary(pruned, mask).to_dict()
    without = evaluation.summary(pruned).to_dict()
    assert with_mask == without
    assert with_mask["leaf"][-1] == "total"
    assert with_mask["kept"][-1] == 50 - round(0.6 * 45)
    assert with_mask["kept"][-1] == sum(with_mask["kept"][:-1])
    assert with_mask["sparsity"][-1] == pytest.approx(27 / 50)
    assert len(str(evaluation.summary(pruned)).splitlines()) == 5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"relevant": 1.0}, 1.0), ({"relevant": 1, "variant": "relevant_only"}, 0.1)],
)
def test_summary_share_optimisable_is_that_of_the_next_update(settings, expected):
    x, g = jnp.linspace(1.0, 2.0, 10), jnp.linspace(0.1, 1.0, 10)
    tx = optax.chain(optax.clip_by_global_norm(1e9), prunadag(**settings))
    state = tx.init(x)
    table = evaluation.summary(x, gradients=g, state=state, **settings)
    assert table.to_dict()["optimisable"] == pytest.approx([expected, expected])
    _, next_state = tx.update(g, state, x)
    before, after = (
        optax.tree.get(s, "optimisable_weight") for s in (state, next_state)
    )
    assert float((after != before).mean()) == pytest.approx(expected)
    ax = plotting.plot_summary(table)
    assert ax.get_legend() is not None


def test_summary_warns_of_an_emptied_leaf():
    params = {"big": jnp.full((3, 3), 9.0), "small": jnp.full((2, 2), 0.1)}
    pruned, mask = masks.prune(params, 0.5)
    with pytest.warns(UserWarning, match=r"params\['small'\] is empty: all its 4"):
        evaluation.summary(pruned, mask)
    with pytest.warns(UserWarning, match="small"):
        evaluation.summary(pruned)
    # A bias that starts at zero is no emptied leaf.
    evaluation.summary({"bias": jnp.zeros(3), "w": jnp.ones((2, 2))})


def test_evaluation_does_without_plotting():
    code = "import sys, prunadag_optax; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = ran.stdout.split()
    assert "prunadag_optax.evaluation" in loaded
    assert not {"prunadag_optax.plotting", "matplotlib"} & set(loaded)


def test_errors_are_drawn_for_every_method():
    loss = lambda x: jnp.sum((x - 1) ** 2)  # noqa: E731
    grid = [0.25, 0.5]
    errors = {
        name: evaluation.pruning_error(loss, scale * jnp.arange(1.0, 5), grid)
        for name, scale in [("a", 1.0), ("b", 2.0)]
    }
    ax = plotting.plot_errors(grid, errors, measure="omega")
    assert [line.get_label() for line in ax.get_lines()] == ["a", "b"]
    np.testing.assert_allclose(ax.get_lines()[1].get_ydata(), errors["b"].omega)
    _, ours = plt.subplots()
    assert plotting.plot_errors(grid, errors, ax=ours) is ours


def test_plotting_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    curve = evaluation.PruningCurve((0.0,), {"m": (1.0,)})
    with pytest.raises(ImportError, match=r"prunadag_optax\[plot\]"):
        plotting.plot_curves(curve)


@pytest.mark.parametrize(
    ("evaluate", "name"),
    [
        (evaluation.pruning_curve, "metric_fn"),
        (evaluation.pruning_error, "loss_fn"),
    ],
)
def test_swapped_and_wrong_arguments(evaluate, name, params):
    loss = lambda p: jnp.sum(p["out"] ** 2)  # noqa: E731
    with refused(f"{name} must be a function of the parameters", "got a dict"):
        evaluate(params, loss, [0.5])
    for sparsities in (0.5, "0.5", {"a": 0.5}, None):
        with refused("sparsities must be a list of numbers, such as [0.5, 0.9]; got"):
            evaluate(loss, params, sparsities)
    with refused("params must be a pytree of parameters", "optimizer's state"):
        evaluate(loss, optax.adam(0.1).init(params), [0.5])
