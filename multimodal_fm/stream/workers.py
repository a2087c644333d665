"""Steps read ahead, by threads or by worker processes; the order is the same."""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import contextlib
import itertools
import os
import signal
import threading
import time
import traceback
from dataclasses import dataclass, field

import torch

from ..errors import UserError
from .crash_log import Journal
from .dataset import Steps
from .shared_memory import Shelves

RESTARTS = 3  # how often workers that die at one step are started again


@dataclass
class Loader:
    """Steps from `start` to `stop`, read ahead by threads or by worker processes; the order is the same."""

    steps: Steps
    start: int
    stop: int
    workers: int = 1
    how: str = "processes"
    _near: object = field(default=None, repr=False)

    def __iter__(self):
        if not self.workers:
            for step in range(self.start, self.stop):
                yield self.steps[step]
        elif self.how == "threads":
            yield from self._by_threads()
        else:
            yield from self._by_processes()

    def close(self) -> None:
        near, self._near = self._near, None
        if near is None:
            return
        atexit.unregister(self.close)
        if isinstance(near, concurrent.futures.Executor):
            near.shutdown(wait=True, cancel_futures=True)
            return
        near._shutdown_workers()
        for worker in near._workers:  # what still reads after some seconds; it ignores all other signals
            if worker.is_alive():
                worker.kill()
                worker.join()

    def _by_threads(self):
        self._near = pool = concurrent.futures.ThreadPoolExecutor(self.workers, "mmfm-read", _modest_thread)
        ahead = collections.deque()
        todo = iter(range(self.start, self.stop))
        try:
            for step in itertools.islice(todo, 2 * self.workers):
                ahead.append(pool.submit(self.steps.__getitem__, step))
            while ahead:
                ready = ahead.popleft().result()
                for step in itertools.islice(todo, 1):
                    ahead.append(pool.submit(self.steps.__getitem__, step))
                yield ready
        finally:
            self.close()

    def _by_processes(self):
        step, deaths = self.start, 0
        while step < self.stop:
            shelves = Shelves(self.steps, self.workers)
            self._near = workers = _started(self._data_loader(shelves, step))
            atexit.register(self.close)  # before the interpreter waits for them, for ever
            _Deaths.hold_back()
            try:
                while step < self.stop:
                    ready = shelves.taken(_Deaths.told(workers))
                    step, deaths = step + 1, 0
                    yield ready
                    ready = None  # the shelf is not held here while the next step is waited for
            except (RuntimeError, OSError, EOFError) as error:
                dead = _Deaths.among(workers)
                if not dead:
                    raise
                deaths += 1
                self._blame(workers, dead, deaths, step, error)
            finally:
                self.close()
                workers = shelves = ready = None  # else the next workers inherit the memory of these

    def _blame(self, workers, dead: list[int], deaths: int, step: int, error: Exception) -> None:
        codes = [workers._workers[i].exitcode for i in dead]
        reading = []
        for worker, code in zip(dead, codes, strict=True):
            if self.steps.journal and code not in (-signal.SIGKILL, -signal.SIGTERM):
                reading += self.steps.journal.blame_worker(worker)
        names = Journal.named(reading)
        if deaths > RESTARTS:
            raise UserError(f"step {step + 1}: its reader ended {deaths} times (exit {codes[0]}) at {names}") from error
        print(f"step {step + 1}: a reader ended (exit {codes[0]}) at {names}; started again", flush=True)

    def _data_loader(self, shelves: Shelves, start: int):
        return torch.utils.data.DataLoader(
            shelves,
            batch_size=None,
            sampler=range(start, self.stop),
            num_workers=self.workers,
            prefetch_factor=2,
            collate_fn=bytes,
            worker_init_fn=_modest_process,
            generator=torch.Generator(),  # a private one: the loader must not draw from the run's
            multiprocessing_context="fork",
        )


def _started(loader: torch.utils.data.DataLoader):
    """An iterator of the loader, whose workers run. Raises UserError where the system refuses one of them."""
    others = set(torch.multiprocessing.active_children())
    try:
        return iter(loader)
    except (OSError, RuntimeError) as error:  # no room in /dev/shm, no more processes, threads or open files
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if hasattr(half := frame.f_locals.get("self"), "_shutdown_workers"):
                half._shutdown = True  # it would try to end what never began
                if getattr(half, "_worker_pids_set", False):  # it would raise when these are ended below
                    torch.utils.data._utils.signal_handling._remove_worker_pids(id(half))
                    half._worker_pids_set = False
        for child in set(torch.multiprocessing.active_children()) - others:
            child.kill()
            child.join()
        why = getattr(error, "strerror", None) or error
        raise UserError(f"readers=processes: they cannot be started: {why}; take readers=threads") from None


class _Deaths:
    """PyTorch raises from a signal handler when a worker has died, in whatever the program is at: a step, a save.

    With this it raises where a step is waited for, and nowhere else.
    """

    waiting = False

    @classmethod
    def hold_back(cls) -> None:
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and not hasattr(handler, "held_back"):

            def only_while_waiting(*what):
                if cls.waiting:
                    handler(*what)

            only_while_waiting.held_back = True
            with contextlib.suppress(ValueError):  # not in the main thread: PyTorch has set none there
                signal.signal(signal.SIGCHLD, only_while_waiting)

    @staticmethod
    def among(workers, patience: float = 0.5) -> list[int]:
        """Which of the workers have died, by number; the system may need a moment to say so."""
        until = time.monotonic() + patience
        while not (dead := [i for i, worker in enumerate(workers._workers) if worker.exitcode is not None]):
            if time.monotonic() >= until:
                break
            time.sleep(0.01)
        return dead

    @classmethod
    def told(cls, workers) -> bytes:
        """What the workers send next. Raises RuntimeError where one has died."""
        cls.waiting = True
        try:
            if cls.among(workers, 0):
                raise RuntimeError("a worker died")
            return next(workers)
        finally:
            cls.waiting = False


def _modest_thread() -> None:
    """Readers leave the processor to the training, where it is short."""
    torch.set_num_threads(1)  # of this thread alone
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + 10)


def _modest_process(_: int) -> None:
    """Workers leave interrupts to the main process, which saves first, and the processor too, where it is short.

    They end with it, however it ends: steps that it did not fetch would keep them, and their memory, for ever.
    """
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with contextlib.suppress(RuntimeError):  # no threads left
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    torch.multiprocessing.parent_process().join()
    os._exit(1)
