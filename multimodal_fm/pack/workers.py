"""Work in other processes. One that dies (a decoder's crash, no memory left) takes only its own job with it."""

from __future__ import annotations

import concurrent.futures as futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool


def run(
    function: Callable,
    jobs: Iterable,
    workers: int,
    done: Callable = lambda job, result: None,
    died: Callable | None = None,
) -> None:
    """`function(job)` for every job, `done(job, result)` here for each in any order. workers 0: in this process.

    Where a process dies, the jobs that were under way are done once more, each alone; `died(job)` is called when one
    dies alone too, and then it is tried again: it must have changed something, or raise.
    """
    if not workers:
        for job in jobs:
            done(job, function(job))
        return
    waiting = iter(jobs)
    while (suspects := _together(function, waiting, workers, done)) is not None:
        for job in suspects:
            while not _alone(function, job, done):
                if died is None:
                    raise RuntimeError(f"a process died twice over {job}")
                died(job)


def _together(function, waiting, workers: int, done) -> list | None:
    """None when all is done; the jobs under way where a process died."""
    under_way = {}
    with _executor(workers) as executor:
        try:
            while True:
                while len(under_way) < 2 * workers and (job := next(waiting, None)) is not None:
                    try:
                        under_way[executor.submit(function, job)] = job
                    except BrokenProcessPool:
                        return [*under_way.values(), job]
                if not under_way:
                    return None
                for one in futures.wait(under_way, return_when=futures.FIRST_COMPLETED).done:
                    result = one.result()
                    done(under_way.pop(one), result)
        except BrokenProcessPool:
            return list(under_way.values())
        except BaseException:
            executor.shutdown(wait=True, cancel_futures=True)
            raise


def _alone(function, job, done) -> bool:
    with _executor(1) as executor:
        try:
            result = executor.submit(function, job).result()
        except BrokenProcessPool:
            return False
    done(job, result)
    return True


def _executor(workers: int) -> futures.ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")  # it imports torch once, and forks while it has one thread
    context.set_forkserver_preload([f"{__package__}.run", f"{__package__}.validate"])
    return futures.ProcessPoolExecutor(workers, context, initializer=_begin)


def _begin() -> None:
    """In each process: one thread, an end with Ctrl-C, and an end when the parent has ended, however it did."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
