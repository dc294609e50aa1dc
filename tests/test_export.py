"""Files of pruned parameters, their sizes, and BCOO kernels."""

import dataclasses
import io
import json
import os
import sys
import typing
import zipfile

import flax.linen as nn
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training import train_state
from jax.experimental import sparse

from prunadag_optax import export, masks

FORMATS = {
    "dense": (export.save_dense, export.load_dense),
    "sparse": (export.save_sparse, export.load_sparse),
}
many = hypothesis.settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, np.float64, np.int32, np.bool_]


def normal(shape, sparsity=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32)
    x[rng.permutation(x.size).reshape(shape) < round(sparsity * x.size)] = 0
    return x


def assert_same(loaded, params):
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for got, wanted in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True
    ):
        assert isinstance(got, np.ndarray)
        wanted = np.asarray(wanted)
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert got.tobytes() == wanted.tobytes()


@pytest.fixture(params=FORMATS)
def round_trip(request, tmp_path):
    save, load = FORMATS[request.param]

    def run(params):
        save(params, tmp_path / "model")
        assert [file.name for file in tmp_path.iterdir()] == ["model"]
        return load(str(tmp_path / "model"))

    return run


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_keeps_dtypes(round_trip, dtype):
    x = normal((32, 24), 0.9).astype(dtype)
    assert_same(round_trip({"params": {"Dense_0": {"kernel": x}}, "b": x[0]}), {
        "params": {"Dense_0": {"kernel": x}},
        "b": x[0],
    })  # fmt: skip


@pytest.mark.parametrize(
    "leaf",
    [
        np.zeros((0, 3), np.float32),
        np.zeros((), np.float32),
        np.float32(2.5),
        np.zeros((17, 3), np.float32),
        np.ones((17, 3), np.float32),
        np.array([np.nan, np.inf, -np.inf, 1e-45] + 90 * [0.0], np.float32),
        np.array([np.nan, 0.0], np.float32),
        normal((6, 40), 0.9).T,
        normal((6, 40), 0.9)[::-1, ::2],
        normal((40, 6), 0.9).astype(jnp.bfloat16).T,
    ],
    ids=[
        *("zero-size", "scalar", "numpy scalar", "all zero", "all one"),
        *("few finite", "dense NaN", "transposed", "strided", "bfloat16 transposed"),
    ],
)
def test_round_trip_of_leaves(round_trip, leaf):
    params = {"a": {"leaf": leaf}, "other": np.arange(3)}
    assert_same(round_trip(params), params)


def test_big_endian_leaves_come_back_equal(round_trip):
    x = normal((40, 6), 0.9)
    assert_same(round_trip({"x": x.astype(">f4")}), {"x": x})


def test_python_scalars_and_jax_arrays(round_trip):
    params = {"rate": 0.5, "x": jnp.arange(4.0)}
    assert_same(round_trip(params), params)


class Pair(typing.NamedTuple):
    w: typing.Any
    b: typing.Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: typing.Any
    heads: list[typing.Any]
    rate: float = dataclasses.field(default=0.5, metadata={"static": True})


W, B = normal((6, 40), 0.9), normal(3)


@pytest.mark.parametrize(
    "params",
    [
        {},
        [],
        {"a": {}, "b": None, "c": [(), {"d": None}]},
        {"mlp/~/linear_0": {"w": W, "b": B}, "mlp/~/linear_1": {"w": W}},
        {"a/b": {"c": W}, "a": {"b/d": B}, "a/": B, "": W, "//": {"": B}},
        {"layer.0.weight": W, "layer.0.bias": B},
        [(W, B), (W.T, B)],
        ([W], [B]),
        {"layers": [W, {"b": (B,)}]},
        {0: {1: W}, 10: {"1": B}},
        {"a": W, "a/b": B},
        {"list": W, "dict": ["tuple", B][1:], "tuple": (B, None)},
        {'\u00e9\u4e2d "\\\n': W},
    ],
)
def test_plain_containers_come_back_as_they_were(round_trip, params):
    assert_same(round_trip(params), params)


