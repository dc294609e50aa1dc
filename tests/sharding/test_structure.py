"""Shrinking divided parameters: what still divides stays where it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prunadag_optax import structure


def setting():
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    place = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: E731

    def apply(p, x):
        h = lax.with_sharding_constraint(jnp.tanh(x @ p["in"]), place("d", "m"))
        return h @ p["out"]

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    specs = {"in": place("d", "m"), "out": place("m", None)}
    variables = jax.device_put({"in": draw(8, 12), "out": draw(12, 4)}, specs)
    x = jax.device_put(draw(8, 8), place("d"))
    return apply, variables, x, structure.trace(apply, variables, x)


@pytest.mark.parametrize(("units", "divides"), [(6, True), (5, False), (1, False)])
def test_axes_that_no_longer_divide_are_gathered(units, divides):
    apply, variables, x, found = setting()
    keep = {"in": np.arange(12) < units}
    small = structure.shrink(found, keep, variables)
    along = "m" if divides else None
    assert small["in"].sharding.spec == P("d", along)
    assert small["out"].sharding.spec == P(along, None)
    np.testing.assert_array_equal(small["in"], np.asarray(variables["in"])[:, :units])
    shapes = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding), variables
    )
    for name, struct in structure.shrink(found, keep, shapes).items():
        assert struct.sharding == small[name].sharding

    run = jax.jit(structure.small_apply(found, keep))
    expected = apply(structure.masked(found, keep, variables), x)
    np.testing.assert_allclose(run(small, x), expected, rtol=1e-5, atol=1e-5)
    # The constraint on the batch stays, whatever the units do.
    constraint = [
        equation.params["sharding"].spec
        for equation in run.trace(small, x).jaxpr.eqns
        if equation.primitive.name == "sharding_constraint"
    ]
    assert constraint == [P("d", along)]


def test_gradients_of_the_small_model_are_those_of_one_device():
    apply, variables, x, found = setting()
    keep = {"in": np.arange(12) % 2 == 0}
    small = structure.shrink(found, keep, variables)
    loss = lambda apply: lambda p: jnp.sum(apply(p, x) ** 2)  # noqa: E731
    mine = jax.jit(jax.grad(loss(structure.small_apply(found, keep))))(small)
    full = jax.jit(jax.grad(loss(apply)))(structure.masked(found, keep, variables))
    for name, value in structure.shrink(found, keep, full).items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-4, atol=1e-5)
