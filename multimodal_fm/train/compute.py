"""What a run took: `RUN/compute.json`, with a segment for each time that it was started or went on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from pathlib import Path

import torch

from .. import __version__
from ..corpus.storage import write_atomic
from .energy import Meter
from .parallel import Ranks

SUMS = ("energy_kwh", "co2e_kg")


class Compute:
    """Counts steps, tokens and time, and meters energy. The first rank alone does; nothing that fails here ends a run.

    `start` is the step that the run goes on from. What was spent on steps that a killed run did again is spent: the
    segments before stay.
    """

    def __init__(self, run_dir: Path, start: int, country: str, device: torch.device, ranks: Ranks):
        self.file, self.ranks = run_dir / "compute.json", ranks
        self.tokens, self.began, self.earlier = 0, time.monotonic(), []
        if not ranks.is_first:
            return
        if start:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self.earlier = list(json.loads(self.file.read_text(encoding="utf-8"))["segments"])
        self.segment = {
            "from_step": start,
            "to_step": start,
            "device": str(device),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "ranks": ranks.size,
            "machines": max(1, ranks.size // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))),
            "versions": {
                "multimodal_fm": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        self.meter = Meter(country)

    def add(self, tokens: int) -> None:
        self.tokens += tokens

    def write(self, step: int) -> None:
        """Write the file as things stand after `step`."""
        if not self.ranks.is_first:
            return
        counts = {"to_step": step, "tokens": self.tokens, "wall_seconds": time.monotonic() - self.began}
        self.segment |= {**counts, "energy": self.meter.read()}
        segments = [*self.earlier, self.segment]
        data = {"segments": segments, "total": total(segments)}
        with contextlib.suppress(OSError):
            write_atomic(self.file, json.dumps(data, indent=1).encode())

    def close(self) -> None:
        """Stop the meter. What was done is written with its last measurement, as of the last step that was saved."""
        if self.ranks.is_first:
            self.meter.close()
            if self.segment["to_step"] > self.segment["from_step"]:
                self.write(self.segment["to_step"])


def total(segments: list[dict]) -> dict:
    """Sums over the segments; of energy and CO2e over those that were measured, `measured_seconds` long together."""
    measured = [one["energy"] for one in segments if "energy_kwh" in one["energy"]]
    sums = {
        "steps": sum(one["to_step"] - one["from_step"] for one in segments),
        "tokens": sum(one["tokens"] for one in segments),
        "wall_seconds": sum(one["wall_seconds"] for one in segments),
    }
    if not measured:
        reason = segments[-1]["energy"]["not_measured"]
        return {**sums, **dict.fromkeys(SUMS, f"not measured: {reason}")}
    return {
        **sums,
        "measured_seconds": sum(one["seconds"] for one in measured),
        **{name: sum(one[name] for one in measured) for name in SUMS},
        "estimated": True,
        "why": measured[-1]["why"],
        "carbon_intensity_g_per_kwh": measured[-1]["carbon_intensity_g_per_kwh"],
        "carbon_intensity_from": measured[-1]["carbon_intensity_from"],
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
