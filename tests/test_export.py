"""Files of pruned parameters, their sizes, and BCOO kernels."""

import json
import sys

import flax.linen as nn
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.experimental import sparse

from prunadag_optax import export, masks

FORMATS = {
    "dense": (export.save_dense, export.load_dense),
    "sparse": (export.save_sparse, export.load_sparse),
}
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


def test_empty_tree_and_what_has_no_leaves(round_trip):
    assert round_trip({}) == {}
    assert round_trip({"a": {}, "b": None}) == {}


def test_frozen_dict_and_flax_parameters(round_trip):
    params = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 5)))
    assert_same(round_trip(FrozenDict(params)), params)


def test_nnx_models_by_pure_dict(round_trip):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(2)])

    state = nnx.state(Model(nnx.Rngs(0)))
    pure = nnx.to_pure_dict(state)
    assert_same(nnx.restore_int_paths(round_trip(pure)), pure)
    with pytest.raises(ValueError, match=r"nnx\.to_pure_dict\(state\)"):
        round_trip(state)


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
@hypothesis.settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
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


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("params", "message"),
    [
        (np.ones(2), "params must be a nested dict of arrays; got ndarray"),
        ([np.ones(2)], "params must be a nested dict of arrays; got list"),
        ({"a": [np.ones(2)]}, r"params\['a'\]\[0\].*keys that are strings or integers"),
        ({"a": {"b/c": np.ones(2)}}, r"params\['a'\]\['b/c'\]: keys must not hold '/'"),
        ({"a": {(1, 2): np.ones(2)}}, r"keys that are strings or integers"),
        ({"a": {True: np.ones(2)}}, r"keys that are strings or integers"),
        ({"a": np.ones(2, complex)}, r"params\['a'\] has dtype complex128; allowed"),
        ({"a": np.array(["x"])}, r"params\['a'\] has dtype <U1; allowed"),
        ({"a": object()}, r"params\['a'\] has dtype object; allowed"),
        ({"a": jax.random.key(0)}, r"params\['a'\] has dtype key<fry>; allowed"),
    ],
)
def test_what_cannot_be_saved(tmp_path, name, params, message):
    with pytest.raises(ValueError, match=message):
        FORMATS[name][0](params, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FORMATS)
def test_files_that_are_missing_or_not_ours(tmp_path, name):
    load = FORMATS[name][1]
    file = tmp_path / "model"
    with pytest.raises(FileNotFoundError, match=r"there is no file .*model\."):
        load(file)
    said = {
        "dense": "model is not a safetensors file",
        "sparse": "model is not a whole file written by save_sparse",
    }[name]
    for content in (b"", b"not a model, but longer than eight bytes", b"PK\x03\x04abc"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            load(file)
    np.save(tmp_path / "other.npy", np.ones(3))
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    for other in ("other.npy", "other.npz"):
        file.write_bytes((tmp_path / other).read_bytes())
        with pytest.raises(ValueError, match=said):
            load(file)


def test_truncated_and_altered_files(tmp_path):
    file = tmp_path / "model"
    for name, (save, load) in FORMATS.items():
        save({"x": normal((64, 64), 0.9)}, file)
        whole = file.read_bytes()
        for size in (10, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="model is not a"):
                load(file)
        if name == "sparse":
            middle = len(whole) // 2
            file.write_bytes(whole[:middle] + b"\0" * 8 + whole[middle + 8 :])
            with pytest.raises(ValueError, match="not a whole file"):
                load(file)


@pytest.mark.parametrize(
    ("leaf", "values"),
    [
        (["x", "float32", [3]], np.ones(2, np.float32)),
        (["x", "float32", [2]], np.ones(2)),
        (["x", "complex64", [2]], np.ones(2, np.complex64)),
        (["x", "nothing", [2]], np.ones(2)),
        (["x", "float32"], np.ones(2, np.float32)),
    ],
)
def test_headers_that_do_not_fit_the_values(tmp_path, leaf, values):
    header = json.dumps({"format": 1, "leaves": [leaf]})
    np.savez(
        tmp_path / "x.npz",
        allow_pickle=False,
        **{"prunadag_optax": header, "0.values": values},
    )
    with pytest.raises(ValueError, match="not a whole file written by save_sparse"):
        export.load_sparse(tmp_path / "x.npz")


def test_a_later_format_is_named(tmp_path):
    np.savez(tmp_path / "x.npz", prunadag_optax='{"format": 2, "leaves": []}')
    with pytest.raises(ValueError, match="format 2, not 1"):
        export.load_sparse(tmp_path / "x.npz")


def test_dense_files_from_elsewhere(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    file = tmp_path / "model"
    safetensors.save_file({"a.weight": np.ones(2), "b": np.zeros(1)}, file)
    assert_same(export.load_dense(file), {"a.weight": np.ones(2), "b": np.zeros(1)})
    safetensors.save_file({"a": np.ones(2), "a/b": np.zeros(1)}, file)
    with pytest.raises(ValueError, match="is the name of a leaf and of a node"):
        export.load_dense(file)
    safetensors.save_file({"a": np.ones(2, jnp.float8_e4m3fn)}, file)
    with pytest.raises(ValueError, match="holds 'a' with dtype F8_E4M3; allowed are"):
        export.load_dense(file)


def test_two_leaves_of_one_name(tmp_path):
    @jax.tree_util.register_pytree_with_keys_class
    class Unsorted(dict):
        def tree_flatten_with_keys(self):
            keys = [jax.tree_util.DictKey(key) for key in self]
            return list(zip(keys, self.values(), strict=True)), tuple(self)

        @classmethod
        def tree_unflatten(cls, keys, children):
            return cls(zip(keys, children, strict=True))

    with pytest.raises(ValueError, match="two leaves have the name '1'"):
        export.save_sparse(Unsorted({1: np.ones(1), "1": np.ones(1)}), tmp_path / "x")


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    message = r"need safetensors: pip install 'prunadag_optax\[flax\]'"
    params = {"x": normal((3, 3), 0.5)}
    for call in (
        lambda: export.save_dense(params, tmp_path / "x"),
        lambda: export.load_dense(tmp_path / "x"),
        lambda: export.file_sizes(params),
    ):
        with pytest.raises(ImportError, match=message):
            call()
    export.save_sparse(params, tmp_path / "x")
    assert_same(export.load_sparse(tmp_path / "x"), params)
