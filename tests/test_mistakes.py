"""Mistakes that users make, and the errors that answer them."""

import pathlib
import traceback

import jax
import jax.numpy as jnp
import optax
import pytest

import prunadag_optax
from prunadag_optax import (
    capped,
    classify,
    eval_params,
    evaluation,
    export,
    kth_largest_magnitude,
    masks,
    plotting,
    prunadag,
    pruning_aware,
    recipes,
    scale_by_prunadag,
    schedules,
)
from prunadag_optax.methods import (
    balls,
    bregman,
    dual_averaging,
    frank_wolfe,
    gradual_pruning,
    hard_thresholding,
    lottery_ticket,
    proximal,
    sparse_momentum,
)
from prunadag_optax.methods.penalties import operators, regularisers

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
pytest.importorskip("matplotlib")
from prunadag_optax import linen as pruning_linen  # noqa: E402
from prunadag_optax import nnx as pruning_nnx  # noqa: E402

PACKAGE = pathlib.Path(prunadag_optax.__file__).parent
KERNEL = jnp.arange(1.0, 9.0).reshape(4, 2)
PARAMS = {"kernel": KERNEL, "bias": jnp.zeros(2)}
MASK = {"kernel": KERNEL > 4, "bias": None}
OTHER = {"weight": KERNEL}
NAN = float("nan")
CURVE = evaluation.PruningCurve((0.0, 0.9), {"accuracy": (0.95, 0.94)})
ERROR = evaluation.PruningError(rho=jnp.ones(2), omega=jnp.ones(2))
L1 = regularisers.l1(1e-3)
SGD = optax.sgd(0.1)
AWARE = pruning_aware(SGD, 0.5)
DENSITY = schedules.cubic_density(0.1, begin=0, end=10)


def loss(params):
    return jnp.sum(params["kernel"] ** 2)


def step(tx, updates=PARAMS, state=None, params=PARAMS):
    return tx.update(updates, tx.init(PARAMS) if state is None else state, params)


def linen_state(**kwargs):
    given = {"apply_fn": None, "params": PARAMS, "tx": SGD, **kwargs}
    return pruning_linen.PruningTrainState.create(**given)


def nnx_model():
    return nnx.Linear(4, 2, rngs=nnx.Rngs(0))


def nnx_optimizer(model=None):
    return nnx.Optimizer(model or nnx_model(), SGD, wrt=nnx.Param)


def ladder(*args, **kwargs):
    return list(
        recipes.ladder(*args, **{"total_steps": 4, "sparsities": (0.5,), **kwargs})
    )


def gradient(params, batch):
    return jax.grad(loss)(params)


