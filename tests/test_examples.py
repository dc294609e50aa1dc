"""The programs that show smaller models, with small networks and few images."""

import functools

import numpy as np
import pytest

from benchmarks import demo, small_models
from benchmarks.examples import shrink


@pytest.mark.slow
def test_the_example_ends_with_smaller_networks(monkeypatch):
    images = [x[:256] for x in demo.load_images()]
    monkeypatch.setattr(demo, "load_images", lambda: images)
    monkeypatch.setattr(shrink, "VGG", functools.partial(shrink.VGG, (4, 8, 8)))
    table = shrink.run(epochs=1, repeats=1)
    names = table["network"]
    assert names[0] == "full"
    assert [name.partition(",")[0] for name in names[1:]] == ["masked", "small"] * 2
    params = [int(count.replace(",", "")) for count in table["parameters"]]
    flops = [float(count) for count in table["million operations an image"]]
    for column in (params, flops, table["kilobytes"]):
        assert column[0] == column[1] == column[3] > column[2] > column[4]
    # A quarter of the weights between groups, half of those at the ends.
    assert 0.25 < params[2] / params[0] < 0.5


def test_the_times_of_smaller_networks_are_a_page():
    page = small_models.run(widths=(4, 8, 8), repeats=1)
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in row[1:-1]] for row in rows]
    assert [row[0].partition(",")[0] for row in rows] == [
        "full",
        *["masked", "small"] * 2,
    ]
    deviations = [float(row[head.index("deviation")]) for row in rows[2::2]]
    assert np.max(deviations) < 1e-5
    shares = [float(row[head.index("operations")]) for row in rows]
    assert shares[0] == shares[1] == shares[3] == 1 > shares[2] > shares[4]
