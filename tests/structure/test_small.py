"""The small model computes what the masked one does, wherever a model is used."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType

from prunadag_optax import structure
from tests.helpers import enable_x64, refused
from tests.structure.models import MODELS, ResNet, floats, from_linen, made, named
from tests.structure.test_models import INEXACT

NAMES = (
    "vgg_train",
    "resnet",
    "encoder",
    "scanned_transformer",
    "nnx_transformer",
    "gpt_gqa_rope",
    "recurrent",
    "cond_while",
)
# A while loop has no reverse-mode derivative, in any model.
DIFFERENTIABLE = NAMES[:-1]


def some(*names, quick):
    """Names to parametrize by, of which all but the quick ones are run by name only."""
    slow = pytest.mark.slow
    return [pytest.param(n, marks=() if n in quick else slow) for n in names]


X, P = floats(4, 6), {"in": floats(6, 8, seed=2), "out": floats(8, 3, seed=3)}
HALF = np.arange(8) % 2 == 0


def half_of(found, without=(), seed=0):
    """A random half of the units of each group."""
    rng = np.random.default_rng(seed)
    return {
        group.name: rng.permutation(np.arange(group.size) < group.size // 2)
        for group in found.groups
        if group.name not in without
    }


@functools.cache
def pruned(name):
    """A model, its structure, a choice of units, its small function and variables."""
    model, found = made(name)
    keep = half_of(found, {group for key, group in INEXACT if key == name})
    small = structure.shrink(found, keep, model.variables)
    return model, found, keep, structure.small_apply(found, keep), small


def loss_of(apply):
    """A scalar of all outputs; of those of state too."""

    def loss(variables, *inputs):
        outputs = jax.tree.leaves(apply(variables, *inputs))
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in outputs)

    return loss


def assert_close(tree, expected, rtol=1e-5):
    """Relative to the largest number in each tree."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    others = [np.asarray(x, np.float64) for x in jax.tree.leaves(expected)]
    scale = max(np.abs(x).max() for x in others)
    assert scale > 0
    for one, other in zip(leaves, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * scale)


def outputs_of(model, output):
    """Without the new values of state, whose shapes differ."""
    return output if model.state is None else output[0]


# Derivatives and transformations.


@pytest.mark.parametrize(
    "name", some(*DIFFERENTIABLE, quick=("vgg_train", "encoder", "gpt_gqa_rope"))
)
def test_gradients_are_the_sliced_ones_of_the_masked_model(name):
    model, found, keep, apply, small = pruned(name)
    masked = structure.masked(found, keep, model.variables)
    gradients = jax.jit(jax.grad(loss_of(apply)))(small, *model.inputs)
    expected = jax.jit(jax.grad(loss_of(model.apply)))(masked, *model.inputs)
    assert_close(gradients, structure.shrink(found, keep, expected))


@pytest.mark.parametrize(
    "name", some("encoder", "resnet", "gpt_gqa_rope", quick=("gpt_gqa_rope",))
)
def test_in_float64_they_agree_to_its_rounding(name):
    with enable_x64():
        model = MODELS[name]()
        wide = lambda x: (  # noqa: E731
            x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
        )
        variables, inputs = jax.tree.map(wide, (model.variables, model.inputs))
        found = structure.trace(model.apply, variables, *inputs)
        keep = half_of(found)
        small = structure.shrink(found, keep, variables)
        masked = structure.masked(found, keep, variables)

        def loss(apply, variables):
            return sum(map(jnp.sum, jax.tree.leaves(apply(variables, *inputs))))

        apply = structure.small_apply(found, keep)
        value, gradients = jax.jit(jax.value_and_grad(functools.partial(loss, apply)))(
            small
        )
        expected, full = jax.jit(
            jax.value_and_grad(functools.partial(loss, model.apply))
        )(masked)
        assert value.dtype == jnp.float64
        assert_close(value, expected, 1e-12)
        assert_close(gradients, structure.shrink(found, keep, full), 1e-12)


@pytest.mark.parametrize("name", ["encoder", "vgg_train", "gpt_gqa_rope"])
def test_other_dtypes_than_the_traced_ones(name):
    model, found, keep, apply, small = pruned(name)
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)  # noqa: E731
    masked = half(structure.masked(found, keep, model.variables))
    output = outputs_of(model, jax.jit(apply)(half(small), *model.inputs))
    expected = outputs_of(model, jax.jit(model.apply)(masked, *model.inputs))
    assert output.dtype == expected.dtype
    assert_close(output, expected, 0.02)  # Two or three units of bfloat16's last place.


