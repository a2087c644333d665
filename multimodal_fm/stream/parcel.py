"""A step on its way from one process to another: all its tensors in one block of shared memory.

PyTorch would send each tensor in a block, and with an open file, of its own: some hundreds a step.
"""

from __future__ import annotations

import io
import pickle
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor

ALIGNED = 64  # bytes


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


def packed(step) -> bytes:
    """What a queue carries. Made here, since an error of the queue's own thread is told to nobody.

    Raises RuntimeError or OSError where there is no shared memory, or no file, left.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(step)
    places, end = [], 0
    for one in pickler.tensors:
        places.append((end, one.dtype, tuple(one.shape)))
        end += -(-one.numel() * one.element_size() // ALIGNED) * ALIGNED
    block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(max(end, 1)))
    for one, place in zip(pickler.tensors, places, strict=True):
        _at(block, *place).copy_(one)
    return bytes(ForkingPickler.dumps((file.getvalue(), places, block)))


def unpacked(parcel: bytes):
    """The step, its tensors where they were put. Raises OSError where the process that packed it is gone."""
    data, places, block = ForkingPickler.loads(parcel)
    return _Unpickler(io.BytesIO(data), [_at(block, *place) for place in places]).load()


def _at(block: Tensor, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    return block[begin : begin + count * dtype.itemsize].view(dtype).view(shape)
