"""Shipping a pruned model: dense and compressed sparse files, BCOO kernels, file sizes.

Both file formats hold a nested dict of arrays, the leaves named by their path of keys,
and come back as a nested dict of NumPy arrays with the shapes and dtypes that were
saved. `save_dense` writes safetensors, which most other frameworks read (it needs the
package of that name, in the extra `flax`); `save_sparse` writes, with NumPy alone, one
deflated .npz with a bit for each weight and the weights that are not zero.
"""

import json
import math
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import sparse

from prunadag_optax import masks
from prunadag_optax._common import tables

# What files hold: safetensors' name of each dtype, and NumPy's. A dtype that NumPy only
# knows through ml_dtypes (bfloat16) is in the .npz as its bits.
_DTYPES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
_HEADER = "prunadag_optax"
_FORMAT = 1


class FileSizes(tables.Table):
    """One row a file, from `file_sizes`.

    Attributes:
      columns: "file", what was written; "bytes", its size; "ratio", that size over the
        size of the dense file of the parameters as trained.
    """


def save_dense(params: optax.Params, path: str | pathlib.Path) -> None:
    """Writes parameters as one safetensors file, zeros included.

    A leaf's name is its keys joined by "/", such as "params/Dense_0/kernel". Integer
    keys, as in `nnx.to_pure_dict(state)`, become decimals; `nnx.restore_int_paths`
    makes them integers again. What has no leaves (None, an empty dict) is not stored.

    Args:
      params: nested dict (or FrozenDict) of arrays: bool, integers, float16, bfloat16,
        float32 or float64.
      path: the file; one that is there is replaced.

    Raises:
      ValueError: if a node is no dict, a key is not a string or an integer or holds
        "/", two leaves get one name, or a leaf has another dtype.
      ImportError: if safetensors is not installed.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import export
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = pathlib.Path(folder) / "model.safetensors"
      ...     export.save_dense({"out": {"kernel": jnp.array([[1.0, 0.0]])}}, file)
      ...     export.load_dense(file)
      {'out': {'kernel': array([[1., 0.]], dtype=float32)}}
    """
    _, serialize = _safetensors()
    # safetensors reads memory as it lies, so it must be row-major.
    leaves = {
        name: np.asarray(leaf, order="C") for name, leaf in _flatten(params).items()
    }
    pathlib.Path(path).write_bytes(serialize(leaves))


