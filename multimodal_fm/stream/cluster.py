"""Where jobs are done: in processes of this machine, by the ranks that torchrun has started, or on a Ray cluster.

A job is a function of a module and an argument, whose results lie in files that all machines see. Whoever does it, in
whatever order, the files are the same, so that a machine that is lost costs the time of its jobs alone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from ..errors import UserError
from .worker_pool import Job, WorkerPool, call, raise_after_deaths, run_jobs

POLL = 0.05  # seconds between looks for a new job or result
PATIENCE = 60.0  # seconds that the first rank waits for the others to see that all is done
RETRIES = 3  # of a job whose process or machine is lost, by Ray itself
AHEAD = 2  # jobs that are handed out for each process

ANY = 1 << 30  # number of jobs

Function = Callable[[Any], Any]
OnDeath = Callable[[Job, int, int], None]


class Executor(Protocol):
    """Does jobs somewhere."""

    parallel: bool  # whether other processes than this one do them

    def run(
        self,
        function: Callable[[Any], Any],
        jobs: Iterable,
        on_death: OnDeath = raise_after_deaths,
        most: int = ANY,
    ) -> Iterator[tuple[Any, Any]]:
        """Yields (job, function(job)) for every job as they are done. most: how many jobs there are at most.

        Raises what the function raises. on_death: as for `WorkerPool`; with several machines it has to be picklable.
        """
        ...


@contextlib.contextmanager
def open_executor(cluster: str, workers: int) -> Iterator[Executor | None]:
    """Where jobs are done. None on any rank but the first: when it is left, the rank does its share until all is done.

    cluster: empty for this machine, or for the ranks where torchrun (whatever sets RANK and WORLD_SIZE) has started
    several; `ray`: a cluster that runs here or that RAY_ADDRESS names, else one of this machine; `auto`: one that runs;
    ray://HOST:10001 or HOST:6379. workers: processes of this machine, or of each rank; 0: none but this one. On Ray
    there is one for each core of the cluster. Raises UserError.
    """
    if cluster:
        with _on_ray(cluster) as executor:
            yield executor
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        with _among_ranks(workers) as executor:
            yield executor
    else:
        yield Local(workers)


class Local:
    """Processes of this machine."""

    def __init__(self, workers: int):
        self.workers, self.parallel = workers, workers > 0

    def run(
        self,
        function: Callable[[Any], Any],
        jobs: Iterable,
        on_death: OnDeath = raise_after_deaths,
        most: int = ANY,
    ) -> Iterator[tuple[Any, Any]]:
        return run_jobs(function, jobs, min(self.workers, most), on_death)


def _do(job: tuple[Function, Any]) -> bytes:
    """What `call` makes of a function and its argument, with a hint where a file is missing that others have."""
    function, argument = job

    def do(argument: Any) -> Any:
        try:
            return function(argument)
        except FileNotFoundError as error:
            mend = "every machine needs the sources and the folder that is written under the same names"
            raise UserError(f"{error.filename or error}: not there on {socket.gethostname()}: {mend}") from None

    return call(do, argument)


def _result(data: bytes) -> Any:
    """Raises what the job raised."""
    error, result = pickle.loads(data)
    if error is not None:
        raise error
    return result


# -------------------------------------------------------------------------------------------------------------- ranks


class Ranks:
    """The first rank's side: jobs and results go through the store that the ranks have met at."""

    parallel = True

    def __init__(self, store: Any):
        self.store, self.given = store, 0
        self.taken = 0  # results

    def run(
        self,
        function: Callable[[Any], Any],
        jobs: Iterable,
        on_death: OnDeath = raise_after_deaths,
        most: int = ANY,
    ) -> Iterator[tuple[Any, Any]]:
        numbered, under_way = iter(jobs), {}
        while True:
            ahead = AHEAD * max(1, self.store.add("processes", 0))
            for job in itertools.islice(numbered, max(0, ahead - len(under_way))):
                self.store.set(f"job/{self.given}", pickle.dumps((function, job, on_death)))
                under_way[self.given] = job
                self.given += 1
            if not under_way:
                return
            _wait_for(self.store, f"finished/{self.taken}")
            number = int(self.store.get(f"finished/{self.taken}"))
            self.taken += 1
            data = self.store.get(f"result/{number}")
            for name in (f"job/{number}", f"result/{number}", f"finished/{self.taken - 1}"):
                self.store.delete_key(name)
            if number in under_way:  # else of a run before, which ended at an error
                yield under_way.pop(number), _result(data)


