"""Two processes train as one does, and one that is killed costs a restart, no more.

The processes run `tests/sharding/two_process.py`: they find each other over the
loopback, sum with gloo, and divide data, parameters and optimizer state between them.
"""

import contextlib
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")

from tests.sharding import two_process

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 150  # seconds for one run, under load; ten times what it takes alone


def free_port():
    """A port nobody has, below those that the system gives to connections."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def running(directory, count, *options):
    """The processes of one run; none of them outlives the block."""
    directory.mkdir(exist_ok=True)
    port = free_port()
    workers = []
    with contextlib.ExitStack() as stack:
        for number in range(count):
            script = [sys.executable, "-m", "tests.sharding.two_process"]
            script += [str(directory / "result.npz"), "--processes", str(count)]
            script += ["--process", str(number), "--port", str(port), *options]
            out = stack.enter_context((directory / f"out{number}").open("w"))
            err = stack.enter_context((directory / f"err{number}").open("w"))
            workers.append(subprocess.Popen(script, cwd=ROOT, stdout=out, stderr=err))
        try:
            yield workers
        finally:
            for worker in workers:
                worker.kill()
                worker.wait(30)


def steps_of(directory, number):
    """What a process has printed: the step it starts from, and those it has done."""
    printed = (directory / f"out{number}").read_text()
    return [int(step) for step in re.findall(r"^step (\d+)\n", printed, re.M)]


def what_they_said(directory):
    errors = sorted(directory.glob("err*"))
    return "\n".join(f"{e.name}:\n{e.read_text()[-5000:]}" for e in errors)


def wait_until(condition, workers, directory):
    """Waits for a condition while all processes run."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        ended = [worker.poll() for worker in workers]
        assert ended == [None] * len(workers), (ended, what_they_said(directory))
        assert time.monotonic() < deadline, what_they_said(directory)
        time.sleep(0.01)


def run_to_the_end(directory, count, *options):
    """The step that each process starts from, and the result."""
    with running(directory, count, *options) as workers:
        deadline = time.monotonic() + LIMIT
        try:
            codes = [w.wait(max(0.1, deadline - time.monotonic())) for w in workers]
        except subprocess.TimeoutExpired:
            pytest.fail(what_they_said(directory))
    assert codes == [0] * count, (codes, what_they_said(directory))
    printed = [steps_of(directory, number) for number in range(count)]
    assert all(steps[-1] == two_process.STEPS for steps in printed)
    with np.load(directory / "result.npz") as result:
        return [steps[0] for steps in printed], dict(result)


def complete(checkpoints):
    """The steps of the checkpoints that were written to their end."""
    return sorted(int(p.name) for p in checkpoints.glob("*") if p.name.isdigit())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The result of two processes that nothing happens to."""
    starts, result = run_to_the_end(tmp_path_factory.mktemp("two"), 2)
    assert starts == [0, 0]
    return result


def test_two_processes_equal_one(tmp_path, two):
    _, one = run_to_the_end(tmp_path, 1)
    assert one.keys() == two.keys()
    for name, expected in one.items():
        assert two[name].dtype == expected.dtype
        # Double precision, and gloo adds in another order than one process does: some
        # 1e-16 of numbers near 1 a step. One component in another class for a single
        # step would be off by 1e-4 or more.
        np.testing.assert_allclose(two[name], expected, rtol=1e-12, atol=1e-14)
    (kernel,) = (x for name, x in one.items() if name == "[0]['in']['kernel']")
    assert kernel.dtype == np.float64
    assert kernel.shape == (64, 128)


@pytest.mark.slow
def test_killed_process_costs_a_restart(tmp_path, two):
    checkpoints = tmp_path / "checkpoints"
    options = "--checkpoints", str(checkpoints)
    last = random.randrange(two_process.EVERY, two_process.STEPS // 2)
    victim = random.randrange(2)
    happened = f"process {victim} was killed after step {last}"

    def moment():
        return complete(checkpoints) and last in steps_of(tmp_path, victim)

    with running(tmp_path, 2, *options, "--pause", "0.3") as workers:
        wait_until(moment, workers, tmp_path)
        workers[victim].send_signal(signal.SIGKILL)
        assert workers[victim].wait(30) == -signal.SIGKILL
        # The other cannot add what is not there: it ends in an error or it waits.
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert workers[1 - victim].wait(1) != 0, happened
    assert not (tmp_path / "result.npz").exists(), happened
    assert steps_of(tmp_path, 1 - victim)[-1] < two_process.STEPS, happened
    saved = complete(checkpoints)[-1]
    assert 0 < saved < two_process.STEPS, happened

    starts, result = run_to_the_end(tmp_path, 2, *options)
    assert starts == [saved, saved], happened
    assert result.keys() == two.keys()
    for name, expected in two.items():
        np.testing.assert_array_equal(result[name], expected, happened, strict=True)
