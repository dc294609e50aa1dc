"""The data sets of the benchmarks: from a local folder, else downloaded.

Each function looks for its files in the folder that the environment variable
PRUNADAG_DATA names, in a subfolder of its own:

    mnist/            the four idx files (train-images-idx3-ubyte.gz, ...)
    fashion-mnist/    the same four
    a9a/              a9a.gz and a9a.t.gz, in the format of LIBSVM
    reged0/           reged0_train.data.gz and reged0_train.targets
    musk/             clean1.tsv.gz
    tinyshakespeare/  input.txt
    cifar10/          cifar10_lossless_4000.npz

Fashion-MNIST is also found where Debian's package dataset-fashion-mnist puts it. What
is not there is downloaded from its public source where it has one: from OpenML by
scikit-learn, which keeps it in its own cache (`sklearn.datasets.get_data_home`), or
from its web page, kept in `cache_folder`. Failing that, `MissingData` says both ways.
Files that are there but are not what they should be raise ValueError, which says what
is wrong.
"""

import gzip
import hashlib
import os
import pathlib
import urllib.request
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
from sklearn.datasets import fetch_openml, load_svmlight_file

_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
    "tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
# Where Debian's package dataset-fashion-mnist puts its files.
_DEBIAN = pathlib.Path("/usr/share/datasets")
_CAUSALITY = "http://www.causality.inf.ethz.ch/challenge.php?page=datasets"


class MissingData(Exception):  # noqa: N818 (it says what is wrong, as KeyError does)
    """A data set that is neither in the local folder nor to be downloaded."""


class Examples(NamedTuple):
    """Inputs and the class of each."""

    features: np.ndarray  # shape [examples, features], or of images
    labels: np.ndarray  # shape [examples]


def cache_folder() -> pathlib.Path:
    """Where results that take long to compute, and downloads, are kept.

    Returns:
      The folder that PRUNADAG_CACHE names, else `prunadag_optax` in the user's cache
      folder; it need not exist yet.

    Examples:
      >>> import os, pathlib
      >>> os.environ["PRUNADAG_CACHE"] = "somewhere"
      >>> cache_folder() == pathlib.Path("somewhere")
      True
      >>> del os.environ["PRUNADAG_CACHE"]
    """
    if chosen := os.environ.get("PRUNADAG_CACHE"):
        return pathlib.Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "prunadag_optax"


def mnist() -> Examples:
    """MNIST: uint8 images of shape [70000, 784] in 0..255, and their digits.

    The first 60,000 are the training images.
    """
    images, digits = _find(
        "mnist", _idx_names("mnist"), _idx_examples, lambda: _openml("mnist_784")
    )
    return _checked(
        "mnist", images.astype(np.uint8), digits.astype(np.int64), (784,), range(10)
    )


def fashion_mnist() -> Examples:
    """Fashion-MNIST: uint8 images of shape [70000, 784] in 0..255, and classes 0..9.

    The first 60,000 are the training images.
    """
    names = _idx_names("fashion-mnist")
    packaged = [_DEBIAN / name for name in names]

    def elsewhere() -> Examples:
        if all(path.is_file() for path in packaged):
            return _idx_examples(*packaged)
        return _openml("Fashion-MNIST")

    images, labels = _find("fashion-mnist", names, _idx_examples, elsewhere)
    return _checked(
        "fashion-mnist",
        images.astype(np.uint8),
        labels.astype(np.int64),
        (784,),
        range(10),
    )


def a9a() -> Examples:
    """Adult as a9a: float64 0/1 features of shape [48842, 123], labels -1 and +1.

    The first 32,561 are the training set.
    """

    def local(*files: pathlib.Path) -> Examples:
        parts = [load_svmlight_file(str(file), n_features=123) for file in files]
        return Examples(
            np.concatenate([features.toarray() for features, _ in parts]),
            np.concatenate([labels for _, labels in parts]),
        )

    # OpenML's file is sparse, which scikit-learn reads by this parser only.
    features, labels = _find(
        "a9a",
        ["a9a/a9a.gz", "a9a/a9a.t.gz"],
        local,
        lambda: _openml("a9a", as_frame=False, parser="liac-arff"),
    )
    return _checked("a9a", features, labels.astype(float), (123,), (-1, 1))


def reged0() -> Examples:
    """REGED0, training set: float64 features of shape [500, 999], labels -1 and +1."""

    def local(data: pathlib.Path, targets: pathlib.Path) -> Examples:
        return Examples(np.loadtxt(data, ndmin=2), np.loadtxt(targets, ndmin=1))

    features, labels = _find(
        "reged0",
        ["reged0/reged0_train.data.gz", "reged0/reged0_train.targets"],
        local,
        None,
        f"it can be had from {_CAUSALITY}",
    )
    return _checked("reged0", features, labels, (999,), (-1, 1))