def test_other_containers_come_back_as_dicts_by_names(round_trip):
    layer = Layer(W, [B, W])
    params = {"pair": Pair(W, (B, None)), "layer": layer, "none": Pair(None, {})}
    assert_same(
        round_trip(params),
        {
            "pair": {"w": W, "b": (B, None)},
            "layer": {"w": W, "heads": [B, W]},
            "none": {"w": None, "b": {}},
        },
    )
    assert_same(round_trip(layer), {"w": W, "heads": [B, W]})


def test_boxes_come_back_as_what_they_hold(round_trip):
    boxed = nn.Dense(
        2,
        kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "m")),
        bias_init=nn.with_logical_partitioning(nn.initializers.ones, ("m",)),
    ).init(jax.random.key(0), jnp.ones((1, 5)))
    kernel, bias = np.ones((5, 2), np.float32), np.ones(2, np.float32)
    assert_same(round_trip(boxed), {"params": {"kernel": kernel, "bias": bias}})


@pytest.mark.parametrize("array", [W, jnp.asarray(B), np.ones(0, np.float32)])
def test_what_is_loaded_is_writable(round_trip, array):
    loaded = round_trip({"a": array, "b": [array]})
    for x in jax.tree.leaves(loaded):
        assert x.flags.writeable
        x[...] = 7  # each has its memory to itself
        assert (x == 7).all()
    assert sum(x.sum() for x in jax.tree.leaves(loaded)) == 14 * np.size(array)


def test_frozen_dict_and_flax_parameters(round_trip):
    params = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 5)))
    assert_same(round_trip(FrozenDict(params)), params)


def test_nnx_states_with_and_without_variables(round_trip):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(2)])

    state = nnx.state(Model(nnx.Rngs(0)))
    pure = nnx.to_pure_dict(state)
    assert set(pure["layers"]) == {0, 1}
    for given in (state, nnx.as_pure(state), pure):
        loaded = round_trip(given)
        assert_same(loaded, pure)
    model = Model(nnx.Rngs(1))
    nnx.update(model, loaded)
    assert_same(nnx.to_pure_dict(nnx.state(model)), pure)


@hypothesis.given(
    st.recursive(
        st.none() | st.just(W) | st.just(B),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text("ab/.~", max_size=3), inner, max_size=3)
            | st.dictionaries(st.integers(-2, 12), inner, max_size=3)
        ),
        max_leaves=8,
    ).filter(lambda tree: not isinstance(tree, np.ndarray | None))
)
@many
def test_trees_come_back_or_are_refused_before_anything_is_written(tmp_path, params):
    names = [
        "/".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    for save, load in FORMATS.values():
        (tmp_path / "model").unlink(missing_ok=True)
        if len(set(names)) == len(names):
            save(params, tmp_path / "model")
            assert_same(load(tmp_path / "model"), params)
        else:
            with pytest.raises(ValueError, match="must have a name of its own"):
                save(params, tmp_path / "model")
            assert not list(tmp_path.iterdir())


def test_dense_names_are_key_paths_that_safetensors_reads(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    params = {"params": {"Dense_0": {"kernel": normal((2, 3))}}}
    export.save_dense(params, tmp_path / "x.safetensors")
    loaded = safetensors.load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(
        loaded["params/Dense_0/kernel"], params["params"]["Dense_0"]["kernel"]
    )


@hypothesis.given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.uint16]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=20),
        fill=st.just(0),
    ),
    st.booleans(),
)
@many
def test_sparse_round_trip_property(tmp_path, x, as_bfloat16):
    if as_bfloat16:
        with np.errstate(all="ignore"):
            x = x.astype(jnp.bfloat16)
    export.save_sparse({"x": x}, tmp_path / "x.npz")
    loaded = export.load_sparse(tmp_path / "x.npz")["x"]
    assert (loaded.dtype, loaded.shape) == (x.dtype, x.shape)
    # Equal to the bit, but for the sign of zeros.
    assert np.where(x == 0, 0, loaded).tobytes() == np.where(x == 0, 0, x).tobytes()
    assert not loaded[x == 0].any()


def test_negative_zeros_of_sparse_leaves_are_positive(tmp_path):
    x = np.full(100, -0.0, np.float32)
    export.save_sparse({"x": x}, tmp_path / "x.npz")
    assert not np.signbit(export.load_sparse(tmp_path / "x.npz")["x"]).any()


