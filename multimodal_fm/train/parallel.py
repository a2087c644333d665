"""Several processes that train one model: each takes some of a step's microbatches. One process is the plain case.

`torchrun --nproc-per-node 2 -m multimodal_fm pretrain …` starts them; gloo on a CPU, NCCL on GPUs.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError

TIMEOUT = datetime.timedelta(minutes=30)  # for the first rank to make the indexes and the tokenizer


@dataclass(frozen=True)
class Ranks:
    """This process among the others. Methods with `objects` in their name speak over the CPU, whatever the device."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_gather_objects(self, value) -> list:
        """Every rank's value, in the ranks' order."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=_cpu_group())
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=_cpu_group())

    def on_first(self, work):
        """What `work()` returns on the first rank, for all of them. Raises UserError on the others where it raises."""
        if not self.is_first:
            error, result = self.all_gather_objects(None)[0]
            if error:
                raise UserError(f"the first rank could not go on: {error}")
            return result
        try:
            result = work()
        except BaseException as error:
            self.all_gather_objects((f"{type(error).__name__}: {error}", None))
            raise
        self.all_gather_objects(("", result))
        return result

    def first_then_others(self, work):
        """`work()` on each rank, on the first one before the others, which then find what it made."""
        results = []
        self.on_first(lambda: results.append(work()))
        return results[0] if self.is_first else work()

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the ranks, in place."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def sum_by_name(self, values: dict[str, Tensor], device) -> dict[str, Tensor]:
        """Sums over the ranks of scalars by name; a rank may lack some of them."""
        if self.size == 1:
            return values
        names = sorted({name for own in self.all_gather_objects(list(values)) for name in own})
        zero = torch.zeros((), device=device)
        stacked = torch.stack([values.get(name, zero).float() for name in names])
        dist.all_reduce(stacked)
        return dict(zip(names, stacked.unbind(), strict=True))

    def all_gather(self, rows: Tensor) -> list[Tensor]:
        """Each rank's rows (n, D), in the ranks' order; the ranks may have different n."""
        if self.size == 1:
            return [rows]
        counts = self.all_gather_objects(len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return [one[:count] for one, count in zip(gathered, counts, strict=True)]


ALONE = Ranks()
_group = None


def _cpu_group() -> Any:
    """A process group for objects and barriers, which needs no GPU."""
    global _group
    if _group is None:
        _group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=TIMEOUT)
    return _group


def init(device: torch.device) -> Ranks:
    """Meet the other processes that `torchrun` has started, if any."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return ALONE
    if not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT)
    return Ranks(dist.get_rank(), size)


def shutdown() -> None:
    global _group
    if dist.is_initialized():
        dist.destroy_process_group()
        _group = None