def musk1() -> Examples:
    """Musk, version 1: float64 features of shape [476, 166], labels -1 and +1 (musk).

    The names of the molecule and of its conformation are left out.
    """

    def examples(table: Any, target: Any) -> Examples:
        features = table[[f"f{i}" for i in range(1, 167)]].to_numpy(float)
        return Examples(features, 2 * np.asarray(target, float) - 1)

    def local(file: pathlib.Path) -> Examples:
        table = pd.read_csv(file, sep="\t")
        return examples(table, table["target"])

    # OpenML's "musk" is version 2; this is version 1 under the name of its file.
    features, labels = _find(
        "musk1",
        ["musk/clean1.tsv.gz"],
        local,
        lambda: examples(*_openml("clean1", as_frame=True, parser="auto")),
    )
    return _checked("musk1", features, labels, (166,), (-1, 1))


def tinyshakespeare() -> str:
    """Tiny Shakespeare: 1,115,394 characters of plays."""
    return _find(
        "tinyshakespeare",
        ["tinyshakespeare/input.txt"],
        lambda file: file.read_text(encoding="utf-8"),
        lambda: _download("tinyshakespeare.txt", *_SHAKESPEARE).decode("utf-8"),
    )


def cifar10() -> Examples:
    """CIFAR-10: uint8 images of shape [examples, 32, 32, 3], and their classes 0..9.

    The local file has 4,000 images, the download all 60,000.
    """

    def local(file: pathlib.Path) -> Examples:
        with np.load(file) as arrays:
            return Examples(arrays["X"], arrays["y"])

    def download() -> Examples:
        # There a row is the red, then the green, then the blue plane.
        planes, labels = _openml("CIFAR_10")
        return Examples(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)

    images, labels = _find(
        "cifar10", ["cifar10/cifar10_lossless_4000.npz"], local, download
    )
    return _checked(
        "cifar10",
        images.astype(np.uint8),
        labels.astype(np.int64),
        (32, 32, 3),
        range(10),
    )


def _find(
    name: str,
    files: list[str],
    local: Callable[..., Any],
    download: Callable[[], Any] | None,
    otherwise: str = "",
) -> Any:
    """What `local` makes of the files, else `download`, else MissingData."""
    folder = os.environ.get("PRUNADAG_DATA")
    paths = [pathlib.Path(folder or "", file) for file in files]
    if folder and all(path.is_file() for path in paths):
        return local(*paths)
    advice = (
        f"{name} is not there: put {', '.join(files)} under a folder and name that "
        f"folder in the environment variable PRUNADAG_DATA (now "
        f"{repr(folder) if folder else 'not set'})"
    )
    if download is None:
        raise MissingData(f"{advice}; there is no download, but {otherwise}")
    try:
        return download()
    # A network that is down raises OSError; a source that has changed, ValueError.
    except (OSError, ValueError) as error:
        raise MissingData(
            f"{advice}, or run again with a network to download it ({error})"
        ) from error


def _openml(name: str, as_frame: bool = False, parser: str = "auto") -> Examples:
    with warnings.catch_warnings():
        # Without a network it warns before it raises.
        warnings.filterwarnings("ignore", message="A network error occurred")
        found: Any = fetch_openml(
            name, version=1, as_frame=as_frame, parser=parser, n_retries=1
        )
    features = found.data
    if scipy.sparse.issparse(features):
        features = features.toarray()
    return Examples(features, found.target)


def _download(name: str, url: str, sha256: str) -> bytes:
    """A file from the web, or as kept from last time; ValueError if it has changed."""
    kept = cache_folder() / name
    if kept.is_file():
        content = kept.read_bytes()
    else:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        where = kept if kept.is_file() else url
        raise ValueError(f"{where} has the SHA-256 {found}, expected {sha256}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(content)
    return content


def _idx_names(folder: str) -> list[str]:
    """The files of MNIST and of what has its format: training, then test."""
    return [
        f"{folder}/{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]


def _idx_examples(*files: pathlib.Path) -> Examples:
    """The images of those files, one row each, and their labels."""
    train, train_labels, test, test_labels = map(_idx, files)
    images = np.concatenate([train, test])
    return Examples(
        images.reshape(len(images), -1), np.concatenate([train_labels, test_labels])
    )


def _idx(path: pathlib.Path) -> np.ndarray:
    """A gzipped idx file of bytes: two zeros, type 8, number of axes, sizes, data."""
    with gzip.open(path) as file:
        content = file.read()
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no idx file of bytes: it begins {content[:4]!r}")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4).astype(int)
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if data.size != shape.prod():
        raise ValueError(
            f"{path} should hold {shape.prod()} bytes, shape {tuple(shape.tolist())}, "
            f"and holds {data.size}"
        )
    return data.reshape(shape)


def _checked(
    name: str,
    features: np.ndarray,
    labels: np.ndarray,
    shape: tuple[int, ...],
    classes: Any,
) -> Examples:
    """The examples, or a ValueError that says what is wrong with them."""
    if features.shape[1:] != shape or labels.shape != features.shape[:1]:
        raise ValueError(
            f"{name}: features must have the shape (examples, "
            f"{', '.join(map(str, shape))}) and labels (examples,), got "
            f"{features.shape} and {labels.shape}"
        )
    if strange := set(np.unique(labels).tolist()) - set(classes):
        raise ValueError(
            f"{name}: labels must be among {list(classes)}, got {sorted(strange)}"
        )
    return Examples(features, labels)
