"""What holds memory on a device and what a step takes there: on this machine's own, which is measured, and on
accelerators that are elsewhere, by their data sheets and stated assumptions."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from ..batch import Batch
from ..model import pick_device
from ..stream.loader import BUFFERS_PER_WORKER
from . import accelerators as acc
from .calibrate import calibrate, measure_products, resident, with_depth
from .compute import cpu_name
from .config import TrainConfig
from .trace import Trace, trace

GB = 1e9
MOST_TRACED = 2  # microbatches of a step: the largest ones; their work stands for that of the others
CPU_UTILIZATION = 0.5  # of a CPU's matrix products in a whole step, assumed where steps take too long to be measured
LONGEST_CALIBRATION = 90.0  # seconds that steps with few blocks may be expected to take


@dataclass(frozen=True)
class Read:
    """What a few steps of the stream were like, on one rank."""

    batches: list[Batch]  # of the step with the most tokens
    tokens: float  # a step and rank, filler among them
    filler: float
    samples: int  # a step, of all ranks
    content: int  # bytes of raw content a step and rank, which go to the device
    seconds: float  # of a core of this machine, to read a rank's share of a step

    def largest(self) -> list[Batch]:
        """The microbatches that hold the most memory."""
        return sorted(self.batches, key=lambda batch: len(batch.tokens), reverse=True)[:MOST_TRACED]


class ThisMachine:
    """This machine's own device, which is measured."""

    def __init__(self, config: TrainConfig, traced: Trace, read: Read):
        self.config, self.device = config, pick_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.rate = measure_products(self.device)
        depth = config.model.backbone.depth
        work = (traced.flops + traced.update_flops) / (CPU_UTILIZATION * self.rate)
        self.measured: dict[str, Any] | None = None
        self.assumptions: list[str] = []
        if work * min(1.0, 3 / depth) * 5 <= LONGEST_CALIBRATION:
            self.measured = calibrate(config)
        else:
            self.assumptions.append(
                f"a step takes too long here to be measured: its products run at {CPU_UTILIZATION:.0%} of this "
                "machine's own rate, which was measured"
            )
        self.step_seconds = _extrapolate(self.measured["steps"], depth) if self.measured else work

    def describe(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        return {
            "kind": self.device.type,
            "name": name,
            "count": 1,
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "tflops": self.rate / 1e12,
            "memory": self._room(),
            "from": "measured: products of square matrices",
        }

    def _room(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def memory(self, traced: Trace, read: Read) -> dict[str, Any]:
        parts = _memory_parts(traced)
        if self.device.type == "cpu":
            parts["reading ahead"] = BUFFERS_PER_WORKER * self.config.num_workers * read.content
        if self.measured:
            peaks, framework = self.measured["peak"], self.measured["framework"]
            held = {
                n: sum(
                    _memory_parts(
                        trace(with_depth(self.config, n), read.largest(), self.device.type == "cuda")
                    ).values()
                )
                for n in peaks
            }
            over = {n: peak - framework - held[n] for n, peak in peaks.items()}
            parts["allocator"] = max(0, int(_extrapolate(over, self.config.model.backbone.depth)))
            self.assumptions.append("what the allocator cannot use was measured with one and two blocks")
        else:
            framework = resident(self.device)
            parts["allocator"] = int(acc.FRAGMENTATION * sum(traced.peak.values()))
        parts["framework"] = int(acc.CONTEXT * GB) if self.device.type == "cuda" else framework
        return _total(parts, traced, self._room())

    def seconds(self, traced: Trace, read: Read) -> dict[str, float]:
        compute = self.step_seconds
        found = {"compute": compute, "read": read.seconds / max(1, self.config.num_workers)}
        if self.device.type == "cpu" and self.config.num_workers:
            # whoever reads ahead takes its time from the same cores
            cores = len(os.sched_getaffinity(0))
            found["shared cores"] = (compute * torch.get_num_threads() + read.seconds) / cores
        elif not self.config.num_workers:
            found["compute"], found["read"] = compute + read.seconds, read.seconds
        return found

    def energy(self, hours: float) -> dict[str, Any]:
        if self.device.type == "cuda":
            return {"kwh": None, "from": "not known of this device: name its --kind"}
        threads = torch.get_num_threads()
        watts = threads * acc.CORE_WATTS + self._room() / GB * acc.MEMORY_WATTS
        what = f"{acc.CORE_WATTS:g} W a core, {acc.MEMORY_WATTS:g} W a GB of memory (Lannelongue et al. 2021), assumed"
        return {"kwh": watts * hours / 1000, "watts": watts, "from": what}


def _extrapolate(by_depth: dict[int, float], depth: int) -> float:
    """What is linear in the number of blocks, from one and two of them."""
    one, two = by_depth[1], by_depth.get(2, by_depth[1])
    return one + (two - one) * (depth - 1)


class Accelerators:
    """Accelerators of a data sheet."""

    def __init__(self, config: TrainConfig, kind: acc.Accelerator, count: int, utilization: float):
        self.config, self.kind, self.count = config, kind, count
        self.utilization = utilization or acc.UTILIZATION
        self.sharding = _Sharding(config, count)
        said = "as given" if utilization else "assumed"
        self.assumptions = [
            f"products at {self.utilization:.0%} of {kind.tflops[config.precision]:g} TFLOP/s ({kind.source}), {said}",
            f"{acc.CONTEXT:g} GB for context and libraries, {acc.FRAGMENTATION:.0%} of a step's memory lost, assumed",
            f"{kind.link:g} GB/s between the {acc.MACHINE} devices of a machine, {acc.NETWORK:g} GB/s a device between "
            f"machines, {acc.TRANSFER:g} GB/s from the host, assumed",
            f"{kind.watts:g} W a device, its limit, and {acc.HOST_WATTS:.0%} more for the host, assumed",
            "samples are read as fast as one core of this machine read them",
        ]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind.name,
            "name": self.kind.name,
            "count": self.count,
            "tflops": self.kind.tflops[self.config.precision],
            "memory": int(self.kind.memory * GB),
            "utilization": self.utilization,
            "parallel": self.sharding.kind,
            "from": self.kind.source,
        }

    def memory(self, traced: Trace, read: Read) -> dict[str, Any]:
        parts = _memory_parts(traced)
        if self.sharding.shards > 1:
            for name in traced.held:
                parts[name] = math.ceil(parts[name] / self.sharding.shards)
            # the block at work and the one that is fetched ahead; what lies outside of the blocks is whole in a step
            outside = sum(traced.parameters.values()) - self.config.model.backbone.depth * traced.block
            parts["gathered weights"] = 2 * _width(self.config) * traced.block + 4 * max(0, outside)
            if len(read.batches) == 1:  # else gradients are whole until the last microbatch
                whole = 4 * (traced.block + max(0, outside))
                parts["gradients"] = min(parts["gradients"], whole + parts["gradients"] // self.sharding.shards)
        parts["allocator"] = int(acc.FRAGMENTATION * sum(traced.peak.values()))
        parts["framework"] = int(acc.CONTEXT * GB)
        return _total(parts, traced, int(self.kind.memory * GB))

    def seconds(self, traced: Trace, read: Read) -> dict[str, float]:
        rate = self.kind.tflops[self.config.precision] * 1e12 * self.utilization
        compute = traced.flops / rate
        own = 1 / self.sharding.shards
        # an update reads and writes weights, gradients, moments and the average
        update = traced.update_flops / self.count / rate + 2 * (
            sum(traced.held.values()) + 4 * traced.trainable
        ) * own / (self.kind.bandwidth * 1e12)
        exchange = self.sharding.seconds(traced, len(read.batches), self.kind)
        return {
            "compute": compute + update + max(0.0, exchange - self.sharding.hidden(compute, len(read.batches))),
            "exchange": exchange,
            "update": update,
            "read": read.seconds / max(1, self.config.num_workers),
            "transfer": read.content / (acc.TRANSFER * GB),
        }

    def energy(self, hours: float) -> dict[str, Any]:
        watts = self.count * self.kind.watts * (1 + acc.HOST_WATTS)
        return {
            "kwh": watts * hours / 1000,
            "watts": watts,
            "from": f"{self.kind.watts:g} W a device at its limit, assumed",
        }


class _Sharding:
    """How weights, gradients, moments and averages are shared out among the ranks, and what ranks exchange."""

    def __init__(self, config: TrainConfig, count: int):
        self.config, self.count, self.kind = config, count, config.parallel.kind
        sizes = {"ddp": 1, "fsdp": count, "hsdp": config.parallel.shard_size}
        self.shards = min(sizes[self.kind], count)

    def seconds(self, traced: Trace, microbatches: int, kind: acc.Accelerator) -> float:
        """Of all that is exchanged in a step: gradients once, sharded weights before each forward and backward."""
        if self.count == 1:
            return 0.0
        speed = (kind.link if self.count <= acc.MACHINE else acc.NETWORK) * GB
        inside = (kind.link if self.shards <= acc.MACHINE else acc.NETWORK) * GB
        weights = sum(traced.parameters.values())
        if self.shards == 1:
            return 2 * 4 * traced.trainable / speed
        gathered = 2 * microbatches * _width(self.config) * weights / inside
        across = 2 * 4 * traced.trainable / self.shards / speed if self.shards < self.count else 0.0
        return gathered + 4 * traced.trainable / inside + across

    def hidden(self, compute: float, microbatches: int) -> float:
        """Seconds of computing behind which the exchange can hide: the last backward pass, or, of shards, all."""
        return compute if self.shards > 1 else compute * 2 / 3 / max(1, microbatches)


def _width(config: TrainConfig) -> int:
    """Bytes of a number in a product."""
    return 4 if config.precision == "float32" else 2


def _memory_parts(traced: Trace) -> dict[str, int]:
    """What stays, and what the hungrier of a step's halves, forward and backward or update, holds beside it."""
    return {**traced.held, **max(traced.peak, traced.update, key=lambda half: sum(half.values()))}


def _total(parts: dict[str, int], traced: Trace, room: int) -> dict[str, Any]:
    total = sum(parts.values())
    halves = {"forward and backward": sum(traced.peak.values()), "update": sum(traced.update.values())}
    return {"parts": parts, "halves": halves, "total": total, "room": room, "fits": total <= room}
