"""Muon on several ranks: each matrix is orthogonalized by one of them, its owner.

A matrix whose rows lie on all ranks comes together at its owner by one all-to-all and goes back by another; one that
every rank holds whole is only sent out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .muon import orthogonalize_all


def assign(shapes: Sequence[torch.Size], ranks: int) -> list[int]:
    """The owner of each matrix (M, N): the most work first, each to the rank that has the least so far."""
    work = [min(shape) ** 2 * max(shape) for shape in shapes]
    loads, owners = [0] * ranks, [0] * len(work)
    for number in sorted(range(len(work)), key=lambda n: -work[n]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += work[number]
    return owners


class WholeMatrices:
    """Of matrices that every rank holds: each rank orthogonalizes its own and hears of the others'.

    group: the ranks; None: all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def __call__(self, updates: list[Tensor]) -> list[Tensor]:
        if not updates:
            return []
        owners = assign([update.shape for update in updates], self.size)
        mine = orthogonalize_all([u for u, owner in zip(updates, owners, strict=True) if owner == self.rank])
        counts = [0] * self.size
        for update, owner in zip(updates, owners, strict=True):
            counts[owner] += update.numel()
        dtype = torch.bfloat16 if updates[0].is_cuda else torch.float32  # that of `orthogonalize`
        flat = torch.zeros(max(counts), dtype=dtype, device=updates[0].device)
        if mine:
            flat[: counts[self.rank]] = torch.cat([one.reshape(-1) for one in mine])
        gathered = [torch.empty_like(flat) for _ in counts]
        dist.all_gather(gathered, flat, group=self.group)
        taken, results = [0] * self.size, []
        for update, owner in zip(updates, owners, strict=True):
            results.append(gathered[owner].narrow(0, taken[owner], update.numel()).view_as(update))
            taken[owner] += update.numel()
        return results


class RowsOfMatrices:
    """Of matrices whose rows are shared out over the ranks of a group, in the chunks of `torch.chunk`.

    shapes: of all matrices, in an order that is the same on all ranks. held: which of them this rank has rows of; the
    updates are given for these.
    """

    def __init__(
        self,
        shapes: list[torch.Size],
        held: list[bool],
        group: dist.ProcessGroup,
        device: torch.device,
        work: Callable[[list[Tensor]], list[Tensor]] = orthogonalize_all,
    ):
        self.shapes, self.held, self.group, self.device, self.work = shapes, held, group, device, work
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.owners = assign(shapes, self.size)

    def _rows(self, shape: torch.Size, rank: int) -> int:
        rows = -(-shape[0] // self.size)
        return max(0, min(rows, shape[0] - rank * rows))

    def _owned_by(self, owner: int) -> list[int]:
        return [number for number, own in enumerate(self.owners) if own == owner]

    def __call__(self, updates: list[Tensor]) -> list[Tensor]:
        # every rank takes part, one that has no rows of anything too
        given = iter(updates)
        update = {number: next(given) for number, held in enumerate(self.held) if held}
        parts = [[update[n].reshape(-1) for n in self._owned_by(rank) if n in update] for rank in range(self.size)]
        mine = self._owned_by(self.rank)
        sizes = [[self._rows(self.shapes[n], rank) * self.shapes[n][1] for n in mine] for rank in range(self.size)]
        received = self._exchange(parts, [sum(own) for own in sizes], torch.float32)
        pieces = [flat.split(own) for flat, own in zip(received, sizes, strict=True)]
        whole = [torch.cat([one[k] for one in pieces]).view(self.shapes[n]) for k, n in enumerate(mine)]
        done = self.work(whole)
        back = [[] for _ in range(self.size)]
        for matrix, n in zip(done, mine, strict=True):
            rows = [self._rows(self.shapes[n], rank) for rank in range(self.size)]
            for part, piece in zip(back, matrix.split(rows), strict=True):
                part.append(piece.reshape(-1))
        owned = [[n for n in self._owned_by(rank) if n in update] for rank in range(self.size)]
        counts = [[update[n].numel() for n in own] for own in owned]
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        results: dict[int, Tensor] = {}
        for flat, own, count in zip(self._exchange(back, [sum(c) for c in counts], dtype), owned, counts, strict=True):
            for number, piece in zip(own, flat.split(count), strict=True):
                results[number] = piece.view_as(update[number])
        return [results[number] for number, held in enumerate(self.held) if held]

    def _exchange(self, parts: list[list[Tensor]], sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
        """Send to each rank its parts, and receive so many numbers from each."""
        empty = torch.zeros(0, dtype=dtype, device=self.device)
        flat = [torch.cat([empty, *(part.to(dtype) for part in own)]) for own in parts]
        received = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        dist.all_to_all_single(received, torch.cat(flat), sizes, [len(own) for own in flat], group=self.group)
        return list(received.split(sizes))
