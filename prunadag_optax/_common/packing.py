"""Masks with one bit a weight, where JAX's bool takes a byte."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from prunadag_optax._common import checks


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["bits"], meta_fields=["shape"]
)
class PackedMask:
    """The mask of one leaf, eight weights to a byte.

    Attributes:
      bits: uint8, shape (..., bytes); leading axes where it was mapped over.
      shape: that of the mask.
    """

    def __init__(self, bits: Any, shape: tuple[int, ...]):
        self.bits = bits
        self.shape = tuple(shape)

    def __repr__(self):
        return f"PackedMask(shape={self.shape})"


def is_packed(node: Any) -> bool:
    """Whether a node is a packed mask."""
    return isinstance(node, PackedMask)


def pack(mask: Any) -> Any:
    r"""A mask with one bit a weight: an eighth of the memory.

    .. math:: \lceil n / 8 \rceil \text{ bytes for a leaf of } n \text{ weights}

    A packed mask is a pytree: it goes through jit, into optimizer states and into
    checkpoints. Packing moves a leaf that is sharded onto one device; keep the masks of
    sharded parameters as they are.

    Args:
      mask: pytree of bool arrays, None for leaves that are not prunable.

    Returns:
      Pytree with a `PackedMask` for each array. What is packed already stays.

    Raises:
      ValueError: if a leaf is no bool array.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> mask = {"kernel": jnp.arange(24).reshape(4, 6) % 3 == 0, "bias": None}
      >>> packed = masks.pack(mask)
      >>> sum(x.nbytes for x in jax.tree.leaves(packed))
      3
      >>> bool((masks.unpack(packed)["kernel"] == mask["kernel"]).all())
      True
    """

    def leaf(path, keep):
        if is_packed(keep):
            return keep
        dtype = checks.dtype_of(keep)
        if dtype != jnp.bool_:
            got = checks.shown(keep) if dtype is None else f"the dtype {dtype}"
            raise ValueError(
                f"mask{jax.tree_util.keystr(path)} must be a bool array; got {got}. "
                "Masks are made by masks.magnitude_mask and the like."
            )
        keep = jnp.asarray(keep)
        return PackedMask(jnp.packbits(keep.reshape(-1)), keep.shape)

    return jax.tree_util.tree_map_with_path(leaf, mask, is_leaf=is_packed)


def unpack(mask: Any) -> Any:
    """The mask of bool arrays of which `pack` has made a packed one.

    Args:
      mask: pytree of `PackedMask`, bool arrays and None.

    Returns:
      Pytree of bool arrays and None; what is not packed stays as it is.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> masks.unpack(masks.pack(jnp.array([True, False, True]))).tolist()
      [True, False, True]
    """

    def leaf(keep):
        if not is_packed(keep):
            return keep
        size = math.prod(keep.shape)
        bits = jnp.unpackbits(jnp.asarray(keep.bits), axis=-1, count=size)
        return bits.astype(bool).reshape(*bits.shape[:-1], *keep.shape)

    return jax.tree.map(leaf, mask, is_leaf=is_packed)


def packed_like(mask: Any, like: Any) -> Any:
    """A mask as another one is: packed where that is.

    Args:
      mask: pytree of bool arrays, None for leaves that are not prunable.
      like: a mask of the same parameters, packed or not.

    Returns:
      The mask, all of it packed or none.
    """
    packed = any(is_packed(node) for node in jax.tree.leaves(like, is_leaf=is_packed))
    return pack(mask) if packed else mask
