"""The benchmark of networks in small: on digits and on pydoc's topics."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from benchmarks.bench import models
from benchmarks.networks import (
    __main__ as command,
)
from benchmarks.networks import (
    evaluation,
    others,
    overview,
    plans,
    records,
    report,
    results,
    tasks,
    training,
    tuning,
    verdicts,
)
from benchmarks.networks.contenders import CONTENDERS, CORE
from benchmarks.networks.records import Run
from prunadag_optax import masks

MLP = tasks.QUICK["mlp_mnist"]
TEXT = tasks.QUICK["transformer_shakespeare"]
CONVOLUTIONS = tasks.QUICK["cnn_mnist"]


# Tasks.


def test_images_are_split_and_standardised():
    data = tasks.load(MLP)
    for part, size in zip(data, (1200, 200, 397), strict=True):
        assert part.inputs.shape == (size, 8, 8, 1)
        assert part.targets.shape == (size,)
    np.testing.assert_allclose(data.train.inputs.mean(), 0, atol=1e-3)
    np.testing.assert_allclose(data.train.inputs.std(), 1, rtol=1e-3)
    # No image is in two parts.
    rows = np.concatenate([np.asarray(p.inputs).reshape(-1, 64) for p in data])
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_folds_take_turns_as_test_images_by_the_seed():
    settings = MLP._replace(folds=4)
    parts = [tasks.load(settings, seed) for seed in range(5)]
    images = [np.asarray(x.test.targets) for x in parts]
    np.testing.assert_array_equal(images[0], images[4])
    labels = load_digits(return_X_y=True)[1]
    # The fold of seed 1 begins where that of seed 0 ends, around the end of the data.
    np.testing.assert_array_equal(images[1], np.roll(labels, -397)[1400:])
    for data in parts[:4]:
        assert data.test.inputs.shape == (397, 8, 8, 1)
        rows = [np.asarray(p.targets) for p in data]
        assert len(np.concatenate(rows)) == 1797
    # Without folds the seed says nothing.
    one, other = (np.asarray(tasks.load(MLP, seed).test.inputs) for seed in (0, 3))
    np.testing.assert_array_equal(one, other)


def test_a_text_is_split_and_the_target_is_the_next_character():
    data = tasks.load(TEXT)
    text = np.asarray(data.train.inputs)
    np.testing.assert_array_equal(text[1:], data.train.targets[:-1])
    for part in (data.validation, data.test):
        assert part.inputs.shape == (50, 16)
        flat, after = np.asarray(part.inputs).ravel(), np.asarray(part.targets).ravel()
        np.testing.assert_array_equal(flat[1:], after[:-1])
    order = tasks.order(TEXT, data.train, jax.random.key(0))
    assert order.shape == (20, 32)
    window = tasks.minibatch(TEXT, data.train, order[0], jax.random.key(1))
    begin = int(order[0, 3])
    np.testing.assert_array_equal(window.inputs[3], text[begin : begin + 16])
    np.testing.assert_array_equal(window.targets[3], text[begin + 1 : begin + 17])


def test_minibatches_of_an_epoch_are_a_part_of_the_images_each_once():
    data = tasks.load(MLP)
    order = np.asarray(tasks.order(MLP, data.train, jax.random.key(3))).ravel()
    assert len(order) == len(np.unique(order)) == 1200
    other = tasks.order(MLP, data.train, jax.random.key(4))
    assert np.any(order != np.asarray(other).ravel())


def test_flips_mirror_whole_images():
    settings = MLP._replace(flips=True)
    data = tasks.load(MLP)
    chosen = jnp.arange(40)
    part = tasks.minibatch(settings, data.train, chosen, jax.random.key(0))
    plain = data.train.inputs[chosen]
    same = np.all(np.asarray(part.inputs == plain), axis=(1, 2, 3))
    mirrored = np.all(np.asarray(part.inputs == plain[:, :, ::-1]), axis=(1, 2, 3))
    assert np.all(same | mirrored)
    assert 5 < np.sum(same & ~mirrored) < 35


def test_real_and_quick_tasks_have_the_same_names():
    assert list(tasks.TASKS) == list(tasks.QUICK)
    for settings in (*tasks.TASKS.values(), *tasks.QUICK.values()):
        assert settings.model in models.MODELS
        assert settings.data in tasks.SOURCES
        assert settings.steps_per_epoch >= 10
        assert 0 < settings.trial_epochs <= settings.epochs


# Networks.


SLOW_TO_COMPILE = pytest.param("resnet_cifar", marks=pytest.mark.slow)


@pytest.mark.parametrize("task", ["mlp_mnist", "cnn_mnist", SLOW_TO_COMPILE])
def test_logits_of_images(task):
    settings = tasks.QUICK[task]
    module = training.module_of(settings, 10)
    images = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    variables = jax.jit(module.init)(jax.random.key(1), images)
    logits, new = jax.jit(
        lambda x: module.apply(variables, x, train=True, mutable=["batch_stats"])
    )(images)
    assert logits.shape == (6, 10)
    assert ("batch_stats" in new) == settings.normalised
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        assert (path[-1].key == "kernel") == (leaf.ndim > 1)


def test_a_character_is_told_from_the_past_only():
    module = training.module_of(TEXT, 20)
    text = jax.random.randint(jax.random.key(0), (2, 16), 0, 20)
    variables = jax.jit(module.init)(jax.random.key(1), text)
    apply = jax.jit(module.apply)
    before = apply(variables, text)
    after = apply(variables, text.at[:, 9].set(0))
    assert before.shape == (2, 16, 20)
    np.testing.assert_allclose(before[:, :9], after[:, :9], atol=1e-5)
    assert np.any(abs(before[:, 9:] - after[:, 9:]) > 1e-3)


# Training and evaluation.


def trained(contender, settings=MLP, **changes):
    given = {"hyperparameter": 1e-2, "target": None, "seed": 0, "epochs": 2} | changes
    if isinstance(contender, str):
        contender = CONTENDERS[contender]
    return training.fit(settings, contender, tasks.load(settings), **given)


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.slow
def test_an_epoch_is_a_plain_loop_over_its_minibatches(looped):
    settings = CONVOLUTIONS if looped else MLP
    assert settings.looped == looped
    data = tasks.load(settings)
    shares = (1.0, 0.1, 1.0) if looped else ()
    contender = CONTENDERS["sgd"]._replace(shares=shares)
    fitted = trained(contender, settings, hyperparameter=0.1)

    module = training.module_of(settings, 10)
    tx = CONTENDERS["sgd"].make(jnp.float32(0.1), plans.Plan(48, 24, None))
    key = jax.random.key(0)
    start_key = jax.random.split(jax.random.fold_in(key, 0))[0]
    variables = jax.jit(module.init)(start_key, data.train.inputs[:1])
    params = variables["params"]
    # Averages for each share, the smallest first, and whose a step's are.
    places, memory = ([1, 0, 1], [0.9**3, 0.9**1.5]) if looped else ([0], [0.9])
    stats = [variables.get("batch_stats", {})] * len(memory)
    state = tx.init(params)

    @jax.jit
    def step(params, stats, state, part, memory):
        grads, stats = jax.grad(
            lambda p: training.loss(module, p, stats, part, memory), has_aux=True
        )(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state

    for epoch in (1, 2):
        order_key, _ = jax.random.split(jax.random.fold_in(key, epoch))
        for number, chosen in enumerate(tasks.order(settings, data.train, order_key)):
            part = tasks.Examples(*(x[chosen] for x in data.train))
            i = places[(24 * (epoch - 1) + number) % len(places)]
            params, stats[i], state = step(params, stats[i], state, part, memory[i])
    expected = (params, jax.tree.map(lambda *each: jnp.stack(each), *stats))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3),
        (fitted.params, fitted.stats),
        expected,
    )


def test_seeds_differ_and_repeat():
    first, again, other = (trained("adam", seed=seed).params for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernel = first["Dense_0"]["kernel"]
    assert not np.allclose(kernel, other["Dense_0"]["kernel"])


def test_measured_is_what_numpy_says():
    data = tasks.load(MLP)
    fitted = trained("adam")
    found = evaluation.measured(MLP, data, fitted, "test", (0.9,), seed=0)
    assert len(found["one-shot"]) == len(evaluation.SPARSITIES)
    for sparsity in (0.0, 0.8, 0.95):
        params, _ = masks.prune(fitted.params, sparsity)
        x = np.asarray(data.test.inputs, float).reshape(397, 64)
        for number in range(2):
            layer = params[f"Dense_{number}"]
            x = np.maximum(x, 0) if number else x
            x = x @ np.asarray(layer["kernel"], float) + np.asarray(layer["bias"])
        right = 100 * np.mean(x.argmax(1) == data.test.targets)
        place = evaluation.SPARSITIES.index(sparsity)
        np.testing.assert_allclose(found["one-shot"][place], right, atol=0.3)
        picked = x[np.arange(397), data.test.targets]
        loss = np.mean(np.log(np.exp(x).sum(1)) - picked)
        np.testing.assert_allclose(found["one-shot loss"][place], loss, rtol=1e-3)
    assert list(found["fine-tuned"]) == ["0.9"]
    assert found["fine-tuned loss"]["0.9"] < found["one-shot loss"][4]


def test_recalibrated_statistics_are_those_of_the_images():
    data = tasks.load(CONVOLUTIONS)
    module = training.module_of(CONVOLUTIONS, 10)
    variables = jax.jit(module.init)(jax.random.key(0), data.train.inputs[:1])
    use = evaluator = evaluation.evaluator(CONVOLUTIONS, 10)
    assert evaluator is evaluation.evaluator(CONVOLUTIONS._replace(data="mnist"), 10)
    images = data.train.inputs[:1000]
    found = use.statistics(variables["params"], variables["batch_stats"], images)
    kernel = variables["params"]["Conv_0"]["kernel"]
    first = jax.lax.conv_general_dilated(
        images, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        found["BatchNorm_0"]["mean"], first.mean((0, 1, 2)), atol=1e-4
    )


def test_averages_are_those_of_the_nearest_turns():
    shares = (1.0, 0.01, 0.1, 0.01)
    stats = {"mean": jnp.array([[2.0, 2.0], [4.0, 6.0], [8.0, 0.0]])}

    def at(share):
        return training.averages_at(stats, shares, share)["mean"]

    # Beyond the turns as at their end, and halfway between in the logarithm.
    for share, expected in (
        (1.0, [8, 0]),
        (0.1, [4, 6]),
        (0.01, [2, 2]),
        (0.001, [2, 2]),
        (10**-1.5, [3, 4]),
    ):
        np.testing.assert_allclose(at(share), expected, rtol=1e-6)
    one = training.stacked({"mean": jnp.array([5.0, 7.0])}, ())
    np.testing.assert_array_equal(training.averages_at(one, (), 0.3)["mean"], [5, 7])


# Contenders.


def test_all_try_as_much():
    assert set(CORE) <= set(CONTENDERS)
    for name, contender in CONTENDERS.items():
        assert len(set(contender.grid)) == 4, name
        assert set(contender.choices) <= set(tuning.SCORES), name
        assert set(contender.targets) <= set(evaluation.FINE_TUNED), name
        assert (contender.choices == plans.AT_TARGET) == bool(contender.targets), name


def zeros_of(name, target):
    grid = CONTENDERS[name].grid
    fitted = trained(name, target=target, hyperparameter=grid[0], epochs=3)
    assert np.all(
        np.isfinite(np.concatenate([x.ravel() for x in jax.tree.leaves(fitted.params)]))
    )
    return float(evaluation.zeros(fitted.params))


@pytest.mark.parametrize(
    "name",
    [
        "gmp_sgd",
        pytest.param("hard_thresholding", marks=pytest.mark.slow),
        pytest.param("lottery", marks=pytest.mark.slow),
    ],
)
def test_masked_contenders_end_at_their_target(name):
    size = 64 * 32 + 32 * 10
    np.testing.assert_allclose(zeros_of(name, 0.9), round(0.9 * size) / size, rtol=1e-5)


@pytest.mark.slow  # compiles every one of them
@pytest.mark.parametrize("name", list(CONTENDERS))
def test_every_contender_trains(name):
    contender = CONTENDERS[name]
    zeros = zeros_of(name, 0.9 if contender.targets else None)
    assert 0 <= zeros < 0.95


def test_recipes_lose_nothing_at_their_target():
    data = tasks.load(MLP)
    fitted = trained("targeted", hyperparameter=1e-2, target=0.9, epochs=6)
    found = evaluation.measured(MLP, data, fitted, "test")["one-shot"]
    whole, at = found[0], found[evaluation.SPARSITIES.index(0.9)]
    assert evaluation.zeros(fitted.params) == 0
    assert whole > 30
    assert abs(whole - at) < 5


def test_a_ticket_is_the_start_without_its_smallest():
    tx = others.rewound(optax.sgd(0.1), jnp.float32(0.5), half=2)
    start = {"bias": jnp.zeros(2), "kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    x, state = start, tx.init(start)
    # The small weights grow, so that the large ones are pruned.
    gradient = {"bias": jnp.ones(2), "kernel": jnp.array([[-90.0, -80.0], [0.0, 0.0]])}
    for count in range(4):
        updates, state = tx.update(gradient, state, x)
        x = optax.apply_updates(x, updates)
        if count == 2:
            np.testing.assert_allclose(x["kernel"], [[1.0, 2.0], [0.0, 0.0]])
            np.testing.assert_allclose(x["bias"], [0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(x["kernel"], [[10.0, 10.0], [0.0, 0.0]], rtol=1e-5)


# Tuning, records, verdicts and the page.


def record(name, *, phase="test", target=None, h=None, seed=0, one_shot=50.0, **more):
    """A finished run as it would be, of one accuracy everywhere unless a list."""
    contender = CONTENDERS[name]
    run = Run(name, phase, target, contender.grid[0] if h is None else h, seed)
    values = one_shot if isinstance(one_shot, list) else [one_shot] * 10
    split = "test" if phase == "test" else "validation"
    return {
        "key": records.key_of(run, contender, MLP),
        **run._asdict(),
        "sparsities": list(evaluation.SPARSITIES),
        split: {"one-shot": values, **more},
        "seconds": {"step": 1e-3 * (1 + seed), "training": 1.0, "all": 2.0},
    }


def known_of(*found):
    return {r["key"]: r for r in found}


def test_the_best_trial_is_chosen_by_each_of_the_scores():
    grid = CONTENDERS["adam"].grid
    curves = ([90.0] + [10.0] * 9, [80.0] * 10, [70.0] * 10)
    trials = [
        record("adam", phase="trial", h=h, seed=tuning.TRIAL_SEED, one_shot=curve)
        for h, curve in zip(grid, curves, strict=False)
    ]
    contender = CONTENDERS["adam"]
    chosen = tuning.chosen("adam", contender, MLP, 3, known_of(*trials))
    assert chosen == {"dense": grid[0], "pruning": grid[1]}
    assert tuning.chosen("adam", contender, MLP, 3, known_of(*trials[:2])) is None
    assert len(tuning.tests_of("adam", contender, chosen, 3)) == 6
    # With one trial there is nothing to choose.
    assert tuning.trials_of("adam", contender, MLP, 1) == []
    assert set(tuning.chosen("adam", contender, MLP, 1, {}).values()) == {grid[0]}
    runs = [record("adam", h=grid[0]), record("adam", h=grid[1])]
    first, second = results.rows(MLP, known_of(*trials, *runs))
    assert (first.name, second.name) == ("adam (dense)", "adam (pruning)")


def test_where_there_are_folds_the_mean_over_several_trial_seeds_chooses():
    settings, contender = MLP._replace(folds=4), CONTENDERS["adam"]
    grid, first = contender.grid, tuning.TRIAL_SEED
    runs = tuning.trials_of("adam", contender, settings, 2)
    assert [(r.hyperparameter, r.seed) for r in runs] == [
        (grid[0], first),
        (grid[0], first + 1),
        (grid[1], first),
        (grid[1], first + 1),
    ]
    # The second is better by the first seed, and worse in the mean.
    found = [
        record("adam", phase="trial", h=r.hyperparameter, seed=r.seed, one_shot=value)
        | {"key": records.key_of(r, contender, settings)}
        for r, value in zip(runs, (80.0, 80.0, 90.0, 60.0), strict=True)
    ]
    known = known_of(*found)
    assert tuning.chosen("adam", contender, settings, 2, known)["dense"] == grid[0]
    known = known_of(*found[:3])
    assert tuning.chosen("adam", contender, settings, 2, known) is None


@pytest.mark.parametrize(("folds", "seeds"), [(1, (3, 3)), (6, (6, 12))])
def test_what_is_held_to_little_has_several_rounds_of_the_folds(folds, seeds):
    settings = MLP._replace(folds=folds)
    names = ("adam", "targeted")
    assert tuple(tuning.seeds_of(CONTENDERS[n], settings) for n in names) == seeds


def test_keys_tell_apart_what_numbers_depend_on():
    contender, run = CONTENDERS["adam"], Run("adam", "test", None, 1e-3, 0)
    keys = {
        records.key_of(run, contender, MLP),
        records.key_of(run._replace(seed=1), contender, MLP),
        records.key_of(run._replace(hyperparameter=1e-2), contender, MLP),
        records.key_of(run, contender._replace(version=2), MLP),
        records.key_of(run, contender, MLP._replace(epochs=4)),
    }
    assert len(keys) == 5
    longer_trials = MLP._replace(trial_epochs=99)
    assert records.key_of(run, contender, longer_trials) in keys


def test_records_survive_the_file_and_can_be_forgotten(tmp_path):
    path = tmp_path / "new" / "task.jsonl"
    assert records.load(path) == {}
    runs = [record("adam"), record("sgd"), record("adam", one_shot=60.0)]
    for run in runs:
        records.append(path, run)
    # Of equal keys the last.
    assert records.load(path) == known_of(runs[2], runs[1])
    records.forget(path, {"adam"})
    assert records.load(path) == known_of(runs[1])


def judged(own, rival, gradual, fine_tuned=90.0, targeted=90.0):
    """The verdicts in their order."""
    known = [
        record("any_sparsity", one_shot=own, **{"fine-tuned": {"0.9": fine_tuned}}),
        record("adam", one_shot=rival),
        record("gmp_adam", target=0.9, one_shot=gradual),
        record("targeted_l1", target=0.9, one_shot=targeted),
    ]
    found = verdicts.verdicts(results.rows(MLP, known_of(*known)), normalised=False)
    return [verdict.claim.holds for verdict in found]


def test_verdicts_follow_the_numbers():
    falling = [90.0, 89.0, 85.0, 80.0, 70.0, 60.0, 50.0, 40.0, 30.0, 20.0]
    flat = [89.6] * 10
    # At or above; 5 above at 80%, where 5 points are lost; dense; targeted; any; tuned.
    assert judged(flat, falling, 90.0) == [True, False, True, True, True, True]
    steep = [90.0, 89.0, 84.0, *falling[3:]]
    assert judged(flat, steep, 90.0)[1]
    assert not judged([89.4] * 10, falling, 90.0)[2]
    assert not judged([89.6] * 9 + [19.0], falling, 90.0)[0]
    assert not judged(flat, falling, 90.7, targeted=90.3)[3]
    assert judged(flat, falling, 90.5, targeted=90.3)[3:] == [True, True, True]
    assert judged(flat, falling, 90.7, targeted=90.7)[4:] == [False, False]


def test_the_long_runs_have_claims_of_their_own():
    known = [
        record("any_sparsity", one_shot=80.0),
        record("any_sparsity_sgd_4x", one_shot=90.0),
        record("gmp_adam", target=0.9, one_shot=90.5),
    ]
    found = verdicts.verdicts(results.rows(MLP, known_of(*known)), normalised=False)
    assert [(v.criterion, v.contender, v.claim.holds) for v in found] == [
        (f"{verdicts.NEAR}, one-shot", "any_sparsity", False),
        (f"{verdicts.LONG_NEAR}, one-shot", "any_sparsity_sgd_4x", True),
    ]


def test_what_the_l1_norm_does_for_gradual_pruning_is_a_line_of_its_own():
    known = [
        record("any_sparsity", one_shot=90.0),
        record("targeted_sgd", target=0.9, one_shot=90.0),
        record("gmp_sgd", target=0.9, one_shot=90.1),
    ]
    found = results.rows(MLP, known_of(*known))
    plain = verdicts.verdicts(found, normalised=False)
    # Without a run of targeted_l1 there is no verdict of what is offered.
    assert [(v.criterion, v.claim.holds) for v in plain] == [
        (f"{verdicts.NEAR}, one-shot", True),
        (f"{verdicts.TARGET} {verdicts.WITHOUT_L1}, one-shot", True),
    ]
    known += [record("gmp_sgd_l1", target=0.9, one_shot=91.5)]
    found = results.rows(MLP, known_of(*known))
    both = verdicts.verdicts(found, normalised=False)
    assert both[:2] == plain
    assert [(v.criterion, v.contender, v.claim.holds) for v in both[2:]] == [
        (f"{verdicts.NEAR} {verdicts.WITH_L1}, one-shot", "any_sparsity", False)
    ]
    # What is offered has to do without the rows that have no norm.
    known += [record("targeted_l1", target=0.9, one_shot=89.7)]
    known[1] = record("targeted_sgd", target=0.9, one_shot=91.3)
    found = results.rows(MLP, known_of(*known))
    both = verdicts.verdicts(found, normalised=False)
    assert [(v.criterion, v.contender, v.claim.holds) for v in both] == [
        (f"{verdicts.TARGET}, one-shot", "targeted", False),
        (f"{verdicts.NEAR}, one-shot", "any_sparsity", True),
        (f"{verdicts.TARGET} {verdicts.WITH_L1}, one-shot", "targeted", True),
        (f"{verdicts.TARGET} {verdicts.WITHOUT_L1}, one-shot", "targeted", True),
        (f"{verdicts.NEAR} {verdicts.WITH_L1}, one-shot", "any_sparsity", False),
    ]


@pytest.mark.parametrize(("phase", "epochs"), [("test", 12), ("trial", 2)])
def test_a_long_run_has_as_many_epochs_more(phase, epochs, monkeypatch):
    def fit(*args, epochs, **kwargs):
        raise StopIteration(epochs)

    monkeypatch.setattr(training, "fit", fit)
    run = Run("any_sparsity_sgd_4x", phase, None, 1e-3, 0)
    with pytest.raises(StopIteration, match=f"^{epochs}$"):
        command.make(run, "mlp_mnist", MLP._replace(epochs=3, trial_epochs=2))


def test_contenders_with_targets_have_rows_by_loss_and_by_accuracy():
    contender = CONTENDERS["targeted"]
    grid = contender.grid
    runs = tuning.trials_of("targeted", contender, MLP, 3)
    assert [(r.hyperparameter, r.target) for r in runs] == [
        (h, target) for h in grid[:3] for target in plans.TUNED_AT
    ]

    def trials_with(*losses):
        """At each target its loss and accuracy; nonsense at all other sparsities."""
        accuracies = ((80.0, 60.0), (75.0, 67.0), (70.0, 60.0))
        flat = map(itertools.chain.from_iterable, (accuracies, losses))
        found = []
        for run, accuracy, loss in zip(runs, *flat, strict=True):
            at = [run.target == s for s in evaluation.SPARSITIES]
            trial = record(
                "targeted",
                phase="trial",
                target=run.target,
                h=run.hyperparameter,
                seed=run.seed,
                one_shot=[accuracy if here else 99.0 for here in at],
            )
            trial["validation"]["one-shot loss"] = [loss if here else 0 for here in at]
            found.append(trial)
        return found

    # By the mean over the targets: the first by the loss, the second by the accuracy,
    # though at the one target the second has less loss, and the first is better.
    trials = trials_with((0.1, 0.4), (0.3, 0.3), (0.5, 0.2))
    tests = [record("targeted", target=0.9, h=h, one_shot=88.0) for h in grid[:2]]
    # The rival's better row counts.
    tests += [record("gmp_adam", target=0.9, one_shot=88.2)]
    tests[1]["test"]["one-shot"] = [77.0] * 10
    found = results.rows(MLP, known_of(*trials, *tests))
    names = [row.name for row in results.by_contender(found, "targeted")]
    assert names == ["targeted (loss)", "targeted (accuracy)"]
    [verdict] = verdicts.targeted(found, verdicts.WITHOUT_L1)
    assert verdict.claim.holds
    assert "by targeted (loss)" in verdict.claim.evidence
    # Where both judge alike there is one row.
    trials = trials_with((0.1, 0.4), (0.2, 0.2), (0.5, 0.2))
    found = results.rows(MLP, known_of(*trials, *tests))
    assert [(r.name, r.hyperparameter) for r in found[1:]] == [("targeted", grid[1])]
    # One target is not enough.
    known = known_of(*trials[::2])
    assert tuning.chosen("targeted", contender, MLP, 3, known) is None


def test_the_summary_names_those_who_keep_all_of_a_claim():
    # The second loses the whole network, the first nothing.
    lossy = [80.0] + [89.6] * 9
    known = [record("adam", one_shot=[90.0] * 5 + [80.0] * 5)]
    known += [record("mostly_whole", one_shot=90.0)]
    known += [record("any_sparsity", one_shot=lossy)]
    both = verdicts.verdicts(results.rows(MLP, known_of(*known)), normalised=False)
    one = [v for v in both if v.contender == "any_sparsity"]
    lines = overview.summary({"first": both, "second": one}).splitlines()
    assert lines[0] == "|  | first | second |"
    name = f"{verdicts.ABOVE}, one-shot"
    assert lines[2:] == [f"| {name} | mostly_whole | none |"]


def test_the_overview_has_the_best_rivals_and_the_better_trial():
    given = {"phase": "trial", "seed": tuning.TRIAL_SEED}
    runs = [
        record("adam", one_shot=[80.0] * 4 + [70.0] * 6),
        record("sgd", one_shot=[79.0] * 5 + [75.0] * 5),
        record("often_whole", one_shot=71.0),
        record("often_whole_sgd", one_shot=72.0),
        record("ramda", one_shot=[60.0] * 5 + [65.0] * 5),
        record("prox_sgd", one_shot=[61.0] * 5 + [64.0] * 5),
        record("gsm", target=0.9, one_shot=66.0),
    ]
    for name, accuracy in (("often_whole", 85.0), ("often_whole_sgd", 84.0)):
        grid = CONTENDERS[name].grid
        runs += [record(name, h=h, one_shot=accuracy, **given) for h in grid]
    known = known_of(*runs)
    found = {"first": results.rows(MLP, known)}
    lines = overview.main_lines(found, {"first": known}, {"first": MLP}).splitlines()
    assert lines[3:] == [
        "| best of Adam, AdamW, Adagrad, SGD | 80.0 | 79.0 | 75.0 | 75.0 | 75.0 |",
        "| without it, `OFTEN_WHOLE` (Adam) | 71.0 | 71.0 | 71.0 | 71.0 | 71.0 |",
        "| best of the other methods, a training for each (gsm) |  | 66.0 |  |  |  |",
        "| best of the other methods, one training each (prox_sgd, ramda) "
        "| 61.0 | 61.0 | 65.0 | 65.0 | 65.0 |",
    ]
    # With one seed of three neither the core nor the others are complete.
    assert overview.left_out(MLP, known, ["ramda"]) == ["ramda"]


def test_the_table_of_the_readme_is_that_of_the_page():
    root = pathlib.Path(__file__).parents[1]
    page = (command.RESULTS / "networks.md").read_text(encoding="utf-8")
    table = page.split("\n## Overview\n")[1].split("\n\n")[1]
    assert table.startswith("|  | 0 | 90 |")
    assert table in (root / "README.md").read_text(encoding="utf-8")


def test_differences_are_taken_seed_by_seed():
    runs = [
        record(name, target=0.9, seed=seed, one_shot=base + seed)
        # The second has its runs in another order.
        for name, base, seeds in (
            ("targeted", 80.0, (0, 1, 2)),
            ("gmp_adam", 79.0, (2, 0, 1)),
        )
        for seed in seeds
    ]
    [verdict] = verdicts.verdicts(results.rows(MLP, known_of(*runs)), normalised=False)
    assert "(+1.00 ± 0.00)" in verdict.claim.evidence


def test_a_verdict_without_its_runs_is_left_out():
    rows = results.rows(MLP, known_of(record("adam"), record("sgd")))
    assert verdicts.verdicts(rows, normalised=False) == []


def test_contenders_with_targets_stand_at_their_targets():
    runs = [
        record("gmp_sgd", target=target, seed=seed, one_shot=100 * target + seed)
        for target in plans.TARGETS
        for seed in (0, 1)
    ]
    [row] = results.rows(MLP, known_of(*runs))
    assert row.means("one-shot") == {t: 100 * t + 0.5 for t in plans.TARGETS}
    table = report.by_sparsity([row], "one-shot", (0.5, 0.9, 0.99))
    assert table.splitlines()[-1] == "| gmp_sgd |  | 90.50 ± 0.71 | 99.50 ± 0.71 |"
    assert results.step_seconds("gmp_sgd", known_of(*runs)) == 1e-3


def test_a_run_from_the_command_line_to_the_page_and_again(tmp_path):
    arguments = [
        "--task", "mlp_mnist", "--methods", "sgd", "--seeds", "1", "--quick",
        "--output", str(tmp_path),
    ]  # fmt: skip
    command.main([*arguments, "--trials", "2"])
    file = tmp_path / "networks" / "mlp_mnist.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    trials = [r for r in map(json.loads, lines) if r["phase"] == "trial"]
    assert [r["hyperparameter"] for r in trials] == list(CONTENDERS["sgd"].grid[:2])
    assert all(r["seed"] == tuning.TRIAL_SEED for r in trials)
    assert len(lines) > 2
    command.main([*arguments, "--trials", "2"])
    assert file.read_text(encoding="utf-8").splitlines() == lines
    page = (tmp_path / "networks.md").read_text(encoding="utf-8")
    assert page.count("\n## ") == 3  # the verdicts, the overview, the task
    assert "A quick run" in page
    assert "| sgd" in page
    assert (tmp_path / "networks" / "mlp_mnist.png").stat().st_size > 1000


@pytest.mark.slow  # minutes
def test_all_tasks_and_contenders(tmp_path):
    command.main(["--quick", "--seeds", "1", "--output", str(tmp_path)])
    page = (tmp_path / "networks.md").read_text(encoding="utf-8")
    assert page.count("\n## ") == 2 + len(tasks.QUICK)
    for name in CONTENDERS:
        assert page.count(f"\n| {name} |") >= len(tasks.QUICK)
    assert "Bits per character" in page
    assert page.count("### Recalibrated") == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seeds", "0"],
        ["--trials", "0"],
        ["--task", "everything"],
        ["--methods", "sgdd"],
        ["pages"],
    ],
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert arguments[-1] in capsys.readouterr().err
