"""What accelerators can do at most, by their makers' data sheets, and what links between them carry.

Peaks are those of dense matrices; data sheets often print twice as much, for 2:4 sparsity.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Accelerator:
    name: str
    memory: float  # GB
    bandwidth: float  # of its memory, TB/s
    tflops: dict[str, float]  # by precision; float32 as TF32 products, where it has them
    watts: float  # the board's limit
    link: float  # GB/s in one direction to the others of its machine
    source: str


def _nvidia(name, memory, bandwidth, float32, bfloat16, float8, watts, link, sheet) -> Accelerator:
    peaks = {"float32": float32, "bfloat16": bfloat16} | ({"float8": float8} if float8 else {})
    return Accelerator(name, memory, bandwidth, peaks, watts, link, f"NVIDIA, {sheet}")


ACCELERATORS = {
    "b200": _nvidia("B200 SXM", 180, 8.0, 1125, 2250, 4500, 1000, 900, "DGX B200 data sheet"),
    "h200": _nvidia("H200 SXM", 141, 4.8, 494, 989, 1979, 700, 450, "H200 Tensor Core GPU data sheet"),
    "h100": _nvidia("H100 SXM", 80, 3.35, 494, 989, 1979, 700, 450, "H100 Tensor Core GPU data sheet"),
    "h100-pcie": _nvidia("H100 PCIe", 80, 2.0, 378, 756, 1513, 350, 64, "H100 Tensor Core GPU data sheet, PCIe"),
    "a100": _nvidia("A100 SXM 80 GB", 80, 2.039, 156, 312, None, 400, 300, "A100 Tensor Core GPU data sheet"),
    "a100-40": _nvidia("A100 SXM 40 GB", 40, 1.555, 156, 312, None, 400, 300, "A100 Tensor Core GPU data sheet"),
    "l40s": _nvidia("L40S", 48, 0.864, 183, 362, 733, 350, 32, "L40S data sheet"),
    "l4": _nvidia("L4", 24, 0.3, 60, 121, 242, 72, 32, "L4 Tensor Core GPU data sheet"),
    "a10": _nvidia("A10", 24, 0.6, 62.5, 125, None, 150, 32, "A10 Tensor Core GPU data sheet"),
    "rtx4090": _nvidia("RTX 4090", 24, 1.008, 82.6, 165, 330, 450, 32, "Ada GPU architecture whitepaper"),
    "mi300x": Accelerator(
        "MI300X", 192, 5.3, {"float32": 654, "bfloat16": 1307, "float8": 2615}, 750, 448, "AMD, MI300X data sheet"
    ),
}

UTILIZATION = 0.4  # of the peak, in a whole step, assumed: large language models in bf16 reach 0.38 to 0.55 (PaLM, MPT)
NETWORK = 50.0  # GB/s between machines for each accelerator, assumed: one 400 Gbit/s adapter each
MACHINE = 8  # accelerators in one machine, assumed
TRANSFER = 20.0  # GB/s from the host's memory, assumed: PCIe 4.0 x16 from pinned memory
CONTEXT = 1.5  # GB that the driver's context, the libraries' workspaces and NCCL's buffers hold, assumed
FRAGMENTATION = 0.05  # of what a step holds for a while, which PyTorch's allocator cannot use, assumed
HOST_WATTS = 0.3  # of the accelerators' power once more for processors, memory, fans and network, assumed
CORE_WATTS = 12.0  # a core of an unknown processor (Green Algorithms, Lannelongue et al. 2021)
MEMORY_WATTS = 0.3725  # a GB of memory (the same)


def find(kind: str) -> Accelerator:
    """The accelerator of this name. Raises UserError."""
    if kind not in ACCELERATORS:
        close = difflib.get_close_matches(kind, ACCELERATORS, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are auto, cpu, {', '.join(ACCELERATORS)}"
        raise UserError(f"--kind {kind!r} is not known: {hint}")
    return ACCELERATORS[kind]