# Rows are (id, the mistake, the exception, the argument that the message names).
MASKS = [
    ("percent for sparsity", lambda: masks.prune(PARAMS, 90), ValueError, "sparsity"),
    ("negative sparsity", lambda: masks.prune(PARAMS, -0.5), ValueError, "sparsity"),
    ("NaN sparsity", lambda: masks.prune(PARAMS, NAN), ValueError, "sparsity"),
    ("sparsity as text", lambda: masks.prune(PARAMS, "0.9"), ValueError, "sparsity"),
    ("sparsities for one", lambda: masks.prune(PARAMS, [0.5]), ValueError, "sparsity"),
    (
        "array of sparsities",
        lambda: masks.prune(PARAMS, jnp.array([0.5, 0.9])),
        ValueError,
        "sparsity",
    ),
    (
        "schedule for sparsity",
        lambda: masks.prune(PARAMS, DENSITY),
        ValueError,
        "sparsity",
    ),
    ("bool for sparsity", lambda: masks.prune(PARAMS, True), ValueError, "sparsity"),
    ("prune swapped", lambda: masks.prune(0.5, PARAMS), ValueError, "sparsity"),
    (
        "linen module for params",
        lambda: masks.prune(nn.Dense(2), 0.5),
        ValueError,
        "params",
    ),
    (
        "nnx model for params",
        lambda: masks.prune(nnx_model(), 0.5),
        ValueError,
        "params",
    ),
    (
        "nnx optimizer for params",
        lambda: masks.prune(nnx_optimizer(), 0.5),
        ValueError,
        "params",
    ),
    (
        "train state for params",
        lambda: masks.prune(linen_state(), 0.5),
        ValueError,
        "params",
    ),
    (
        "optimizer state for params",
        lambda: masks.prune(SGD.init(PARAMS), 0.5),
        ValueError,
        "params",
    ),
    ("optimizer for params", lambda: masks.prune(SGD, 0.5), ValueError, "params"),
    (
        "text among params",
        lambda: masks.prune({**PARAMS, "name": "mlp"}, 0.5),
        ValueError,
        "params['name']",
    ),
    (
        "function among params",
        lambda: masks.prune({**PARAMS, "act": jax.nn.relu}, 0.5),
        ValueError,
        "params['act']",
    ),
    (
        "integer params",
        lambda: masks.prune({"kernel": jnp.arange(4)}, 0.5, where=masks.everything),
        ValueError,
        "params['kernel']",
    ),
    (
        "complex params",
        lambda: masks.prune(KERNEL + 1j, 0.5, where=masks.everything),
        ValueError,
        "params",
    ),
    (
        "tree for where",
        lambda: masks.prune(PARAMS, 0.5, where=MASK),
        ValueError,
        "where",
    ),
    (
        "name for where",
        lambda: masks.prune(PARAMS, 0.5, where="kernel"),
        ValueError,
        "where",
    ),
    (
        "where compares a key with a name",
        lambda: masks.prune(PARAMS, 0.5, where=lambda path, _: path[-1] == "kernel"),
        ValueError,
        "where",
    ),
    (
        "where chooses nothing",
        lambda: masks.prune(PARAMS, 0.5, where=masks.named("weights")),
        ValueError,
        "where",
    ),
    (
        "where of one argument",
        lambda: masks.prune(PARAMS, 0.5, where=lambda path: True),
        ValueError,
        "where",
    ),
    (
        "where returns an array",
        lambda: masks.prune(PARAMS, 0.5, where=lambda path, leaf: leaf > 0),
        ValueError,
        "where",
    ),
    (
        "where is a type",
        lambda: masks.prune(PARAMS, 0.5, where=nnx.Param),
        ValueError,
        "where",
    ),
    ("only biases", lambda: masks.prune({"bias": KERNEL}, 0.5), ValueError, "where"),
    (
        "scope in the plural",
        lambda: masks.prune(PARAMS, 0.5, scope="leafs"),
        ValueError,
        "scope",
    ),
    ("scope as number", lambda: masks.prune(PARAMS, 0.5, scope=1), ValueError, "scope"),
    (
        "scope returns a float",
        lambda: masks.prune(PARAMS, 0.5, scope=lambda path, leaf: 1.0),
        ValueError,
        "scope",
    ),
    (
        "scope returns too many axes",
        lambda: masks.prune(PARAMS, 0.5, scope=lambda path, leaf: 2),
        ValueError,
        "scope",
    ),
    (
        "scope of one argument",
        lambda: masks.prune(PARAMS, 0.5, scope=lambda leaf: 0),
        ValueError,
        "scope",
    ),
    (
        "score misspelt",
        lambda: masks.prune(PARAMS, 0.5, score="magnitud"),
        ValueError,
        "score",
    ),
    (
        "score is None",
        lambda: masks.prune(PARAMS, 0.5, score=None),
        ValueError,
        "score",
    ),
    (
        "score returns another tree",
        lambda: masks.prune(PARAMS, 0.5, score=lambda params: OTHER),
        ValueError,
        "score",
    ),
    (
        "score returns another shape",
        lambda: masks.prune(KERNEL, 0.5, score=lambda x: x[:1]),
        ValueError,
        "score",
    ),
    (
        "score returns integers",
        lambda: masks.prune(KERNEL, 0.5, score=lambda x: x.astype(int)),
        ValueError,
        "score",
    ),
    (
        "score of two arguments",
        lambda: masks.prune(KERNEL, 0.5, score=lambda g, x: x),
        ValueError,
        "score",
    ),
    (
        "previous of another tree",
        lambda: masks.prune(PARAMS, 0.5, previous={"weight": KERNEL > 4}),
        ValueError,
        "mask",
    ),
    (
        "previous is the pruned params",
        lambda: masks.prune(PARAMS, 0.5, previous=PARAMS),
        ValueError,
        "mask",
    ),
    (
        "opt_state is the optimizer",
        lambda: masks.prune(PARAMS, 0.5, opt_state=AWARE),
        ValueError,
        "opt_state",
    ),
    (
        "opt_state is the params",
        lambda: masks.prune(PARAMS, 0.5, opt_state=PARAMS),
        ValueError,
        "opt_state",
    ),
    (
        "prune to less than is pruned",
        lambda: masks.prune_further(PARAMS, 0.1, MASK),
        ValueError,
        "sparsity",
    ),
    (
        "held mask of another shape",
        lambda: masks.prune_further(KERNEL, 0.9, KERNEL[:2] > 0),
        ValueError,
        "mask",
    ),
    ("n above m", lambda: masks.n_m_mask(PARAMS, 4, 2), ValueError, "n="),
    ("float n", lambda: masks.n_m_mask(PARAMS, 2.0, 4), ValueError, "n="),
    ("m does not divide", lambda: masks.n_m_mask(PARAMS, 2, 3), ValueError, "m="),
    ("2:4 as text", lambda: masks.n_m_mask(PARAMS, "2:4", 4), ValueError, "n="),
    (
        "n:m axis out of range",
        lambda: masks.n_m_mask(PARAMS, 2, 4, axis=5),
        ValueError,
        "axis",
    ),
    (
        "n:m axis as text",
        lambda: masks.n_m_mask(KERNEL, 2, 4, axis="in"),
        ValueError,
        "axis",
    ),
    ("n:m of a model", lambda: masks.n_m_mask(nnx_model(), 2, 4), ValueError, "params"),
    (
        "names of named as a list",
        lambda: masks.named(["kernel", "embedding"]),
        ValueError,
        "names",
    ),
    (
        "mask of another tree",
        lambda: masks.apply_mask(PARAMS, {"weight": KERNEL > 4}),
        ValueError,
        "mask",
    ),
    (
        "mask of another shape",
        lambda: masks.apply_mask(PARAMS, {**MASK, "kernel": KERNEL.T > 4}),
        ValueError,
        "mask['kernel']",
    ),
    (
        "mask of zeros and ones",
        lambda: masks.apply_mask(PARAMS, {**MASK, "kernel": jnp.ones((4, 2))}),
        ValueError,
        "mask['kernel']",
    ),
    (
        "mask is the result of prune",
        lambda: masks.apply_mask(PARAMS, masks.prune(PARAMS, 0.5)),
        ValueError,
        "mask",
    ),
    (
        "mask is a sparsity",
        lambda: masks.apply_mask(PARAMS, 0.5),
        ValueError,
        "mask",
    ),
    ("mask swapped", lambda: masks.apply_mask(MASK, PARAMS), ValueError, "mask"),
    (
        "mask with text",
        lambda: masks.apply_mask(PARAMS, {**MASK, "kernel": "all"}),
        ValueError,
        "mask['kernel']",
    ),
    (
        "finalise a model",
        lambda: masks.finalise(nnx_model(), MASK),
        ValueError,
        "params",
    ),
    (
        "sparsity of a linen module",
        lambda: masks.sparsity(nn.Dense(2)),
        ValueError,
        "mask_or_params",
    ),
    (
        "sparsity of integers",
        lambda: masks.sparsity({"steps": jnp.arange(3)}),
        ValueError,
        "mask_or_params['steps']",
    ),
    (
        "keep_pruned with a mask of integers",
        lambda: masks.keep_pruned({**MASK, "kernel": jnp.ones((4, 2), int)}).init(
            PARAMS
        ),
        ValueError,
        "mask['kernel']",
    ),
    (
        "keep_pruned without params",
        lambda: step(masks.keep_pruned(MASK), params=None),
        ValueError,
        "params",
    ),
    (
        "keep_pruned with gradients of another tree",
        lambda: step(masks.keep_pruned(MASK), OTHER),
        ValueError,
        "updates",
    ),
    (
        "percent for density on schedule",
        lambda: masks.mask_on_schedule(PARAMS, None, 0, 5),
        ValueError,
        "density",
    ),
    (
        "density schedule in percent",
        lambda: masks.mask_on_schedule(PARAMS, None, 0, lambda count: 95.0),
        ValueError,
        "density",
    ),
    (
        "float every",
        lambda: masks.mask_on_schedule(PARAMS, None, 0, DENSITY, every=1.5),
        ValueError,
        "every",
    ),
    (
        "k above n",
        lambda: kth_largest_magnitude(PARAMS, 11),
        ValueError,
        "k must",
    ),
    ("k as share", lambda: kth_largest_magnitude(PARAMS, 0.5), ValueError, "k must"),
    (
        "k and tree swapped",
        lambda: kth_largest_magnitude(3, PARAMS),
        ValueError,
        "tree",
    ),
]

