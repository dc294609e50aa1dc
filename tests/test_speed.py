"""The logic of benchmarks.speed, with tiny sizes and no assertion on time."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import methods, rivals, speed, speed_report, step_cost, timing, trees
from prunadag_optax import prunadag

RATE = 0.05


@pytest.mark.parametrize("size", [7_000, 123_456, 10_000_000])
def test_trees_have_one_size(size):
    exact, shapes = trees.same_size(size)
    resnet, transformer = shapes["ResNet"], shapes["transformer"]
    assert shapes["flat"] is None
    assert trees.size_of(resnet) == trees.size_of(transformer) == exact
    # Short by less than a column of the head and its bias.
    assert 0 <= size - exact <= resnet["head/kernel"][0]
    assert (len(transformer), len(resnet)) == (150, 161)
    assert all(math.prod(shape) > 0 for shape in (resnet | transformer).values())


def test_resnet_50_has_its_published_size():
    assert trees.size_of(trees.resnet_shapes(64, 1000)) == 25_557_032


def test_split_keeps_the_order_and_checks_the_size():
    flat = jnp.arange(10.0)
    leaves = trees.split(flat, {"a": (2, 3), "b": (4,)})
    assert leaves["a"].shape == (2, 3)
    np.testing.assert_array_equal(
        jnp.concatenate([leaf.ravel() for leaf in leaves.values()]), flat
    )
    with pytest.raises(ValueError, match="10 elements"):
        trees.split(flat, {"a": (2, 3)})


def test_floor_counts_the_passes():
    assert methods.floor_bytes(1, methods.PRUNADAG) == 9 * 4
    # Half of the two reads of g and the three passes over x; float32 weights.
    assert methods.floor_bytes(10, methods.PRUNADAG, "bfloat16") == 10 * (5 * 2 + 16)
    assert methods.floor_bytes(1, methods.ADAGRAD) == 5 * 4
    assert methods.floor_bytes(1, methods.ADAM) == 7 * 4
    assert methods.floor_bytes(3, methods.COPY) == 24


def test_interleave_lets_slow_ones_sit_out():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in ("fast", "slow")}
    times = timing.interleave(runs, 10, every={"slow": 5}, warm_up=3)
    assert (calls.count("fast"), calls.count("slow")) == (13, 3)
    assert np.isfinite(times["slow"]).nonzero()[0].tolist() == [0, 5]
    assert np.isfinite(times["fast"]).all()


def test_ratios():
    own, base = np.array([2.0, np.nan, 9.0]), np.array([1.0, 2.0, 3.0])
    assert timing.ratio(own, base) == 5.5 / 2
    assert timing.paired_ratio(own, base) == 2.5
    assert timing.spread(base) == {"median ms": 2.0, "quartiles ms": [1.5, 2.5]}


def test_compiled_step_carries_on_and_is_compiled_once():
    seen = []

    def step(x, y):
        jax.debug.callback(lambda value: seen.append(float(value)), x)
        return (x + y,)

    compiled = timing.compile_step(
        step, (jnp.zeros(()),), [jnp.ones(()), 2 + jnp.ones(())]
    )
    for _ in range(4):
        compiled.run()
    jax.effects_barrier()
    assert seen == [0, 1, 4, 5]
    assert compiled.traced() == 1
    assert compiled.compile_s > 0


def test_groups_repeat_the_references_and_leave_out_what_cannot_fit():
    needed = {**dict.fromkeys(step_cost.REFERENCES, 1), "a": 4, "b": 3, "c": 9, "d": 2}
    base = [*step_cost.REFERENCES]
    assert step_cost.groups(needed, 9) == [[*base, "a"], [*base, "b", "d"]]
    assert step_cost.groups(needed, 100) == [[*needed]]
    assert step_cost.groups(needed, 1) == []


def steps_of(tx, params, gradients):
    """The parameters after each step."""
    state, seen = tx.init(params), []
    for gradient in gradients:
        updates, state = jax.jit(tx.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


@pytest.mark.parametrize("variant", ["v1", "v2", "v3", "v4"])
@pytest.mark.slow
def test_top_k_computes_the_same(variant):
    shapes = {"a": (40, 5), "b": (7,)}
    params, gradients = jax.tree.map(
        lambda x: trees.as_tree(x, shapes), trees.random_data(207)
    )
    gradients = 3 * gradients
    own = steps_of(prunadag(RATE, variant=variant), params, gradients)
    other = steps_of(rivals.top_k(RATE, variant=variant), params, gradients)
    for one, two in zip(own, other, strict=True):
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), 1e-5, 1e-7)


@pytest.mark.parametrize("variant", ["v3", "v4"])
def test_torch_computes_the_same(variant):
    pytest.importorskip("torch")
    shapes = {"a": (40, 5), "b": (7,)}
    params, gradients = jax.tree.map(
        lambda x: trees.as_tree(x, shapes), trees.random_data(207)
    )
    gradients = 3 * gradients
    tx = prunadag(RATE, variant=variant, scope="leaf")
    state = rivals.torch_init(rivals.to_torch(params))
    for count, expected in enumerate(steps_of(tx, params, gradients)):
        gradient = rivals.to_torch(gradients[count])
        rivals.torch_step(state, gradient, count, learning_rate=RATE, variant=variant)
        for x, y in zip(state.params, jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x.numpy(), np.asarray(y), 1e-5, 1e-7)


@pytest.mark.parametrize("variant", ["v3", "v4"])
@pytest.mark.slow
def test_pallas_computes_the_same(variant):
    params, gradients = trees.random_data(1_000, "float32")
    pallas, plain = methods.with_pallas(variant), prunadag(RATE, variant=variant)
    step = methods.optimizer_step(plain)
    one, two = (params, pallas.tx.init(params)), (params, plain.init(params))
    for gradient in gradients:
        one, two = pallas.step(*one, gradient), step(*two, gradient)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
    assert one[1].count == two[1][0].count == len(gradients)


def test_tables_show_what_there_is():
    rows = [
        {
            "optimizer": "a",
            "n": 10_000,
            "median ms": 1.23456,
            "quartiles ms": [1.0, 2.5],
        },
        {"optimizer": "b", "n": 10_000, "skipped": "memory"},
    ]
    table = speed_report.Table("Title", "Note.", rows, ("optimizer", "n", "median ms"))
    assert speed_report.to_markdown(table).splitlines() == [
        "## Title",
        "",
        "Note.",
        "",
        "| optimizer | n | median ms | skipped |",
        "|---|---|---|---|",
        "| a | 10,000 | 1.23 |  |",
        "| b | 10,000 |  | memory |",
    ]
    assert [speed_report.cell(v) for v in (None, [1.0, 2.5], 12345.6, "v3")] == [
        "",
        "1-2.5",
        "12,346",
        "v3",
    ]


def test_too_large_sizes_are_skipped(monkeypatch):
    monkeypatch.setattr(step_cost, "memory_available", lambda: 1000)
    rows = step_cost.steps(1000, 1, {"flat": None})
    assert {row["skipped"] for row in rows} == {"memory"}
    rows = step_cost.linearity([1000], 1)
    assert {row["skipped"] for row in rows} == {"memory"}


@pytest.mark.slow
def test_command_writes_its_results(tmp_path, monkeypatch, capsys):
    arguments = [
        "--sections",
        "steps",
        "compilations",
        "--sizes",
        "50",
        "--repeats",
        "1",
    ]
    monkeypatch.setattr(
        sys, "argv", ["speed", "--repeats", "1", *arguments, "--output", str(tmp_path)]
    )
    monkeypatch.setattr(
        trees, "same_size", lambda size: (size, {"flat": None, "two": {"a": (size,)}})
    )
    monkeypatch.setattr(step_cost, "rounds", lambda size, repeats: repeats)
    speed.main()
    written = json.loads((tmp_path / "speed.json").read_text())
    assert {row["compilations"] for row in written["compilations"]} == {1}
    adagrad = next(r for r in written["steps"] if r["optimizer"] == "optax.adagrad")
    assert adagrad["/ adagrad"] == adagrad["/ flat"] == 1
    assert adagrad["floor MB"] == 50 * 20 / 1e6
    text = (tmp_path / "speed.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("\n## ") == 4
    assert (tmp_path / "speed.png").stat().st_size > 0