def test_sizes_fall_with_sparsity():
    params = {"kernel": normal((256, 256)), "bias": normal(256)}
    tables = [
        export.file_sizes(params, masks.magnitude_mask(params, s))
        for s in (0, 0.5, 0.8, 0.9, 0.95, 0.98, 1)
    ]
    sizes = np.array([table.to_dict()["bytes"] for table in tables])
    assert (sizes[:, :2] == sizes[0, 0]).all()
    assert (np.diff(sizes[:, 2:], axis=0) < 0).all()
    assert (sizes[1:6, 3] < sizes[1:6, 2]).all()
    assert sizes[4, 3] < sizes[4, 0] / 4
    assert sizes[0, 0] > 4 * 257 * 256


def test_sizes_without_a_mask_take_parameters_as_they_are(tmp_path):
    params = {"x": normal((64, 64), 0.9)}
    table = export.file_sizes(params)
    columns = table.to_dict()
    assert columns == export.file_sizes(params, {"x": params["x"] != 0}).to_dict()
    export.save_sparse(params, tmp_path / "x")
    assert columns["bytes"][-1] == (tmp_path / "x").stat().st_size
    assert columns["ratio"] == [b / columns["bytes"][0] for b in columns["bytes"]]
    assert str(table).splitlines()[0].split() == ["file", "bytes", "ratio"]
    assert table.to_csv(tmp_path / "t.csv") == (tmp_path / "t.csv").read_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
def test_bcoo_equals_dense(sparsity, dtype):
    kernel = jnp.asarray(normal((30, 20), sparsity), dtype)
    params = {"layer": {"kernel": kernel, "bias": jnp.ones(20, dtype)}}
    layer = export.to_bcoo(params)["layer"]
    assert isinstance(layer["kernel"], sparse.BCOO)
    assert layer["kernel"].nse == 600 - round(600 * sparsity)
    assert layer["bias"] is params["layer"]["bias"]
    assert layer["kernel"].dtype == dtype
    np.testing.assert_array_equal(layer["kernel"].todense(), kernel)
    product = jax.jit(lambda x, w: x @ w)
    x = jnp.asarray(normal((7, 30), seed=1), dtype)
    tolerance = 0.1 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(
        product(x, layer["kernel"]).astype(np.float32),
        product(x, kernel).astype(np.float32),
        atol=tolerance,
        rtol=tolerance,
    )


def test_bcoo_of_chosen_leaves_and_a_sparsified_model():
    # sparsify has no rule for nn.relu, which has a derivative of its own.
    model = nn.Sequential([nn.Dense(8), lambda x: jnp.maximum(x, 0), nn.Dense(3)])
    x = normal((4, 6))
    params, _ = masks.prune(model.init(jax.random.key(0), x), 0.8)
    converted = export.to_bcoo(
        params, where=lambda path, leaf: path[1].key == "layers_2" and leaf.ndim > 1
    )["params"]
    assert isinstance(converted["layers_2"]["kernel"], sparse.BCOO)
    assert isinstance(converted["layers_0"]["kernel"], jax.Array)
    np.testing.assert_allclose(
        jax.jit(sparse.sparsify(model.apply))(export.to_bcoo(params), x),
        model.apply(params, x),
        rtol=1e-5,
    )


def test_bcoo_of_convolution_kernels_and_zero_size():
    params = {"conv": jnp.asarray(normal((3, 3, 2, 4), 0.9)), "none": jnp.ones((0, 2))}
    dense = jax.tree.map(
        lambda m: m.todense(),
        export.to_bcoo(params),
        is_leaf=lambda node: isinstance(node, sparse.BCOO),
    )
    jax.tree.map(np.testing.assert_array_equal, dense, params)


# Bad arguments.

