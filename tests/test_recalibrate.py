"""Statistics of batch normalisation computed anew, in both APIs of Flax."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from prunadag_optax import evaluation, masks
from prunadag_optax.linen import PruningTrainState
from tests.helpers import enable_x64, refused

recalibrate = functools.partial(evaluation.recalibrate_batch_norm, progress=False)
EPSILON = 1e-5


# Models: a convolution and a dense layer, each with batch normalisation.


class Linen(nn.Module):
    momentum: float = 0.9
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, train=False):
        dtypes = {"dtype": self.dtype, "param_dtype": self.dtype}
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=EPSILON,
            **dtypes,
        )
        x = nn.Conv(3, (2, 2), padding="VALID", name="conv", **dtypes)(x)
        x = nn.relu(norm(name="norm_0")(x))
        x = nn.Dense(4, name="dense", **dtypes)(x.reshape(len(x), -1))
        return norm(name="norm_1")(x)


class Nnx(nnx.Module):
    def __init__(self, momentum=0.9, dtype="float32"):
        rngs = nnx.Rngs(0)
        dtypes = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
        norm = functools.partial(
            nnx.BatchNorm, momentum=momentum, epsilon=EPSILON, rngs=rngs, **dtypes
        )
        self.conv = nnx.Conv(1, 3, (2, 2), padding="VALID", rngs=rngs, **dtypes)
        self.norm_0 = norm(3)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(27, 4, rngs=rngs, **dtypes)
        self.norm_1 = norm(4)

    def __call__(self, x):
        x = nnx.relu(self.norm_0(self.conv(x)))
        return self.norm_1(self.dense(self.dropout(x).reshape(len(x), -1)))


def linen_forward(model):
    def forward(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    return forward


def images(sizes, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(n, 4, 4, 1)) * (1 + j) + j).astype(dtype)
        for j, n in enumerate(sizes)
    ]


@functools.cache
def linen_variables(dtype="float32"):
    x = jnp.zeros((2, 4, 4, 1), dtype)
    variables = jax.jit(Linen(dtype=dtype).init)(jax.random.key(0), x)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), variables)


# In NumPy: the inputs of both layers over all batches.


def inputs_of(params, batches):
    """Each batch is normalised by its own statistics, as in training."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    inputs = [], []
    for x in batches:
        x = np.asarray(x, np.float64)
        kernel = params["conv"]["kernel"]
        h = sum(
            x[:, i : i + 3, j : j + 3] @ kernel[i, j] for i in (0, 1) for j in (0, 1)
        )
        h = h + params["conv"]["bias"]
        inputs[0].append(h.reshape(-1, 3))
        h = (h - h.mean((0, 1, 2))) / np.sqrt(h.var((0, 1, 2)) + EPSILON)
        h = np.maximum(h * params["norm_0"]["scale"] + params["norm_0"]["bias"], 0)
        h = h.reshape(len(x), -1) @ params["dense"]["kernel"]
        inputs[1].append(h + params["dense"]["bias"])
    return [np.concatenate(of_layer) for of_layer in inputs]


def check_statistics(stats, params, batches, rtol):
    for name, inputs in zip(
        ("norm_0", "norm_1"), inputs_of(params, batches), strict=True
    ):
        for key, right in (("mean", inputs.mean(0)), ("var", inputs.var(0))):
            np.testing.assert_allclose(
                stats[name][key], right, rtol=rtol, atol=rtol * inputs.std()
            )


