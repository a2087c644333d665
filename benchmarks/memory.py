"""How much memory the parts of a step take that would grow with a square or with a vocabulary.

    python benchmarks/memory.py [--quick] [--json] [--out FOLDER]

Each figure is the peak above what was there before, the inputs among it, in a process of its own that does one forward
and backward: resident memory on a CPU, allocated memory on a GPU. The contrastive loss from 4,096 to 65,536 pairs of
512 numbers (quick: to 16,384), beside the plain loss over the whole table where it fits; the cross-entropy over 131,072
ids, beside torch's on all logits; a backbone with and without activation checkpointing. Full: about 20 minutes on two
cores. Writes memory.json and memory.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, about, device, markdown, synchronise, write_results
from torch import Tensor

from multimodal_fm.backbone import Backbone
from multimodal_fm.backbone import Config as BackboneConfig
from multimodal_fm.batch import SequenceTable, find_pairs, plan_reading
from multimodal_fm.losses import pairwise
from multimodal_fm.losses.cross_entropy import linear_cross_entropy
from multimodal_fm.tokens import Tokens

WIDTH = 512  # of the features that are compared
SIZES = (4096, 8192, 16_384, 32_768, 65_536)
VOCABULARY = 1 << 17
TABLE_BYTES = 3e9  # what the plain loss may hold on a machine that others use


def contrastive(count: int, who: str) -> Callable[[], None]:
    table = SequenceTable(torch.arange(2 * count) % 2, torch.arange(2 * count) // 2, torch.arange(2 * count) // 2)
    pair = find_pairs(table, ["text", "image"])["text_image"].to(device())
    features = F.normalize(torch.randn(2 * count, WIDTH, device=device()), dim=-1).requires_grad_()
    log_scale = torch.tensor(2.6, device=device(), requires_grad=True)
    matches = pairwise.Matches(pair.groups, pair.columns, pair.own(None))

    def tiled() -> Tensor:
        left, right = (features.index_select(0, rows) for rows in pair.rows)
        return pairwise.info_nce(left, right, log_scale, matches)[0]

    def plain() -> Tensor:
        left, right = (features.index_select(0, rows) for rows in pair.rows)
        logits = left @ right.T * log_scale.exp()
        return (F.cross_entropy(logits, pair.columns[0]) + F.cross_entropy(logits.T, pair.columns[1])) / 2

    return lambda: (tiled if who == "ours" else plain)().backward()


def vocabulary(rows: int, who: str) -> Callable[[], None]:
    width = 256
    vectors = torch.randn(rows, width, device=device(), requires_grad=True)
    weight = (torch.randn(VOCABULARY, width, device=device()) / width**0.5).requires_grad_()  # logits of unit variance
    bias = torch.zeros(VOCABULARY, device=device(), requires_grad=True)
    ids = torch.randint(VOCABULARY, (rows,), device=device())

    def loss() -> Tensor:
        if who == "ours":
            return linear_cross_entropy(vectors, weight, bias, ids)
        return F.cross_entropy(F.linear(vectors, weight, bias), ids, reduction="none")

    return lambda: (loss().sum() / rows).backward()


def checkpointing(depth: int, who: str) -> Callable[[], None]:
    """32 sequences of 256 tokens through a backbone of width 256."""
    backbone = Backbone(BackboneConfig(width=256, depth=depth, num_heads=4)).to(device())
    backbone.checkpointing = who  # pyright: ignore[reportAttributeAccessIssue]
    for weight in backbone.parameters():
        weight.grad = torch.zeros_like(weight)
    lengths, count = torch.full((32,), 256), 32 * 256
    sequence = torch.repeat_interleave(torch.arange(32), lengths)
    zeros = torch.zeros(count, dtype=torch.long)
    reading = plan_reading(Tokens(zeros, torch.zeros(count, 3), sequence, zeros, zeros), 1).to(device())
    content = torch.randn(count, 256, device=device(), requires_grad=True)
    tokens = reading.tokens.replace(content=content)
    return lambda: backbone(tokens, reading.attention, reading.routing).content.square().mean().backward()


PARTS = {"contrastive": contrastive, "vocabulary": vocabulary, "checkpointing": checkpointing}


def measure(part: str, size: int, who: str) -> dict[str, float]:
    """Bytes above what was there before, and seconds, of one forward and backward. In a process of its own."""
    small = {"contrastive": 64, "vocabulary": 4, "checkpointing": 1}[part]
    PARTS[part](small, who)()  # what torch loads at the first call
    call = PARTS[part](size, who)
    synchronise()
    before = reset_peak()
    began = time.perf_counter()
    call()
    synchronise()
    return {"bytes": peak() - before, "seconds": time.perf_counter() - began}


def reset_peak() -> int:
    """The memory that there is now, from which the peak is counted anew."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return torch.cuda.max_memory_allocated() if device().type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def in_process(part: str, size: int, who: str, runs: int) -> dict[str, float]:
    """The medians of several processes."""
    found = []
    for _ in range(runs):
        command = [sys.executable, __file__, "--part", part, "--size", str(size), "--who", who]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