LINEAR = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
DICT = {"w": jnp.ones((2, 2))}
NOT_PARAMS = {
    "None": (None, "params must be .*; got None"),
    "a path": ("model.npz", "params must be an array; got 'model.npz'"),
    "paths": (["a.npz", "b.npz"], r"params\[0\] must be an array; got 'a.npz'"),
    "a linen module": (nn.Dense(2), "params must be .* got the linen module Dense"),
    "an nnx module": (LINEAR, r"params must be .* nnx\.state\(model, nnx\.Param\)"),
    "an nnx optimizer": (
        nnx.Optimizer(LINEAR, optax.adam(1e-3), wrt=nnx.Param),
        r"params must be .* nnx\.state\(model, nnx\.Param\)",
    ),
    "a TrainState": (
        train_state.TrainState.create(
            apply_fn=None, params=DICT, tx=optax.sgd(0.1, 0.9)
        ),
        r"params must be .* take state\.params",
    ),
    "a state": (optax.adam(1e-3).init(DICT), r"params must be .*\(ScaleByAdamState"),
    "a state without arrays": (
        optax.sgd(0.1).init(DICT),
        r"params must .*\(EmptyState",
    ),
    "an optimizer": (optax.adam(1e-3), "params must be .* an optax transformation"),
    "shapes": (jax.eval_shape(lambda: DICT), r"params.* must .* values, outside jit"),
    "a function": (jnp.sum, "params must be an array; got"),
}


def one_screen(error):
    assert str(error).count("\n") == 0
    assert len(str(error)) < 600