OPTIMIZERS = [
    ("negative learning rate", lambda: prunadag(-0.1), ValueError, "learning_rate"),
    ("learning rate as text", lambda: prunadag("1e-3"), ValueError, "learning_rate"),
    ("optimizer for learning rate", lambda: prunadag(SGD), ValueError, "learning_rate"),
    ("params for learning rate", lambda: prunadag(PARAMS), ValueError, "learning_rate"),
    ("relevant in percent", lambda: prunadag(0.1, 10.0), ValueError, "relevant"),
    ("relevant zero", lambda: prunadag(0.1, 0), ValueError, "relevant"),
    (
        "count above n",
        lambda: prunadag(0.1, 11).init(PARAMS),
        ValueError,
        "relevant",
    ),
    (
        "schedule of float counts",
        lambda: prunadag(0.1, lambda count: 10.0),
        ValueError,
        "relevant",
    ),
    ("variant misspelt", lambda: prunadag(variant="V3"), ValueError, "variant"),
    ("one function as variant", lambda: prunadag(variant=max), ValueError, "variant"),
    ("capped of nothing", lambda: capped(None), ValueError, "variant"),
    ("relevance misspelt", lambda: prunadag(relevance="grad"), ValueError, "relevance"),
    ("scope misspelt", lambda: prunadag(scope="layer"), ValueError, "scope"),
    ("momentum 1", lambda: prunadag(momentum=1.0), ValueError, "momentum"),
    (
        "schedule for momentum",
        lambda: prunadag(momentum=optax.constant_schedule(0.9)),
        ValueError,
        "momentum",
    ),
    (
        "integer dtype",
        lambda: prunadag(accumulator_dtype=jnp.int32),
        ValueError,
        "accumulator_dtype",
    ),
    (
        "initial weight zero",
        lambda: prunadag(initial_weight=0),
        ValueError,
        "initial_weight",
    ),
    (
        "update without params",
        lambda: step(prunadag(0.1), params=None),
        ValueError,
        "params",
    ),
    (
        "gradients of another structure",
        lambda: step(prunadag(0.1), OTHER),
        ValueError,
        "updates",
    ),
    (
        "gradients of another shape",
        lambda: step(AWARE, {**PARAMS, "kernel": KERNEL.T}),
        ValueError,
        "updates['kernel']",
    ),
    (
        "value_and_grad for gradients",
        lambda: step(AWARE, jax.value_and_grad(loss)(PARAMS)),
        ValueError,
        "updates",
    ),
    (
        "gradient is a function",
        lambda: step(AWARE, jax.grad(loss)),
        ValueError,
        "updates",
    ),
    (
        "None for gradients",
        lambda: step(AWARE, None),
        ValueError,
        "updates",
    ),
    (
        "init of integers",
        lambda: prunadag(0.1).init({"steps": jnp.arange(3)}),
        ValueError,
        "params['steps']",
    ),
    (
        "init of complex",
        lambda: AWARE.init({"kernel": KERNEL + 1j}),
        ValueError,
        "params['kernel']",
    ),
    (
        "init of a tree with a function",
        lambda: prunadag(0.1).init({**PARAMS, "act": jax.nn.relu}),
        ValueError,
        "params['act']",
    ),
    (
        "init of a linen module",
        lambda: prunadag(0.1).init(nn.Dense(2)),
        ValueError,
        "params",
    ),
    (
        "init of an nnx model",
        lambda: prunadag(0.1).init(nnx_model()),
        ValueError,
        "params",
    ),
    (
        "init of a train state",
        lambda: AWARE.init(linen_state()),
        ValueError,
        "params",
    ),
    (
        "init of text",
        lambda: AWARE.init({**PARAMS, "name": "mlp"}),
        ValueError,
        "params['name']",
    ),
    (
        "state of another optimizer",
        lambda: step(scale_by_prunadag(0.1), state=optax.adam(0.1).init(PARAMS)),
        ValueError,
        "state",
    ),
    (
        "state of another optimizer in pruning_aware",
        lambda: step(AWARE, state=optax.adam(0.1).init(PARAMS)),
        ValueError,
        "state",
    ),
    (
        "params for the state",
        lambda: step(AWARE, state=PARAMS),
        ValueError,
        "state",
    ),
    (
        "state and gradients swapped",
        lambda: AWARE.update(AWARE.init(PARAMS), PARAMS, PARAMS),
        ValueError,
        "updates",
    ),
    ("learning rate for base", lambda: pruning_aware(0.1, 0.5), ValueError, "base"),
    (
        "optax function for base",
        lambda: pruning_aware(optax.adam, 0.5),
        ValueError,
        "base",
    ),
    ("base by name", lambda: pruning_aware("adam", 0.5), ValueError, "base"),
    (
        "base and density swapped",
        lambda: pruning_aware(0.5, SGD),
        ValueError,
        "base",
    ),
    ("density 95.0", lambda: pruning_aware(SGD, 95.0), ValueError, "density"),
    ("NaN density", lambda: pruning_aware(SGD, NAN), ValueError, "density"),
    ("density None", lambda: pruning_aware(SGD, None), ValueError, "density"),
    (
        "list of densities",
        lambda: pruning_aware(SGD, [0.5, 0.1]),
        ValueError,
        "density",
    ),
    (
        "density schedule returns NaN",
        lambda: pruning_aware(SGD, lambda count: NAN),
        ValueError,
        "density",
    ),
    (
        "density schedule of two arguments",
        lambda: pruning_aware(SGD, lambda params, count: 0.5),
        ValueError,
        "density",
    ),
    (
        "gradient_at misspelt",
        lambda: pruning_aware(SGD, 0.5, gradient_at="prune"),
        ValueError,
        "gradient_at",
    ),
    (
        "shrink rate in percent",
        lambda: pruning_aware(SGD, 0.5, shrink_rate=50),
        ValueError,
        "shrink_rate",
    ),
    (
        "negative soft threshold",
        lambda: pruning_aware(SGD, 0.5, soft_threshold=-1.0),
        ValueError,
        "soft_threshold",
    ),
    (
        "tree for where in pruning_aware",
        lambda: pruning_aware(SGD, 0.5, where=MASK).init(PARAMS),
        ValueError,
        "where",
    ),
    (
        "score by another name in pruning_aware",
        lambda: pruning_aware(SGD, 0.5, score="l1"),
        ValueError,
        "score",
    ),
    (
        "score tree for pruning_aware",
        lambda: pruning_aware(SGD, 0.5, score=PARAMS),
        ValueError,
        "score",
    ),
    (
        "eval_params swapped",
        lambda: eval_params(PARAMS, AWARE.init(PARAMS)),
        ValueError,
        "params",
    ),
    (
        "eval_params of the optimizer",
        lambda: eval_params(AWARE, PARAMS),
        ValueError,
        "opt_state",
    ),
    (
        "eval_params of a linen module",
        lambda: eval_params(AWARE.init(PARAMS), nn.Dense(2)),
        ValueError,
        "params",
    ),
    (
        "eval_params of a train state",
        lambda: eval_params(AWARE.init(PARAMS), linen_state()),
        ValueError,
        "params",
    ),
    (
        "eval_params with the state of another tree",
        lambda: eval_params(
            pruning_aware(SGD, 0.5, gradient_at="pruned").init(OTHER), PARAMS
        ),
        ValueError,
        "opt_state",
    ),
    (
        "eval_params with the params twice",
        lambda: eval_params(PARAMS, PARAMS),
        ValueError,
        "opt_state",
    ),
    (
        "eval_params with a number for the state",
        lambda: eval_params(0.5, PARAMS),
        ValueError,
        "opt_state",
    ),
    (
        "classify with another tree",
        lambda: classify(OTHER, PARAMS, PARAMS),
        ValueError,
        "gradients",
    ),
    (
        "classify with weights of another tree",
        lambda: classify(PARAMS, PARAMS, OTHER),
        ValueError,
        "weight",
    ),
    (
        "classify with a share in percent",
        lambda: classify(PARAMS, PARAMS, PARAMS, relevant=10.0),
        ValueError,
        "relevant",
    ),
]

