"""Reads steps ahead in worker processes, in the order of the steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field

from ..errors import UserError
from .crash_log import CrashLog
from .dataset import Step, StepDataset
from .shared_memory import SharedBuffers
from .worker_pool import MAX_DEATHS, Job, WorkerPool

BUFFERS_PER_WORKER = 5  # for two steps that are being read or wait, and for those that the training holds


@dataclass
class Loader:
    """The steps from `start` to `stop`. With num_workers=0 each is read when it is asked for.

    `data_step` says which step of the stream stands for each, where some are left out. The steps are the same for any
    number of workers. A worker that dies is replaced and its step read again; a sample
    that crashed its worker twice is left out.
    """

    dataset: StepDataset
    start: int
    stop: int
    num_workers: int = 1
    data_step: Callable[[int], int] = lambda step: step
    _iterator: Iterator[Step] | None = field(default=None, init=False, repr=False)

    def __iter__(self) -> Iterator[Step]:
        steps = map(self.data_step, range(self.start, self.stop))
        self._iterator = self._read_ahead(steps) if self.num_workers else map(self.dataset.read, steps)
        return self._iterator

    def close(self) -> None:
        """Ends the worker processes."""
        if isinstance(self._iterator, Generator):
            self._iterator.close()

    def _read_ahead(self, steps: Iterable[int]) -> Iterator[Step]:
        buffers, log = SharedBuffers(BUFFERS_PER_WORKER * self.num_workers), self.dataset.crash_log

        def read(job: tuple[int, int | None]) -> bytes:
            return buffers.write(job[1], lambda empty: self.dataset.read(job[0], empty))

        pool = WorkerPool(read, self.num_workers, initializer=log and log.use_slot, on_death=self._record_death)
        with contextlib.closing(pool):
            jobs = ((step, buffers.acquire()) for step in steps)
            for (_, number), data in pool.imap(jobs):
                yield buffers.load(number, data)

    def _record_death(self, job: Job, worker: int, exit_code: int) -> None:
        """Names the sample that a worker was decoding when it crashed. Raises UserError where that has no end."""
        step, log = job.argument[0], self.dataset.crash_log
        crashed = exit_code not in (-signal.SIGKILL, -signal.SIGTERM)  # else somebody ended it
        samples = log.record_crash(worker) if log and crashed else []
        names = f"while it decoded {CrashLog.format(samples)}" if samples else "and no sample is known to be the cause"
        if job.deaths > MAX_DEATHS and all(log and log.crash_counts[sample] > MAX_DEATHS for sample in samples):
            raise UserError(f"step {step + 1}: its worker ended {job.deaths} times (exit code {exit_code}) {names}")
        print(f"step {step + 1}: its worker ended (exit code {exit_code}) {names}; it is read again", flush=True)
