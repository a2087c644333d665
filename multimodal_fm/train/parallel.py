"""Several processes that train one model: each takes some of a step's microbatches. One process is the plain case.

`torchrun --nproc-per-node 2 -m multimodal_fm pretrain …` starts them; gloo on a CPU, NCCL on GPUs.
"""

from __future__ import annotations

import datetime
import os
import secrets
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError

TIMEOUT = datetime.timedelta(hours=12)
"""How long a rank waits for the others: as long as the first one may make indexes or evaluate. `hang_timeout` of the
run's config notices a step that hangs much earlier."""

STORE_KEY, PATIENCE = "multimodal_fm/store", datetime.timedelta(seconds=5)  # where the ranks' own store is announced


@dataclass
class Config:
    kind: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: every rank holds the whole model. fsdp: each holds a shard of every weight, gradient, moment and average
    (FSDP2). hsdp: shards within groups of `shard_size` ranks, such as those of one machine, copies across groups."""
    shard_size: int = 0  # hsdp: ranks of a group; the number of ranks is a multiple of it

    def __post_init__(self):
        if (self.kind == "hsdp") != (self.shard_size > 0):
            raise ValueError("shard_size is a number from 1 up with kind: hsdp, and 0 with the other kinds")

    def check(self, size: int) -> None:
        """Raises UserError where so many ranks cannot be laid out."""
        if self.kind == "hsdp" and size % self.shard_size:
            raise UserError(f"parallel.shard_size={self.shard_size} does not divide the {size} ranks")


@dataclass(frozen=True)
class Ranks:
    """This process among the others. Methods with `objects` in their name speak over the CPU, whatever the device."""

    rank: int = 0
    size: int = 1
    group: Any = None  # of the objects; None: one for all that the main thread says

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_gather_objects(self, value) -> list:
        """Every rank's value, in the ranks' order."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.group or _cpu_group())
        return values

    def in_background(self) -> Ranks:
        """The same ranks for another thread, whose objects do not get between those of this one. All ranks call it."""
        return self if self.size == 1 else Ranks(self.rank, self.size, dist.new_group(backend="gloo", timeout=TIMEOUT))

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

    def all_gather(self, rows: Tensor, counts: list[int] | None = None) -> list[Tensor]:
        """Each rank's rows (n, D), in the ranks' order; the ranks may have different n: `counts`, where it is known."""
        if self.size == 1:
            return [rows]
        counts = self.all_gather_objects(len(rows)) if counts is None else counts
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
        settings: dict[str, Any] = {"timeout": TIMEOUT}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            settings |= {"rank": int(os.environ["RANK"]), "world_size": size, "store": _new_store(size)}
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, **settings)
        else:
            dist.init_process_group("gloo", **settings)
    return Ranks(dist.get_rank(), size)


def _new_store(size: int) -> Any:
    """A store of this try's ranks alone, which the first rank keeps.

    The one that torchrun offers outlives a restart, and with it the addresses of ranks that are dead: who comes first
    would take them for those of the new ones, and gloo waits for ever, each rank for the other. It only tells where the
    new store is; an address of an earlier try leads nowhere, or to a store that knows another number.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    stores: Any = dist  # which offers them without saying so to type checkers
    launcher = stores.TCPStore(host, port, is_master=False, timeout=TIMEOUT)
    if os.environ["RANK"] == "0":
        store = stores.TCPStore(host, 0, size, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
        number = secrets.token_hex(8)
        store.set("number", number)
        launcher.set(STORE_KEY, f"{store.port} {number}")
        return store
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        port, number = launcher.get(STORE_KEY).decode().split()
        try:
            store = stores.TCPStore(host, int(port), size, is_master=False, timeout=PATIENCE, wait_for_workers=False)
            if store.get("number").decode() == number:
                store.set_timeout(TIMEOUT)
                return store
        except (RuntimeError, ValueError):  # of an earlier try
            time.sleep(0.2)
    raise UserError(f"rank {os.environ['RANK']}: the first rank did not come within {TIMEOUT}")


def shutdown() -> None:
    global _group
    if dist.is_initialized():
        dist.destroy_process_group()
        _group = None