RECIPES = [
    (
        "total steps as float",
        lambda: recipes.targeted(1e4, sparsity=0.9),
        ValueError,
        "total_steps",
    ),
    (
        "total steps negative",
        lambda: recipes.any_sparsity(-1),
        ValueError,
        "total_steps",
    ),
    (
        "total steps True",
        lambda: recipes.any_sparsity(True),
        ValueError,
        "total_steps",
    ),
    (
        "total steps as array",
        lambda: recipes.any_sparsity(jnp.asarray(100)),
        ValueError,
        "total_steps",
    ),
    (
        "targeted in percent",
        lambda: recipes.targeted(100, sparsity=90),
        ValueError,
        "sparsity",
    ),
    (
        "targeted at everything",
        lambda: recipes.targeted(100, sparsity=1.0),
        ValueError,
        "sparsity",
    ),
    (
        "several sparsities for one",
        lambda: recipes.targeted(100, sparsity=(0.5, 0.9)),
        ValueError,
        "sparsity",
    ),
    (
        "schedule for the sparsity",
        lambda: recipes.targeted(100, sparsity=DENSITY),
        ValueError,
        "sparsity",
    ),
    (
        "base misspelt",
        lambda: recipes.targeted(100, sparsity=0.9, base="adamw"),
        ValueError,
        "base",
    ),
    (
        "base is a transformation",
        lambda: recipes.targeted(100, sparsity=0.9, base=SGD),
        ValueError,
        "base",
    ),
    (
        "base is a function of nothing",
        lambda: recipes.targeted(
            100, sparsity=0.9, base=lambda: SGD, learning_rate=0.1
        ),
        ValueError,
        "base",
    ),
    (
        "base returns a schedule",
        lambda: recipes.targeted(
            100, sparsity=0.9, base=lambda rate: rate, learning_rate=0.1
        ),
        ValueError,
        "base",
    ),
    (
        "learning rate forgotten",
        lambda: recipes.targeted(100, sparsity=0.9, base=optax.lion),
        ValueError,
        "learning_rate",
    ),
    (
        "learning rate negative",
        lambda: recipes.any_sparsity(100, learning_rate=-0.1),
        ValueError,
        "learning_rate",
    ),
    (
        "learning rate as list",
        lambda: recipes.any_sparsity(100, learning_rate=[0.1]),
        ValueError,
        "learning_rate",
    ),
    (
        "optimizer as learning rate",
        lambda: recipes.any_sparsity(100, learning_rate=SGD),
        ValueError,
        "learning_rate",
    ),
    ("l1 negative", lambda: recipes.any_sparsity(100, l1=-0.1), ValueError, "l1"),
    ("regulariser as l1", lambda: recipes.any_sparsity(100, l1=L1), ValueError, "l1"),
    (
        "weight decay as schedule",
        lambda: recipes.any_sparsity(100, weight_decay=DENSITY),
        ValueError,
        "weight_decay",
    ),
    (
        "end before begin",
        lambda: recipes.targeted(100, sparsity=0.9, begin=0.7, end=0.1),
        ValueError,
        "end",
    ),
    (
        "begin in steps",
        lambda: recipes.targeted(100, sparsity=0.9, begin=10),
        ValueError,
        "begin",
    ),
    (
        "one density for several",
        lambda: recipes.any_sparsity(100, densities=0.1),
        ValueError,
        "densities",
    ),
    (
        "densities in percent",
        lambda: recipes.any_sparsity(100, densities=(100, 10, 5)),
        ValueError,
        "densities",
    ),
    (
        "no densities",
        lambda: recipes.any_sparsity(100, densities=()),
        ValueError,
        "densities",
    ),
    (
        "text among densities",
        lambda: recipes.any_sparsity(100, densities=(1.0, "0.1")),
        ValueError,
        "densities",
    ),
    (
        "dense share in percent",
        lambda: recipes.any_sparsity(100, dense_share=10),
        ValueError,
        "dense_share",
    ),
    (
        "one sparsity for a ladder",
        lambda: ladder(gradient, PARAMS, [0] * 4, sparsities=0.9),
        ValueError,
        "sparsities",
    ),
    (
        "ladder in percent",
        lambda: ladder(gradient, PARAMS, [0] * 4, sparsities=(50, 90)),
        ValueError,
        "sparsities",
    ),
    (
        "ladder downwards",
        lambda: ladder(gradient, PARAMS, [0] * 4, sparsities=(0.9, 0.5)),
        ValueError,
        "sparsities",
    ),
    (
        "ladder of float steps",
        lambda: ladder(gradient, PARAMS, [0] * 4, total_steps=4.0),
        ValueError,
        "total_steps",
    ),
    (
        "ladder of steps as text",
        lambda: ladder(gradient, PARAMS, [0] * 4, total_steps="4"),
        ValueError,
        "total_steps",
    ),
    (
        "ladder with too few batches",
        lambda: ladder(lambda x, batch: x, KERNEL, [0] * 3),
        ValueError,
        "batches",
    ),
    (
        "ladder with one batch",
        lambda: ladder(gradient, PARAMS, 0.0),
        ValueError,
        "batches",
    ),
    (
        "ladder with gradients for their function",
        lambda: ladder(PARAMS, PARAMS, [0] * 4),
        ValueError,
        "gradient",
    ),
    (
        "ladder of a module",
        lambda: ladder(gradient, nn.Dense(2), [0] * 4),
        ValueError,
        "params",
    ),
    (
        "ladder with a schedule for the rate",
        lambda: ladder(gradient, PARAMS, [0] * 4, learning_rate=DENSITY),
        ValueError,
        "learning_rate",
    ),
    (
        "parts of another number",
        lambda: ladder(gradient, PARAMS, [0] * 4, parts=(0.5, 0.5)),
        ValueError,
        "parts",
    ),
    (
        "one part",
        lambda: ladder(gradient, PARAMS, [0] * 4, parts=1.0),
        ValueError,
        "parts",
    ),
    (
        "final density zero",
        lambda: schedules.cubic_density(0.0, begin=0, end=10),
        ValueError,
        "final",
    ),
    (
        "final density in percent",
        lambda: schedules.cubic_density(5, begin=0, end=10),
        ValueError,
        "final",
    ),
    (
        "schedule ends where it begins",
        lambda: schedules.cubic_density(0.1, begin=10, end=10),
        ValueError,
        "end",
    ),
    (
        "one-shot at a negative step",
        lambda: schedules.one_shot_density(0.1, step=-1),
        ValueError,
        "step",
    ),
    (
        "one density in a cycle",
        lambda: schedules.cyclic_density(0.1),
        ValueError,
        "densities",
    ),
    (
        "least negative",
        lambda: schedules.cyclic_density((1.0, 0.1), least=-0.1),
        ValueError,
        "least",
    ),
    (
        "one final of a staircase",
        lambda: schedules.staircase_density(0.1, ends=(10,)),
        ValueError,
        "finals",
    ),
    (
        "one end of a staircase",
        lambda: schedules.staircase_density((0.1,), ends=10),
        ValueError,
        "ends",
    ),
    (
        "staircase upwards",
        lambda: schedules.staircase_density((0.1, 0.5), ends=(10, 20)),
        ValueError,
        "finals",
    ),
    (
        "ends as text",
        lambda: schedules.staircase_density((0.5, 0.1), ends=("10", "20")),
        ValueError,
        "ends",
    ),
    (
        "one turn of a cycle",
        lambda: schedules.density_cycle(0.1, 0.05),
        ValueError,
        "turns",
    ),
    (
        "turns in percent",
        lambda: schedules.density_cycle(0.1, (10, 5)),
        ValueError,
        "turns",
    ),
    (
        "schedule of a schedule",
        lambda: schedules.stable_decay(optax.constant_schedule(0.1), 100),
        ValueError,
        "learning_rate",
    ),
    (
        "decay over a float",
        lambda: schedules.stable_decay(0.1, 1e3),
        ValueError,
        "total_steps",
    ),
]

