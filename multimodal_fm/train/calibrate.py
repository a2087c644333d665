"""What this machine does: its matrix products, how fast it reads samples, and steps of the run with few blocks.

A step's time and what a process holds grow by the same amount with each block, so that steps with one and with two
blocks tell those of a run of any depth, with all that belongs to it: objectives, optimizers, averages. It is done in a
process of its own, whose memory is that of a run's process.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import nn

from ..batch import with_counts
from ..config import to_data
from ..model import pick_device
from ..stream.tasks import build_stream
from .config import TrainConfig, build
from .setup import open_sources
from .trace import held_bytes
from .train_step import TrainStep

SIZE, PRODUCT_SECONDS = 1024, 0.5  # of the matrices on a CPU that are multiplied, and for how long
MAX_STEPS, MAX_SECONDS = 6, 20.0  # of each depth, and of all steps together
LEAST_STEPS = 2


def measure_products(device: torch.device, seconds: float = PRODUCT_SECONDS) -> float:
    """Floating-point operations a second of products of square matrices."""
    size, dtype = (SIZE, torch.float32) if device.type == "cpu" else (8 * SIZE, torch.bfloat16)
    a = torch.randn(size, size, device=device, dtype=dtype)
    taken, began = [], time.perf_counter()
    torch.mm(a, a)
    while not taken or time.perf_counter() - began < seconds:
        _wait(device)
        start = time.perf_counter(), time.process_time()
        torch.mm(a, a)
        _wait(device)
        taken.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return 2 * size**3 / _when_idle(taken, device)


def calibrate(config: TrainConfig) -> dict[str, Any]:
    """Measures steps of `config`, whose tokenizers have learned, with few blocks.

    Returns {"steps": {depth: seconds of a step where nothing else runs here}, "threads",
    "read": processor seconds to read a step,
    "framework": bytes of the process before there is a model, "peak": {depth: the most bytes of the process}}.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_calibrate, to_data(config)).result()


def _calibrate(data: dict) -> dict[str, Any]:
    config = build(data)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    _import_all(config)
    corpora = open_sources(config)
    stream = build_stream(
        config.tasks, corpora, config.model.tokenizers, config.seed, config.microbatches, config.round_to,
        heads=config.model.heads,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps, reads = [], []
    for number in range(LEAST_STEPS):
        began = time.process_time()
        step = stream[number]
        reads.append(time.process_time() - began)
        steps.append([with_counts(batch, step.counts) for batch in step.batches])
    torch.set_num_threads(threads)
    framework = resident(device)
    depths = sorted({1, min(2, config.model.backbone.depth)})
    runs, seconds, peaks = {}, {depth: [] for depth in depths}, {}
    before = 0  # bytes of the runs with fewer blocks, which are still there
    for depth in depths:
        _reset_peak(device)
        runs[depth] = TrainStep(with_depth(config, depth), device)
        for number in range(LEAST_STEPS):
            runs[depth](number, steps[number])
        peaks[depth] = _peak(device) - before
        before += sum(held_bytes(runs[depth]).values())
    began = time.perf_counter()
    for number in range(2, 2 + MAX_STEPS):  # in turns, so that what else runs here slows both
        for depth in depths:
            _wait(device)
            start = time.perf_counter(), time.process_time()
            runs[depth](number, steps[number % len(steps)])
            _wait(device)
            seconds[depth].append((time.perf_counter() - start[0], time.process_time() - start[1]))
        if number >= 1 + LEAST_STEPS and time.perf_counter() - began > MAX_SECONDS:
            break
    return {
        "steps": {depth: _when_idle(own, device) for depth, own in seconds.items()},
        "read": min(reads),
        "threads": threads,
        "framework": framework,
        "peak": peaks,
    }


def with_depth(config: TrainConfig, depth: int) -> TrainConfig:
    """The same run with so many blocks in its backbone, from random weights."""
    backbone = dataclasses.replace(config.model.backbone, depth=depth)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone), init="")


def _import_all(config: TrainConfig) -> None:
    """Whatever a run's process imports before its first step and in it."""
    from . import loop  # noqa: F401

    if "tensorboard" in config.track:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    layer = nn.Linear(8, 8)
    layer(torch.randn(4, 8)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _when_idle(taken: list[tuple[float, float]], device: torch.device) -> float:
    """The seconds of a step where nothing else runs on this machine, of pairs of seconds and processor seconds.

    Processor seconds hardly depend on what else runs; how many of them there are in a second is told by the pair that
    was interrupted least. A process alone does not take longer than its processor seconds.
    """
    if device.type != "cpu":
        return min(seconds for seconds, _ in taken)
    return statistics.median(cpu for _, cpu in taken) * min(1.0, *(seconds / cpu for seconds, cpu in taken))


def resident(device: torch.device) -> int:
    """The bytes that this process holds, on the device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """The most that the process has held so far, on the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
