"""N:M in training: held, gradual, and as turns; dense turns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax import eval_params, masks, pruning_aware, recipes, schedules
from prunadag_optax.methods.gradual_pruning import gradual_magnitude_pruning


def params():
    a, b = jax.random.split(jax.random.key(0))
    return {
        "a": {"kernel": jax.random.normal(a, (16, 6)), "bias": jnp.ones(6)},
        "b": {"kernel": jax.random.normal(b, (8, 3))},
    }


def in_groups(tree, m=4):
    """How many of each m along the inputs are not zero."""
    return {
        int(n)
        for name in ("a", "b")
        for x in [np.asarray(tree[name]["kernel"])]
        for n in (x.reshape(-1, m, x.shape[1]) != 0).sum(1).ravel()
    }


def test_held_under_any_optimizer():
    x = params()
    mask = masks.n_m_mask(x, 2, 4)
    tx = optax.chain(optax.adamw(0.1), masks.keep_pruned(mask))
    x, state, step = masks.apply_mask(x, mask), tx.init(x), jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(jax.tree.map(jnp.ones_like, x), state, x)
        x = optax.apply_updates(x, updates)
        assert in_groups(x) == {2}


def test_gradual_n_m_prunes_one_after_another():
    x = params()
    density = schedules.cubic_density(0.5, begin=0, end=8)
    tx = gradual_magnitude_pruning(optax.sgd(0.1), density, n_m="2:4")
    state, step, seen = tx.init(x), jax.jit(tx.update), []
    for count in range(10):
        before = state.mask
        updates, state = step(x, state, x)
        x = optax.apply_updates(x, updates)
        expected = int(np.clip(round(float(density(count)) * 4), 2, 4))
        assert in_groups(x) == {expected}
        seen.append(expected)
        assert not any(
            bool(jnp.any(new & ~old))
            for new, old in zip(
                jax.tree.leaves(state.mask), jax.tree.leaves(before), strict=True
            )
        )
    assert seen[0] == 4
    assert 3 in seen
    assert seen[-1] == 2


def test_turns_train_the_n_m_network_and_keep_it_in_the_dense_one():
    x = params()
    tx = recipes.any_sparsity(
        40, densities=(1.0, 0.1, "2:4", "1:4"), begin=0.0, end=0.1, base="momentum"
    )
    state, step = tx.init(x), jax.jit(tx.update)
    for count in range(1, 17):
        dense = eval_params(state, x)
        gradient = jax.tree.map(jnp.sign, x)
        updates, state = step(gradient, state, x)
        x = optax.apply_updates(x, updates)
        dense = eval_params(state, x)
        if count < 4:
            continue
        turn = count % 4
        if turn in (2, 3):
            n = {2: 2, 3: 1}[turn]
            assert in_groups(x) == {n}
            expected = masks.apply_mask(dense, masks.n_m_mask(dense, n, 4))
            jax.tree.map(np.testing.assert_array_equal, x, expected)
        else:
            kept = sum(int((x[i]["kernel"] != 0).sum()) for i in "ab")
            assert kept == {0: 120, 1: 12}[turn]


@pytest.mark.parametrize("at", ["params", "pruned"])
def test_a_constant_pattern(at):
    x = params()
    tx = pruning_aware(optax.sgd(0.1), "2:4", shrink_rate=1.0, gradient_at=at)
    state, step = tx.init(x), jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(jax.tree.map(jnp.zeros_like, x), state, x)
        x = optax.apply_updates(x, updates)
        assert in_groups(x) == {2}


def test_eight_of_which_four_are_kept_go_by_magnitude_with_ties_by_index():
    x = np.random.default_rng(0).integers(-3, 4, (32, 5)).astype(np.float32)
    groups = np.abs(x).reshape(4, 8, 5)
    # Sorted by magnitude, and by index where they tie.
    rank = np.argsort(np.argsort(groups, axis=1, kind="stable"), axis=1)
    found = masks.n_m_mask(jnp.asarray(x), 4, 8)
    np.testing.assert_array_equal(found, (rank >= 4).reshape(32, 5))
    # Long groups are sorted, not compared with each other.
    rank = np.argsort(np.argsort(np.abs(x), axis=0, kind="stable"), axis=0)
    np.testing.assert_array_equal(masks.n_m_mask(jnp.asarray(x), 9, 32), rank >= 23)


def test_until_the_density_comes_down_to_it_no_pattern_is_in_use():
    density = schedules.cyclic_density(
        ("2:4", 1.0), least=lambda count: jnp.where(count < 4, 0.6, 0.0)
    )
    assert density.patterns == ((2, 4),)
    assert [int(density.pattern_at(k)) for k in range(6)] == [-1, -1, -1, -1, 0, -1]
    shares = [round(float(density(k)), 3) for k in range(6)]
    assert shares == [0.6, 1, 0.6, 1, 0.5, 1]


def test_dense_turns_are_not_searched_for():
    # The k-th largest of n = k is everything, zeros and NaNs included.
    x = {"kernel": jnp.array([[0.0, -1.0], [jnp.nan, 2.0]])}
    tx = pruning_aware(optax.sgd(1.0), 1.0)
    g = {"kernel": jnp.ones((2, 2))}
    updates, state = jax.jit(tx.update)(g, tx.init(x), x)
    expected = jnp.where(jnp.isnan(x["kernel"]), jnp.nan, -1.0)
    np.testing.assert_array_equal(updates["kernel"], expected)
    assert float(state.threshold_hint[0]) == 0


def test_what_is_refused():
    x = params()
    for bad in ("2:", "0:4", "5:4", "half"):
        with pytest.raises(ValueError, match=f"density must be .* got '{bad}'"):
            pruning_aware(optax.sgd(0.1), bad)
        with pytest.raises(ValueError, match="densities must be"):
            schedules.cyclic_density((1.0, bad))
        with pytest.raises(ValueError, match="n_m must be"):
            masks.mask_on_schedule(x, None, 0, 0.5, n_m=bad)
    tx = pruning_aware(optax.sgd(0.1), "2:5")
    with pytest.raises(ValueError, match="m must divide axis -2 of"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match=r"the count 121, more than the 120"):
        pruning_aware(optax.sgd(0.1), 121).init(x)