EVALUATION = [
    (
        "metric and params swapped",
        lambda: evaluation.pruning_curve(PARAMS, loss, [0.5]),
        ValueError,
        "metric_fn",
    ),
    (
        "metric called already",
        lambda: evaluation.pruning_curve(loss(PARAMS), PARAMS, [0.5]),
        ValueError,
        "metric_fn",
    ),
    (
        "one float for sparsities",
        lambda: evaluation.pruning_curve(loss, PARAMS, 0.9),
        ValueError,
        "sparsities",
    ),
    (
        "sparsities in percent",
        lambda: evaluation.pruning_curve(loss, PARAMS, [50, 90]),
        ValueError,
        "sparsities",
    ),
    (
        "nested sparsities",
        lambda: evaluation.pruning_curve(loss, PARAMS, [[0.5, 0.9]]),
        ValueError,
        "sparsities",
    ),
    (
        "metric returns an array",
        lambda: evaluation.pruning_curve(
            lambda params: params["kernel"], PARAMS, [0.5], progress=False
        ),
        ValueError,
        "metric_fn",
    ),
    (
        "metric returns nothing",
        lambda: evaluation.pruning_curve(
            lambda params: None, PARAMS, [0.5], progress=False
        ),
        ValueError,
        "metric_fn",
    ),
    (
        "metric returns text",
        lambda: evaluation.pruning_curve(
            lambda params: "0.9", PARAMS, [0.5], progress=False
        ),
        ValueError,
        "metric_fn",
    ),
    (
        "metric returns no metrics",
        lambda: evaluation.pruning_curve(
            lambda params: {}, PARAMS, [0.5], progress=False
        ),
        ValueError,
        "metric_fn",
    ),
    (
        "curve of a train state",
        lambda: evaluation.pruning_curve(loss, linen_state(), [0.5], progress=False),
        ValueError,
        "params",
    ),
    (
        "recalibrate is a tree",
        lambda: evaluation.pruning_curve(loss, PARAMS, [0.5], recalibrate=PARAMS),
        ValueError,
        "recalibrate",
    ),
    (
        "error of an nnx model",
        lambda: evaluation.pruning_error(loss, nnx_model(), [0.5]),
        ValueError,
        "params",
    ),
    (
        "loss and params swapped",
        lambda: evaluation.pruning_error(PARAMS, loss, [0.5]),
        ValueError,
        "loss_fn",
    ),
    (
        "loss returns an array",
        lambda: evaluation.pruning_error(lambda p: p["kernel"], PARAMS, [0.5]),
        ValueError,
        "loss_fn",
    ),
    (
        "loss returns a pair",
        lambda: evaluation.pruning_error(lambda p: (loss(p), p), PARAMS, [0.5]),
        ValueError,
        "loss_fn",
    ),
    (
        "summary of a state",
        lambda: evaluation.summary(linen_state()),
        ValueError,
        "params",
    ),
    (
        "summary of a module",
        lambda: evaluation.summary(nn.Dense(2)),
        ValueError,
        "params",
    ),
    (
        "summary with a mask of another tree",
        lambda: evaluation.summary(PARAMS, OTHER),
        ValueError,
        "mask",
    ),
    (
        "gradients without state",
        lambda: evaluation.summary(PARAMS, gradients=PARAMS),
        ValueError,
        "state",
    ),
    (
        "summary with the state of another optimizer",
        lambda: evaluation.summary(
            PARAMS, gradients=PARAMS, state=optax.adam(0.1).init(PARAMS)
        ),
        ValueError,
        "state",
    ),
    (
        "summary with a setting misspelt",
        lambda: evaluation.summary(
            PARAMS, gradients=PARAMS, state=prunadag().init(PARAMS), relevent=0.1
        ),
        TypeError,
        "relevent",
    ),
    (
        "summary with a setting alone",
        lambda: evaluation.summary(PARAMS, variants="v1"),
        TypeError,
        "variants",
    ),
    ("no curves", lambda: plotting.plot_curves({}), ValueError, "curves"),
    (
        "list of curves",
        lambda: plotting.plot_curves([CURVE, CURVE]),
        ValueError,
        "curves",
    ),
    (
        "curve without values",
        lambda: plotting.plot_curves(evaluation.PruningCurve((), {})),
        ValueError,
        "curve",
    ),
    (
        "errors for curves",
        lambda: plotting.plot_curves(ERROR),
        ValueError,
        "curves",
    ),
    (
        "unknown metric",
        lambda: plotting.plot_curves(CURVE, metric="loss"),
        ValueError,
        "metric",
    ),
    (
        "unknown measure",
        lambda: plotting.plot_errors([0.0, 0.9], ERROR, measure="tau"),
        ValueError,
        "measure",
    ),
    (
        "errors and sparsities swapped",
        lambda: plotting.plot_errors(ERROR, [0.0, 0.9]),
        ValueError,
        "errors",
    ),
    (
        "sparsities of another number",
        lambda: plotting.plot_errors([0.0, 0.5, 0.9], ERROR),
        ValueError,
        "sparsities",
    ),
    (
        "no errors",
        lambda: plotting.plot_errors([0.0, 0.9], {}),
        ValueError,
        "errors",
    ),
    (
        "params for a summary",
        lambda: plotting.plot_summary(PARAMS),
        ValueError,
        "summary",
    ),
    (
        "summary for units",
        lambda: plotting.plot_units(evaluation.summary(PARAMS)),
        ValueError,
        "units",
    ),
    (
        "figure for axes",
        lambda: plotting.plot_curves(CURVE, ax="left"),
        ValueError,
        "ax",
    ),
]