@pytest.mark.parametrize(
    "name", some(*NAMES, quick=("vgg_train", "gpt_gqa_rope", "cond_while"))
)
def test_another_batch_size(name):
    model, found, keep, apply, small = pruned(name)
    masked = structure.masked(found, keep, model.variables)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x[::-1]]), model.inputs)
    one = jax.tree.map(lambda x: x[:1], model.inputs)
    for inputs in (twice, one):
        output = outputs_of(model, jax.jit(apply)(small, *inputs))
        expected = outputs_of(model, jax.jit(model.apply)(masked, *inputs))
        assert output.shape == expected.shape
        assert_close(output, expected)


@pytest.mark.parametrize("name", ["encoder", "recurrent", "cond_while"])
def test_vmap_over_small_variables(name):
    model, _, _, apply, small = pruned(name)
    several = [jax.tree.map(lambda x, n=n: x * (1 + n / 4), small) for n in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    no = (None,) * len(model.inputs)
    outputs = jax.jit(jax.vmap(apply, in_axes=(0, *no)))(stacked, *model.inputs)
    for n, variables in enumerate(several):
        assert_close(outputs[n], apply(variables, *model.inputs))


@pytest.mark.parametrize("name", ["encoder", "scanned_transformer"])
def test_training_in_a_scan_with_donated_buffers(name):
    model, found, keep, apply, small = pruned(name)
    tx = optax.sgd(0.01)

    def train(loss, variables, project):
        def step(carry, _):
            variables, state = carry
            value, gradients = jax.value_and_grad(loss)(variables, *model.inputs)
            updates, state = tx.update(project(gradients), state)
            return (optax.apply_updates(variables, updates), state), value

        return lax.scan(step, (variables, tx.init(variables)), length=3)

    masked = structure.masked(found, keep, model.variables)
    expected, losses = jax.jit(
        lambda v: train(
            loss_of(model.apply), v, lambda g: structure.masked(found, keep, g)
        )
    )(masked)
    mine = jax.tree.map(jnp.copy, small)
    (after, _), small_losses = jax.jit(
        lambda v: train(loss_of(apply), v, lambda g: g), donate_argnums=0
    )(mine)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(mine))
    assert_close(small_losses, losses)
    assert_close(after, structure.shrink(found, keep, expected[0]))


# Choices of units.


def test_several_outputs_keep_their_tree():
    model, found, keep, apply, small = pruned("several_outputs")
    expected = model.apply(
        structure.masked(found, keep, model.variables), *model.inputs
    )
    output = apply(small, *model.inputs)
    assert set(output) == {"class", "number", "last"}
    for name, value in output.items():
        assert value.shape == expected[name].shape
        assert_close(value, expected[name])


