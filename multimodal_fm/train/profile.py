"""A profile of a few steps: `mmfm pretrain CONFIG --profile`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, schedule

WARMUP, MEASURED = 3, 3  # steps


class Profile:
    """Writes RUN/profile.json, for Perfetto or chrome://tracing, and RUN/profile.txt, the operators that take the most
    time, of the steps 4 to 6."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        steps = schedule(wait=WARMUP - 1, warmup=1, active=MEASURED, repeat=1)
        self._profiler = torch.profiler.profile(activities=activities, schedule=steps, on_trace_ready=self._write)
        self._profiler.start()

    def _write(self, profiler) -> None:
        profiler.export_chrome_trace(str(self.run_dir / "profile.json"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (self.run_dir / "profile.txt").write_text(profiler.key_averages().table(sort_by=by, row_limit=40))

    def step(self) -> None:
        self._profiler.step()

    def close(self) -> None:
        self._profiler.stop()