def row(name: str, peer: str, ours: float, theirs: float | None, unit: str, runs: int) -> dict:
    """ratio: how many times what we take they take."""
    ratio = theirs / ours if theirs else None
    return {"name": name, "peer": peer, "ours": ours, "theirs": theirs, "ratio": ratio, "unit": unit, "runs": runs}


def compare(quick: bool):
    """Yields the rows, as they are measured."""
    runs = 1 if quick else 3
    rows = 512 if quick else 2048
    ours, theirs = (in_process("vocabulary", rows, who, runs) for who in ("ours", "plain"))
    yield row(f"vocabulary-{rows}", "torch, all logits", ours["bytes"], theirs["bytes"], "bytes", runs)
    yield row(f"vocabulary-{rows}-time", "torch, all logits", ours["seconds"], theirs["seconds"], "seconds", runs)
    depth = 4 if quick else 12
    none = in_process("checkpointing", depth, "none", runs)
    for mode in ("selective", "full"):
        ours = in_process("checkpointing", depth, mode, runs)
        yield row(f"checkpointing-{mode}", "none", ours["bytes"], none["bytes"], "bytes", runs)
        yield row(f"checkpointing-{mode}-time", "none", ours["seconds"], none["seconds"], "seconds", runs)
    least = {}
    for size in SIZES[:3] if quick else SIZES:
        times = runs if size <= 8192 else 1
        ours = in_process("contrastive", size, "ours", times)
        fits = 4 * 4 * size**2 < TABLE_BYTES
        theirs = in_process("contrastive", size, "plain", times) if fits else {"bytes": None, "seconds": None}
        yield row(f"contrastive-{size}", "whole table", ours["bytes"], theirs["bytes"], "bytes", times)
        yield row(f"contrastive-{size}-time", "whole table", ours["seconds"], theirs["seconds"], "seconds", times)
        least[size] = ours["bytes"]
    growth = (least[max(least)] / least[SIZES[0]]) / (max(least) / SIZES[0])
    yield row("contrastive-growth", "linear", growth, 1.0, f"{SIZES[0]} to {max(least)} pairs, over the pairs'", 1)


def describe(found: dict) -> list[str]:
    def show(value: float | None) -> str:
        if value is None:
            return "not run"
        return f"{value / 1e6:,.0f} MB" if found["unit"] == "bytes" else f"{value:,.3g}"

    ratio = f"{found['ratio']:.2f}" if found["ratio"] else ""
    unit = "" if found["unit"] == "bytes" else found["unit"]
    return [found["name"], show(found["ours"]), show(found["theirs"]), found["peer"], ratio, unit, str(found["runs"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller, in some minutes")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=PARTS, help="one measurement, in this process")
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--who", default="ours")
    given = parser.parse_args()
    if given.part:
        print(json.dumps(measure(given.part, given.size, given.who)))
        return
    rows, machine = [], {**about(), "threads": torch.get_num_threads(), "quick": given.quick}
    for found in compare(given.quick):
        rows.append(found)
        print(json.dumps(found) if given.json else "  ".join(describe(found)), flush=True)
        write(given.out, machine, rows)


def write(out: Path, machine: dict, rows: list[dict]) -> None:
    table = markdown([["", "ours", "theirs", "who", "theirs / ours", "", "processes"], *map(describe, rows)])
    note = "Memory above the inputs of one forward and backward, each in a process of its own."
    write_results(out, "memory", "Memory", machine, rows, f"{note}\n\n{table}")


if __name__ == "__main__":
    main()
