"""Parameter trees of one size: a flat array, a transformer and a ResNet.

A step is timed on all three in the same run, so their sizes have to be equal, to the
element. The ResNet's width and number of classes are whole numbers and set the size;
the transformer's vocabulary and context are then chosen to make exactly the same. All
three hold the same numbers in the same order, so every search finds the same threshold.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

Shapes = dict[str, tuple[int, ...]]

# Bottleneck blocks of the four stages of ResNet-50.
_STAGES = (3, 4, 6, 3)
_LAYERS = 12


def resnet_shapes(width: int, classes: int) -> Shapes:
    """The 161 leaves of a ResNet-50.

    Args:
      width: channels of the stem, 64 in ResNet-50.
      classes: outputs of the head, 1000 in ResNet-50.

    Returns:
      Shape of every leaf by name: kernels [height, width, in, out], the scale and bias
      of each normalisation, and the head.
    """
    shapes: Shapes = {}

    def convolution(name: str, size: int, inputs: int, outputs: int) -> None:
        shapes[f"{name}/kernel"] = (size, size, inputs, outputs)
        shapes[f"{name}/norm/scale"] = (outputs,)
        shapes[f"{name}/norm/bias"] = (outputs,)

    convolution("stem", 7, 3, width)
    channels = width
    for stage, blocks in enumerate(_STAGES):
        inner = width * 2**stage
        for block in range(blocks):
            name = f"stage{stage}/block{block}"
            convolution(f"{name}/reduce", 1, channels, inner)
            convolution(f"{name}/spatial", 3, inner, inner)
            convolution(f"{name}/expand", 1, inner, 4 * inner)
            if block == 0:
                convolution(f"{name}/shortcut", 1, channels, 4 * inner)
            channels = 4 * inner
    return shapes | {"head/kernel": (channels, classes), "head/bias": (classes,)}


def transformer_shapes(width: int, vocabulary: int, context: int) -> Shapes:
    """The 150 leaves of a decoder with 12 layers of 12 leaves each.

    Args:
      width: d, the size of an embedding.
      vocabulary: number of tokens.
      context: number of positions.

    Returns:
      Shape of every leaf by name.
    """
    block: Shapes = {
        "attention/norm/scale": (width,),
        "attention/norm/bias": (width,),
        "attention/qkv/kernel": (width, 3 * width),
        "attention/qkv/bias": (3 * width,),
        "attention/out/kernel": (width, width),
        "attention/out/bias": (width,),
        "mlp/norm/scale": (width,),
        "mlp/norm/bias": (width,),
        "mlp/up/kernel": (width, 4 * width),
        "mlp/up/bias": (4 * width,),
        "mlp/down/kernel": (4 * width, width),
        "mlp/down/bias": (width,),
    }
    return {
        "embedding/tokens": (vocabulary, width),
        "embedding/positions": (context, width),
        **{f"layer{i}/{k}": v for i in range(_LAYERS) for k, v in block.items()},
        "norm/scale": (width,),
        "norm/bias": (width,),
        "head/kernel": (width, vocabulary),
        "head/bias": (vocabulary,),
    }


def size_of(shapes: Shapes) -> int:
    """Number of elements of all leaves together."""
    return sum(map(math.prod, shapes.values()))


def resnet_near(size: int) -> Shapes:
    """The widest ResNet-50 whose head fits into `size`, with the classes that do fit.

    Args:
      size: elements wanted, at least 7,000.

    Returns:
      Shapes of at most `size` elements in all, less than one class short of it.
    """
    width = _largest(lambda w: size_of(resnet_shapes(w, 10)) <= size)
    # Every class adds a column to the head, and a bias: its size is linear in them.
    without = size_of(resnet_shapes(width, 0))
    each = size_of(resnet_shapes(width, 1)) - without
    return resnet_shapes(width, (size - without) // each)


def transformer_of(size: int) -> Shapes:
    """A transformer of exactly `size` elements, about 55% of them in its layers.

    Args:
      size: elements wanted, at least 2,000.

    Returns:
      Shapes of exactly `size` elements in all.
    """

    def layers(width: int) -> int:
        return size_of(transformer_shapes(width, 0, 0))

    width = _largest(lambda w: layers(w) <= 0.55 * size)
    rest = size - layers(width)
    # rest = vocabulary (2 width + 1) + context width, so that vocabulary = rest modulo
    # width; nine tenths go to the vocabulary, the context takes what remains.
    vocabulary = int(0.9 * rest) // (2 * width + 1)
    vocabulary -= (vocabulary - rest) % width
    context = (rest - vocabulary * (2 * width + 1)) // width
    return transformer_shapes(width, vocabulary, context)


def _largest(holds: Callable[[int], bool]) -> int:
    width = 1
    while holds(width + 1):
        width += 1
    return width


def split(flat: jax.Array, shapes: Shapes) -> dict[str, jax.Array]:
    """Cuts a flat array into leaves.

    Args:
      flat: [n].
      shapes: shape of every leaf, n elements in all.

    Returns:
      The leaves by name, in the order of `shapes`.

    Raises:
      ValueError: if the shapes do not have n elements in all.
    """
    if size_of(shapes) != flat.size:
        raise ValueError(
            f"shapes must have {flat.size} elements, the size of flat; got "
            f"{size_of(shapes)}."
        )
    leaves, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        leaves[name] = flat[start:stop].reshape(shape)
        start = stop
    return leaves


def random_data(size: int, dtype: str = "float32") -> tuple[jax.Array, list[jax.Array]]:
    """Parameters and two gradients, normal.

    Args:
      size: n.
      dtype: of all.

    Returns:
      Parameters [n] of deviation 0.1, and gradients [n] of deviations 1 and 1.25: used
      in turn, they move the threshold from step to step, as minibatches do, so that the
      search for it does not start from the answer.
    """
    x, first, second = jax.random.split(jax.random.key(0), 3)
    return 0.1 * jax.random.normal(x, (size,), dtype), [
        jax.random.normal(first, (size,), dtype),
        1.25 * jax.random.normal(second, (size,), dtype),
    ]


def same_size(size: int) -> tuple[int, dict[str, Shapes | None]]:
    """The three trees at one size near `size`.

    Args:
      size: elements wanted, at least 7,000.

    Returns:
      n, and the shapes of the trees with exactly n elements: "flat" (None: the array
      itself), "transformer" and "ResNet".
    """
    resnet = resnet_near(size)
    exact = size_of(resnet)
    return exact, {
        "flat": None,
        "transformer": transformer_of(exact),
        "ResNet": resnet,
    }


def as_tree(flat: jax.Array, shapes: Shapes | None) -> Any:
    """The flat array itself where `shapes` is None, else its leaves."""
    return flat if shapes is None else split(flat, shapes)