def nnx_parts(model):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), params


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("sizes", [(6, 6, 6), (7, 2, 4)])
def test_linen_statistics_are_those_of_all_inputs(dtype, rtol, sizes):
    with enable_x64(dtype == "float64"):
        variables, batches = linen_variables(dtype), images(sizes, dtype=dtype)
        params, _ = masks.prune(variables["params"], 0.5)
        pruned = {**variables, "params": params}
        new = recalibrate(linen_forward(Linen(dtype=dtype)), pruned, iter(batches))
        check_statistics(new["batch_stats"], params, batches, rtol)
        assert jax.tree.structure(new) == jax.tree.structure(pruned)
        same = jax.tree.map(lambda a, b: a.dtype == b.dtype, new, pruned)
        assert jax.tree.all(same)
        assert new["params"] is params


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("float64", 1e-10)])
def test_nnx_statistics_are_those_of_all_inputs(dtype, rtol):
    with enable_x64(dtype == "float64"):
        model, batches = Nnx(dtype=dtype), images((7, 2, 4), dtype=dtype)
        for norm in (model.norm_0, model.norm_1):
            for variable in (norm.mean, norm.var):
                variable.set_value(variable[...].astype(dtype))
        params, _ = masks.prune(nnx.as_pure(nnx.state(model, nnx.Param)), 0.5)
        nnx.update(model, params)
        before = nnx.graphdef(model)
        # Dropout, which the model has in training mode, drops nothing here.
        assert recalibrate(model, (batch for batch in batches)) is model
        check_statistics(*nnx_parts(model), batches, rtol)
        assert nnx.graphdef(model) == before
        assert model.norm_0.mean[...].dtype == jnp.dtype(dtype)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([2, 3, 6]), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_any_sizes_of_batches(sizes, seed):
    variables, batches = linen_variables(), images(sizes, seed)
    new = recalibrate(FORWARD, variables, batches)
    check_statistics(new["batch_stats"], variables["params"], batches, 3e-5)


FORWARD = linen_forward(Linen())