@pytest.mark.parametrize("name", ["resnet", "encoder", "recurrent", "gpt_gqa_rope"])
def test_one_unit_of_each_group(name):
    model, found, _, _, _ = pruned(name)
    keep = {g.name: np.arange(g.size) == g.size // 3 for g in found.groups}
    small = structure.shrink(found, keep, model.variables)
    for group in found.groups:
        for member in group.members:
            mine = named(small)[member.path]
            assert (
                mine.shape[member.axis] < found.shapes[member.path].shape[member.axis]
            )
    structure.check(found, model.variables, *model.inputs, keep=keep, tolerance=1e-5)


@pytest.mark.parametrize(
    "name", some("resnet", "encoder", "scanned_transformer", quick=("resnet",))
)
def test_shrinking_twice_is_shrinking_once(name):
    # Once more from the small model itself, as a model of its own.
    model, found, keep, apply, small = pruned(name)
    again = structure.trace(apply, small, *model.inputs)
    left = {g.name: int(keep[g.name].sum()) for g in found.groups}
    # A group of which one unit is left is frozen now.
    assert {g.name: g.size for g in again.groups} == {
        name: size for name, size in left.items() if size > 1
    }
    fewer = {g.name: np.arange(g.size) != 0 for g in again.groups}
    both = {name: mask.copy() for name, mask in keep.items()}
    for group, mask in fewer.items():
        both[group][np.flatnonzero(both[group])[~mask]] = False
    twice = structure.shrink(again, fewer, small)
    once = structure.shrink(found, both, model.variables)
    jax.tree.map(np.testing.assert_array_equal, twice, once)
    assert_close(
        structure.small_apply(again, fewer)(twice, *model.inputs),
        structure.small_apply(found, both)(once, *model.inputs),
    )


def test_a_choice_that_removes_nothing_changes_nothing():
    model, found, keep, _, _ = pruned("encoder")
    whole = {name: np.ones_like(mask) for name, mask in keep.items()}
    output = structure.small_apply(found, whole)(model.variables, *model.inputs)
    np.testing.assert_array_equal(output, model.apply(model.variables, *model.inputs))


def test_an_axis_of_which_nothing_is_left():
    # The diagonal of heads x dimensions: head 0 with dimension 0, and so on.
    p = {"query": floats(6, 3, 3), "out": floats(3, 2)}

    def apply(p, x):
        y = jnp.einsum("bi,ihk->bhk", x, p["query"])
        return jnp.tanh(y.reshape(-1, 9))[:, ::4] @ p["out"] + y.sum((1, 2))[:, None]

    found = structure.trace(apply, p, X)
    assert [group.size for group in found.groups] == [3, 3]
    first, second = (group.name for group in found.groups)
    keep = {first: [True, False, False], second: [False, True, True]}
    structure.check(found, p, X, keep=keep, tolerance=1e-5)


# Functions with a derivative of their own.


def gradients_of(activation, p=P, x=X, keep=HALF):
    """Of the small model, and those of the masked one sliced."""

    def apply(p, x):
        return activation(x @ p["in"]) @ p["out"]

    found = structure.trace(apply, p, x)
    keep = {"in": keep}
    loss = lambda apply: lambda p: jnp.sum(jnp.sin(apply(p, x)))  # noqa: E731
    small = structure.shrink(found, keep, p)
    mine = jax.grad(loss(structure.small_apply(found, keep)))(small)
    full = jax.grad(loss(apply))(structure.masked(found, keep, p))
    return mine, structure.shrink(found, keep, full)


def test_relu_has_the_gradient_0_at_0():
    p = {"in": jnp.zeros((6, 8)), "out": P["out"]}
    mine, _ = gradients_of(jax.nn.relu, p)
    assert not mine["in"].any()
    # maximum, for which JAX shares the gradient at ties, shows that these are some.
    mine, _ = gradients_of(lambda y: jnp.maximum(y, 0), p)
    assert mine["in"].all()


@pytest.mark.parametrize(
    "activation",
    [
        jax.nn.relu,
        jax.nn.relu6,
        jax.nn.silu,
        jax.nn.elu,
        lambda y: jnp.logaddexp(y, y),
        lambda y: jnp.logaddexp(y, jnp.zeros_like(y)),
        jax.nn.softplus,
    ],
)
def test_activations_with_a_rule(activation):
    # Half of the inputs are zeros: ties. What has no gradient there has one elsewhere.
    x = X * (jnp.arange(4) % 2)[:, None]
    mine, expected = gradients_of(activation, x=x)
    assert_close(mine, expected)


@jax.custom_vjp
def clipped(y, limit):
    del limit
    return jnp.tanh(y)


# The derivative is not that of tanh, so that losing the rule shows.
clipped.defvjp(
    lambda y, limit: (jnp.tanh(y), (y, limit)),
    lambda kept, g: (jnp.clip(2 * g * kept[0], -kept[1], kept[1]), None),
)


@jax.custom_jvp
def power(y, count):
    return y**count


@power.defjvp
def _power_rule(primals, tangents):
    (y, count), (dy, _) = primals, tangents
    return power(y, count), 5 * dy * y


@pytest.mark.parametrize(
    "activation",
    [
        lambda y: clipped(y, 0.3),
        lambda y: power(y, 2),
        lambda y: power(y, jnp.int32(2)),
        lambda y: power(y, jnp.full(y.shape, 2)),
    ],
    ids=["vjp", "jvp static", "jvp scalar", "jvp array"],
)
def test_own_rules_are_kept(activation):
    mine, expected = gradients_of(activation)
    assert_close(mine, expected)


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.checkpoint, jax.jit], ids=["plain", "remat", "jit"]
)
@pytest.mark.parametrize(
    "rule", [lambda y: clipped(y, 0.3), lambda y: power(y, 2)], ids=["vjp", "jvp"]
)
def test_own_rules_inside_a_scan(wrap, rule):
    def activation(y):
        def step(y, _):
            return wrap(rule)(y * 0.3), None

        return lax.scan(step, y, length=3)[0]

    mine, expected = gradients_of(activation)
    assert_close(mine, expected)


