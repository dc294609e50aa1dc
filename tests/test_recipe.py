"""The study behind the recipes, in small."""

import functools
import json

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("sklearn")

from benchmarks import measured_recipes
from benchmarks.archive.recipe import __main__ as recipe
from benchmarks.archive.recipe.studies import STUDIES, Plan, Study
from prunadag_optax import recipes

# The study is in the archive.
pytestmark = pytest.mark.slow


def test_every_case_is_an_optimizer():
    params = {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}
    for study in STUDIES.values():
        assert set(study.sparsities) <= set(recipe.SPARSITIES)
        for make in study.cases.values():
            tx = make(Plan(100, 10))
            assert isinstance(tx, optax.GradientTransformation)
            updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
            assert updates["kernel"].shape == (4, 3)


@pytest.mark.parametrize(
    ("cycle", "dense"),
    [
        (measured_recipes.DENSE_1_OF_10, 1 / 10),
        (measured_recipes.DENSE_1_OF_4, 1 / 4),
        (measured_recipes.DENSE_2_OF_3, 2 / 3),
        (measured_recipes.DENSE_7_OF_8, 7 / 8),
    ],
)
def test_measured_cycles_have_the_dense_turns_of_their_names(cycle, dense):
    turns = np.asarray(cycle) == 1
    assert turns.mean() == pytest.approx(dense)
    # They lie evenly: as many in each half.
    assert turns[: len(turns) // 2].sum() == pytest.approx(turns.sum() / 2, abs=0.5)


@pytest.mark.parametrize("base", ["adam", "momentum"])
def test_measured_recipes_fall_to_zero(base):
    x = {"kernel": np.ones((4, 3), np.float32)}

    def last_step(recipe, **settings):
        tx = recipe(sparsity=0.0, total_steps=10, base=base, **settings)
        state = tx.init(x)
        updates = x
        for _ in range(11):
            updates, state = tx.update(x, state, x)
        return abs(np.asarray(updates["kernel"])).max()

    measured = functools.partial(measured_recipes.falling_to_zero, recipes.targeted)
    assert last_step(measured) == 0
    assert last_step(recipes.targeted) > 0


def test_verdicts_are_of_differences_seed_by_seed():
    study = Study("", "", (0.98,), dict.fromkeys(["first", "better", "same", "worse"]))
    base = np.zeros((3, len(recipe.SPARSITIES)))
    base[:, recipe.SPARSITIES.index(0.98)] = [70.0, 80.0, 90.0]
    gains = {
        "first": 0,
        "better": [1, 1.1, 0.9],
        "same": [1, -1, 0.1],
        "worse": [-1] * 3,
    }
    found = {
        name: {"curves": (base + np.reshape(gain, (-1, 1))).tolist()}
        for name, gain in gains.items()
    }
    lines = recipe.verdict(study, found)
    assert lines[0] == "* better: +1.00 ± 0.06 points, better."
    assert "no difference" in lines[1]
    assert lines[2].endswith("worse.")


@pytest.mark.slow
def test_the_page_is_made_and_nothing_runs_twice(tmp_path, capsys):
    arguments = ["pruning", "--quick", "--seeds", "2", "--output", str(tmp_path)]
    recipe.main(arguments)
    page = (tmp_path / "recipe.md").read_text()
    kept = json.loads((tmp_path / "recipe.json").read_text())
    cases = kept["studies"]["pruning"]
    assert set(cases) == set(STUDIES["pruning"].cases)
    for case in cases.values():
        curves = np.array(case["curves"])
        assert curves.shape == (2, len(recipe.SPARSITIES))
        assert (curves >= 0).all()
        assert (curves <= 100).all()
        # Two epochs of digits leave more than chance in the whole network.
        assert curves[:, 0].max() > 10
    assert "| targeted |" in page
    assert "gradual magnitude pruning of Adam: " in page
    assert (tmp_path / "recipe" / "pruning.png").stat().st_size > 10_000
    cases["targeted"]["seconds"] = -1.0
    (tmp_path / "recipe.json").write_text(json.dumps(kept))
    recipe.main(arguments)
    again = json.loads((tmp_path / "recipe.json").read_text())
    assert again["studies"]["pruning"]["targeted"]["seconds"] == -1.0
    assert "recipe.md" in capsys.readouterr().out