def test_momentum_and_former_statistics_do_not_matter():
    variables, batches = linen_variables(), images((4, 4))
    right = recalibrate(FORWARD, variables, batches)["batch_stats"]
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, variables["batch_stats"])
    found = recalibrate(
        linen_forward(Linen(momentum=0.0)), {**variables, "batch_stats": bad}, batches
    )["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, found, right)

    models = Nnx(momentum=0.99), Nnx(momentum=0.0)
    models[1].norm_0.var[...] *= jnp.nan
    found, right = (nnx_parts(recalibrate(model, batches))[0] for model in models)
    jax.tree.map(np.testing.assert_array_equal, found, right)
    assert [model.norm_0.momentum for model in models] == [0.99, 0.0]


def test_evaluation_with_one_batch_is_training_on_it():
    variables, (batch,) = linen_variables(), images((8,))
    new = recalibrate(FORWARD, variables, [batch])
    right, _ = FORWARD(variables, batch)
    np.testing.assert_allclose(Linen().apply(new, batch), right, rtol=1e-4, atol=1e-5)
    model = Nnx()
    recalibrate(model, [batch])
    evaluated = nnx.clone(model)
    evaluated.eval()
    model.dropout.deterministic = True
    np.testing.assert_allclose(evaluated(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_forward_of_labelled_batches():
    variables, batches = linen_variables(), images((4, 3))
    pairs = [(batch, np.zeros(len(batch))) for batch in batches]
    right = recalibrate(FORWARD, variables, batches)
    found = recalibrate(lambda v, pair: FORWARD(v, pair[0]), variables, pairs)
    jax.tree.map(np.testing.assert_array_equal, found, right)
    model, other = Nnx(), Nnx()
    recalibrate(model, batches)
    assert recalibrate(lambda m, pair: m(pair[0]), other, pairs) is other
    jax.tree.map(
        np.testing.assert_array_equal, nnx_parts(model)[0], nnx_parts(other)[0]
    )


def test_forward_is_compiled_once():
    traces = []

    def forward(variables, batch):
        traces.append(None)
        return FORWARD(variables, batch)

    for sparsity in (0.2, 0.8):
        params, _ = masks.prune(linen_variables()["params"], sparsity)
        recalibrate(forward, {**linen_variables(), "params": params}, images((3, 3)))
    assert len(traces) == 1


def test_forward_that_is_compiled_already():
    variables, batches = linen_variables(), images((4, 4))
    forward = jax.jit(linen_forward(Linen()))
    forward(variables, batches[0])
    new = recalibrate(forward, variables, batches)
    check_statistics(new["batch_stats"], variables["params"], batches, 1e-5)
    # And what it does for others is as before.
    _, updated = forward(variables, batches[0])
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(
        variables["batch_stats"]
    )


def test_frozen_dicts_stay_frozen():
    variables = freeze(linen_variables())
    new = recalibrate(FORWARD, variables, images((4,)))
    assert jax.tree.structure(new) == jax.tree.structure(variables)


# Layers under Flax's transformations, masks, names of axes.

X = np.random.default_rng(3).normal(size=(3, 8, 2)).astype("float32")
MASK = np.arange(24).reshape(3, 8, 1) % 3 > 0
ALL = X.reshape(-1, 2)


class Block(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.BatchNorm(not self.train, use_bias=False, use_scale=False)(x)
        return 2 * y + 1, None


class Stacked(nn.Module):
    carry: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        how = {"variable_carry": "batch_stats"} if self.carry else {}
        how = how or {"variable_axes": {"batch_stats": 0}}
        rngs = {"split_rngs": {"params": True}, "length": 3}
        return nn.scan(Block, **how, **rngs)(train, name="block")(x)[0]


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.BatchNorm(not train)
        return norm(x) + norm(3 * x)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, pair, train=False):
        return nn.BatchNorm(not train)(pair[0], mask=pair[1])


class Axes(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.remat(nn.BatchNorm)
        return norm(not train, axis=0, axis_name="member", name="BatchNorm_0")(x.T)


def linen_stats(model, batches, forward=None, variables=None):
    if variables is None:
        x = jax.tree.map(lambda x: x[0], batches)
        variables = model.init(jax.random.key(0), x)
    batches = [
        jax.tree.map(lambda x, j=j: x[j], batches)
        for j in range(len(jax.tree.leaves(batches)[0]))
    ]
    return recalibrate(forward or linen_forward(model), variables, batches)[
        "batch_stats"
    ]


def test_layers_in_a_scan():
    stats = linen_stats(Stacked(), X)["block"]["BatchNorm_0"]
    y = np.stack([(x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON) for x in X])
    means = [ALL.mean(0), np.ones(2), np.ones(2)]
    np.testing.assert_allclose(stats["mean"], means, rtol=1e-4)
    variances = [ALL.var(0), 4 * y.reshape(-1, 2).var(0), 4 * np.ones(2)]
    np.testing.assert_allclose(stats["var"], variances, rtol=1e-4)


def test_a_layer_called_several_times_sees_all_its_inputs():
    stats = linen_stats(Shared(), X)["BatchNorm_0"]
    inputs = np.concatenate([ALL, 3 * ALL])
    np.testing.assert_allclose(stats["mean"], inputs.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats["var"], inputs.var(0), rtol=1e-4)

    # Carried through a scan, for which Flax wants variables that are there already.
    layer = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
    variables = {"batch_stats": {"block": {"BatchNorm_0": layer}}}
    stats = linen_stats(Stacked(carry=True), X, variables=variables)["block"]
    one = np.stack([(x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON) for x in X])
    inputs = np.concatenate([ALL, *(2 * one + 1), *(2 * one + 1)])
    np.testing.assert_allclose(
        stats["BatchNorm_0"]["mean"], inputs.mean(0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(stats["BatchNorm_0"]["var"], inputs.var(0), rtol=1e-4)


def test_masked_values_do_not_count():
    mask = MASK.copy()
    mask[1] = False  # a batch without any
    stats = linen_stats(Masked(), (X, mask))["BatchNorm_0"]
    inputs = ALL[mask.ravel()]
    np.testing.assert_allclose(stats["mean"], inputs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], inputs.var(0), rtol=1e-5)


def test_statistics_over_a_named_axis():
    model = Axes()

    def forward(variables, x):
        def member(x):
            return model.apply(variables, x, train=True, mutable=["batch_stats"])

        outputs, state = jax.vmap(member, axis_name="member")(x.reshape(2, 4, 2))
        return outputs, jax.tree.map(lambda leaf: leaf[0], state)

    stats = linen_stats(model, X, forward)["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], ALL.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], ALL.var(0), rtol=1e-5)


class OfKind(nnx.BatchNorm):
    """A subclass with a call of its own."""

    def __call__(self, x, *args, **kwargs):
        return super().__call__(3 * x, *args, **kwargs)


def test_nnx_layers_in_a_scan_shared_and_of_a_subclass():
    class Net(nnx.Module):
        def __init__(self):
            make = lambda rngs: nnx.BatchNorm(2, rngs=rngs)  # noqa: E731
            self.layers = nnx.vmap(make)(nnx.Rngs(0).split(2))
            self.shared = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
            self.again = self.shared
            self.own = OfKind(2, rngs=nnx.Rngs(0))

        def __call__(self, x, train=False):
            # Asked to evaluate, the layer counts all the same.
            self.own(x, use_running_average=not train)
            self.again(self.shared(x))

            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def step(layer, x):
                return 2 * layer(x) + 1

            return step(self.layers, x)

    model = recalibrate(Net(), X)
    y = np.concatenate([(x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON) for x in X])
    for layer, inputs in (
        (model.shared, np.concatenate([ALL, y])),
        (model.own, 3 * ALL),
    ):
        np.testing.assert_allclose(layer.mean[...], inputs.mean(0), rtol=1e-4)
        np.testing.assert_allclose(layer.var[...], inputs.var(0), rtol=1e-4)
    means = model.layers.mean[...]
    np.testing.assert_allclose(means, [ALL.mean(0), np.ones(2)], rtol=1e-4)
    assert type(model.own) is OfKind
    assert not hasattr(model.own, "recalibration_count")


class Partly(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=True, name="frozen")(x)
        x = nn.SpectralNorm(nn.Dense(2), name="spectral")(x, update_stats=train)
        return nn.BatchNorm(not train, name="live")(x)


def test_frozen_layers_keep_their_statistics_and_warn():
    model = Partly()
    variables = model.init(jax.random.key(0), X[0])
    variables["batch_stats"]["frozen"]["var"] = jnp.full(2, 4.0)
    with pytest.warns(UserWarning, match="1 of 2 layers.*'frozen'"):
        new = recalibrate(linen_forward(model), variables, X)
    for name in ("frozen", "spectral"):
        jax.tree.map(
            np.testing.assert_array_equal,
            new["batch_stats"][name],
            variables["batch_stats"][name],
        )
    # What is frozen normalises by the statistics that it has.
    quarter = jax.tree.map(lambda leaf: leaf, variables)
    quarter["batch_stats"]["frozen"]["var"] = jnp.full(2, 1.0)
    with pytest.warns(UserWarning, match="keep"):
        double = recalibrate(linen_forward(model), quarter, X)
    np.testing.assert_allclose(
        double["batch_stats"]["live"]["var"],
        4 * new["batch_stats"]["live"]["var"],
        rtol=1e-3,
    )


# Mistakes.

TREE = {"params": {"kernel": np.ones((2, 2))}}


@pytest.mark.parametrize(
    ("parts", "call"),
    [
        (
            ("batches", "at least one", "generator"),
            lambda: recalibrate(FORWARD, linen_variables(), []),
        ),
        (
            ("batches", "at least one"),
            lambda: recalibrate(FORWARD, linen_variables(), iter(())),
        ),
        (("batches", "at least one"), lambda: recalibrate(Nnx(), [])),
        (("batches", "None"), lambda: recalibrate(FORWARD, linen_variables())),
        (("batches", "0.5"), lambda: recalibrate(Nnx(), 0.5)),
        (("forward", "a dict"), lambda: recalibrate(linen_variables(), FORWARD, X)),
        (("forward", "a list"), lambda: recalibrate([X], Nnx())),
        (
            ("forward", "module Linen", "mutable"),
            lambda: recalibrate(Linen(), linen_variables(), X),
        ),
        (("variables", "a list"), lambda: recalibrate(FORWARD, [X], linen_variables())),
        (
            ("variables", "batch_stats", "'params'"),
            lambda: recalibrate(FORWARD, TREE, X),
        ),
        (
            ("variables", "PruningTrainState", "state.batch_stats"),
            lambda: recalibrate(
                FORWARD,
                PruningTrainState.create(
                    apply_fn=None, params=TREE["params"], tx=optax.sgd(1.0)
                ),
                X,
            ),
        ),
        (
            ("variables", "got none"),
            lambda: recalibrate(FORWARD, {**linen_variables(), "batch_stats": {}}, X),
        ),
        (
            ("model", "nnx.BatchNorm", "Linear"),
            lambda: recalibrate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), X),
        ),
        (
            ("forward", "training mode", "train=True"),
            lambda: recalibrate(
                lambda v, x: Linen().apply(v, x, mutable=["batch_stats"]),
                linen_variables(),
                images((3,)),
            ),
        ),
        (
            ("forward", "change its batch statistics", "mutable"),
            lambda: recalibrate(
                lambda v, x: Linen().apply(v, x, train=True),
                linen_variables(),
                images((3,)),
            ),
        ),
        (
            ("forward", "return", "mutable"),
            lambda: recalibrate(
                lambda v, x: FORWARD(v, x)[0], linen_variables(), images((3,))
            ),
        ),
        (
            ("forward", "training mode"),
            lambda: recalibrate(lambda model, x: x, Nnx(), images((3,))),
        ),
        (
            ("forward", "(variables, batch)"),
            lambda: recalibrate(lambda model: model, Nnx(), images((3,))),
        ),
    ],
)
def test_mistakes_are_named(parts, call):
    with refused(*parts):
        call()


def test_an_error_changes_nothing_in_an_nnx_model():
    model = Nnx()
    before = nnx.graphdef(model), nnx_parts(model)

    def batches():
        yield images((3,))[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        recalibrate(model, batches())
    assert nnx.graphdef(model) == before[0]
    jax.tree.map(np.testing.assert_array_equal, nnx_parts(model), before[1])


def test_without_flax(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    with refused("recalibrate_batch_norm", "prunadag_optax[flax]", error=ImportError):
        recalibrate(FORWARD, linen_variables(), X)


# What it is for.


class Digits(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for features in (8, 16):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(not train)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def test_a_pruned_network_gets_its_accuracy_back():
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype("float32")
    model, tx = Digits(), optax.adam(0.01)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])

    @jax.jit
    def train(variables):
        def step(carry, batch):
            params, stats, opt_state = carry
            x, y = batch

            def loss(params):
                logits, new = forward({"params": params, "batch_stats": stats}, x)
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
                return losses.mean(), new["batch_stats"]

            grads, stats = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state)
            return (optax.apply_updates(params, updates), stats, opt_state), None

        params, stats = variables["params"], variables["batch_stats"]
        start = params, stats, tx.init(params)
        data = images[:1200].reshape(12, 100, 8, 8, 1), labels[:1200].reshape(12, 100)
        data = jax.tree.map(lambda x: jnp.concatenate([x] * 8), data)
        (params, stats, _), _ = jax.lax.scan(step, start, data)
        return {"params": params, "batch_stats": stats}

    @jax.jit
    def accuracy(variables):
        return (
            model.apply(variables, images[1200:]).argmax(-1) == labels[1200:]
        ).mean()

    forward = linen_forward(model)
    trained = train(variables)
    params, _ = masks.prune(trained["params"], 0.7)
    pruned = {**trained, "params": params}
    batches = images[:1200].reshape(6, 200, 8, 8, 1)
    found = {
        "dense": accuracy(trained),
        "pruned": accuracy(pruned),
        "recalibrated": accuracy(recalibrate(forward, pruned, batches)),
    }
    assert found["dense"] > 0.9
    assert found["recalibrated"] > 0.78
    assert found["recalibrated"] > found["pruned"] + 0.1