def test_a_rule_that_mixes_the_units_it_gets():
    # The function treats units alike; its derivative sorts them.
    @jax.custom_vjp
    def strange(y):
        return jnp.tanh(y)

    strange.defvjp(lambda y: (jnp.tanh(y), y), lambda y, g: (jnp.cumsum(g, axis=-1),))

    def apply(p, x):
        return strange(x @ p["in"]) @ p["out"]

    found = structure.trace(apply, P, X)
    assert not found.groups
    assert "'cumsum'" in found.explain("in", 1)


def test_second_derivatives():
    def apply(p, x):
        return jax.nn.softplus(x @ p["in"]) @ p["out"]

    found = structure.trace(apply, P, X)
    keep = {"in": HALF}

    def curvature(apply, p):
        loss = lambda p: jnp.sum(apply(p, X) ** 2)  # noqa: E731
        _, along = jax.jvp(jax.grad(loss), (p,), (p,))
        return along

    mine = curvature(
        structure.small_apply(found, keep), structure.shrink(found, keep, P)
    )
    full = curvature(apply, structure.masked(found, keep, P))
    assert_close(mine, structure.shrink(found, keep, full))


# Export.


def exported(apply, variables, *inputs):
    return jax.export.export(jax.jit(apply))(variables, *inputs)


@pytest.mark.parametrize(
    "name", some(*NAMES, "lenet", "mlp", quick=("lenet", "nnx_transformer"))
)
def test_export_with_fixed_shapes(name):
    _, _, _, apply, small = pruned(name)
    inputs = pruned(name)[0].inputs
    call = exported(apply, small, *inputs).call
    assert_close(call(small, *inputs), apply(small, *inputs))


@pytest.mark.parametrize(
    "name",
    some(
        *("mlp", "lenet", "resnet", "encoder", "nnx_transformer", "gpt_gqa_rope"),
        quick=("mlp", "lenet", "encoder"),
    ),
)
def test_export_with_a_symbolic_batch(name):
    model, _, _, apply, small = pruned(name)
    (batch,) = jax.export.symbolic_shape("batch")
    symbolic = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), model.inputs
    )
    call = exported(apply, small, *symbolic).call
    for inputs in (model.inputs, jax.tree.map(lambda x: x[:2], model.inputs)):
        assert_close(call(small, *inputs), apply(small, *inputs))


def test_a_group_that_is_not_there_at_other_inputs():
    p = {"in": floats(6, 8), "other": floats(6, 8), "out": floats(8, 3)}

    def apply(p, x):
        if len(x) > 4:
            return jnp.sort(x @ p["in"]) @ p["out"] + (x @ p["other"])[:, :3]
        return (x @ p["in"]) @ p["out"] + (x @ p["other"])[:, :3]

    found = structure.trace(apply, p, X)
    keep = {"in": HALF}
    small = structure.shrink(found, keep, p)
    small_apply = structure.small_apply(found, keep)
    assert small_apply(small, X).shape == (4, 3)
    with refused("[[5, 6]]", "'in'", "structure.trace(apply"):
        small_apply(small, floats(5, 6))


# What cannot be followed.


class Branches(nn.Module):
    """One branch through a primitive without a rule, the other as usual."""

    through: str

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Dense(8, name="usual")(x))
        y = nn.relu(nn.Dense(7, name="next")(y))
        z = nn.Dense(4, name="strange")(x)
        if self.through == "cholesky":
            gram = z.T @ z + jnp.eye(4)
            z = z @ jnp.linalg.cholesky(gram)
        elif self.through == "qr":
            z = jnp.linalg.qr(z)[0]
        else:
            shape = jax.ShapeDtypeStruct(z.shape, z.dtype)
            z = jax.pure_callback(np.sin, shape, z, vmap_method="sequential")
        return nn.Dense(3, name="head")(y) + nn.Dense(3, name="other_head")(z)


@pytest.mark.parametrize("through", ["cholesky", "qr", "pure_callback"])
def test_a_primitive_without_a_rule_freezes_its_branch_only(through):
    model = from_linen(Branches(through), X)
    found = structure.trace(model.apply, model.variables, X)
    assert {group.name: group.size for group in found.groups} == {"usual": 8, "next": 7}
    source, first = inspect.getsourcelines(Branches)
    lines = {
        f"test_small.py:{first + n}"
        for n, line in enumerate(source)
        if f"linalg.{through}(" in line or f"jax.{through}(" in line
    }
    assert list(found.unknown) == [through]
    for primitive, line in found.unknown.items():
        assert line.split()[0] in lines, (primitive, line)
        assert f"The primitive {primitive!r} ({line}) cannot be" in str(found)
    frozen = {(entry.path, entry.axis) for entry in found.frozen}
    for path, axis in (
        ("params/strange/kernel", 1),
        ("params/strange/bias", 0),
        ("params/other_head/kernel", 0),
    ):
        assert (path, axis) in frozen
        said = found.explain(path, axis)
        assert any(repr(primitive) in said for primitive in found.unknown)
        assert any(line in said for line in lines)
    keep = {"usual": np.arange(8) < 3, "next": np.arange(7) > 3}
    structure.check(found, model.variables, X, keep=keep, tolerance=1e-5)