@pytest.mark.parametrize(("params", "message"), NOT_PARAMS.values(), ids=NOT_PARAMS)
@pytest.mark.parametrize(
    "call",
    [
        lambda params, folder: export.save_dense(params, folder / "model"),
        lambda params, folder: export.save_sparse(params, folder / "model"),
        lambda params, folder: export.file_sizes(params),
        lambda params, folder: export.to_bcoo(params),
    ],
    ids=["save_dense", "save_sparse", "file_sizes", "to_bcoo"],
)
def test_what_is_no_tree_of_parameters(tmp_path, call, params, message):
    with pytest.raises(ValueError, match=message) as raised:
        call(params, tmp_path)
    one_screen(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("params", "message"),
    [
        (np.ones(2), r"params must be a dict.* write \{'w': array\}"),
        ({"a": {(1, 2): np.ones(2)}}, r"params\['a'\] must .* strings or integers"),
        ({"a": {True: np.ones(2)}}, r"params\['a'\] must .* strings or integers"),
        ({"a": np.ones(2, complex)}, r"params\['a'\] must .* of dtype complex128"),
        ({"a": np.array(["x"])}, r"params\['a'\] must .* of dtype <U1. Allowed are"),
        ({"a": jax.random.key(0)}, r"params\['a'\] must .* of dtype key<fry>"),
        (
            {"a": sparse.BCOO.fromdense(jnp.eye(2))},
            r"params\['a'\] must have children with names.* got a BCOO",
        ),
        ({"a/b": W, "a": {"b": W}}, r"params\['a/b'\] must have a name of its own"),
        ({"a": [W], "a/0": W}, r"must have a name of its own; 'a/0' is that of anoth"),
        (
            {"__metadata__": W},
            "must have a name of its own; '__metadata__' is reserved",
        ),
    ],
)
def test_what_cannot_be_saved(tmp_path, name, params, message):
    (tmp_path / "model").write_text("old")
    with pytest.raises(ValueError, match=message) as raised:
        FORMATS[name][0](params, tmp_path / "model")
    one_screen(raised.value)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_nothing_is_saved_or_converted_under_jit(tmp_path):
    for call, message in (
        (
            lambda p: export.save_dense(p, tmp_path / "x"),
            r"params\['w'\] must hold val",
        ),
        (
            lambda p: export.save_sparse(p, tmp_path / "x"),
            r"params\['w'\] must hold va",
        ),
        (export.to_bcoo, "params must be a tree of arrays with values, outside jit"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            jax.jit(call)(DICT)
        one_screen(raised.value)
    deleted = jnp.ones((2, 2))
    deleted.delete()
    with pytest.raises(ValueError, match=r"params\['w'\] must hold values"):
        export.save_dense({"w": deleted}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [None, 3, ["a", "b"], b"a", DICT])
def test_what_is_no_path(path):
    for save, load in FORMATS.values():
        for call in (lambda save=save: save(DICT, path), lambda load=load: load(path)):
            message = r"path must be a string or a pathlib\.Path; got"
            with pytest.raises(ValueError, match=message):
                call()


def test_paths_without_files(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for save, load in FORMATS.values():
        for name in ("folder", "pipe"):
            for call in (lambda path, save=save: save(DICT, path), load):
                with pytest.raises(
                    ValueError, match=f"path must be a file; .*{name} is"
                ):
                    call(tmp_path / name)
        with pytest.raises(FileNotFoundError, match=r"there is no file .*model\."):
            load(tmp_path / "model")
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*none\."):
            save(DICT, tmp_path / "none" / "model")


def test_masks_and_predicates_that_do_not_fit():
    for mask in (0.5, [jnp.ones((2, 2), bool)], LINEAR, {"w": jnp.ones((2, 3), bool)}):
        with pytest.raises(ValueError, match=r"^mask") as raised:
            export.file_sizes(DICT, mask)
        one_screen(raised.value)
    for where in (0.5, "w", {"w": True}, lambda path, leaf: path[-1] == "w"):
        with pytest.raises(ValueError, match=r"^where must") as raised:
            export.to_bcoo(DICT, where=where)
        one_screen(raised.value)


# Saving is atomic.


@pytest.mark.parametrize("name", FORMATS)
def test_a_failure_while_writing_leaves_the_old_file(tmp_path, name, monkeypatch):
    save, load = FORMATS[name]
    file = tmp_path / "model"
    save({"a": W}, file)

    def full(data):
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "_bytes", full)
    monkeypatch.setattr(export, "_checksum", lambda tree, leaves: "0")
    with pytest.raises(OSError, match="no space left"):
        save({"a": B}, file)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [file]
    assert_same(load(file), {"a": W})
    save({"a": B}, file)
    assert list(tmp_path.iterdir()) == [file]
    assert_same(load(file), {"a": B})


def test_links_are_followed_and_equal_parameters_are_equal_files(tmp_path):
    for save, load in FORMATS.values():
        (tmp_path / "link").unlink(missing_ok=True)
        save({"a": B}, tmp_path / "model")
        (tmp_path / "link").symlink_to("model")
        save({"a": W}, tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert_same(load(tmp_path / "model"), {"a": W})
        save({"a": W}, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()


# Damaged and hostile files.

SMALL = {
    "l/0": [normal((4, 9), 0.8), (np.arange(3), None)],
    "b": np.array([True, False]),
}


def refused_by(name, file, message=""):
    said = rf"is damaged, or no file for load_{name}: .*{message}"
    with pytest.raises(ValueError, match=said) as raised:
        FORMATS[name][1](file)
    one_screen(raised.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name, (save, _) in FORMATS.items():
        save(SMALL, folder / name)
    return {name: (folder / name).read_bytes() for name in FORMATS}


def assert_same_or_refused(name, file, content):
    file.write_bytes(content)
    try:
        loaded = FORMATS[name][1](file)
    except ValueError:
        refused_by(name, file)
        return False
    assert_same(loaded, SMALL)
    return True


@pytest.mark.parametrize("name", FORMATS)
@hypothesis.given(st.data())
@hypothesis.settings(many, max_examples=400)
def test_any_byte_that_changes_is_harmless_or_seen(saved, tmp_path, name, data):
    content = bytearray(saved[name])
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    assert_same_or_refused(name, tmp_path / "model", content)


@pytest.mark.parametrize("name", FORMATS)
def test_every_bit_of_the_data_is_guarded(saved, tmp_path, name):
    content = saved[name]
    if name == "dense":
        first = 8 + int.from_bytes(content[:8], "little")
        places = range(first, len(content))
    else:
        # The data of the first entry with weights.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            info = archive.getinfo("0.values")
        first = info.header_offset + 30 + len(info.filename)
        # The last byte holds bits that mean nothing.
        places = range(first, first + info.compress_size - 1)
    for at in places:
        changed = bytearray(content)
        changed[at] ^= 1 << (at % 8)
        assert not assert_same_or_refused(name, tmp_path / "model", changed)


@pytest.mark.parametrize("name", FORMATS)
def test_files_that_are_cut_anywhere(saved, tmp_path, name):
    for size in range(len(saved[name])):
        cut = saved[name][:size]
        assert not assert_same_or_refused(name, tmp_path / "model", cut)
    both = saved[name] + saved[name][len(saved[name]) // 2 :]
    assert_same_or_refused(name, tmp_path / "model", both)


@pytest.mark.parametrize("name", FORMATS)
@hypothesis.given(st.binary(max_size=200))
@many
def test_any_bytes_are_refused(tmp_path, name, content):
    (tmp_path / "model").write_bytes(content)
    refused_by(name, tmp_path / "model")


def test_files_of_other_kinds(tmp_path, saved):
    file = tmp_path / "model"
    np.save(tmp_path / "other.npy", np.ones(3))
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    others = [(tmp_path / f"other.{kind}").read_bytes() for kind in ("npy", "npz")]
    for name, other in (("dense", "sparse"), ("sparse", "dense")):
        for content in (*others, saved[other], b"", b"PK\x03\x04abc"):
            file.write_bytes(content)
            refused_by(name, file)


def dense_file(file, header, body=b""):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + body)


def tensor(dtype="F32", shape=(2,), data_offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


OURS = {"prunadag_optax.tree": '"a"', "prunadag_optax.crc32": "00000000"}


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ({"a": tensor(shape=[10**12])}, 8, "8 bytes are no float32 array"),
        ({"a": tensor(shape=[10**30])}, 8, "8 bytes are no float32 array"),
        ({"a": tensor(shape=[10**30, 0], data_offsets=[0, 0])}, 0, ""),
        ({"a": tensor(shape=[1] * 99, data_offsets=[0, 4])}, 4, ""),
        ({"a": tensor(shape=[-2, -1])}, 8, "a shape must be of integers >= 0"),
        ({"a": tensor(shape=[float("nan")])}, 8, "a shape must be of integers >= 0"),
        ({"a": tensor(shape=[2.0])}, 8, "a shape must be of integers >= 0"),
        ({"a": tensor(shape=[True, 2])}, 8, "a shape must be of integers >= 0"),
        ({"a": tensor(shape=2)}, 8, "not iterable"),
        ({"a": tensor("F8_E4M3", [8])}, 8, "'a' has dtype 'F8_E4M3'; allowed are"),
        ({"a": tensor(["F32"])}, 8, ""),
        ({"a": tensor("F64")}, 8, "8 bytes are no float64 array"),
        ({"a": tensor("BOOL", [8])}, b"\0\1\2\0\0\0\0\0", "bool has bytes other than"),
        ({"a": tensor(data_offsets=[0, 10**30])}, 8, "'a' does not follow"),
        ({"a": tensor(data_offsets=[8, 0])}, 8, "'a' does not follow"),
        ({"a": tensor(data_offsets=[-8, 0])}, 8, "'a' does not follow"),
        ({"a": tensor(data_offsets=[0, 8, 16])}, 8, ""),
        ({"a": tensor()}, 9, "1 bytes are in no array"),
        ({"a": tensor(), "b": tensor()}, 8, "'b' does not follow"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "it has no 'data_offsets'"),
        ({"a": 3}, 8, ""),
        ([1, 2], 8, ""),
        (b'{"a":1,"a":2}', 8, "two entries of its header have one name"),
        (b"[" * 100_000, 8, "recursion"),
        (b'{"a":' * 100_000, 8, "recursion"),
        ({"__metadata__": OURS, "a": tensor()}, 8, "its checksum differs"),
        (
            {"__metadata__": {**OURS, "prunadag_optax.tree": "[" * 10**5}},
            0,
            "recursion",
        ),
        ({"__metadata__": {"prunadag_optax.tree": "null"}}, 0, "it has no 'prunadag_"),
        ({"__metadata__": {"prunadag_optax.crc32": "0"}}, 0, "it has no 'prunadag_"),
    ],
)
def test_hostile_dense_files(tmp_path, header, body, message):
    file = tmp_path / "model"
    dense_file(file, header, bytes(body))
    refused_by("dense", file, message)


def test_dense_headers_longer_than_the_file(tmp_path):
    for size in (3, 10**8 + 1, 2**63, 2**64 - 1):
        (tmp_path / "model").write_bytes(size.to_bytes(8, "little") + b"{}")
        refused_by("dense", tmp_path / "model", "its header is longer than the file")


def sparse_file(file, leaf, entries, tree='"w"', compression=zipfile.ZIP_DEFLATED):
    header = '{"format": 2, "tree": %s, "leaves": %s}'
    header = header % (tree, json.dumps([leaf] if leaf else []))
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in {"header.json": header, **entries}.items():
            archive.writestr(name, content)


MASK = {"0.mask": np.packbits([True, False, True]).tobytes()}
ONE, TWO = ({"0.values": bytes(4 * n)} for n in (1, 2))


@pytest.mark.parametrize(
    ("leaf", "entries", "message"),
    [
        (
            ["w", "float32", [10**12]],
            {**MASK, **TWO},
            "0.mask must be 125000000000 byt",
        ),
        (["w", "float32", [10**30]], {**MASK, **TWO}, "0.mask must be 125"),
        (["w", "float32", [10**12]], TWO, "0.values must be 4000000000000 bytes"),
        (["w", "float32", [10**30, 0]], {"0.mask": b"", "0.values": b""}, ""),
        (["w", "float32", [100]], {**MASK, **TWO}, "0.mask must be 13 bytes"),
        (["w", "float32", [8]], {"0.mask": b"\xff", **ONE}, "0.values must be 32 byte"),
        (["w", "float32", [3]], {**MASK, **ONE}, "0.values must be 8 bytes"),
        (["w", "float64", [3]], {**MASK, **TWO}, "0.values must be 16 bytes"),
        (["w", "float32", [3]], TWO, "0.values must be 12 bytes"),
        (["w", "float32", [2]], {}, "it has no '0.values'"),
        (["w", "float32", [3]], MASK, "it has no '0.values'"),
        (["w", "float32", [2]], {**TWO, "1.values": b""}, "needs its entry '1.values'"),
        (["w", "float32", [-2]], TWO, "a shape must be of integers >= 0"),
        (["w", "float32", [float("nan")]], TWO, "a shape must be of integers >= 0"),
        (["w", "float32", [float("inf")]], TWO, "a shape must be of integers >= 0"),
        (["w", "float32", ["2"]], TWO, "a shape must be of integers >= 0"),
        (["w", "float32", None], TWO, "not iterable"),
        (["w", "float32"], TWO, "unpack"),
        (["w", "complex64", [1]], TWO, "has dtype 'complex64'"),
        (["w", "object", [1]], TWO, "has dtype 'object'"),
        (["w", ["float32"], [2]], TWO, ""),
        (
            ["w", "bool", [8]],
            {"0.values": bytes(range(8))},
            "bool has bytes other than",
        ),
        (["v", "float32", [2]], TWO, "it has no 'w'"),
        ([["w"], "float32", [2]], TWO, ""),
        (None, {}, "it has no 'w'"),
    ],
)
def test_hostile_sparse_files(tmp_path, leaf, entries, message):
    sparse_file(tmp_path / "model", leaf, entries)
    refused_by("sparse", tmp_path / "model", message)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("null", "its tree has no place for 'w'"),
        ('["list", "w", "w"]', "it has no 'w'"),
        ('["set", "w"]', "none of dicts, lists and tuples"),
        ('["dict", ["a"], "w", null]', "none of dicts, lists and tuples"),
        ('["dict", ["a", "a"], "w", null]', "none of dicts, lists and tuples"),
        ('["dict", [true], "w"]', "none of dicts, lists and tuples"),
        ('["dict", [["a"]], "w"]', "none of dicts, lists and tuples"),
        ("{}", "none of dicts, lists and tuples"),
        ('["list", ' * 10**5 + "1", "recursion"),
        ('["list", ' * 900 + '"w"' + "]" * 900, "recursion"),
        ('"w", "tree": "w"', "two entries of its header have one name"),
    ],
)
def test_hostile_trees(tmp_path, tree, message):
    sparse_file(tmp_path / "model", ["w", "float32", [2]], TWO, tree)
    refused_by("sparse", tmp_path / "model", message)


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_other_compressions_are_refused(tmp_path, compression):
    leaf = ["w", "float32", [2]]
    sparse_file(tmp_path / "model", leaf, TWO, compression=compression)
    refused_by("sparse", tmp_path / "model", "header.json must be .*, deflated")


def test_a_whole_sparse_file_by_hand_loads(tmp_path):
    # So that the files above are refused for what is wrong with each.
    sparse_file(
        tmp_path / "model", ["w", "float32", [3]], {**MASK, **TWO}, '["list","w"]'
    )
    assert_same(export.load_sparse(tmp_path / "model"), [np.zeros(3, np.float32)])


def test_encrypted_and_repeated_entries(tmp_path, saved):
    file = tmp_path / "model"
    for at in range(len(saved["sparse"])):
        if saved["sparse"][at : at + 4] == b"PK\x01\x02":
            content = bytearray(saved["sparse"])
            content[at + 8] |= 1
            file.write_bytes(content)
            refused_by("sparse", file, "encrypted")
    archive = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED)
    archive.writestr("header.json", '{"format": 2, "tree": null, "leaves": []}')
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("header.json", "")
    archive.close()
    refused_by("sparse", file, "two of its entries have one name")


def test_a_bomb_is_not_inflated(tmp_path, monkeypatch):
    # A megabyte of zeros for two values: refused by its size.
    sparse_file(
        tmp_path / "model", ["w", "float32", [3]], {"0.values": bytes(2**20), **MASK}
    )
    read = []
    inflate = zipfile.ZipExtFile.read
    monkeypatch.setattr(
        zipfile.ZipExtFile,
        "read",
        lambda stream, n=-1: read.append(stream.name) or inflate(stream, n),
    )
    refused_by("sparse", tmp_path / "model", "0.values must be 8 bytes")
    assert read == ["header.json", "0.mask"]


def test_a_later_format_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", '{"format": 3, "leaves": []}')
    refused_by("sparse", tmp_path / "x", "it has format 3, not 2")


def test_dense_files_from_elsewhere(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    file = tmp_path / "model"
    torch = {"layer.0.weight": np.ones(2), "b": np.zeros(1)}
    safetensors.save_file(torch, file, {"format": "pt"})
    assert_same(export.load_dense(file), torch)
    safetensors.save_file({"a/b/c": np.ones(2), "a/d": np.zeros((0, 3))}, file)
    nested = {"a": {"b": {"c": np.ones(2)}, "d": np.zeros((0, 3))}}
    assert_same(export.load_dense(file), nested)
    assert export.load_dense(file)["a"]["d"].flags.writeable
    safetensors.save_file({"a": np.ones(2), "a/b": np.zeros(1)}, file)
    refused_by("dense", file, "is the name of a leaf and of a node")


def test_dense_files_are_read_elsewhere(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    params = {
        "mlp/~/0": [x.astype(t) for x in (W, W.T) for t in DTYPES if t != np.bool_]
    }
    params["flags"] = [np.array([True, False]), np.zeros((0, 3)), np.float32(3)]
    export.save_dense(params, tmp_path / "model")
    loaded = safetensors.load_file(tmp_path / "model")
    wanted = {f"mlp/~/0/{i}": x for i, x in enumerate(params["mlp/~/0"])}
    wanted |= {f"flags/{i}": np.asarray(x) for i, x in enumerate(params["flags"])}
    assert_same(loaded, wanted)


def test_two_leaves_of_one_name(tmp_path):
    @jax.tree_util.register_pytree_with_keys_class
    class Unsorted(dict):
        def tree_flatten_with_keys(self):
            keys = [jax.tree_util.DictKey(key) for key in self]
            return list(zip(keys, self.values(), strict=True)), tuple(self)

        @classmethod
        def tree_unflatten(cls, keys, children):
            return cls(zip(keys, children, strict=True))

    with pytest.raises(ValueError, match="name of its own; '1' is that of another"):
        export.save_sparse(Unsorted({1: np.ones(1), "1": np.ones(1)}), tmp_path / "x")


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for save, load in FORMATS.values():
        save(SMALL, tmp_path / "x")
        assert_same(load(tmp_path / "x"), SMALL)
