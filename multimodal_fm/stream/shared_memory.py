"""Steps on their way from worker processes: they lie in memory that all processes see and that is used again and again.

PyTorch would send each tensor in a file of its own under /dev/shm, made and thrown away: some hundreds a step, and the
system clears every page of them first.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import pickle
import resource
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .dataset import Step, Steps

ALIGNED = 64  # bytes
EACH = 5  # shelves a worker: for two steps that wait or are in the making, and for those that are trained on
ROOM = 1 << 30  # bytes a shelf, of which the system gives what is written to


class Shelves(torch.utils.data.Dataset):
    """Steps by number, for a worker to put on a shelf (`[step]`) and for the main process to take (`taken`).

    A shelf is free again when the last tensor on it is gone. What finds no shelf, or no room on it, goes through the
    workers' pipe: slower, but nothing breaks where memory may not be reserved, or where somebody keeps every step.
    """

    def __init__(self, steps: Steps, workers: int):
        self.steps = steps
        self.used = mmap.mmap(-1, workers * EACH)  # 1: a worker has put something there and it is not gone yet
        self.shelves = [[]] * workers
        if _may_reserve():
            with contextlib.suppress(OSError):
                self.shelves = [[mmap.mmap(-1, ROOM) for _ in range(EACH)] for _ in range(workers)]

    def __getitem__(self, step: int) -> bytes:
        try:
            return self._put(step)
        except UserError as error:  # PyTorch would make it a traceback
            return pickle.dumps(error)

    def _put(self, step: int) -> bytes:
        worker = torch.utils.data.get_worker_info().id
        free = (n for n in range(len(self.shelves[worker])) if not self.used[worker * EACH + n])
        number = next(free, None)
        if number is None:
            return _packed(self.steps[step], None, None)
        self.used[worker * EACH + number] = 1
        try:
            shelf = _Shelf(self.shelves[worker][number])
            return _packed(self.steps.read(step, shelf.empty), shelf, (worker, number))
        except BaseException:
            self.used[worker * EACH + number] = 0
            raise

    def taken(self, parcel: bytes) -> Step:
        """The step. Raises what the worker raised for bad input."""
        found = pickle.loads(parcel)
        if isinstance(found, UserError):
            raise found
        (step, places, where, end), data = found, None
        if where is not None:
            worker, number = where
            array = np.frombuffer(self.shelves[worker][number], np.uint8, end)
            weakref.finalize(array, _free, self.used, worker * EACH + number, os.getpid()).atexit = False
            data = torch.from_numpy(array)  # every tensor on the shelf keeps the array
        return _Unpickler(io.BytesIO(step), [_tensor(data, *place) for place in places]).load()


def _free(used: mmap.mmap, which: int, process: int) -> None:
    if os.getpid() == process:  # another one, forked while the step was held, has only lost its copy
        used[which] = 0


def _may_reserve() -> bool:
    """Whether memory that is mapped and not used costs nobody anything: no `ulimit -v`, no strict accounting."""
    with contextlib.suppress(OSError):
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


class _Shelf:
    """A shelf while it is filled."""

    def __init__(self, memory: mmap.mmap):
        self.data, self.end = torch.from_numpy(np.frombuffer(memory, np.uint8)), 0

    def empty(self, *size: int, dtype: torch.dtype) -> Tensor:
        """As `torch.empty`: on the shelf where it has room, else anywhere."""
        begin = self.end
        end = begin + -(-math.prod(size) * dtype.itemsize // ALIGNED) * ALIGNED
        if end > len(self.data):
            return torch.empty(size, dtype=dtype)
        self.end = end
        return _tensor(self.data, begin, dtype, size)

    def place(self, one: Tensor) -> int | None:
        """Where on the shelf a tensor begins; None where it is not there."""
        begin = one.data_ptr() - self.data.data_ptr()
        return begin if one.is_contiguous() and 0 <= begin < self.end else None


def _packed(step: Step, shelf: _Shelf | None, where: tuple[int, int] | None) -> bytes:
    """What goes through the pipe. `where`: the shelf, by its worker and its number."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(step)
    places = []
    for one in pickler.tensors:
        begin = None if shelf is None else shelf.place(one)
        if begin is None and shelf is not None:
            begin = shelf.place(shelf.empty(*one.shape, dtype=one.dtype).copy_(one))
        found = one.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if begin is None else begin
        places.append((found, one.dtype, tuple(one.shape)))
    return pickle.dumps((file.getvalue(), places, where, 0 if shelf is None else shelf.end))


def _tensor(data: Tensor | None, found: int | bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor that begins at a byte of the data, or whose own bytes are given."""
    if isinstance(found, bytes):
        data, found = torch.from_numpy(np.array(bytearray(found), np.uint8)), 0
    count = math.prod(shape)
    return data[found : found + count * dtype.itemsize].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Pickles all but tensors, which it keeps and numbers."""

    def __init__(self, file):
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, one):
        if not isinstance(one, Tensor):
            return None
        if id(one) not in self._numbers:
            self._numbers[id(one)] = len(self.tensors)
            self.tensors.append(one)
        return self._numbers[id(one)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, tensors: list[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]
