"""The Python examples of the pages run as pasted, each in a process of its own."""

import pathlib
import re
import subprocess
import sys

import pytest

from tests.compiling import as_here
from tests.helpers import ROOT, environment

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a page asks for in words: this one is about meshes.
FLAGS = {"many_devices": "--xla_force_host_platform_device_count=8"}


def examples(page: pathlib.Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize(
    ("page", "code"),
    [
        pytest.param(page.stem, code, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, code in enumerate(examples(page))
    ],
)
def test_example_runs_as_pasted(page, code, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment(**as_here(FLAGS.get(page, ""))),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_there_are_examples():
    assert examples(ROOT / "README.md")
    assert sum(map(bool, map(examples, PAGES))) > 1