@contextlib.contextmanager
def _among_ranks(workers: int) -> Iterator[Ranks | None]:
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://")))
    processes = max(1, workers)
    store.add("processes", processes)
    threads = [threading.Thread(target=_serve, args=(store, bool(workers)), daemon=True) for _ in range(processes)]
    for thread in threads:
        thread.start()
    try:
        yield Ranks(store) if rank == 0 else None
    finally:
        if rank == 0:
            store.set("end", "")
        for thread in threads:  # of the others: until the first has set the end
            thread.join()
        with contextlib.suppress(RuntimeError):
            store.add("left", 1)
            until = time.monotonic() + PATIENCE
            while rank == 0 and store.add("left", 0) < size and time.monotonic() < until:
                time.sleep(POLL)  # the first may hold the store


def _serve(store: Any, own_process: bool) -> None:
    """Do jobs, one after the other, in a process of their own or in this thread, until the end is set."""
    pool = None
    if own_process:
        multiprocessing.set_forkserver_preload([__name__])
        pool = WorkerPool(_do, 1, 1, "forkserver", on_death=_tell_death)
    # where the store is gone, the first rank has ended
    with contextlib.closing(pool) if pool else contextlib.nullcontext(), contextlib.suppress(RuntimeError):
        while True:
            number = store.add("claimed", 1) - 1
            if not _wait_for(store, f"job/{number}"):
                return
            function, argument, on_death = pickle.loads(store.get(f"job/{number}"))
            try:
                if pool:
                    [(_, data)] = pool.imap([_Told((function, argument), on_death)])
                else:
                    data = _do((function, argument))
            except UserError as error:  # of on_death
                data = pickle.dumps((error, None))
            store.set(f"result/{number}", data)
            store.set(f"finished/{store.add('done', 1) - 1}", str(number))


class _Told:
    """A job that knows what is done when its process dies. The process gets the job alone."""

    def __init__(self, job: tuple[Function, Any], on_death: OnDeath):
        self.job, self.on_death = job, on_death

    def __reduce__(self):
        return tuple, (self.job,)


def _tell_death(job: Job, worker: int, exit_code: int) -> None:
    told = job.argument
    told.on_death(Job(job.number, told.job[1], job.deaths), worker, exit_code)


def _wait_for(store: Any, key: str) -> bool:
    """Whether the key is there, False where the end is set first. Raises RuntimeError where the store is gone."""
    pause = POLL / 10
    while not store.check([key]):
        if store.check(["end"]):
            return False
        time.sleep(pause)
        pause = min(POLL, 2 * pause)
    return True


# ---------------------------------------------------------------------------------------------------------------- Ray


class Ray:
    """Tasks on a Ray cluster, which restarts those whose process or machine is lost."""

    parallel = True

    def __init__(self, ray: Any):
        self.ray = ray

    @property
    def cores(self) -> int:
        return max(1, int(self.ray.cluster_resources().get("CPU", 1)))

    @property
    def gpus(self) -> int:
        return int(self.ray.cluster_resources().get("GPU", 0))

    @property
    def machines(self) -> int:
        return max(1, sum(node["Alive"] for node in self.ray.nodes()))

    def run(
        self,
        function: Function,
        jobs: Iterable,
        on_death: OnDeath = raise_after_deaths,
        most: int = ANY,
        gpus: float = 0,
    ) -> Iterator[tuple[Any, Any]]:
        """gpus: that each job needs."""
        errors, numbered, under_way = self.ray.exceptions, enumerate(jobs), {}
        task = self.ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_do)
        while True:
            for number, job in itertools.islice(numbered, max(0, AHEAD * self.cores - len(under_way))):
                under_way[task.remote((function, job))] = Job(number, job)
            if not under_way:
                return
            [done], _ = self.ray.wait(list(under_way), num_returns=1)
            job = under_way.pop(done)
            try:
                data = self.ray.get(done)
            except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError):
                job.deaths += 1
                on_death(job, 0, 0)
                under_way[task.remote((function, job.argument))] = job
                continue
            yield job.argument, _result(data)


@contextlib.contextmanager
def _on_ray(cluster: str) -> Iterator[Ray]:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--cluster needs Ray: pip install 'multimodal_fm[cluster]', on every machine") from None
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(None if cluster == "ray" else cluster, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"--cluster {cluster}: {said} (ray, auto, ray://HOST:10001 or HOST:6379)") from None
    try:
        yield Ray(ray)
    finally:
        ray.shutdown()
