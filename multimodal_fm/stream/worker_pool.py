"""Worker processes that work through jobs: they read ahead for the training, and they pack.

A process that dies (a decoder crashed, no memory was left) is replaced, and the new one is given its jobs again.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from ..errors import UserError

MAX_DEATHS = 3  # of worker processes over the same job


@dataclass
class Job:
    """A job that a worker was given. deaths: how many workers have died over it."""

    number: int
    argument: Any
    deaths: int = 0


@dataclass
class Worker:
    process: BaseProcess
    connection: Connection
    jobs: collections.deque[Job] = field(default_factory=collections.deque)  # the first is under way, the others wait


def raise_after_deaths(job: Job, worker: int, exit_code: int) -> None:
    """Raises UserError when `MAX_DEATHS` workers have died over a job."""
    if job.deaths >= MAX_DEATHS:
        raise UserError(
            f"a worker process ended {job.deaths} times (exit code {exit_code}) over the same job: "
            "look whether memory runs out, or use fewer workers"
        )


class WorkerPool:
    """Calls `function` in `num_workers` processes, which have one torch thread each.

    Args:
        function: called with one job after the other.
        ahead: how many jobs a worker is given at a time: the one that it works on and those that wait for it.
        start_method: of `multiprocessing`; `fork` lets the workers inherit memory that they share.
        initializer: called in each new worker with its number.
        on_death: called in the main process with (job, number of the worker, exit code) when a worker died over a job.
            The job is then done again by a new worker with the same number, unless this raises.
        nice: how much lower their priority is than that of the main process.

    Workers leave signals to the main process, and end when it ends, however it does. Raises UserError where the system
    refuses to start a worker; those that were started are then ended.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        num_workers: int,
        ahead: int = 2,
        start_method: str = "fork",
        initializer: Callable[[int], None] | None = None,
        on_death: Callable[[Job, int, int], None] = raise_after_deaths,
        nice: int = 10,
    ):
        self.function, self.ahead, self.initializer, self.on_death = function, ahead, initializer, on_death
        self.nice = nice
        self._context: Any = multiprocessing.get_context(start_method)
        self._workers: list[Worker] = []
        self._owner = os.getpid()
        atexit.register(self.close)  # runs before the handler of multiprocessing, which would wait for the workers
        for number in range(num_workers):
            self._workers.append(self._start(number))

    def imap(self, jobs: Iterable, ordered: bool = True) -> Iterator[tuple[Any, Any]]:
        """Yields (job, function(job)) for every job, in the order of the jobs or as they are done.

        Jobs are taken from the iterable no further ahead than the workers need. Raises what the function raises.
        """
        numbered, results = enumerate(jobs), {}
        submitted = returned = 0

        def submit() -> None:
            nonlocal submitted
            for number, job in itertools.islice(numbered, self.ahead * len(self._workers) + returned - submitted):
                self._send(min(self._workers, key=lambda worker: len(worker.jobs)), Job(number, job))
                submitted += 1

        submit()
        while returned < submitted:
            while not (returned in results if ordered else results):
                results.update(self._receive())
            job, error, result = results.pop(returned if ordered else next(iter(results)))
            if error is not None:
                raise error
            returned += 1
            submit()  # before the caller turns to this result
            yield job, result

    def close(self) -> None:
        """Ends the workers at once, whatever they are doing."""
        atexit.unregister(self.close)
        if os.getpid() == self._owner:  # else this is a fork of the main process
            for worker in self._workers:
                worker.process.kill()
            for worker in self._workers:
                worker.process.join()
                worker.connection.close()
            self._workers = []

    def _start(self, number: int) -> Worker:
        try:
            connection, other_end = self._context.Pipe()
            with other_end:
                arguments = (other_end, self.function, self.initializer, number, self.nice)
                process = self._context.Process(target=_run_worker, args=arguments)
                process.start()
        except (OSError, RuntimeError, EOFError) as error:  # no more processes, threads, memory or open files
            self.close()
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"worker processes cannot be started: {reason}; use fewer workers, or 0 to do without"
            ) from None
        return Worker(process, connection)

    def _send(self, worker: Worker, job: Job) -> None:
        worker.jobs.append(job)
        with contextlib.suppress(OSError):  # it has died: `_receive` will see it
            worker.connection.send(job.argument)

    def _receive(self) -> Iterator[tuple[int, tuple]]:
        """Waits until workers have sent results or died. Yields (job's number, (job, error, result))."""
        ready = wait([end for worker in self._workers for end in (worker.connection, worker.process.sentinel)])
        for number, worker in enumerate(self._workers):
            died = worker.process.sentinel in ready
            try:
                while (died or worker.connection in ready) and worker.connection.poll():  # a dead one's results too
                    error, result = pickle.loads(worker.connection.recv_bytes())
                    job = worker.jobs.popleft()
                    yield job.number, (job.argument, error, result)
            except (EOFError, OSError):
                died = True
            if died:
                self._replace(number)

    def _replace(self, number: int) -> None:
        worker = self._workers[number]
        worker.process.join(5)
        worker.process.kill()  # in case it has lost its connection only
        worker.process.join()
        worker.connection.close()
        if worker.jobs:
            worker.jobs[0].deaths += 1
            self.on_death(worker.jobs[0], number, worker.process.exitcode or 0)
        self._workers[number] = self._start(number)
        for job in worker.jobs:
            self._send(self._workers[number], job)


def run_jobs(
    function: Callable[[Any], Any],
    jobs: Iterable,
    num_workers: int,
    on_death: Callable[[Job, int, int], None] = raise_after_deaths,
) -> Iterator[tuple[Any, Any]]:
    """Yields (job, function(job)) for every job as they are done. With num_workers=0 this process does them itself."""
    if not num_workers:
        yield from ((job, function(job)) for job in jobs)
        return
    # The main process may run threads, such as that of a progress bar, so the workers are forked from another one.
    multiprocessing.set_forkserver_preload([function.__module__])
    with contextlib.closing(WorkerPool(function, num_workers, 1, "forkserver", on_death=on_death)) as pool:
        yield from pool.imap(jobs, ordered=False)


def _run_worker(
    connection: Connection, function: Callable, initializer: Callable | None, number: int, nice: int
) -> None:
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(nice)
    torch.set_num_threads(1)
    with contextlib.suppress(RuntimeError):  # the system gives no more threads
        threading.Thread(target=_exit_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(number)
    with contextlib.suppress(EOFError, OSError):  # the main process has ended
        while True:
            connection.send_bytes(call(function, connection.recv()))


def call(function: Callable, argument: Any) -> bytes:
    """The pickled pair of what the function raised, None where it raised nothing, and what it returned."""
    try:
        return pickle.dumps((None, function(argument)), protocol=5)
    except Exception as error:
        error.add_note(text := traceback.format_exc())
        try:
            pickle.loads(data := pickle.dumps((error, None)))
        except Exception:  # many exceptions cannot be pickled
            data = pickle.dumps((RuntimeError(text), None))
        return data


def _exit_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)
