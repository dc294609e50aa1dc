"""Small networks on images, trained by any optimizer, an epoch in one compiled loop.

All here is written for one run. `over_seeds` runs it for several seeds at once, by
`jax.vmap` of the Python that calls the compiled epochs: an epoch is compiled once, and
there is progress to be seen between epochs. Batched arrays cannot be waited for, so
times and progress are right where epochs are not dispatched ahead; `wait_for_epochs`
sees to that.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm.auto import tqdm

from benchmarks import datasets
from prunadag_optax import masks

# Images are stored as bytes and standardised where they are used, by the mean and the
# standard deviation of MNIST's pixels.
MEAN, DEVIATION = 0.1307 * 255, 0.3081 * 255
CLASSES = 10
GLOROT = jax.nn.initializers.glorot_normal()
KAIMING = jax.nn.initializers.he_normal()
# Hidden layers of LeNet-300-100.
LENET = (300, 100)


class Examples(NamedTuple):
    """Images and the class of each."""

    images: jax.Array  # uint8 [examples, pixels]
    labels: jax.Array  # int32 [examples]


class Data(NamedTuple):
    """A data set on the device."""

    train: Examples
    test: Examples
    validation: Examples | None = None


class Fitted(NamedTuple):
    """The end of a training, and the way to it."""

    params: Any
    state: Any  # of the optimizer
    history: dict[str, jax.Array]  # what was measured, [times, ...]


def _data(images: Any, labels: Any, training: int) -> Data:
    images, labels = np.asarray(images, np.uint8), np.asarray(labels, np.int32)
    parts = [slice(training), slice(training, None)]
    return Data(*(Examples(jnp.array(images[i]), jnp.array(labels[i])) for i in parts))


def mnist() -> Data:
    """MNIST: 60,000 images to train on, 10,000 to test.

    Raises:
      datasets.MissingData: if it is not there and cannot be downloaded.
    """
    return _data(*datasets.mnist(), training=60_000)


def digits() -> Data:
    """scikit-learn's digits of 8 x 8 pixels: 1,500 to train on, 297 to test."""
    images, labels = load_digits(return_X_y=True)
    return _data(np.minimum(16 * images, 255), labels, training=1500)


def with_validation(data: Data, count: int) -> Data:
    """The data with so many of the training images held out, the last ones."""
    images, labels = data.train
    return Data(
        Examples(images[:-count], labels[:-count]),
        data.test,
        Examples(images[-count:], labels[-count:]),
    )


def layers(data: Data, hidden: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the layers of a network on the data, inputs and classes with them."""
    return (data.train.images.shape[1], *hidden, CLASSES)


@functools.partial(jax.jit, static_argnames=("sizes", "initialiser"))
def init_network(
    key: jax.Array,
    sizes: tuple[int, ...],
    initialiser: Callable[..., jax.Array],
) -> dict[str, dict[str, jax.Array]]:
    """A multilayer perceptron in the names and shapes of Flax, biases at zero.

    Args:
      key: random key.
      sizes: of the layers, the inputs first.
      initialiser: of the kernels.

    Returns:
      {"Dense_0": {"kernel": [in, out], "bias": [out]}, ...}.
    """
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"Dense_{i}": {"kernel": initialiser(k, shape), "bias": jnp.zeros(shape[1:])}
        for i, (k, shape) in enumerate(
            zip(keys, itertools.pairwise(sizes), strict=True)
        )
    }


def prunable(params: Any) -> list[jax.Array]:
    """The weights that are pruned, leaf by leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [x for path, x in leaves if masks.prunable(path, x)]


def logits(params: Any, images: jax.Array) -> jax.Array:
    """What the network says of images, [batch, classes]; ReLU between the layers."""
    x = (images.astype(jnp.float32) - MEAN) / DEVIATION
    for i in range(len(params)):
        layer = params[f"Dense_{i}"]
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"][None]
    return x


def loss(params: Any, examples: Examples) -> jax.Array:
    """Mean cross entropy."""
    each = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, examples.images), examples.labels
    )
    return each.mean()


@jax.jit
def accuracy(params: Any, examples: Examples) -> jax.Array:
    """Share of the examples told right, %."""
    right = logits(params, examples.images).argmax(-1) == examples.labels
    return 100 * right.mean()