EXPORT = [
    ("path as number", lambda: export.save_dense(PARAMS, 3), ValueError, "path"),
    (
        "params and path swapped",
        lambda: export.save_dense("a", PARAMS),
        ValueError,
        "params",
    ),
    (
        "path is a folder",
        lambda: export.save_dense(PARAMS, PACKAGE),
        ValueError,
        "path",
    ),
    ("load from a tree", lambda: export.load_dense(PARAMS), ValueError, "path"),
    ("load a folder", lambda: export.load_sparse(PACKAGE), ValueError, "path"),
    (
        "save a module",
        lambda: export.save_dense(nn.Dense(2), "a"),
        ValueError,
        "params",
    ),
    (
        "save a train state",
        lambda: export.save_sparse(linen_state(), "a"),
        ValueError,
        "params",
    ),
    ("save one array", lambda: export.save_dense(KERNEL, "a"), ValueError, "params"),
    ("save nothing", lambda: export.save_dense(None, "a"), ValueError, "params"),
    (
        "save complex numbers",
        lambda: export.save_dense({"kernel": KERNEL + 1j}, "a"),
        ValueError,
        "params['kernel']",
    ),
    (
        "save a function",
        lambda: export.save_dense({"act": jax.nn.relu}, "a"),
        ValueError,
        "params['act']",
    ),
    (
        "save keys that are numbers",
        lambda: export.save_dense({0.5: KERNEL}, "a"),
        ValueError,
        "params",
    ),
    (
        "sizes with a mask of another tree",
        lambda: export.file_sizes(PARAMS, {"weight": KERNEL > 4}),
        ValueError,
        "mask",
    ),
    (
        "sizes with params for the mask",
        lambda: export.file_sizes(PARAMS, PARAMS),
        ValueError,
        "mask",
    ),
    (
        "BCOO of text for where",
        lambda: export.to_bcoo(PARAMS, where="kernel"),
        ValueError,
        "where",
    ),
    ("BCOO of a module", lambda: export.to_bcoo(nn.Dense(2)), ValueError, "params"),
    ("BCOO of nothing", lambda: export.to_bcoo(None), ValueError, "params"),
    (
        "BCOO of shapes",
        lambda: export.to_bcoo(jax.eval_shape(lambda: PARAMS)),
        ValueError,
        "params",
    ),
]

FLAX = [
    (
        "linen state of variables in a module",
        lambda: linen_state(params=nn.Dense(2)),
        ValueError,
        "params",
    ),
    (
        "linen state with optax's function",
        lambda: linen_state(tx=optax.adam),
        ValueError,
        "tx",
    ),
    (
        "linen state with masks of another tree",
        lambda: linen_state(masks={"weight": KERNEL > 4}),
        ValueError,
        "mask",
    ),
    (
        "linen gradients of another tree",
        lambda: linen_state().apply_gradients(grads=OTHER),
        ValueError,
        "grads",
    ),
    (
        "linen gradients of another tree with masks",
        lambda: linen_state().prune(0.5).apply_gradients(grads=OTHER),
        ValueError,
        "grads",
    ),
    (
        "linen gradients are value and gradients",
        lambda: linen_state().apply_gradients(grads=(0.5, PARAMS)),
        ValueError,
        "grads",
    ),
    ("linen prune in percent", lambda: linen_state().prune(90), ValueError, "sparsity"),
    (
        "linen prune to less",
        lambda: linen_state().prune(0.5).prune(0.25),
        ValueError,
        "sparsity",
    ),
    (
        "linen density in percent",
        lambda: linen_state().prune_on_schedule(5),
        ValueError,
        "density",
    ),
    (
        "linen curve with one float",
        lambda: linen_state().curve(loss, 0.5),
        ValueError,
        "sparsities",
    ),
    (
        "fine_tune without masks",
        lambda: pruning_linen.fine_tune(linen_state(), loss, []),
        ValueError,
        "state",
    ),
    (
        "fine_tune of params",
        lambda: pruning_linen.fine_tune(PARAMS, loss, []),
        ValueError,
        "state",
    ),
    (
        "fine_tune with batches and loss swapped",
        lambda: pruning_linen.fine_tune(linen_state().prune(0.5), [0, 1], loss),
        ValueError,
        "loss_fn",
    ),
    (
        "fine_tune with one number for batches",
        lambda: pruning_linen.fine_tune(linen_state().prune(0.5), gradient, 3),
        ValueError,
        "batches",
    ),
    (
        "nnx prune of params",
        lambda: pruning_nnx.prune(PARAMS, 0.5),
        ValueError,
        "model",
    ),
    (
        "nnx prune of a linen module",
        lambda: pruning_nnx.prune(nn.Dense(2), 0.5),
        ValueError,
        "model",
    ),
    (
        "nnx prune in percent",
        lambda: pruning_nnx.prune(nnx_model(), 90),
        ValueError,
        "sparsity",
    ),
    (
        "nnx prune of the optimizer",
        lambda: pruning_nnx.prune(nnx_optimizer(), 0.5),
        ValueError,
        "model",
    ),
    (
        "nnx prune with the transformation",
        lambda: pruning_nnx.prune(nnx_model(), 0.5, optimizer=SGD),
        ValueError,
        "optimizer",
    ),
    (
        "nnx eval_params swapped",
        lambda: pruning_nnx.eval_params(nnx_model(), nnx_optimizer()),
        ValueError,
        "optimizer",
    ),
    (
        "nnx update swapped",
        lambda: pruning_nnx.prune(nnx_model(), 0.5).update(
            nnx_model(), nnx_optimizer(), PARAMS
        ),
        ValueError,
        "optimizer",
    ),
    (
        "nnx gradients of another model",
        lambda: pruning_nnx.prune(nnx_model(), 0.5).update(
            nnx_optimizer(), nnx_model(), nnx.state(nnx.Embed(2, 2, rngs=nnx.Rngs(0)))
        ),
        ValueError,
        "grads",
    ),
    (
        "nnx apply to params",
        lambda: pruning_nnx.prune(nnx_model(), 0.5).apply(PARAMS),
        ValueError,
        "model",
    ),
    (
        "nnx apply to another model",
        lambda: pruning_nnx.prune(nnx_model(), 0.5).apply(
            nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        ),
        ValueError,
        "mask",
    ),
    (
        "nnx sparsity and model swapped",
        lambda: pruning_nnx.prune(0.5, nnx_model()),
        ValueError,
        "model",
    ),
    ("nnx trace of params", lambda: pruning_nnx.trace(PARAMS), ValueError, "model"),
]

