"""A `where` that chooses nothing is an error that says what to write."""

import jax.numpy as jnp
import optax
import pytest

from prunadag_optax import evaluation, masks, pruning_aware, schedules
from prunadag_optax.methods.gradual_pruning import gradual_magnitude_pruning
from tests.helpers import refused

PARAMS = {
    "Dense_0": {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2), "bias": jnp.zeros(2)},
    "Dense_1": {"kernel": jnp.arange(1.0, 5.0).reshape(2, 2), "bias": jnp.zeros(2)},
}
NOTHING = (
    "where must choose at least one leaf of params; it chose none of",
    "['Dense_0']['bias'] (2,), ['Dense_0']['kernel'] (4, 2), ['Dense_1']['bias'] (2,)",
    "and 1 more",
    "masks.named('kernel')",
)


def by_string(path, leaf):
    del leaf
    return path[-1] == "kernel"  # which is DictKey('kernel')


density = schedules.cubic_density(0.5, begin=0, end=10)
CALLS = {
    "magnitude_mask": lambda where: masks.magnitude_mask(PARAMS, 0.5, where=where),
    "prune": lambda where: masks.prune(PARAMS, 0.5, where=where),
    "prune_further": lambda where: masks.prune_further(PARAMS, 0.5, None, where=where),
    "mask_on_schedule": lambda where: masks.mask_on_schedule(
        PARAMS, None, 0, density, where=where
    ),
    "n_m_mask": lambda where: masks.n_m_mask(PARAMS, 1, 2, where=where),
    "pruning_curve": lambda where: evaluation.pruning_curve(
        lambda params: 0.0, PARAMS, [0.5], where=where
    ),
    "pruning_error": lambda where: evaluation.pruning_error(
        lambda params: 0.0 * PARAMS["Dense_0"]["bias"].sum(), PARAMS, [0.5], where=where
    ),
    "gradual": lambda where: gradual_magnitude_pruning(
        optax.sgd(0.1), density, where=where
    ).init(PARAMS),
    "pruning_aware": lambda where: pruning_aware(optax.sgd(0.1), 0.5, where=where).init(
        PARAMS
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_where_that_chooses_nothing(call):
    with refused(*NOTHING) as error:
        call(by_string)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("where", ["kernel", {"Dense_0": True}, True, ["kernel"]])
def test_a_where_that_is_no_function(call, where):
    with refused("where must be a function (path, leaf) -> bool", "masks.named('kern"):
        call(where)


def test_the_default_that_chooses_nothing():
    with refused("masks.prunable, the default where, must choose", "['bias'] (2,)"):
        masks.prune({"bias": jnp.ones(2)}, 0.5)
    # Where there is nothing to choose from, nothing is wrong.
    assert masks.prune({}, 0.5, where=by_string) == ({}, {})


def test_flax_helpers():
    pytest.importorskip("flax")
    from flax import nnx

    from prunadag_optax import nnx as pruning_nnx
    from prunadag_optax.linen import PruningTrainState

    state = PruningTrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1))
    with refused(*NOTHING):
        state.prune(0.9, where=by_string)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with refused("where must choose at least one leaf", "masks.named('kernel')"):
        pruning_nnx.prune(model, 0.5, where=by_string)
    pruning = pruning_nnx.prune(model, 0.5, where=masks.named("kernel"))
    assert pruning.sparsity() == 0.5


def test_named():
    pruned, mask = masks.prune(PARAMS, 0.5, where=masks.named("kernel"))
    assert int((pruned["Dense_0"]["kernel"] == 0).sum()) == 3
    assert int((pruned["Dense_1"]["kernel"] == 0).sum()) == 3
    assert mask["Dense_0"]["bias"] is None
    assert masks.sparsity(mask) == 0.5
    both = masks.magnitude_mask(PARAMS, 0.5, where=masks.named("kernel", "bias"))
    assert not both["Dense_0"]["bias"].any()
    # A name is the last of a path, whatever made the path.
    flat = {"a/b/kernel": jnp.ones((2, 2)), "fc.weight": jnp.ones((2, 2))}
    assert masks.magnitude_mask(flat, 0.5, where=masks.named("weight")) == {
        "a/b/kernel": None,
        "fc.weight": pytest.approx(jnp.array([[False, False], [True, True]])),
    }
    for names in ((), (1,), (["kernel"],)):
        with refused("names must be strings, such as masks.named('kernel', 'emb"):
            masks.named(*names)
