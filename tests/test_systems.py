"""The benchmarks of the other systems in small: on digits, with every part of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.systems import (
    __main__ as command,
)
from benchmarks.systems import (
    bregman,
    costs,
    gsm,
    logistic,
    lottery,
    records,
    report,
    training,
)
from prunadag_optax import masks
from prunadag_optax.methods.penalties.regularisers import group_lasso, group_sparsity

SEEDS = 2


@pytest.fixture(scope="module")
def data():
    return training.digits()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all experiments have left their results, in the quick settings."""
    output = tmp_path_factory.mktemp("systems")
    command.main(["all", "--quick", "--seeds", str(SEEDS), "--output", str(output)])
    return output


def result(folder, name):
    return records.load(folder / "systems" / f"{name}.json")


def values(found, method, metric):
    [row] = [row for row in found.rows if row.method == method]
    return np.asarray(row.values[metric])


# Training.


def network(key, data):
    return training.init_network(key, training.layers(data, (8,)), training.GLOROT)


def measure(params, state, data):
    return {
        "loss": training.loss(params, data.train),
        "accuracy": training.accuracy(params, data.test),
    }


@pytest.mark.slow
def test_an_epoch_is_a_plain_loop_over_its_minibatches(data):
    schedule = training.stepwise(0.1, data.train, 100, (1,))
    tx = optax.sgd(schedule, momentum=0.9)
    fit = training.trainer(lambda _: tx, batch=100, measure=measure, parts=3)
    params = network(jax.random.key(0), data)
    fitted = fit(data, params, jax.random.key(1), epochs=2)
    assert fitted.history["loss"].shape == (6,)

    state, losses = tx.init(params), []
    for epoch in range(2):
        key = jax.random.fold_in(jax.random.key(1), epoch)
        order = jax.random.permutation(key, 1500).reshape(15, 100)
        for number, chosen in enumerate(order, 1):
            part = training.Examples(*(x[chosen] for x in data.train))
            gradients = jax.jit(jax.grad(training.loss))(params, part)
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            if number % 5 == 0:
                losses.append(training.loss(params, data.train))
    np.testing.assert_allclose(fitted.history["loss"], jnp.stack(losses), rtol=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), fitted.params, params
    )
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_seeds_side_by_side_are_the_seeds_one_by_one(data):
    fit = training.trainer(lambda _: optax.adam(1e-2), batch=250, measure=measure)

    def one(key):
        first, second = jax.random.split(key)
        return fit(data, network(first, data), second, epochs=2)

    together = training.over_seeds(one, 2)
    for seed in range(2):
        alone = one(jax.random.key(seed))
        jax.tree.map(
            lambda a, b, seed=seed: np.testing.assert_allclose(a[seed], b, atol=1e-4),
            together.params,
            alone.params,
        )
        np.testing.assert_allclose(
            together.history["loss"][seed], alone.history["loss"], rtol=1e-4
        )


def test_the_learning_rate_falls_at_the_milestones(data):
    schedule = training.stepwise(0.5, data.train, 100, (1, 3))
    at = [float(schedule(step)) for step in (0, 14, 15, 44, 45)]
    # optax's schedule scales once the count has passed a boundary.
    np.testing.assert_allclose(at, [0.5, 0.5, 0.05, 0.05, 0.005], rtol=1e-6)


def test_data_and_networks(data):
    assert data.train.images.shape == (1500, 64)
    assert data.test.images.shape == (297, 64)
    assert data.train.images.dtype == jnp.uint8
    less = training.with_validation(data, 300)
    assert len(less.train.labels) == 1200
    np.testing.assert_array_equal(less.validation.labels, data.train.labels[-300:])
    params = training.init_network(
        jax.random.key(0), (64, 300, 100, 10), training.KAIMING
    )
    images = data.test.images
    x = (np.asarray(images, float) - 0.1307 * 255) / (0.3081 * 255)
    for i in range(3):
        layer = jax.tree.map(lambda p: np.asarray(p, float), params[f"Dense_{i}"])
        x = (np.maximum(x, 0) if i else x) @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(training.logits(params, images), x, atol=1e-4)


# The experiments.


