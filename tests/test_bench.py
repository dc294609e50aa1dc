"""The harness of the experiments: grids, records, pages, and the command line."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import __main__ as command
from benchmarks.bench import (
    contenders,
    experiments,
    figures,
    pages,
    races,
    records,
    runner,
    tables,
    tasks,
    training,
)
from benchmarks.bench.tuning import Grid, search
from prunadag_optax import eval_params, masks

# Grids.


def found(grid, score):
    """What a search ends with, its values asked for one call after another."""
    known = {}
    for _ in range(100):
        missing, choice = search(grid, known.get)
        if choice is not None:
            assert not missing
            return choice
        known |= {value: score(value) for value in missing}
    raise AssertionError("the search does not end")


@given(st.floats(-4.4, 4.4), st.integers(0, 2**31))
def test_a_best_value_within_the_cap_ends_inside(place, noise):
    grid, best = Grid(1.0, most=15), 2.0**place
    worse = np.random.default_rng(noise).uniform(1, 2)
    choice = found(grid, lambda value: -worse * abs(math.log2(value / best)))
    tried = list(choice.scores)
    assert not choice.open
    assert tried == sorted(tried)
    assert tried[0] < choice.value < tried[-1]
    assert choice.scores[choice.value] == max(choice.scores.values())
    # No value between the chosen one and the best was left out.
    assert abs(math.log2(choice.value / best)) <= 0.5 + 1e-6


@pytest.mark.parametrize("sign", [-1, 1])
def test_what_never_turns_is_open_at_the_cap(sign):
    grid = Grid(1.0, most=7)
    choice = found(grid, lambda value: sign * value)
    assert choice.open
    assert len(choice.scores) == 7
    assert choice.value == (16.0 if sign > 0 else 0.0625)


def test_a_choice_inside_needs_no_more_than_the_first_values():
    choice = found(Grid(0.1), lambda value: -abs(value - 0.1))
    assert (choice.value, choice.open) == (0.1, False)
    assert list(choice.scores) == [0.025, 0.05, 0.1, 0.2, 0.4]


def test_failed_trainings_are_never_chosen():
    choice = found(Grid(1.0), lambda value: math.nan if value > 0.6 else value)
    assert (choice.value, choice.open) == (0.5, False)


def test_of_equal_values_the_innermost_is_chosen():
    choice = found(Grid(1.0), lambda value: 1.0)
    assert (choice.value, choice.open) == (1.0, False)


def test_a_search_that_was_interrupted_goes_on():
    grid, score = Grid(1.0), {0.25: 0, 0.5: 0, 1.0: 0, 2.0: 0, 4.0: 1, 16.0: 0}
    assert search(grid, score.get) == ([8.0], None)
    del score[1.0]
    assert search(grid, score.get) == ([1.0], None)


# Contenders.


def test_rows_have_names_of_their_own_and_equal_grids_by_base():
    rows = contenders.SPARSE_TRAINING
    assert len({row.name for row in rows}) == len(rows)
    for base in {row.base for row in rows}:
        assert len({row.grid for row in rows if row.base == base}) == 1


PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 60).reshape(6, 10), "bias": jnp.ones(10)}


@pytest.mark.parametrize("row", contenders.SPARSE_TRAINING, ids=lambda row: row.name)
def test_a_row_trains_and_ends_as_sparse_as_it_should(row):
    plan = contenders.Plan(20, 0.9, (0.8, 0.9))
    grad = row.gradient(
        jax.value_and_grad(lambda x, target: (_distance(x, target), {}), has_aux=True),
        plan,
    )

    @jax.jit
    def train(rate, key):
        tx = row.make(rate, plan, key)

        def step(carry, step_key):
            params, state = carry
            (loss, _), gradient = grad(params, step_key, 0.5)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        start = PARAMS, tx.init(PARAMS)
        return jax.lax.scan(step, start, jax.random.split(key, plan.steps))

    (params, state), losses = train(jnp.float32(0.01), jax.random.key(0))
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    final = eval_params(state, params)
    held = row.method in ("random", "static", "SET", "RigL", "gradual pruning", "AC/DC")
    if held:
        assert float(np.mean(np.asarray(final["kernel"]) == 0)) == pytest.approx(0.9)


def _distance(params, target):
    return sum(jnp.mean((x - target) ** 2) for x in jax.tree.leaves(params))


def test_methods_are_chosen_by_name():
    rows = contenders.chosen(contenders.SPARSE_TRAINING, ["rigl"])
    assert [row.label for row in rows] == ["RigL, uniform", "RigL, ERK"]
    assert contenders.chosen(contenders.SPARSE_TRAINING, None) == list(
        contenders.SPARSE_TRAINING
    )
    with pytest.raises(ValueError, match=r"--method must be among dense, .*got none"):
        contenders.chosen(contenders.SPARSE_TRAINING, ["none"])


# Training and evaluation.


def test_parts_of_a_task_share_no_example():
    data = tasks.load(tasks.DIGITS)
    sizes = [part.inputs.shape for part in data]
    assert sizes == [(1200, 8, 8, 1), (200, 8, 8, 1), (397, 8, 8, 1)]
    rows = np.concatenate([np.asarray(part.inputs).reshape(-1, 64) for part in data])
    assert len(np.unique(rows, axis=0)) == len(rows)
    np.testing.assert_allclose(data.train.inputs.mean(), 0, atol=1e-3)
    np.testing.assert_allclose(data.train.inputs.std(), 1, rtol=1e-3)


def test_the_measures_are_those_of_the_pruned_network():
    task = tasks.DIGITS
    params, stats = tasks.network(task).init(jax.random.key(0))
    fitted = training.Fitted(params, stats, None, 0.0)
    measures = training.measured(task, fitted, "test", (0.0, 0.7))
    x, y = (np.asarray(part, np.float64) for part in tasks.load(task).test)
    x = x.reshape(len(x), -1)
    for sparsity, measure in measures.items():
        pruned = jax.tree.map(np.asarray, masks.prune(params, float(sparsity))[0])
        first, second = (pruned[f"Dense_{i}"] for i in (0, 1))
        hidden = np.maximum(x @ first["kernel"] + first["bias"], 0)
        logits = hidden @ second["kernel"] + second["bias"]
        right = 100 * np.mean(logits.argmax(1) == y)
        peak = logits.max(1)
        total = peak + np.log(np.exp(logits - peak[:, None]).sum(1))
        loss = np.mean(total - logits[np.arange(len(y)), y.astype(int)])
        assert measure["accuracy"] == pytest.approx(right, abs=0.3)
        assert measure["loss"] == pytest.approx(loss, rel=1e-3)


ALL = (*tasks.CHOSEN_ON, *tasks.CONFIRMED_ON)


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(
            task,
            id=task.title,
            marks=[] if task in tasks.CHOSEN_ON[1:3] else pytest.mark.slow,
        )
        for task in ALL
    ],
)
def test_every_kind_of_network_learns_and_is_pruned(task):
    small = tasks.in_small(task)
    contender = contenders.DEFAULTS[0]
    assert contender.method == "any_sparsity"
    fitted = training.fit(
        small, contender, sparsity=None, sparsities=(0.5,), rate=3e-3, seed=0, epochs=4
    )
    before, _ = tasks.network(small).init(jax.random.key(0))
    untrained = fitted._replace(params=before)
    first, last = (
        training.measured(small, each, "test", (0.0, 0.5))
        for each in (untrained, fitted)
    )
    assert last["0"]["loss"] < first["0"]["loss"]
    assert last["0"]["accuracy"] > first["0"]["accuracy"]
    assert last["0.5"] != last["0"]


def test_titles_tell_tasks_apart():
    assert len({task.title for task in ALL}) == len(ALL)
    assert len({task._replace(title="") for task in ALL}) == len(ALL)


def test_statistics_are_those_of_the_pruned_network():
    small = tasks.in_small(tasks.CHOSEN_ON[1])
    assert small.model == "cnn"
    network, data = tasks.network(small), tasks.load(small)
    params, stats = network.init(jax.random.key(0))
    pruned = masks.prune(params, 0.7)[0]
    images = data.train.inputs[:1200]
    [first] = network.recalibrated(pruned, stats, data.train)["BatchNorm_0"]["mean"][:1]
    x = jax.lax.conv_general_dilated(
        images, pruned["Conv_0"]["kernel"], (2, 2), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    np.testing.assert_allclose(first, x[..., 0].mean(), rtol=1e-4, atol=1e-5)


def test_regret_is_what_a_row_lacks_to_the_best_row():
    def row(base, sparsity, accuracy):
        return {
            "task": tasks.DIGITS.title, "method": "any_sparsity", "setting": "lamp",
            "base": base, "sparsity": sparsity, "trainings": "1",
            "learning rate": "0.1", "open": "", "accuracy by seed": accuracy,
        }  # fmt: skip

    rows = [
        row("Adam", "0", "98.00 96.00"), row("Adam", "0.9", "90.00 90.00"),
        row("Adam", "0.99", "10.00 10.00"),
        row("momentum SGD", "0", "95.00 95.00"),
        row("momentum SGD", "0.9", "92.00 94.00"),
        row("momentum SGD", "0.99", "80.00 80.00"),
    ]  # fmt: skip
    here, other = (
        races.Race(task, contenders.DEFAULTS, (0.9, 0.99), 0.95, (0, 1))
        for task in (tasks.DIGITS, tasks.LENET_MNIST)
    )
    page = pages.regret_page("defaults", [here, other], rows, "any_sparsity")
    # The best: 97 and 93. 99% is not in the mean.
    assert "| any_sparsity, lamp | Adam | 1.50 |" in page
    assert "| any_sparsity, lamp | momentum SGD | 1.00 |" in page
    assert f"* {tasks.LENET_MNIST.title}" in page


# Records, with a fake training.

DENSE, RIGL = (
    contenders.chosen(contenders.SPARSE_TRAINING, [name])[0]
    for name in ("dense", "RigL")
)
RACE = races.Race(tasks.DIGITS, (DENSE, RIGL), (0.9, 0.95), 0.95, (0, 1))


class Fake:
    """Makes records whose accuracy is best at a learning rate of its own."""

    def __init__(self, best=0.3, broken=()):
        self.runs, self.best, self.broken = [], best, broken

    def __call__(self, run):
        if run.contender in self.broken:
            raise RuntimeError("broken")
        self.runs.append(run)
        [row] = [row for row in RACE.contenders if row.name == run.contender]
        accuracy = 90 - abs(math.log2(run.rate / self.best)) + run.seed / 10
        asked = (0.0, *RACE.sparsities) if run.sparsity is None else (run.sparsity,)
        return {
            "key": races.key_of(RACE, row, run),
            **run._asdict(),
            "found": {f"{s:g}": {"accuracy": accuracy, "loss": 0.1} for s in asked},
            "zeros": 0.0,
            "steps": 96,
            "step ms": 0.5,
        }


def test_finished_runs_are_not_made_again(tmp_path):
    path, first = tmp_path / "runs.jsonl", Fake()
    assert runner.finish(RACE, RACE.contenders, path, first) == []
    # 0.4 is the best of all: five values, 0.4 and 0.8 beyond it. Then two seeds, and
    # for each of RigL's sparsities.
    trials = [run for run in first.runs if run.phase == "trial"]
    finals = [run for run in first.runs if run.phase == "final"]
    rates = [run.rate for run in trials if run.contender == DENSE.name]
    assert rates == [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8]
    assert len(finals) == 2 + 4
    assert {run.rate for run in finals} == {0.4}
    again = Fake()
    runner.finish(RACE, RACE.contenders, path, again)
    assert again.runs == []
    # One more seed, and nothing else.
    runner.finish(RACE, [DENSE], path, again, seeds=(0, 1, 2))
    assert [(run.phase, run.seed) for run in again.runs] == [("final", 2)]
    # A new version of a method is made anew.
    newer = RIGL._replace(version=2)
    assert not races.due(RACE, newer, records.load(path)).choices


def test_each_sparsity_is_tuned_for_itself_where_none_is_named(tmp_path):
    race = RACE._replace(tuned_at=None)

    class Own(Fake):
        def __call__(self, run):
            self.best = {None: 0.3, 0.9: 0.2, 0.95: 0.05}[run.sparsity]
            return super().__call__(run)

    path, fake = tmp_path / "runs.jsonl", Own()
    runner.finish(race, race.contenders, path, fake)
    rows = races.summary(race, records.load(path))
    chosen = {(row["method"], row["sparsity"]): row["learning rate"] for row in rows}
    assert chosen["RigL", "0.9"] == "0.2"
    assert chosen["RigL", "0.95"] == "0.05"
    assert chosen["dense", "0.95"] == "0.4"
    page = pages.race_page("n", "N", "about", race, rows, ())
    assert "| RigL, uniform | momentum SGD | 0.2, 0.05 | 0.0125 to 0.4 |" in page


def test_a_line_that_was_cut_off_is_made_again(tmp_path):
    path, first = tmp_path / "runs.jsonl", Fake()
    runner.finish(RACE, [DENSE], path, first)
    whole = path.read_text()
    path.write_text(whole[:-9])
    again = Fake()
    runner.finish(RACE, [DENSE], path, again)
    assert again.runs == first.runs[-1:]
    assert path.read_text() == whole


def test_a_method_that_fails_ends_no_other(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    failed = runner.finish(RACE, RACE.contenders, path, Fake(broken=(DENSE.name,)))
    assert failed == [DENSE.name]
    assert "RuntimeError: broken" in capsys.readouterr().out
    rows = races.summary(RACE, records.load(path))
    assert {row["method"] for row in rows} == {"RigL"}


def test_other_processes_make_the_same_runs(tmp_path):
    [quick] = experiments.races_of("sparse_training", quick=True)
    run = races.Run(DENSE.name, "trial", None, 0.05, races.TRIAL_SEED)
    here = experiments.make_run("sparse_training", True, 0, run)
    assert here["key"] == races.key_of(quick, quick.contenders[0], run)
    # Seeds, and nothing else, tell runs apart.
    again = experiments.make_run("sparse_training", True, 0, run)
    assert again["found"] == here["found"]
    other = experiments.make_run("sparse_training", True, 0, run._replace(seed=1))
    assert other["found"] != here["found"]
    assert json.loads(json.dumps(here)) == here


def test_the_folder_of_raw_runs_is_out_of_the_tree(monkeypatch, tmp_path):
    monkeypatch.delenv("PRUNADAG_RUNS", raising=False)
    assert not records.folder().is_relative_to(records.RESULTS.parents[1])
    monkeypatch.setenv("PRUNADAG_RUNS", str(tmp_path))
    assert records.folder() == tmp_path


# Tables, pages and figures.


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "runs.jsonl"
    runner.finish(RACE, RACE.contenders, path, Fake())
    summary = races.summary(RACE, records.load(path))
    table = path.with_suffix(".csv")
    records.write_csv(table, summary)
    return records.read_csv(table)


def test_a_table_has_a_row_for_each_contender_and_sparsity(rows):
    cells = [(row["method"], row["sparsity"]) for row in rows]
    dense, rigl = [("dense", s) for s in ("0", "0.9", "0.95")], ["0.9", "0.95"]
    assert cells == [*dense, *(("RigL", s) for s in rigl)]
    assert rows[0]["accuracy by seed"] == "89.58 89.68"
    assert (rows[0]["tried from"], rows[0]["tried to"]) == ("0.0125", "0.8")


def test_new_rows_take_the_place_of_old_ones(rows):
    order = [("dense", s) for s in ("0", "0.9", "0.95")] + [("RigL", "0.95")]
    new = [{**rows[1], "zeros": "0.5"}]
    merged = records.merged(rows, new, ("method", "sparsity"), order)
    assert [(row["method"], row["sparsity"]) for row in merged] == order
    assert [row["zeros"] for row in merged] == ["0.0000", "0.5", "0.0000", "0.0000"]


def _page(rows):
    pairs = (("RigL", "uniform", "dense", ""),)
    return pages.race_page("race", "A race", "About it.", RACE, rows, pairs)


def test_a_page_says_what_the_table_says(rows):
    page = _page(rows)
    assert "| dense | momentum SGD | 1 | 89.63 ± 0.07 | 89.63 ± 0.07 |" in page
    assert "| RigL, uniform | momentum SGD | 2 |  | 89.63 ± 0.07 |" in page
    assert "| 0.4 | 0.0125 to 0.8 |" in page
    assert "*open* |" not in page
    assert "PRUNADAG_RUNS" in page
    assert "| RigL, uniform less dense | 90% | +0.00 | 0.00 | not told apart |" in page
    open_rows = [{**row, "open": "open"} for row in rows]
    assert "| 0.4 *open* |" in _page(open_rows)


def test_committed_pages_are_made_from_their_tables_byte_for_byte(tmp_path):
    for name in experiments.EXPERIMENTS:
        table = records.RESULTS / f"{name}.csv"
        if not table.is_file():
            continue
        (tmp_path / table.name).write_bytes(table.read_bytes())
        assert command.main(["page", name, "--output", str(tmp_path)]) == 0
        made = (tmp_path / f"{name}.md").read_bytes()
        assert made == table.with_suffix(".md").read_bytes()


def test_no_figure_has_more_lines_than_can_be_told_apart(rows):
    lines = (("dense", "", DENSE.base), ("RigL", "uniform", RIGL.base))
    figure = figures.accuracy("a task", rows, lines)
    [axes] = figure.axes
    assert len(axes.lines) == 2
    assert {text.get_text() for text in axes.texts} == {"dense", "RigL, uniform"}
    # Errors, on a logarithmic axis that is the larger the lower.
    assert axes.get_yscale() == "log"
    assert axes.yaxis_inverted()
    with pytest.raises(ValueError, match="at most 6"):
        figures.accuracy("a task", rows, lines * 4)


@pytest.mark.parametrize(
    ("text", "cells"), [("| a\\|b |", ["a|b"]), ("| 1.5 ± 0.1 |", ["1.5 ± 0.1"])]
)
def test_cells_of_markdown(text, cells):
    assert tables.markdown(["column"], [cells]).splitlines()[-1] == text


# The command line.


def test_the_list_names_experiments_and_methods(capsys):
    assert command.main(["list"]) == 0
    out = capsys.readouterr().out
    for name, experiment in experiments.EXPERIMENTS.items():
        assert f"{name}: {experiment.about}" in out
        for row in experiment.contenders:
            assert f"    {row.label} ({row.base};" in out


def test_a_quick_run_leaves_committed_results_alone(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(records, "RESULTS", results)
    monkeypatch.setenv("PRUNADAG_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arguments = ["run", "sparse_training", "--method", "dense", "--quick"]
    assert command.main(arguments) == 0
    assert list(results.iterdir()) == []
    assert not (tmp_path / "runs").exists()
    page = pathlib.Path(capsys.readouterr().out.splitlines()[0])
    assert page.name == "sparse_training.md"
    made = sorted(path.name for path in page.parent.iterdir())
    assert made == [f"sparse_training.{kind}" for kind in ("csv", "jsonl", "md", "png")]
    with pytest.raises(SystemExit):
        command.main([*arguments, "--output", str(results)])
    assert "--quick must not write over committed results" in capsys.readouterr().err


def test_costs_have_a_row_a_method_beside_adam(tmp_path):
    arguments = ["run", "costs", "--method", "dense", "--quick"]
    assert command.main([*arguments, "--output", str(tmp_path)]) == 0
    [adam, dense] = records.read_csv(tmp_path / "costs.csv")
    assert (adam["method"], adam["/ adam"]) == ("optax.adam", "1.00")
    assert (adam["bytes a weight"], dense["bytes a weight"]) == ("8.00", "4.00")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "sparse_training", "--method", "none"], "--method must be among"),
        (["run", "sparse_training", "--jobs", "0"], "--jobs must be at least 1; got 0"),
        (["page", "sparse_training", "--output", "nowhere"], "there is no nowhere"),
        (["run", "costs", "--method", "dense"], "are compared within one run"),
        (["run", "nothing"], "invalid choice"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, said, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert said in capsys.readouterr().err
