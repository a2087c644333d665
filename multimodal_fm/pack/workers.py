"""Work in other processes. One that dies (a decoder's crash, no memory left) takes only its own task with it."""

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
    tasks: Iterable,
    workers: int,
    done: Callable = lambda task, result: None,
    died: Callable | None = None,
) -> None:
    """`function(task)` for every task, `done(task, result)` here for each in any order. workers 0: in this process.

    Where a process dies, the tasks that were under way are done once more, each alone; `died(task)` is called when one
    dies alone too, and then it is tried again: it must have changed something, or raise.
    """
    if not workers:
        for task in tasks:
            done(task, function(task))
        return
    waiting = iter(tasks)
    while (suspects := _together(function, waiting, workers, done)) is not None:
        for task in suspects:
            while not _alone(function, task, done):
                if died is None:
                    raise RuntimeError(f"a process died twice over {task}")
                died(task)


def _together(function, waiting, workers: int, done) -> list | None:
    """None when all is done; the tasks under way where a process died."""
    under_way = {}
    with _executor(workers) as executor:
        try:
            while True:
                while len(under_way) < 2 * workers and (task := next(waiting, None)) is not None:
                    try:
                        under_way[executor.submit(function, task)] = task
                    except BrokenProcessPool:
                        return [*under_way.values(), task]
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


def _alone(function, task, done) -> bool:
    with _executor(1) as executor:
        try:
            result = executor.submit(function, task).result()
        except BrokenProcessPool:
            return False
    done(task, result)
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