METHODS = [
    (
        "negative radius",
        lambda: balls.make_feasible(PARAMS, -1.0, 0.1),
        ValueError,
        "radius",
    ),
    (
        "ball misspelt",
        lambda: balls.make_feasible(PARAMS, 1.0, 0.1, ball="k-sparse"),
        ValueError,
        "ball",
    ),
    (
        "radius of another tree",
        lambda: balls.make_feasible(PARAMS, {"weight": 1.0}, 0.1),
        ValueError,
        "radius",
    ),
    (
        "support in percent",
        lambda: balls.make_feasible(PARAMS, 1.0, 10.0),
        ValueError,
        "support",
    ),
    (
        "support zero",
        lambda: balls.k_support_norm(PARAMS, 0),
        ValueError,
        "support",
    ),
    (
        "negative radius of a minimiser",
        lambda: balls.lmo_k_support(PARAMS, -1.0, 0.1),
        ValueError,
        "radius",
    ),
    (
        "negative radius of a polytope",
        lambda: balls.lmo_k_sparse(PARAMS, -1.0, 0.1),
        ValueError,
        "radius",
    ),
    (
        "norm of integers",
        lambda: balls.k_support_norm({"steps": jnp.arange(3)}, 1),
        ValueError,
        "params['steps']",
    ),
    (
        "norm of a module",
        lambda: balls.k_sparse_norm(nn.Dense(2), 1),
        ValueError,
        "params",
    ),
    (
        "width negative",
        lambda: balls.initialization_radius(
            lambda key: PARAMS, jax.random.key(0), 0.1, width=-1.0
        ),
        ValueError,
        "width",
    ),
    (
        "samples as float",
        lambda: balls.initialization_radius(
            lambda key: PARAMS, jax.random.key(0), 0.1, width=1.0, samples=1.5
        ),
        ValueError,
        "samples",
    ),
    (
        "params for their initialisation",
        lambda: balls.initialization_radius(PARAMS, jax.random.key(0), 0.1, width=1.0),
        ValueError,
        "init",
    ),
    (
        "Frank-Wolfe with a negative radius",
        lambda: frank_wolfe.conditional_gradient(0.1, -1.0, 0.1),
        ValueError,
        "radius",
    ),
    (
        "rescale misspelt",
        lambda: frank_wolfe.conditional_gradient(0.1, 1.0, 0.1, rescale="grad"),
        ValueError,
        "rescale",
    ),
    (
        "Frank-Wolfe with a schedule of the radius",
        lambda: frank_wolfe.conditional_gradient(0.1, DENSITY, 0.1),
        ValueError,
        "radius",
    ),
    (
        "number for a regulariser",
        lambda: bregman.linbreg(0.1, 1e-3),
        ValueError,
        "regulariser",
    ),
    (
        "function for a regulariser",
        lambda: proximal.prox_sgd(0.1, regularisers.l1),
        ValueError,
        "regulariser",
    ),
    (
        "regulariser and rate swapped",
        lambda: bregman.adabreg(L1, 0.1),
        ValueError,
        "learning_rate",
    ),
    (
        "learning rate for a base of Bregman",
        lambda: bregman.linearised_bregman(0.1, L1),
        ValueError,
        "base",
    ),
    ("delta zero", lambda: bregman.linbreg(0.1, L1, 0.0), ValueError, "delta"),
    (
        "sparsity for a controller",
        lambda: bregman.linbreg(0.1, L1, adaptive=0.9),
        ValueError,
        "adaptive",
    ),
    (
        "controller in percent",
        lambda: bregman.linbreg(0.1, L1, adaptive=bregman.Controller(90)),
        ValueError,
        "target",
    ),
    (
        "sparse start in percent",
        lambda: bregman.sparse_init(jax.random.key(0), PARAMS, 10),
        ValueError,
        "density",
    ),
    (
        "seed for a key",
        lambda: bregman.sparse_init(0, PARAMS, 0.1),
        ValueError,
        "key",
    ),
    (
        "key and params swapped",
        lambda: bregman.sparse_init(PARAMS, jax.random.key(0), 0.1),
        ValueError,
        "key",
    ),
    (
        "milestones fall",
        lambda: dual_averaging.rmda(0.1, L1, milestones=(20, 10)),
        ValueError,
        "milestones",
    ),
    (
        "one milestone",
        lambda: dual_averaging.rmda(0.1, L1, milestones=10),
        ValueError,
        "milestones",
    ),
    (
        "growth misspelt",
        lambda: dual_averaging.ramda(0.1, L1, growth="stage"),
        ValueError,
        "growth",
    ),
    (
        "unaveraged of another state",
        lambda: dual_averaging.unaveraged(optax.adam(0.1).init(PARAMS), L1),
        ValueError,
        "state",
    ),
    (
        "direction is a rate",
        lambda: proximal.proxgen(0.1, L1, direction=0.9),
        ValueError,
        "direction",
    ),
    (
        "metric is an array",
        lambda: proximal.proxgen(0.1, L1, metric=KERNEL),
        ValueError,
        "metric",
    ),
    (
        "compression as a share",
        lambda: sparse_momentum.gsm(0.1, 0.1),
        ValueError,
        "compression",
    ),
    (
        "momentum above one",
        lambda: sparse_momentum.gsm(0.1, 10, 1.5),
        ValueError,
        "momentum",
    ),
    (
        "rate for a base of gradual pruning",
        lambda: gradual_pruning.gradual_magnitude_pruning(0.1, DENSITY),
        ValueError,
        "base",
    ),
    (
        "density in percent for gradual pruning",
        lambda: gradual_pruning.gradual_magnitude_pruning(SGD, 5.0),
        ValueError,
        "density",
    ),
    (
        "optax's function for a base of hard thresholding",
        lambda: hard_thresholding.iterative_hard_thresholding(optax.sgd, 0.1),
        ValueError,
        "base",
    ),
    (
        "components kept in percent",
        lambda: hard_thresholding.hard_threshold(PARAMS, 10.0),
        ValueError,
        "k must",
    ),
    (
        "scope misspelt for hard thresholding",
        lambda: hard_thresholding.hard_threshold(PARAMS, 0.1, scope="layer"),
        ValueError,
        "scope",
    ),
    (
        "rounds as float",
        lambda: lottery_ticket.iterative_magnitude_pruning(
            lambda params, mask: params, PARAMS, rounds=1.5
        ),
        ValueError,
        "rounds",
    ),
    (
        "fraction in percent",
        lambda: lottery_ticket.iterative_magnitude_pruning(
            lambda params, mask: params, PARAMS, rounds=1, fraction=20
        ),
        ValueError,
        "fraction",
    ),
    (
        "tickets by params and train swapped",
        lambda: list(
            lottery_ticket.iterative_magnitude_pruning(
                PARAMS, lambda params, mask: params, rounds=1
            )
        ),
        ValueError,
        "train",
    ),
    (
        "train returns a loss too",
        lambda: list(
            lottery_ticket.iterative_magnitude_pruning(
                lambda params, mask: (params, 0.5), PARAMS, rounds=1
            )
        ),
        ValueError,
        "train",
    ),
    (
        "ticket of a module",
        lambda: lottery_ticket.dense_mask(nn.Dense(2)),
        ValueError,
        "params",
    ),
    (
        "seed for a random mask",
        lambda: lottery_ticket.random_mask(0, MASK),
        ValueError,
        "key",
    ),
    (
        "rate for a sparse optimizer",
        lambda: lottery_ticket.sparse_optimizer(0.1, MASK),
        ValueError,
        "base",
    ),
    (
        "strength negative",
        lambda: regularisers.l1(-1e-3),
        ValueError,
        "strength",
    ),
    (
        "schedule for strength",
        lambda: regularisers.l1(optax.constant_schedule(1e-3)),
        ValueError,
        "strength",
    ),
    (
        "groups misspelt",
        lambda: regularisers.group_lasso(1e-3, "inputs"),
        ValueError,
        "groups",
    ),
    (
        "groups as an axis",
        lambda: regularisers.group_lasso(1e-3, -1),
        ValueError,
        "groups",
    ),
    (
        "groups of a bias",
        lambda: regularisers.group_lasso(1e-3, where=masks.everything).value(PARAMS),
        ValueError,
        "groups",
    ),
    (
        "groups on an axis that is not there",
        lambda: regularisers.group_lasso(1e-3, lambda path, leaf: 5).value(PARAMS),
        ValueError,
        "axis",
    ),
    (
        "groups return a float",
        lambda: regularisers.group_lasso(1e-3, lambda path, leaf: 1.0).value(PARAMS),
        ValueError,
        "axis",
    ),
    (
        "gamma zero",
        lambda: regularisers.group_mcp(1e-3, 0.0),
        ValueError,
        "gamma",
    ),
    (
        "groups for gamma",
        lambda: regularisers.group_mcp(1e-3, "input"),
        ValueError,
        "gamma",
    ),
    (
        "tree for where in a penalty",
        lambda: regularisers.l1(1e-3, where=MASK),
        ValueError,
        "where",
    ),
    (
        "name for where in a penalty",
        lambda: regularisers.nuclear(1e-3, where="kernel"),
        ValueError,
        "where",
    ),
    (
        "name for where in k-support",
        lambda: regularisers.k_support(1e-3, 0.1, where="kernel"),
        ValueError,
        "where",
    ),
    (
        "support of a penalty in percent",
        lambda: regularisers.k_support(1e-3, 10.0),
        ValueError,
        "support",
    ),
    (
        "group sparsity with groups misspelt",
        lambda: regularisers.group_sparsity(PARAMS, "channels"),
        ValueError,
        "groups",
    ),
    (
        "tree for one array",
        lambda: operators.prox_l1(PARAMS, 0.1),
        ValueError,
        "x must",
    ),
    (
        "metric of another shape",
        lambda: operators.prox_l1(KERNEL, 0.1, metric=jnp.ones((3, 3))),
        ValueError,
        "metric",
    ),
    (
        "prox of integers",
        lambda: operators.prox_l1(jnp.arange(3), 0.1),
        ValueError,
        "x has dtype",
    ),
    (
        "negative scaling",
        lambda: operators.prox_l1(KERNEL, 0.1, -1.0),
        ValueError,
        "scaling",
    ),
    (
        "nuclear norm of a vector",
        lambda: operators.prox_nuclear(jnp.ones(3), 0.1),
        ValueError,
        "x must",
    ),
    (
        "axis as text",
        lambda: operators.prox_group_lasso(KERNEL, 0.1, axis="input"),
        ValueError,
        "axis",
    ),
    (
        "axis out of range",
        lambda: operators.prox_group_lasso(KERNEL, 0.1, axis=2),
        ValueError,
        "axis",
    ),
    (
        "number for a regulariser in a metric",
        lambda: regularisers.weighted_prox(0.1, PARAMS, PARAMS),
        ValueError,
        "regulariser",
    ),
    (
        "metric of another tree",
        lambda: regularisers.weighted_prox(L1, PARAMS, OTHER),
        ValueError,
        "metric",
    ),
]

TABLE = [*MASKS, *OPTIMIZERS, *RECIPES, *EVALUATION, *EXPORT, *FLAX, *METHODS]


@pytest.fixture(autouse=True)
def no_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.mark.parametrize(
    ("mistake", "kind", "name"), [pytest.param(*row, id=i) for i, *row in TABLE]
)
def test_a_mistake_is_answered(mistake, kind, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as raised:
        mistake()
    assert raised.type is kind
    message = str(raised.value)
    assert name in message
    assert len(message) <= 2000
    assert len(message.splitlines()) <= 30
    # In our words, not in those of JAX, optax, NumPy or Python: what is written in C
    # has no frame of its own, but no `raise` either.
    innermost = traceback.extract_tb(raised.tb)[-1]
    assert PACKAGE in pathlib.Path(innermost.filename).parents
    assert innermost.line.startswith("raise ")
    assert not list(tmp_path.iterdir())


def test_there_are_a_hundred_mistakes():
    names = [name for name, *_ in TABLE]
    assert len(set(names)) == len(names) >= 100