def test_every_frozen_axis_of_a_resnet_is_explained():
    _, found, _, _, _ = pruned("resnet")
    source, first = inspect.getsourcelines(ResNet)
    lines = {line.strip(): f"models.py:{first + n}" for n, line in enumerate(source)}
    call = lines["return norm(conv(x))"]
    seen = set()
    for entry in found.frozen:
        said = found.explain(entry.path, entry.axis)
        assert f"{entry.size} of {entry.size} positions are frozen" in said
        if entry.path.startswith("params/head"):
            assert "is an axis of the model's output" in said
        elif entry.axis < 2:
            assert "is a spatial axis of 'conv_general_dilated'" in said
            assert f"at {call} " in said
        else:
            assert (entry.path, entry.axis) == ("params/stem/kernel", 2)
            assert "is an axis of the model's input" in said
            assert f"'conv_general_dilated' at {call} " in said
        seen.add((entry.path, entry.axis))
    kernels = [path for path, leaf in found.shapes.items() if len(leaf.shape) == 4]
    spatial = {
        (path, axis)
        for path in kernels
        for axis in (0, 1)
        if found.shapes[path].shape[axis] > 1
    }
    ends = {
        ("params/stem/kernel", 2),
        ("params/head/kernel", 1),
        ("params/head/bias", 0),
    }
    assert seen == spatial | ends


# Axes that the user wants to keep.


def test_freeze_takes_paths_and_pairs():
    model = MODELS["mlp"]()
    names = lambda found: [group.name for group in found.groups]  # noqa: E731
    trace = functools.partial(
        structure.trace, model.apply, model.variables, *model.inputs
    )
    first, second = names(trace())
    kernel = f"params/{second}/kernel"
    assert names(trace(freeze=[kernel])) == []
    assert names(trace(freeze=[(kernel, 1)])) == [first]
    assert names(trace(freeze=[(kernel, 0)])) == [second]
    assert names(trace(freeze=[f"params/{second}/bias"])) == [first]
    assert names(trace(freeze=[(*kernel.split("/"),)])) == []
    found = trace(freeze=iter([(kernel, 1)]))
    assert "is listed in freeze" in found.explain(kernel, 1)
    # Also where the model is traced again.
    keep = {first: np.arange(16) < 8}
    small = structure.shrink(found, keep, model.variables)
    more = floats(9, 7, seed=4)
    assert_close(
        structure.small_apply(found, keep)(small, more),
        model.apply(structure.masked(found, keep, model.variables), more),
    )


def test_remat_and_sharding_constraints_on_one_device():
    mesh = jax.make_mesh((1,), ("m",), axis_types=(AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "m"))

    @jax.checkpoint
    def activation(y):
        return jnp.sin(lax.with_sharding_constraint(y, place)) ** 2

    mine, expected = gradients_of(activation)
    assert_close(mine, expected)


@pytest.mark.parametrize("choose", [lax.top_k, lax.approx_max_k])
def test_what_is_chosen_from_is_frozen(choose):
    # The two largest of the 5 pieces of each unit, along the last axis or another.
    p = {"in": floats(6, 8, 5), "out": floats(2, 8, 3)}
    options = {"reduction_dimension": 1} if choose is lax.approx_max_k else {}

    def apply(p, x):
        y = jnp.einsum("bi,ijk->bkj" if options else "bi,ijk->bjk", x, p["in"])
        best = choose(y, 2, **options)[0]
        order = "bkj,kjo->bo" if options else "bjk,kjo->bo"
        return jnp.einsum(order, best, p["out"])

    found = structure.trace(apply, p, X)
    (group,) = found.groups
    assert [(m.path, m.axis) for m in group.members] == [("in", 1), ("out", 1)]
    assert "is chosen from by" in found.explain("in", 2)
    structure.check(found, p, X, keep={group.name: HALF}, tolerance=1e-5)
