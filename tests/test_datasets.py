"""The data sets, from tiny files in the formats of the real ones; those if there."""

import gzip
import hashlib
import os
import types
import urllib.error

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis.extra import numpy as hnp
from sklearn.datasets import dump_svmlight_file

from benchmarks import datasets

LOADERS = {
    "mnist": datasets.mnist,
    "fashion-mnist": datasets.fashion_mnist,
    "a9a": datasets.a9a,
    "reged0": datasets.reged0,
    "musk1": datasets.musk1,
    "tinyshakespeare": datasets.tinyshakespeare,
    "cifar10": datasets.cifar10,
}
SHAPES = {
    "mnist": (70_000, 784),
    "fashion-mnist": (70_000, 784),
    "a9a": (48_842, 123),
    "reged0": (500, 999),
    "musk1": (476, 166),
    "cifar10": (4_000, 32, 32, 3),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty local folder, an empty cache, no packages and no network."""
    monkeypatch.setenv("PRUNADAG_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PRUNADAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "_DEBIAN", tmp_path / "packages")

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(datasets, "fetch_openml", unreachable)
    monkeypatch.setattr(datasets.urllib.request, "urlopen", unreachable)
    return tmp_path / "data"


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def fake_openml(monkeypatch, name, data, target):
    def fetch(asked, *, version, **kwargs):
        assert (asked, version) == (name, 1)
        return types.SimpleNamespace(data=data, target=target)

    monkeypatch.setattr(datasets, "fetch_openml", fetch)


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, max_side=4)))
def test_idx_round_trip(tmp_path_factory, array):
    file = tmp_path_factory.mktemp("idx") / "x.gz"
    write(file, idx(array))
    read = datasets._idx(file)
    assert read.shape == array.shape
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08\x01", "no idx file"),
        (idx(np.zeros((2, 3)))[:-1], "should hold 6 bytes, shape .2, 3.* holds 5"),
        (idx(np.zeros((2, 3))) + b"1", "should hold 6 bytes, shape .2, 3.* holds 7"),
    ],
)
def test_idx_says_what_is_wrong(tmp_path, content, message):
    write(tmp_path / "x.gz", content)
    with pytest.raises(ValueError, match=message):
        datasets._idx(tmp_path / "x.gz")


def mnist_files(folder, labels=(7, 0, 1), name="mnist"):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(3, 28, 28))
    parts = {"train": slice(0, 2), "t10k": slice(2, 3)}
    for part, rows in parts.items():
        write(folder / f"{name}/{part}-images-idx3-ubyte.gz", idx(images[rows]))
        write(
            folder / f"{name}/{part}-labels-idx1-ubyte.gz", idx(np.array(labels)[rows])
        )
    return images


def test_mnist_local(folder):
    images = mnist_files(folder)
    features, digits = datasets.mnist()
    np.testing.assert_array_equal(features, images.reshape(3, 784))
    assert features.dtype == np.uint8
    np.testing.assert_array_equal(digits, [7, 0, 1])


def test_labels_that_are_none_are_named(folder):
    mnist_files(folder, labels=(7, 0, 11))
    with pytest.raises(ValueError, match=r"mnist: labels must be among .*\[11\]"):
        datasets.mnist()


def test_part_of_the_files_is_not_enough(folder):
    mnist_files(folder)
    (folder / "mnist/t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(datasets.MissingData):
        datasets.mnist()


def test_mnist_from_openml_is_the_same(folder, monkeypatch):
    images = mnist_files(folder)
    local = datasets.mnist()
    monkeypatch.delenv("PRUNADAG_DATA")
    # OpenML gives float features and the digits as text.
    target = np.array(["7", "0", "1"], object)
    fake_openml(monkeypatch, "mnist_784", images.reshape(3, 784).astype(float), target)
    for ours, theirs in zip(local, datasets.mnist(), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_fashion_mnist_local_packaged_and_from_openml(folder, monkeypatch):
    images = mnist_files(folder, name="fashion-mnist")
    local = datasets.fashion_mnist()
    np.testing.assert_array_equal(local.features, images.reshape(3, 784))
    np.testing.assert_array_equal(local.labels, [7, 0, 1])
    # The folder goes before the package, whose files are others here.
    packages = folder.parent / "packages"
    mnist_files(packages, labels=(3, 3, 5), name="fashion-mnist")
    np.testing.assert_array_equal(datasets.fashion_mnist().labels, [7, 0, 1])
    monkeypatch.delenv("PRUNADAG_DATA")
    np.testing.assert_array_equal(datasets.fashion_mnist().labels, [3, 3, 5])
    (packages / "fashion-mnist/train-labels-idx1-ubyte.gz").unlink()
    target = np.array(["7", "0", "1"], object)
    data = images.reshape(3, 784).astype(float)
    fake_openml(monkeypatch, "Fashion-MNIST", data, target)
    for ours, theirs in zip(local, datasets.fashion_mnist(), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_a9a_local_and_from_openml(folder, monkeypatch):
    rng = np.random.default_rng(1)
    features = rng.integers(2, size=(5, 123)).astype(float)
    # The last feature does not occur in the test file, as in the real one.
    features[3:, -1] = 0
    labels = np.array([1, -1, -1, 1, -1])
    for name, rows in {"a9a.gz": slice(0, 3), "a9a.t.gz": slice(3, 5)}.items():
        plain = folder / "plain"
        plain.parent.mkdir(exist_ok=True)
        dump_svmlight_file(features[rows], labels[rows], str(plain), zero_based=False)
        write(folder / "a9a" / name, plain.read_bytes())
    local = datasets.a9a()
    np.testing.assert_array_equal(local.features, features)
    np.testing.assert_array_equal(local.labels, labels)
    monkeypatch.delenv("PRUNADAG_DATA")
    sparse, target = scipy.sparse.csr_matrix(features), labels.astype(str)
    fake_openml(monkeypatch, "a9a", sparse, target.astype(object))
    for ours, theirs in zip(local, datasets.a9a(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_reged0_local(folder):
    features = np.random.default_rng(2).integers(999, size=(3, 999))
    rows = "\n".join(" ".join(map(str, row)) + " " for row in features)
    write(folder / "reged0/reged0_train.data.gz", rows.encode())
    write(folder / "reged0/reged0_train.targets", b"-1\n1\n1\n")
    found = datasets.reged0()
    np.testing.assert_array_equal(found.features, features)
    np.testing.assert_array_equal(found.labels, [-1, 1, 1])


def test_lengths_that_differ_are_named(folder):
    write(folder / "reged0/reged0_train.data.gz", b" ".join([b"1"] * 999))
    write(folder / "reged0/reged0_train.targets", b"-1\n1\n")
    with pytest.raises(ValueError, match=r"reged0: .* got \(1, 999\) and \(2,\)"):
        datasets.reged0()


def test_musk1_local_and_from_openml(folder, monkeypatch):
    names = ["molecule_name", "conformation_name", *(f"f{i}" for i in range(1, 167))]
    values = np.random.default_rng(3).integers(-200, 200, size=(4, 168))
    table = pd.DataFrame(values, columns=pd.Index(names))
    target = [1, 0, 0, 1]
    text = table.assign(target=target).to_csv(sep="\t", index=False)
    write(folder / "musk/clean1.tsv.gz", text.encode())
    local = datasets.musk1()
    np.testing.assert_array_equal(local.features, values[:, 2:])
    np.testing.assert_array_equal(local.labels, [1, -1, -1, 1])
    monkeypatch.delenv("PRUNADAG_DATA")
    fake_openml(monkeypatch, "clean1", table, pd.Series(target).astype(str))
    for ours, theirs in zip(local, datasets.musk1(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_cifar10_local_and_from_openml(folder, monkeypatch):
    images = np.random.default_rng(4).integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
    (folder / "cifar10").mkdir(parents=True)
    labels = np.array([3, 9], np.uint8)
    np.savez(folder / "cifar10/cifar10_lossless_4000.npz", X=images, y=labels)
    local = datasets.cifar10()
    np.testing.assert_array_equal(local.features, images)
    monkeypatch.delenv("PRUNADAG_DATA")
    planes = images.transpose(0, 3, 1, 2).reshape(2, -1).astype(float)
    fake_openml(monkeypatch, "CIFAR_10", planes, labels.astype(str))
    for ours, theirs in zip(local, datasets.cifar10(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_tinyshakespeare_local(folder):
    write(folder / "tinyshakespeare/input.txt", "Exit, pursued by a bear: €".encode())
    assert datasets.tinyshakespeare() == "Exit, pursued by a bear: €"


def test_download_is_checked_and_kept(folder, monkeypatch, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"Who's there?")
    asked = []

    def fetch(url, timeout):
        asked.append(url)
        return source.open("rb")

    monkeypatch.setattr(datasets.urllib.request, "urlopen", fetch)
    digest = hashlib.sha256(b"Who's there?").hexdigest()
    monkeypatch.setattr(datasets, "_SHAKESPEARE", ("https://somewhere", digest))
    for _ in range(2):
        assert datasets.tinyshakespeare() == "Who's there?"
    assert asked == ["https://somewhere"]
    monkeypatch.setattr(datasets, "_SHAKESPEARE", ("https://somewhere", "0" * 64))
    with pytest.raises(datasets.MissingData, match=f"{digest}, expected 0000"):
        datasets.tinyshakespeare()


@pytest.mark.parametrize("name", list(LOADERS))
@pytest.mark.parametrize("set_", [True, False])
def test_missing_data_says_both_ways(folder, monkeypatch, name, set_):
    if not set_:
        monkeypatch.delenv("PRUNADAG_DATA")
    with pytest.raises(datasets.MissingData) as error:
        LOADERS[name]()
    message = str(error.value)
    assert "PRUNADAG_DATA" in message
    assert (str(folder) if set_ else "not set") in message
    assert ("http" if name == "reged0" else "network to download") in message
    subfolder = {"musk1": "musk"}.get(name, name)
    assert f"{subfolder}/" in message


def test_cache_folder_without_a_choice(monkeypatch, tmp_path):
    monkeypatch.delenv("PRUNADAG_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert datasets.cache_folder() == tmp_path / "prunadag_optax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets.cache_folder() == tmp_path / ".cache" / "prunadag_optax"


@pytest.mark.skipif("PRUNADAG_DATA" not in os.environ, reason="no folder of real data")
@pytest.mark.parametrize("name", list(SHAPES))
def test_real_data(name, monkeypatch):
    monkeypatch.setattr(datasets, "fetch_openml", lambda *a, **k: pytest.skip("absent"))
    try:
        features, labels = LOADERS[name]()
    except datasets.MissingData:
        pytest.skip("absent")
    assert features.shape == SHAPES[name]
    assert labels.shape == features.shape[:1]
    # Every class occurs, and no class is all there is.
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    images = ("mnist", "fashion-mnist", "cifar10")
    assert len(shares) == (10 if name in images else 2)
    assert 0.05 < shares.min() <= shares.max() < 0.95
