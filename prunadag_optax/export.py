"""Shipping a pruned model: dense and compressed sparse files, BCOO kernels, file sizes.

Both file formats hold a tree of arrays, each leaf under a name: its path of keys.
Dicts, lists and tuples come back as they were, any other container as a dict by names,
and arrays as writable NumPy arrays of the shapes and dtypes that were saved.
`save_dense` writes safetensors, which most other frameworks read; `save_sparse` writes
a deflated zip file with a bit for each weight and the weights that are not zero. Both
formats carry checksums: a damaged file is an error, never other numbers.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import secrets
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.experimental import sparse

from prunadag_optax import masks
from prunadag_optax._common import checks, tables
from prunadag_optax._common.leaves import parts_of

# What files hold: NumPy's name of each dtype, and that of safetensors.
_CODES = {
    "bfloat16": "BF16",
    "bool": "BOOL",
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
_NAMES = {code: name for name, code in _CODES.items()}
# What safetensors has in its header beside the tensors, and what of it is ours. One
# damaged byte cannot hide both entries, so either without the other is an error.
_METADATA = "__metadata__"
_TREE, _CHECKSUM = "prunadag_optax.tree", "prunadag_optax.crc32"
# The largest header that is read, in bytes: that of safetensors.
_HEADER_LIMIT = 100_000_000
_BOXES = ("value", "raw_value")  # where a box has its array
_HEADER = "header.json"
_FORMAT = 2


class FileSizes(tables.Table):
    """One row a file, from `file_sizes`.

    Attributes:
      columns: "file", what was written; "bytes", its size; "ratio", that size over the
        size of the dense file of the parameters as trained.
    """


def save_dense(params: optax.Params, path: str | os.PathLike[str]) -> None:
    """Writes parameters as one safetensors file, zeros included.

    A leaf's name is its keys joined by "/", such as "params/Dense_0/kernel" or
    "layers/0/w". Keys may hold "/" and "." as long as no two leaves get one name. Boxes
    (an nnx Variable, linen's `Partitioned`, any node whose one child is its `value`)
    are saved as what they hold. The order of keys and the kinds of dicts are not kept.

    Args:
      params: dict, list, tuple, FrozenDict, nnx.State, NamedTuple or registered
        dataclass of arrays, nested at will: bool, integers, float16, bfloat16, float32
        or float64. None stands for no leaf.
      path: the file; one that is there is replaced when the new one is whole.

    Raises:
      ValueError: if `params` holds what is no array of these dtypes, a module or an
        optimizer's state, if two leaves get one name, or if `path` is no path of a
        file. Nothing is written then.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import export
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = pathlib.Path(folder) / "model.safetensors"
      ...     export.save_dense({"layers": [jnp.array([[1.0, 0.0]])]}, file)
      ...     export.load_dense(file)
      {'layers': [array([[1., 0.]], dtype=float32)]}
    """
    tree, leaves = _flatten(params)
    entries, end = {}, 0
    # The widest first: every array is aligned to its elements.
    for name in sorted(leaves, key=lambda name: -leaves[name].itemsize):
        leaf = leaves[name]
        offsets = [end, end := end + leaf.nbytes]
        entries[name] = {
            "dtype": _CODES[leaf.dtype.name],
            "shape": leaf.shape,
            "data_offsets": offsets,
        }
    ours = {_TREE: json.dumps(tree), _CHECKSUM: _checksum(tree, leaves)}
    header = json.dumps({_METADATA: ours, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with _replacing(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in entries:
            file.write(_bytes(leaves[name]))


def load_dense(path: str | os.PathLike[str]) -> Any:
    """Reads a safetensors file, from `save_dense` or from elsewhere.

    Args:
      path: the file.

    Returns:
      The tree that was saved, of writable NumPy arrays. From elsewhere it is a nested
      dict, names split at "/"; there, only the form of the file can be checked.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no safetensors file, if it is damaged, or if it holds dtypes
        that `save_dense` does not write.
    """
    return _loaded(path, _read_dense, "load_dense")


def save_sparse(params: optax.Params, path: str | os.PathLike[str]) -> None:
    r"""Writes parameters as one compressed file of nonzeros and where they are.

    .. math:: n / 8 + b \, |\{ i : x_i \neq 0 \}| \text{ bytes a leaf, before deflate}

    for n weights of b bytes. A leaf for which this is not less than the b n bytes of
    all its weights, such as a bias that was not pruned, is stored dense. NaN and
    infinities are kept; a -0.0 may come back as +0.0.

    Args:
      params: tree of arrays, as in `save_dense`.
      path: the file; one that is there is replaced when the new one is whole.

    Raises:
      ValueError: as `save_dense`.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import export
      >>> params = {"kernel": jnp.zeros((100, 100)).at[1, 2].set(3.0)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = pathlib.Path(folder) / "model.zip"
      ...     export.save_sparse(params, file)
      ...     kernel = export.load_sparse(file)["kernel"]
      >>> kernel.shape, str(kernel.dtype), bool((kernel == params["kernel"]).all())
      ((100, 100), 'float32', True)
    """
    tree, leaves = _flatten(params)
    about = [[name, leaf.dtype.name, leaf.shape] for name, leaf in leaves.items()]
    header = json.dumps({"format": _FORMAT, "tree": tree, "leaves": about})
    with _replacing(path) as file, zipfile.ZipFile(file, "w") as archive:

        def write(name, data):
            # No date, so that equal parameters are equal files.
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)

        write(_HEADER, header)
        for i, leaf in enumerate(leaves.values()):
            flat = leaf.ravel()
            nonzero = flat != 0
            bits = np.packbits(nonzero)
            if bits.nbytes + leaf.itemsize * np.count_nonzero(nonzero) < leaf.nbytes:
                write(f"{i}.mask", bits.data)
                flat = flat[nonzero]
            write(f"{i}.values", _bytes(flat))


def load_sparse(path: str | os.PathLike[str]) -> Any:
    """Reads a file that `save_sparse` wrote.

    Args:
      path: the file.

    Returns:
      The tree that was saved, of writable dense NumPy arrays.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a whole file from `save_sparse`.
    """
    return _loaded(path, _read_sparse, "load_sparse")


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

    Raises:
      ValueError: if `params` is no tree of arrays, or `where` chooses none of them.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import export
      >>> params = {"bias": jnp.ones(2), "kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]])}
      >>> sparse = export.to_bcoo(params)
      >>> sparse["kernel"].nse, jnp.ones((1, 2)) @ sparse["kernel"]
      (1, Array([[0., 2.]], dtype=float32))
    """
    checks.parameters("params", params)
    if where is not None:
        checks.where(where)
    leaves, treedef = jax.tree.flatten(params)
    absent = (Tracer, jax.ShapeDtypeStruct)
    if params is None or any(isinstance(leaf, absent) for leaf in leaves):
        raise ValueError(
            "params must be a tree of arrays with values, outside jit; got "
            f"{checks.shown(params)}{' of none' if leaves else ''}."
        )
    for i, *_ in parts_of(params, where).leaves:
        leaves[i] = sparse.BCOO.fromdense(jnp.asarray(leaves[i]))
    return treedef.unflatten(leaves)


def file_sizes(params: optax.Params, mask: Any = None) -> FileSizes:
    """What the parameters weigh on disk, dense, pruned, deflated and sparse.

    The files are written to a temporary folder and their sizes read there.

    Args:
      params: tree of arrays, as in `save_dense`.
      mask: pytree of bool like `params`, None for leaves that are not prunable; None
        takes the parameters as they are.

    Returns:
      A `FileSizes`, which prints and exports.

    Raises:
      ValueError: as `save_dense`, or if `mask` does not fit `params`.

    Examples:
      >>> import jax, numpy as np
      >>> from prunadag_optax import export, masks
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (256, 256))}
      >>> sizes = export.file_sizes(params, masks.magnitude_mask(params, 0.95))
      >>> dict(zip(sizes.columns["file"], np.round(sizes.columns["ratio"], 2).tolist()))
      {'dense': 1.0, 'pruned, dense': 1.0, 'pruned, dense, deflated': 0.07,
       'pruned, sparse': 0.06}
    """
    with tempfile.TemporaryDirectory() as folder:
        names = "dense", "pruned, dense", "pruned, dense, deflated", "pruned, sparse"
        files = [pathlib.Path(folder) / str(i) for i in range(len(names))]
        save_dense(params, files[0])
        pruned = params if mask is None else masks.apply_mask(params, mask)
        save_dense(pruned, files[1])
        with zipfile.ZipFile(files[2], "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(files[1], "model.safetensors")
        save_sparse(pruned, files[3])
        sizes = [file.stat().st_size for file in files]
    ratios = [size / sizes[0] for size in sizes]
    return FileSizes({"file": list(names), "bytes": sizes, "ratio": ratios})


# A tree stands in a file as None, the name of a leaf, ["list", *children],
# ["tuple", *children] or ["dict", keys, *children].


def _flatten(params: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """What stands for the tree in a file, and its leaves by name, checked."""
    checks.parameters("params", params)
    leaves: dict[str, np.ndarray] = {}

    def pack(node: Any, path: tuple[Any, ...], above: tuple[str, ...]) -> Any:
        place = f"params{jax.tree_util.keystr(path)}"
        children = _children(node)
        if not path and (node is None or children is None):
            raise ValueError(
                "params must be a dict, a list or another tree of arrays; got "
                f"{checks.shown(node)}. For one array write {{'w': array}}."
            )
        if node is None:
            return None
        if children is None:
            name = "/".join(above)
            if name in leaves or name == _METADATA:
                taken = "that of another leaf" if name in leaves else "reserved"
                raise ValueError(
                    f"{place} must have a name of its own; {name!r} is {taken}. Names "
                    "are keys joined by '/': rename a key."
                )
            leaves[name] = _values(node, place)
            return name
        keys = [_key(entry) for entry, _ in children]
        if len(keys) == 1 and getattr(children[0][0], "name", None) in _BOXES:
            return pack(children[0][1], (*path, children[0][0]), above)
        for key in keys:
            if type(key) not in (str, int):
                raise ValueError(
                    f"{place} must have children with names, keys that are strings or "
                    f"integers; got {checks.shown(node)} with {key!r:.80}."
                )
        packed = [
            pack(child, (*path, entry), (*above, str(key)))
            for key, (entry, child) in zip(keys, children, strict=True)
        ]
        if type(node) in (list, tuple):
            return [type(node).__name__, *packed]
        return ["dict", keys, *packed]

    return pack(params, (), ()), leaves


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """The children of a node with their jax keys; None for a leaf."""
    found, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda child: child is not node
    )
    if len(found) == 1 and not found[0][0]:
        return None
    return [(path[0], child) for path, child in found]


def _key(entry: Any) -> Any:
    if isinstance(entry, jax.tree_util.FlattenedIndexKey):  # no name is known
        return entry
    return next(
        getattr(entry, kind) for kind in ("key", "name", "idx") if hasattr(entry, kind)
    )


def _values(leaf: Any, place: str) -> np.ndarray:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if getattr(dtype, "name", None) not in _CODES:
        raise ValueError(
            f"{place} must be an array; got {checks.shown(leaf)} of dtype {dtype}. "
            f"Allowed are {', '.join(_CODES)}."
        )
    try:
        return np.asarray(leaf, dtype.newbyteorder("="), order="C")
    except Exception as error:  # a tracer, a deleted array, a shape without values
        raise ValueError(
            f"{place} must hold values, outside jit; got {checks.shown(leaf)}: "
            f"{_said(error)}."
        ) from error


def _unpack(tree: Any, leaves: dict[str, np.ndarray]) -> Any:
    """The tree, with leaves in place of their names; takes them out of `leaves`."""
    match tree:
        case None:
            return None
        case str():
            return leaves.pop(tree)
        case ["list", *children]:
            return [_unpack(child, leaves) for child in children]
        case ["tuple", *children]:
            return tuple([_unpack(child, leaves) for child in children])
        case ["dict", [*keys], *children] if all(
            type(key) in (str, int) for key in keys
        ) and len(set(keys)) == len(keys) == len(children):
            packed = zip(keys, children, strict=True)
            return {key: _unpack(child, leaves) for key, child in packed}
    raise ValueError("its tree is none of dicts, lists and tuples")


def _whole(tree: Any, leaves: dict[str, np.ndarray]) -> Any:
    whole = _unpack(tree, leaves)
    if leaves:
        raise ValueError(f"its tree has no place for {next(iter(leaves))!r:.80}")
    return whole


def _nest(leaves: dict[str, np.ndarray]) -> dict[str, Any]:
    """The nested dict by names split at "/", for files from elsewhere."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        node = tree
        *parents, last = name.split("/")
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise ValueError(f"{name!r:.80} is the name of a leaf and of a node")
        node[last] = leaf
    return tree


# Files. What is read may be hostile: every size is checked before it is allocated.


@contextlib.contextmanager
def _replacing(path: Any) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when it is whole."""
    file = pathlib.Path(os.path.realpath(_path(path)))
    if file.exists() and not file.is_file():
        raise ValueError(f"path must be a file; {path} is a folder or a device.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent}.")
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as stream:
            yield stream
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _loaded(path: Any, read: Callable[[bytes], Any], loader: str) -> Any:
    file = _path(path)
    if not file.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    if not file.is_file():
        raise ValueError(f"path must be a file; {path} is a folder or a device.")
    data = file.read_bytes()
    try:
        return read(data)
    except Exception as error:  # all that zipfile, zlib, json and NumPy may raise
        raise ValueError(
            f"{path} is damaged, or no file for {loader}: {_said(error)}."
        ) from error


def _path(path: Any) -> pathlib.Path:
    if not isinstance(path, str | os.PathLike):
        raise ValueError(
            f"path must be a string or a pathlib.Path; got {checks.shown(path)}."
        )
    return pathlib.Path(path)


def _said(error: Exception) -> str:
    """The first line of an error, without a full stop."""
    lines = str(error).splitlines() or [type(error).__name__]
    said = f"it has no {lines[0]}" if isinstance(error, KeyError) else lines[0]
    return said[:200].rstrip(".")


def _read_dense(data: bytes) -> Any:
    size = int.from_bytes(data[:8], "little")
    if size > min(len(data) - 8, _HEADER_LIMIT):
        raise ValueError("its header is longer than the file, or than is allowed")
    header = json.loads(data[8 : 8 + size], object_pairs_hook=_unique)
    metadata = header.pop(_METADATA, {})
    body, end = memoryview(data)[8 + size :], 0
    leaves: dict[str, np.ndarray] = {}
    for name, entry in sorted(header.items(), key=lambda x: x[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        if not begin == end <= stop <= len(body):
            raise ValueError(f"{name!r:.80} does not follow the array before")
        code, end = entry["dtype"], stop
        if code not in _NAMES:
            raise ValueError(
                f"{name!r:.80} has dtype {code!r:.80}; allowed are {', '.join(_NAMES)}"
            )
        leaves[name] = _array(body[begin:stop], _NAMES[code], entry["shape"])
    if end != len(body):
        raise ValueError(f"{len(body) - end} bytes are in no array")
    if _TREE not in metadata and _CHECKSUM not in metadata:
        return _nest(leaves)
    tree = json.loads(metadata[_TREE])
    if metadata[_CHECKSUM] != _checksum(tree, leaves):
        raise ValueError("its checksum differs")
    return _whole(tree, leaves)


def _read_sparse(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise ValueError("two of its entries have one name")

        def entry(name: str, size: int | None = None) -> zipfile.ZipInfo:
            info = members.pop(name)
            size = min(info.file_size, _HEADER_LIMIT) if size is None else size
            if info.compress_type != zipfile.ZIP_DEFLATED or info.file_size != size:
                raise ValueError(
                    f"{name} must be {size} bytes, deflated; it is {info.file_size} "
                    f"bytes in compression {info.compress_type}"
                )
            return info

        def inflated(info: zipfile.ZipInfo) -> bytes:
            with archive.open(info) as stream:
                # No more than that, and the entry's own checksum at the end.
                content = stream.read(info.file_size)
            if len(content) != info.file_size:
                raise ValueError(f"{info.filename} is cut short")
            return content

        header = json.loads(inflated(entry(_HEADER)), object_pairs_hook=_unique)
        if header["format"] != _FORMAT:
            raise ValueError(f"it has format {header['format']!r:.80}, not {_FORMAT}")
        leaves: dict[str, np.ndarray] = {}
        for i, (name, dtype, shape) in enumerate(header["leaves"]):
            if dtype not in _CODES or name in leaves:
                raise ValueError(
                    f"{name!r:.80} has dtype {dtype!r:.80}, or is there twice"
                )
            size, itemsize, values = (
                _size(shape),
                jnp.dtype(dtype).itemsize,
                f"{i}.values",
            )
            if f"{i}.mask" in members:
                mask = entry(f"{i}.mask", -(-size // 8))
                # First of all, as the largest: if it does not fit, nothing is inflated.
                leaf = np.zeros(shape, jnp.dtype(dtype))
                bits = np.frombuffer(inflated(mask), np.uint8)
                nonzero = np.unpackbits(bits, count=size).view(bool)
                count = int(np.count_nonzero(nonzero))
                stored = inflated(entry(values, count * itemsize))
                leaf.reshape(-1)[nonzero] = _array(stored, dtype, [count])
            else:
                leaf = _array(inflated(entry(values, size * itemsize)), dtype, shape)
            leaves[name] = leaf
        if members:
            raise ValueError(f"no array needs its entry {next(iter(members))!r:.80}")
        return _whole(header["tree"], leaves)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("two entries of its header have one name")
    return dict(pairs)


def _size(shape: Any) -> int:
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"a shape must be of integers >= 0, not {shape!r:.80}")
    return math.prod(shape)


def _array(data: bytes | memoryview, dtype: str, shape: Any) -> np.ndarray:
    """A writable array of bytes, if there are as many as it needs."""
    kind = jnp.dtype(dtype)
    if len(data) != _size(shape) * kind.itemsize:
        raise ValueError(f"{len(data)} bytes are no {dtype} array {shape!r:.80}")
    array = np.frombuffer(bytearray(data), kind)
    if kind == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise ValueError("an array of bool has bytes other than 0 and 1")
    return array.reshape(shape)


def _bytes(array: np.ndarray) -> memoryview:
    return array.ravel().view(np.uint8).data


def _checksum(tree: Any, leaves: dict[str, np.ndarray]) -> str:
    """CRC-32 of a tree, and the names, dtypes, shapes and bytes of its leaves."""
    names = sorted(leaves)
    about = [[name, leaves[name].dtype.name, leaves[name].shape] for name in names]
    value = zlib.crc32(json.dumps([tree, about]).encode())
    for name in names:
        value = zlib.crc32(_bytes(leaves[name]), value)
    return f"{value:08x}"
