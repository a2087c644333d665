"""What lies on the CPU goes to a device: every tensor of a batch in one piece of pinned memory, by one copy.

A batch has some dozens of tensors of whole numbers, most of them small, and each copy from pageable memory makes the
processor wait. Here they are laid side by side, with the content, and cut apart again on the device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes


def move(value: Any, device: torch.device | str, halved: Collection[int] = ()) -> Any:
    """`value` with all of its tensors on the device, packed where that is a GPU and they are on the CPU.

    value: a tensor, a map, a tuple, or a dataclass of them; numbers stay, and so does a dataclass that sets
    `stays_on_cpu`; anything else moves by its own method `to`. halved: the `id` of float32 tensors that may go in half
    precision on the way to a GPU; there they are float32 again. Nothing waits for the device.
    """
    goal, tensors = torch.device(device), list_tensors(value)
    if all(_is_on(tensor, goal) for tensor in tensors):
        return value
    if goal.type == "cuda" and all(tensor.device.type == "cpu" for tensor in tensors):
        packed = Packed(tensors, halved, pin=True)
        moved = packed.unpack(packed.memory.to(goal, non_blocking=True))
    else:
        moved = [tensor.to(goal, non_blocking=True) for tensor in tensors]
    found = {id(tensor): one for tensor, one in zip(tensors, moved, strict=True)}
    return rebuild(value, lambda tensor: found[id(tensor)], goal)


class Packed:
    """Tensors side by side in one piece of memory (bytes,); equal views of one memory lie there once."""

    def __init__(self, tensors: list[Tensor], halved: Collection[int] = (), pin: bool = False):
        self.places: list[tuple[int, torch.dtype, torch.Size, bool]] = []  # first byte, type, shape, whether halved
        known: dict[tuple, int] = {}
        writes, end = [], 0
        for tensor in tensors:
            half = id(tensor) in halved and tensor.dtype == torch.float32
            dtype = torch.float16 if half else tensor.dtype
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), half)
            if key not in known or not tensor.numel():
                known[key] = end
                writes.append((tensor, len(self.places)))
                end += -(-tensor.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            self.places.append((known[key], dtype, tensor.shape, half))
        self.memory = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
        for tensor, number in writes:
            self._view(self.memory, number).copy_(tensor)

    def _view(self, memory: Tensor, number: int) -> Tensor:
        first, dtype, shape, _ = self.places[number]
        return memory[first : first + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def unpack(self, memory: Tensor) -> list[Tensor]:
        """The tensors, as views of a copy of the memory; those that went in half precision are float32 again."""
        views = [self._view(memory, number) for number in range(len(self.places))]
        return [view.float() if half else view for view, (*_, half) in zip(views, self.places, strict=True)]


def read_later(figures: dict[str, Tensor]) -> Callable[[], dict[str, float]]:
    """Gives a function that returns numbers by name. What is on a GPU is on its way from now on, in one copy, so that
    who asks waits for what was queued before this call and for nothing that came after it."""
    if not any(figure.is_cuda for figure in figures.values()):
        return lambda: {name: float(figure) for name, figure in figures.items()}
    device = next(figure.device for figure in figures.values() if figure.is_cuda)
    flat = torch.stack([figure.detach().float().reshape(()).to(device) for figure in figures.values()])
    host = torch.empty(flat.shape, pin_memory=True).copy_(flat, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()

    def read() -> dict[str, float]:
        ready.synchronize()
        return dict(zip(figures, host.tolist(), strict=True))

    return read


def list_tensors(value: Any) -> list[Tensor]:
    """All tensors that `move` would move, in order."""
    found: list[Tensor] = []
    rebuild(value, lambda tensor: found.append(tensor) or tensor, None)
    return found


def rebuild(value: Any, change: Callable[[Tensor], Tensor], device: torch.device | None) -> Any:
    """`value` with each tensor changed; what moves by a method of its own goes to the device, where one is given."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: rebuild(one, change, device) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(rebuild(one, change, device) for one in value)
    if value is None or isinstance(value, (int, float, str)) or getattr(value, "stays_on_cpu", False):
        return value
    if dataclasses.is_dataclass(value):
        fields = {f.name: rebuild(getattr(value, f.name), change, device) for f in dataclasses.fields(value) if f.init}
        return type(value)(**fields)
    return value if device is None else value.to(device)


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and (device.index is None or tensor.device.index == device.index)
