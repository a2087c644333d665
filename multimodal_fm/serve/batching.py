"""Requests that come at the same time go through the model together."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

WAIT = 0.004  # seconds in which the first of a batch waits for others
MAX_BATCH = 64


class Batcher:
    """One thread that collects jobs for some milliseconds and does them at once.

    Args:
        work: the answers to a list of jobs, in order; an answer that is an exception is raised for its job alone.
        observe: is called with the size of a batch and its seconds.
    """

    def __init__(
        self,
        work: Callable[[list[Any]], Sequence[Any]],
        wait: float = WAIT,
        max_batch: int = MAX_BATCH,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        self.work, self.wait, self.max_batch, self.observe = work, wait, max_batch, observe
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mmfm-batches", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    async def __call__(self, job: Any) -> Any:
        """The answer to a job. Raises what `work` says of it."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._jobs.put((job, loop, future))
        return await future

    def close(self) -> None:
        """Ends the thread after what is waiting."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            first = self._jobs.get()
            if first is None:
                return
            batch, until = [first], time.monotonic() + self.wait
            while len(batch) < self.max_batch:
                try:
                    job = self._jobs.get(timeout=max(until - time.monotonic(), 0))
                except queue.Empty:
                    break
                if job is None:
                    ended = True
                    break
                batch.append(job)
            # Whoever has gone away meanwhile, so that the answer would be for nobody, is left out.
            self._answer([one for one in batch if not one[2].cancelled()])

    def _answer(self, batch: list[tuple]) -> None:
        if not batch:
            return
        began = time.monotonic()
        try:
            answers = list(self.work([job for job, _, _ in batch]))
        except Exception as error:  # a defect: each of them is told, and the thread goes on
            answers = [error] * len(batch)
        self.observe(len(batch), time.monotonic() - began)
        for (_, loop, future), answer in zip(batch, answers, strict=True):
            with contextlib.suppress(RuntimeError):  # its loop is closed: the server has ended
                loop.call_soon_threadsafe(_settle, future, answer)


def _settle(future: asyncio.Future, answer: Any) -> None:
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
