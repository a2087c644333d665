"""Several processes that train one model: each takes some of a step's microbatches. One process is the plain case.

`torchrun --nproc-per-node 2 -m multimodal_fm pretrain …` starts them; gloo on a CPU, NCCL on GPUs.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError

PATIENCE = datetime.timedelta(minutes=30)  # for the first rank to make the indexes and the tokenizer


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def all_gather_objects(self, value) -> list:
        """What every rank has to say, in the ranks' order."""
        if self.size == 1:
            return [value]
        told: list = [None] * self.size
        dist.all_gather_object(told, value, group=_plain())
        return told

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=_plain())

    def broadcast(self, work):
        """What `work()` gives the first rank, for all of them."""
        if not self.first:
            return _raise_or(self.all_gather_objects(None)[0])
        try:
            made = work()
        except BaseException as error:
            self.all_gather_objects((f"{type(error).__name__}: {error}", None))
            raise
        self.all_gather_objects(("", made))
        return made

    def first_rank_first(self, work):
        """`work()`, by the first rank before the others: it makes what they then find."""
        made = []
        self.broadcast(lambda: made.append(work()))
        return made[0] if self.first else work()

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the ranks, in place."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def all_gather(self, rows: Tensor) -> list[Tensor]:
        """Each rank's rows (n, D), in the ranks' order; the ranks may have different n."""
        if self.size == 1:
            return [rows]
        counts = self.all_gather_objects(len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        return [one[:count] for one, count in zip(found, counts, strict=True)]


def _raise_or(told):
    failed, made = told
    if failed:
        raise UserError(f"the first rank could not go on: {failed}")
    return made


ALONE = Ranks()
_group = None


def _plain():
    """A group for objects and waiting, which need no GPU."""
    global _group
    if _group is None:
        _group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)
    return _group


def join(device: torch.device) -> Ranks:
    """Meet the other processes that `torchrun` has started, if any."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Ranks()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), size)


def leave() -> None:
    global _group
    if dist.is_initialized():
        dist.destroy_process_group()
        _group = None