def trainer(
    make_tx: Callable[[Any], optax.GradientTransformation],
    *,
    batch: int,
    measure: Callable[[Any, Any, Data], dict[str, jax.Array]],
    parts: int = 1,
) -> Callable[..., Fitted]:
    """Makes a training function, whose epochs are compiled once.

    Args:
      make_tx: from what is given as `argument` to the optimizer.
      batch: size of a minibatch; what does not fill one is left out of an epoch.
      measure: function (params, state, data) -> scalars by name.
      parts: how often to measure in an epoch.

    Returns:
      Function (data, params, key, *, epochs, argument=None, bar=None) -> `Fitted`.
      The bar is moved on by every epoch.
    """

    @jax.jit
    def start(params, argument, key):
        tx = optax.with_extra_args_support(make_tx(argument))
        return _of_this_run(key, (params, tx.init(params), argument))

    @jax.jit
    def epoch(data, params, state, key, argument):
        tx = optax.with_extra_args_support(make_tx(argument))
        size = len(data.train.labels)
        steps = size // batch // parts
        order = jax.random.permutation(key, size)[: parts * steps * batch]

        def step(carry, chosen):
            params, state = carry
            part = jax.tree.map(lambda x: x[chosen], data.train)
            gradients = jax.grad(loss)(params, part)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        def interval(carry, chosen):
            carry, _ = jax.lax.scan(step, carry, chosen)
            return carry, measure(*carry, data)

        (params, state), measured = jax.lax.scan(
            interval, (params, state), order.reshape(parts, steps, batch)
        )
        return params, state, measured

    def fit(data, params, key, *, epochs, argument=None, bar=None) -> Fitted:
        params, state, argument = start(params, argument, key)
        history = []
        for number in range(epochs):
            params, state, measured = epoch(
                data, params, state, jax.random.fold_in(key, number), argument
            )
            history.append(measured)
            if bar is not None:
                bar.update()
        stacked = jax.tree.map(lambda *each: jnp.concatenate(each), *history)
        return Fitted(params, state, stacked)

    return fit


def _of_this_run(key: jax.Array, tree: Any) -> Any:
    """The tree, unchanged, with every float and bool made to depend on the key.

    Biases that are zero for all seeds are no batch to `jax.vmap`, and become one in the
    first epoch: the second would be compiled anew. Counters stay one for all seeds, so
    that what depends on them stays a branch.
    """
    zero = jax.random.key_data(key)[0] & 0
    return jax.tree.map(
        lambda x: (
            x
            if jnp.issubdtype(x.dtype, jnp.integer)
            else jnp.where(zero == 0, x, jnp.zeros_like(x))
        ),
        tree,
    )


def steps_of(examples: Examples, batch: int, epochs: float) -> int:
    """How many minibatches there are in so many epochs."""
    return int(epochs * (len(examples.labels) // batch))


def stepwise(
    rate: float, examples: Examples, batch: int, milestones: tuple[int, ...]
) -> optax.Schedule:
    """A learning rate that falls to a tenth at each milestone, in epochs."""
    scales = {steps_of(examples, batch, epoch): 0.1 for epoch in milestones}
    return optax.piecewise_constant_schedule(rate, scales)


def over_seeds(run: Callable[[jax.Array], Any], seeds: int) -> Any:
    """What a run gives for several seeds, all at once.

    Args:
      run: function random key -> pytree of arrays.
      seeds: how many; they are 0, 1, ...

    Returns:
      The pytree with a first axis of seeds.
    """
    return jax.block_until_ready(
        jax.vmap(run)(jax.vmap(jax.random.key)(jnp.arange(seeds)))
    )


def wait_for_epochs() -> None:
    """Makes the CPU backend wait for each call; to be called before jax is used."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def progress(total: int, label: str) -> tqdm:
    """A bar that counts epochs, where the output is a terminal."""
    return tqdm(total=total, desc=label, unit="epoch", disable=None)


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str, bar: tqdm) -> Iterator[None]:
    """Adds the wall time of a block to what its name has, and shows the name."""
    bar.set_postfix_str(name)
    began = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
