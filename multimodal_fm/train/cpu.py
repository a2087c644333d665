"""What a training on a CPU asks of its process: memory that stays, and no arithmetic with subnormal numbers."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
NEVER = -1


@contextlib.contextmanager
def without_subnormals() -> Iterator[None]:
    """Numbers below 1.2e-38 count as zero inside, in this thread and in those that torch starts from it.

    A processor takes a hundred times as long for them, and a training makes many: the moments of an embedding that no
    batch has read for a thousand steps, which AdamW goes on with, or the softmax of a large vocabulary
    (benchmarks/LOG.md). To be entered before torch starts its threads, which keep the setting that they began with.
    """
    before = float(torch.tensor([torch.finfo(torch.float32).tiny]) * 0.5) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def keep_freed_memory() -> bool:
    """Tell glibc not to give freed memory back to the system; returns whether it will do so.

    By default large blocks are mapped anew each time and the end of the heap is given back, so that every step of a
    training on a CPU pays for the system's clearing of gigabytes of pages (4 to 5 % of a step, benchmarks/LOG.md). The
    process grows to its peak and stays there. Elsewhere than on Linux with glibc nothing happens.
    """
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
    return False
