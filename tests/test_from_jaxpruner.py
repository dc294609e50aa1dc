"""Every line of the tables for those who come from jaxpruner, and its registry."""

import re

import pytest

from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "from_jaxpruner.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| `(.+)` \| ([\d.]+) \|$", PAGE, re.M)
REGISTRY = {
    "no_prune",
    "magnitude",
    "random",
    "saliency",
    "magnitude_ste",
    "random_ste",
    "global_magnitude",
    "global_saliency",
    "static_sparse",
    "rigl",
    "set",
}


@pytest.fixture(scope="module")
def names():
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    namespace = {}
    exec(code, namespace)
    return namespace


@pytest.mark.parametrize(("theirs", "ours", "zeros"), ROWS)
def test_a_row(names, theirs, ours, zeros):
    assert names["zeros"](eval(ours, names)) == float(zeros)


def test_every_name_of_the_registry_has_a_row():
    named = {name for theirs, *_ in ROWS for name in re.findall(r"`(\w+)`", theirs)}
    assert named >= REGISTRY
    assert len(ROWS) == PAGE.count("\n| ") - PAGE.count("| here |")
