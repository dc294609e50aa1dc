"""Every notebook runs top to bottom, in a process and a kernel of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path):
    # A configuration of its own: this suite's turns the warnings of Jupyter to errors.
    configuration = tmp_path / "pytest.ini"
    configuration.write_text("[pytest]\n")
    options = ["--nbmake", "--nbmake-timeout=120", "-p", "no:cacheprovider"]
    # As in a shell: without the devices, options and backend of this test run. The
    # package of this tree is found even where it is not installed.
    left_out = "XLA_FLAGS", "PYTEST_ADDOPTS", "MPLBACKEND"
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", configuration, *options, notebook],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_there_are_notebooks():
    assert NOTEBOOKS
