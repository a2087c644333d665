"""What a run asks of its machine, and says of it."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from ..corpus.shards import Corpus
from .config import TrainConfig
from .train_step import TrainStep


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """While it lasts, a GPU computes by algorithms that give the same bits each time, where `enabled`."""
    before = torch.are_deterministic_algorithms_enabled()
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it is first used
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def memory_gb(device: torch.device) -> float:
    """The most memory that the process has had so far, on the device, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _cpu_computes_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return torch.backends.cpu.get_cpu_capability() != "AVX2" and any(
        f in flags for f in ("avx512_bf16", "amx_bf16", "bf16")
    )


def headline(config: TrainConfig, train_step: TrainStep, corpora: dict[str, Corpus], step: int) -> list[str]:
    """What a run says before its first step, in lines."""
    millions = sum(p.numel() for p in train_step.parameters) / 1e6
    samples = ", ".join(f"{name} {len(corpus):,}" for name, corpus in corpora.items())
    go_on = f", going on from step {step}" if step else ""
    lines = [
        f"{config.run_dir}: {millions:.1f} M parameters on {train_step.device}, {config.steps} steps{go_on}",
        f"samples: {samples}",
    ]
    if config.precision == "bfloat16" and train_step.device.type == "cpu" and not _cpu_computes_bfloat16():
        lines.append("warning: this processor computes bfloat16 in software, several times slower: precision=float32")
    return lines
