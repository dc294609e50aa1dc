"""Makes the runs of a race that are not there yet, in one process or in several."""

import concurrent.futures
import multiprocessing
import os
import pathlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm

from benchmarks.bench import races, records
from benchmarks.bench.contenders import Contender
from benchmarks.bench.races import Race, Run

Make = Callable[[Run], dict[str, Any]]
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def finish(
    race: Race,
    contenders: Sequence[Contender],
    path: pathlib.Path,
    make: Make,
    *,
    seeds: tuple[int, ...] | None = None,
    jobs: int = 1,
) -> list[str]:
    """Makes all runs that are missing, and adds each to the file as it is finished.

    Args:
      race: the race.
      contenders: whose runs.
      path: file of finished runs.
      make: function run -> record; a function of a module if there are several jobs.
      seeds: of the final runs; None: those of the race.
      jobs: processes; with more than one, each has one thread.

    Returns:
      The names of contenders that failed; the others' runs are all there.
    """
    known = records.load(path)
    failed: list[str] = []
    submitted: set[str] = set()
    pending: dict[concurrent.futures.Future[Any], tuple[Contender, Run]] = {}
    executor = _executor(jobs)
    bar = tqdm(total=0, unit="run", disable=None, smoothing=0)

    def submit(contender: Contender) -> None:
        for run in races.due(race, contender, known, seeds).runs:
            key = races.key_of(race, contender, run)
            if key not in submitted:
                submitted.add(key)
                pending[executor.submit(make, run)] = contender, run
                bar.total += 1
        bar.refresh()

    try:
        for contender in contenders:
            submit(contender)
        while pending:
            done, _ = concurrent.futures.wait(
                pending, return_when=concurrent.futures.FIRST_COMPLETED
            )
            # In the order in which they were submitted.
            for future in [each for each in pending if each in done]:
                contender, run = pending.pop(future)
                if future.cancelled():
                    continue
                bar.update()
                bar.set_postfix_str(f"{run.contender}, {run.phase}, {run.rate:g}")
                # One contender that fails must not end a run of hours.
                if error := future.exception():
                    if contender.name not in failed:
                        failed.append(contender.name)
                        bar.write(f"{contender.name} failed:")
                        bar.write("".join(traceback.format_exception(error)))
                    for other, (owner, _) in pending.items():
                        if owner.name == contender.name:
                            other.cancel()
                    continue
                record = future.result()
                known[record["key"]] = record
                records.append(path, record)
                if contender.name not in failed:
                    submit(contender)
    finally:
        # What has not begun when the user interrupts is not begun any more.
        executor.shutdown(cancel_futures=True)
        bar.close()
    return failed


def _executor(jobs: int) -> concurrent.futures.Executor:
    if jobs == 1:
        return concurrent.futures.ThreadPoolExecutor(1)
    return concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), _single_threaded
    )


def _single_threaded() -> None:
    """Before jax makes its threads: one for this process."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {_ONE_THREAD}".strip()