def load_dense(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a safetensors file, from `save_dense` or from elsewhere.

    Args:
      path: the file.

    Returns:
      Nested dict of NumPy arrays, names split at "/".

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a safetensors file, or holds dtypes that `save_dense`
        does not write.
      ImportError: if safetensors is not installed.
    """
    deserialize, _ = _safetensors()
    data = _existing(path).read_bytes()
    try:
        stored = deserialize(data)
    except Exception as error:  # SafetensorError has no base class but Exception.
        raise ValueError(f"{path} is not a safetensors file: {error}.") from error
    leaves = []
    for name, tensor in stored:
        if tensor["dtype"] not in _DTYPES:
            raise ValueError(
                f"{path} holds {name!r} with dtype {tensor['dtype']}; allowed are "
                f"{', '.join(_DTYPES)}."
            )
        flat = np.frombuffer(tensor["data"], jnp.dtype(_DTYPES[tensor["dtype"]]))
        leaves.append((name, flat.reshape(tensor["shape"])))
    return _nest(leaves, path)


def save_sparse(params: optax.Params, path: str | pathlib.Path) -> None:
    r"""Writes parameters as one compressed file of nonzeros and where they are.

    .. math:: n / 8 + b \, |\{ i : x_i \neq 0 \}| \text{ bytes a leaf, before deflate}

    for n weights of b bytes. A leaf for which this is not less than the b n bytes of
    all its weights, such as a bias that was not pruned, is stored whole. NaN and
    infinities are kept; a -0.0 may come back as +0.0.

    Args:
      params: nested dict of arrays, as in `save_dense`.
      path: the file; one that is there is replaced. No ".npz" is appended.

    Raises:
      ValueError: as `save_dense`.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import export
      >>> params = {"kernel": jnp.zeros((100, 100)).at[1, 2].set(3.0)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = pathlib.Path(folder) / "model.npz"
      ...     export.save_sparse(params, file)
      ...     kernel = export.load_sparse(file)["kernel"]
      >>> kernel.shape, str(kernel.dtype), bool((kernel == params["kernel"]).all())
      ((100, 100), 'float32', True)
    """
    header, arrays = [], {}
    for i, (name, leaf) in enumerate(_flatten(params).items()):
        header.append([name, leaf.dtype.name, leaf.shape])
        flat = leaf.ravel()
        nonzero = flat != 0
        bits = np.packbits(nonzero)
        if bits.nbytes + leaf.itemsize * np.count_nonzero(nonzero) < leaf.nbytes:
            arrays[f"{i}.mask"], flat = bits, flat[nonzero]
        arrays[f"{i}.values"] = flat.view(_stored_dtype(leaf.dtype))
    arrays[_HEADER] = np.array(json.dumps({"format": _FORMAT, "leaves": header}))
    with pathlib.Path(path).open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_sparse(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a file that `save_sparse` wrote.

    Args:
      path: the file.

    Returns:
      Nested dict of NumPy arrays, dense, names split at "/".

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a whole file from `save_sparse`.
    """
    try:
        with _existing(path).open("rb") as file:
            return _nest(_read_sparse(file), path)
    except FileNotFoundError:
        raise
    except (
        *(ValueError, TypeError, KeyError, IndexError, AttributeError),
        *(EOFError, OSError, NotImplementedError, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise ValueError(
            f"{path} is not a whole file written by save_sparse: {error}."
        ) from error


def to_bcoo(params: optax.Params, *, where: masks.Where | None = None) -> Any:
    """The parameters with kernels as `jax.experimental.sparse.BCOO` matrices.

    For the products `x @ kernel` of your own code. A Flax module takes them through
    `jax.experimental.sparse.sparsify(module.apply)`, which has rules for `nn.Dense` but
    none for functions with derivatives of their own, such as `nn.relu` (there,
    `jnp.maximum(x, 0)` does). A nonzero costs the memory of itself and an int32 index
    an axis, so a float32 matrix shrinks above 2/3 sparsity; speed needs far more, as
    `benchmarks/shipping.py` measures.

    Args:
      params: pytree of arrays. Not under jit: the number of nonzeros is a shape.
      where: predicate (path, leaf) -> bool, True for the leaves to convert; None is
        `masks.prunable`.

    Returns:
      Pytree like `params`, with BCOO in place of the chosen leaves, indices sorted.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import export
      >>> params = {"bias": jnp.ones(2), "kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]])}
      >>> sparse = export.to_bcoo(params)
      >>> sparse["kernel"].nse, jnp.ones((1, 2)) @ sparse["kernel"]
      (1, Array([[0., 2.]], dtype=float32))
    """

    def convert(path, leaf):
        if not (where or masks.prunable)(path, leaf):
            return leaf
        return sparse.BCOO.fromdense(jnp.asarray(leaf))

    return jax.tree_util.tree_map_with_path(convert, params)


def file_sizes(params: optax.Params, mask: Any = None) -> FileSizes:
    """What the parameters weigh on disk, dense, pruned, deflated and sparse.

    The files are written to a temporary folder and their sizes read there.

    Args:
      params: nested dict of arrays, as in `save_dense`.
      mask: pytree of bool like `params`, None for leaves that are not prunable; None
        takes the parameters as they are.

    Returns:
      A `FileSizes`, which prints and exports.

    Raises:
      ValueError: as `save_dense`, or if `mask` does not fit `params`.
      ImportError: if safetensors is not installed.

    Examples:
      >>> import jax, numpy as np
      >>> from prunadag_optax import export, masks
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (256, 256))}
      >>> sizes = export.file_sizes(params, masks.magnitude_mask(params, 0.95))
      >>> dict(zip(sizes.columns["file"], np.round(sizes.columns["ratio"], 2).tolist()))
      {'dense': 1.0, 'pruned, dense': 1.0, 'pruned, dense, deflated': 0.07,
       'pruned, sparse': 0.06}
    """
    pruned = params if mask is None else masks.apply_mask(params, mask)
    with tempfile.TemporaryDirectory() as folder:
        names = "dense", "pruned, dense", "pruned, dense, deflated", "pruned, sparse"
        files = [pathlib.Path(folder) / str(i) for i in range(len(names))]
        save_dense(params, files[0])
        save_dense(pruned, files[1])
        with zipfile.ZipFile(files[2], "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(files[1], "model.safetensors")
        save_sparse(pruned, files[3])
        sizes = [file.stat().st_size for file in files]
    ratios = [size / sizes[0] for size in sizes]
    return FileSizes({"file": list(names), "bytes": sizes, "ratio": ratios})


def _safetensors() -> tuple[Any, Any]:
    try:
        from safetensors import deserialize
        from safetensors.numpy import save
    except ImportError as error:
        raise ImportError(
            "dense files need safetensors: pip install 'prunadag_optax[flax]'."
        ) from error
    return deserialize, save


def _existing(path: str | pathlib.Path) -> pathlib.Path:
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    return pathlib.Path(path)


def _flatten(params: optax.Params) -> dict[str, np.ndarray]:
    """The leaves as NumPy arrays, by name, checked."""
    if not isinstance(params, Mapping):
        raise ValueError(
            f"params must be a nested dict of arrays; got {type(params).__name__}. For "
            "nnx models give nnx.to_pure_dict(state)."
        )
    leaves: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where = f"params{jax.tree_util.keystr(path)}"
        keys = [getattr(entry, "key", None) for entry in path]
        for entry, key in zip(path, keys, strict=True):
            if not isinstance(entry, jax.tree_util.DictKey) or (
                isinstance(key, bool) or not isinstance(key, str | int)
            ):
                raise ValueError(
                    f"{where}: params must be nested dicts with keys that are strings "
                    f"or integers; got {entry!r}. For nnx models give "
                    "nnx.to_pure_dict(state)."
                )
            if "/" in str(key):
                raise ValueError(
                    f"{where}: keys must not hold '/', which joins them to the leaf's "
                    f"name; got {key!r}."
                )
        name = "/".join(map(str, keys))
        if name in leaves:
            raise ValueError(f"{where}: two leaves have the name {name!r}.")
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if dtype.name not in _DTYPES.values():
            raise ValueError(
                f"{where} has dtype {dtype}; allowed are {', '.join(_DTYPES.values())}."
            )
        leaves[name] = np.asarray(leaf, dtype.newbyteorder("="))
    return leaves


def _nest(leaves: Iterable[tuple[str, np.ndarray]], path: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves:
        node = tree
        *parents, last = name.split("/")
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise ValueError(f"{path}: {name!r} is the name of a leaf and of a node.")
        node[last] = leaf
    return tree


def _stored_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}") if dtype.name == "bfloat16" else dtype


def _read_sparse(file: Any) -> list[tuple[str, np.ndarray]]:
    leaves = []
    with np.load(file, allow_pickle=False) as archive:
        header = json.loads(archive[_HEADER].item())
        if header["format"] != _FORMAT:
            raise ValueError(f"format {header['format']}, not {_FORMAT}")
        for i, (name, dtype_name, shape) in enumerate(header["leaves"]):
            dtype = jnp.dtype(dtype_name)
            values = archive[f"{i}.values"]
            if dtype.name not in _DTYPES.values() or (
                values.dtype != _stored_dtype(dtype)
            ):
                raise ValueError(f"{name!r} has dtype {values.dtype}, not {dtype}")
            values = values.view(dtype)
            if f"{i}.mask" in archive:
                bits = np.unpackbits(archive[f"{i}.mask"], count=math.prod(shape))
                flat = np.zeros(bits.size, dtype)
                flat[bits.astype(bool)] = values
                values = flat
            leaves.append((name, values.reshape(shape)))
    return leaves
