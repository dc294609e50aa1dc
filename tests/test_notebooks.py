"""Every notebook runs top to bottom, in a process and a kernel of its own."""

import subprocess
import sys

import pytest

from tests.compiling import as_here
from tests.helpers import ROOT, environment

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path):
    # A configuration of its own: this suite's turns the warnings of Jupyter to errors.
    configuration = tmp_path / "pytest.ini"
    configuration.write_text("[pytest]\n")
    options = ["--nbmake", "--nbmake-timeout=120", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", configuration, *options, notebook],
        cwd=tmp_path,
        env=environment(**as_here()),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_there_are_notebooks():
    assert NOTEBOOKS