def test_the_minimiser_is_one(data):
    regulariser = group_lasso(3e-3)
    x = logistic.minimise(data, regulariser, 2000)
    # A fixed point of a proximal gradient step, to rounding, with some groups at zero.
    gradient = jax.grad(training.loss)(x, data.train)
    moved = jax.tree.map(lambda x, g: x - 0.1 * g, x, gradient)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        regulariser.prox(moved, 0.1),
        x,
    )
    assert 0.2 < group_sparsity(x) < 1


@pytest.mark.slow  # a minute for all experiments
def test_dual_averaging_identifies_what_the_minimiser_has(folder):
    found = result(folder, "logistic")
    wanted = values(found, logistic.MINIMISER, "group sparsity")
    best = values(found, logistic.MINIMISER, "objective")
    for name in ("RMDA", "RAMDA", "ProxSGD", "ProxGen", "ProxSSI"):
        assert values(found, name, "accuracy").shape == (SEEDS,)
        assert np.all(values(found, name, "objective") >= best - 1e-5)
    ramda = values(found, "RAMDA", "group sparsity")
    assert np.all(abs(ramda - wanted) < 5)
    for name in ("ProxSGD", "ProxGen"):
        assert np.all(ramda > 5 + values(found, name, "group sparsity"))


@pytest.mark.slow  # a minute for all experiments
def test_gsm_survives_the_cut_that_its_base_does_not(folder):
    found = result(folder, "gsm")
    assert np.all(
        values(found, gsm.GSM, "accuracy") > values(found, gsm.MAGNITUDE, "accuracy")
    )
    size = 64 * 32 + 32 * 10
    exact = 100 * (1 - round(0.9 * size) / size)
    for name in (gsm.GSM, gsm.MAGNITUDE, *gsm.TICKETS.values()):
        np.testing.assert_allclose(
            values(found, name, "weights left"), exact, rtol=1e-4
        )
    # The curve goes through the table's accuracies of the networks without a cut.
    np.testing.assert_allclose(
        np.asarray(found.curves["dense"]["accuracy"])[:, 0],
        values(found, gsm.DENSE, "accuracy"),
        rtol=1e-4,
    )


