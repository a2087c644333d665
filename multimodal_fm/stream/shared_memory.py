"""Carries steps from worker processes to the main process, in memory that all of them share and that is used again.

PyTorch would send each tensor in a file of its own under /dev/shm: some hundreds a step, made anew for every step, of
which the system clears every page first.
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .dataset import Step

ALIGNMENT = 64  # bytes
BUFFER_BYTES = 1 << 30  # of address space; the system provides the pages that are written to


class SharedBuffers:
    """Buffers that worker processes write steps to and the main process reads them from.

    They are made before the workers are forked, which inherit them. The main process takes a free buffer for each step
    (`acquire`) and frees it when the last tensor in it is gone. Without a free buffer, or where one is full, tensors go
    through the pipe of the worker: slower, but it works where memory may not be reserved, and where a caller keeps
    every step.
    """

    def __init__(self, count: int):
        self.buffers: list[mmap.mmap] = []
        if _may_reserve():
            with contextlib.suppress(OSError):
                self.buffers = [mmap.mmap(-1, BUFFER_BYTES) for _ in range(count)]
        self.free = list(range(len(self.buffers)))[::-1]  # the last freed, whose pages exist, is the next to be used

    def acquire(self) -> int | None:
        """The number of a free buffer, None where there is none."""
        return self.free.pop() if self.free else None

    def write(self, number: int | None, read: Callable[..., Step]) -> bytes:
        """Called in a worker: the step that `read(empty)` returns, as bytes for `load`.

        `empty` allocates tensors as `torch.empty` does, in the buffer where there is room.
        """
        file = io.BytesIO()
        pickler = _Pickler(file, _Buffer(b"" if number is None else self.buffers[number]))
        pickler.dump(read(pickler.buffer.empty))
        return file.getvalue()

    def load(self, number: int | None, data: bytes) -> Step:
        """The step that `write` wrote to the buffer. Its tensors share the buffer's memory."""
        memory = None
        if number is not None:
            array = np.frombuffer(self.buffers[number], np.uint8)  # every tensor in the buffer keeps it alive
            weakref.finalize(array, self._release, number, os.getpid()).atexit = False
            memory = torch.from_numpy(array)
        return _Unpickler(io.BytesIO(data), memory).load()

    def _release(self, number: int, process: int) -> None:
        if os.getpid() == process:  # a process that was forked while the step was held has only lost its copy
            self.free.append(number)


def _may_reserve() -> bool:
    """Whether address space costs nothing until it is used: no `ulimit -v`, no strict accounting of memory."""
    with contextlib.suppress(OSError):
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


class _Buffer:
    """A buffer that is being filled."""

    def __init__(self, memory: mmap.mmap | bytes):
        self.memory = torch.from_numpy(np.frombuffer(memory, np.uint8)) if memory else torch.empty(0, dtype=torch.uint8)
        self.end = 0

    def empty(self, *size: int, dtype: torch.dtype) -> Tensor:
        """As `torch.empty`: in the buffer where it has room, else anywhere."""
        begin, end = self.end, self.end + -(-math.prod(size) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if end > len(self.memory):
            return torch.empty(size, dtype=dtype)
        self.end = end
        return _view(self.memory, begin, dtype, size)

    def place(self, tensor: Tensor) -> int | bytes:
        """The byte at which the tensor begins in the buffer, where it is copied to if need be; else its bytes."""
        if not self._contains(tensor):
            tensor = self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)
        if self._contains(tensor):
            return tensor.data_ptr() - self.memory.data_ptr()
        return tensor.view(-1).view(torch.uint8).numpy().tobytes()

    def _contains(self, tensor: Tensor) -> bool:
        return tensor.is_contiguous() and 0 <= tensor.data_ptr() - self.memory.data_ptr() < self.end


def _view(memory: Tensor | None, place: int | bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor that begins at a byte of the memory, or whose own bytes are given."""
    if isinstance(place, bytes):
        memory, place = torch.from_numpy(np.frombuffer(bytearray(place), np.uint8)), 0
    assert memory is not None
    size = math.prod(shape) * dtype.itemsize
    return memory[place : place + size].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Pickles of a tensor only where it is."""

    def __init__(self, file: io.BytesIO, buffer: _Buffer):
        super().__init__(file, protocol=5)
        self.buffer = buffer

    def persistent_id(self, value):
        if isinstance(value, Tensor):
            return self.buffer.place(value), value.dtype, tuple(value.shape)
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, memory: Tensor | None):
        super().__init__(file)
        self.memory = memory

    def persistent_load(self, place: tuple[int | bytes, torch.dtype, tuple[int, ...]]) -> Tensor:
        return _view(self.memory, *place)
