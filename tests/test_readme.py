"""The Python examples run as pasted, those of a page one by one in one process."""

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
# Each has names of its own.
ONE_BY_ONE = """
import runpy, sys
for path in sys.argv[1:]:
    runpy.run_path(path, run_name="__main__")
"""


def examples(page: pathlib.Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


WITH_EXAMPLES = [page for page in PAGES if examples(page)]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_examples_run_as_pasted(page, tmp_path):
    scripts = []
    for number, code in enumerate(examples(page)):
        scripts.append(tmp_path / f"{page.stem}_{number}.py")
        scripts[-1].write_text(code)
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, *scripts],
        cwd=tmp_path,
        env=environment(**as_here(FLAGS.get(page.stem, ""))),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_there_are_examples():
    assert examples(ROOT / "README.md")
    assert sum(map(bool, map(examples, PAGES))) > 1