@pytest.mark.slow  # a minute for all experiments
def test_tickets_have_the_sizes_of_their_rounds(folder):
    found, left = result(folder, "lottery"), np.array([64 * 32, 32 * 10])
    for number in range(3):
        name = lottery.name_of(number)
        share = 100 * left.sum() / (64 * 32 + 32 * 10)
        np.testing.assert_allclose(
            values(found, name, "weights left"), share, rtol=1e-5
        )
        left = left - [round(0.2 * int(left[0])), round(0.1 * int(left[1]))]
    for kind in (lottery.REINITIALISED, lottery.RANDOM):
        name = lottery.name_of(2, kind)
        np.testing.assert_array_equal(
            values(found, name, "weights left"),
            values(found, lottery.name_of(2), "weights left"),
        )
        stop = values(found, name, "stop iteration")
        assert np.all((stop >= 1) & (stop <= 10 * (1200 // 25)))


@pytest.mark.slow  # a minute for all experiments
def test_the_controller_comes_near_its_target(folder):
    found = result(folder, "bregman")
    for family in ("LinBreg", "AdaBreg"):
        sparsity = values(found, bregman.targeted(family, 0.75), "sparsity")
        assert np.all(abs(sparsity - 75) < 1)
    assert np.all(values(found, bregman.DENSE, "sparsity") == 0)
    [row] = [row for row in found.rows if row.method == bregman.DENSE]
    assert "strength" not in row.values


@pytest.mark.slow  # a minute for all experiments
def test_costs_of_known_states(folder):
    found = result(folder, "costs")
    # Parameters to a state: n is small here, and counters are a part of it.
    for name, arrays in {
        costs.ADAM: 2,
        "momentum SGD (optax)": 1,
        "RMDA, group lasso": 2,
        "RAMDA, group lasso": 3,
        "GSM": 1,
        "LinBreg, l1": 1,
        "AdaBreg, l1": 3,
    }.items():
        [size] = values(found, f"small: {name}", "state")
        assert arrays <= size < arrays + 0.05
    assert values(found, f"small: {costs.ADAM}", "/ Adam") == 1
    assert all(row.values["ms"][0] > 0 for row in found.rows)


# Results, claims and the page.


@pytest.mark.slow  # a minute for all experiments
def test_the_page_has_all_that_there_is(folder, tmp_path):
    page = (folder / "systems.md").read_text(encoding="utf-8")
    for name, module in report.EXPERIMENTS.items():
        found = result(folder, name)
        settings = report.settings_of(name, found)
        assert settings == module.QUICK
        assert module.TITLE in page
        for claim in module.claims(found.rows, settings):
            assert f"{claim.text}: {claim.evidence}" in page
        for row in found.rows:
            assert f"| {row.method} |" in page
        assert (folder / "systems" / f"{name}.png").stat().st_size > 1000
    assert page.count("A quick run") == len(report.EXPERIMENTS)
    # Of one experiment alone, a page of one section.
    one = tmp_path / "systems" / "costs.json"
    records.save(result(folder, "costs"), one)
    report.write(one.parent, tmp_path / "systems.md")
    page = (tmp_path / "systems.md").read_text(encoding="utf-8")
    assert page.count("\n## ") == 1


def rows_of(metric, **means):
    return [
        records.row(name, {metric: [value, value]}, 1.0)
        for name, value in means.items()
    ]


def test_verdicts_follow_the_numbers():
    settings = gsm.Settings()

    def judged(lost, ticket, rival):
        rows = [
            records.row(gsm.GSM, {"against dense": [lost]}, 1.0),
            records.row(gsm.TICKETS[gsm.GSM], {"accuracy": [ticket]}, 1.0),
            records.row(gsm.TICKETS[gsm.MAGNITUDE], {"accuracy": [rival]}, 1.0),
        ]
        return [claim.holds for claim in gsm.claims(rows, settings)]

    assert judged(-0.3, 98.0, 97.0) == [True, True]
    assert judged(-0.31, 97.0, 98.0) == [False, False]

    def controlled(sparsities):
        rows = [
            records.row(
                bregman.targeted(family, 0.9),
                {"sparsity": sparsities, "accuracy": [98.0, 98.0]},
                1.0,
            )
            for family in ("LinBreg", "AdaBreg")
        ]
        settings = bregman.Settings(targets=(0.9,))
        return [claim.holds for claim in bregman.claims(rows, settings)]

    # Each run counts, not their mean.
    assert controlled([89.5, 90.5]) == [True, True]
    assert controlled([88.0, 92.0]) == [False, False]


def test_rows_and_curves_survive_the_file(tmp_path):
    row = records.row("A", {"accuracy": jnp.array([1.5, 2.5])}, 3.0, accuracy="98.2*")
    curve = records.curve([1, 2], group_sparsity=jnp.ones((2, 2)) / 3)
    before = records.Result({"seeds": 2}, [row], {"A": curve})
    records.save(before, tmp_path / "new" / "a.json")
    assert records.load(tmp_path / "new" / "a.json") == before
    assert curve["group sparsity"] == [[0.33333, 0.33333]] * 2
    table = report.table([row], {"accuracy": 1})
    assert table.splitlines() == [
        "|  | accuracy | published accuracy | wall time (s) |",
        "| --- | --- | --- | --- |",
        "| A | 2.0 ± 0.7 (1.5-2.5) | 98.2* | 3.0 |",
    ]
    json.loads((tmp_path / "new" / "a.json").read_text())


@pytest.mark.parametrize(
    "arguments", [["all", "--seeds", "0"], ["everything"], ["gsm", "--epochs", "3"]]
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert arguments[-1] in capsys.readouterr().err


def test_shares_of_the_figure_are_pruned_exactly(data):
    params = network(jax.random.key(0), data)
    curve = gsm.pruning_curve(params, data)
    for sparsity, accuracy in zip(gsm.SPARSITIES, curve, strict=True):
        pruned, _ = masks.prune(params, sparsity)
        np.testing.assert_allclose(
            accuracy, training.accuracy(pruned, data.test), atol=0.4
        )
