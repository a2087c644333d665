"""What a run writes while it trains: metrics.jsonl, trackers, quarantine.jsonl and a line of progress."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TextIO

from ..errors import UserError
from ..run_dir.records import Skipped, read_jsonl, truncate_jsonl

SECONDS_BETWEEN_LINES = 15


class Tracker(Protocol):
    """Where figures go beside metrics.jsonl."""

    def log(self, figures: dict[str, float], step: int) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, run_dir: Path, start: int):
        self.folder = str(run_dir / "tensorboard")
        self._open(start)

    def _open(self, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.folder, purge_step=start + 1)

    def rewind(self, step: int) -> None:
        self.writer.close()
        self._open(step)

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Hosted:
    """Weights & Biases, or trackio, whose Python interface is the same."""

    def __init__(self, name: str, run_dir: Path):
        import importlib

        try:
            module = importlib.import_module(name)
        except ImportError:
            raise UserError(f"track: {name} is not installed: pip install {name}, or leave it out of `track`") from None
        self.run = module.init(project="multimodal_fm", name=run_dir.name)

    def log(self, figures: dict[str, float], step: int) -> None:
        self.run.log(figures, step=step)

    def rewind(self, step: int) -> None:
        """Nothing: a figure of a step that was logged before is not taken again."""

    def close(self) -> None:
        self.run.finish()


def open_tracker(name: str, run_dir: Path, start: int) -> Tracker:
    return TensorBoard(run_dir, start) if name == "tensorboard" else Hosted(name, run_dir)


class Monitor:
    """Writes a run's records. `start` is the step the run goes on from; later rows of an earlier try are cut."""

    def __init__(self, run_dir: Path, start: int, steps: int, track: Sequence[str] = ()):
        self.run_dir, self.start, self.steps, self.began = run_dir, start, steps, time.monotonic()
        self._files: dict[str, TextIO] = {}
        self._cut(start)
        self._trackers = [open_tracker(name, run_dir, start) for name in track]
        self._bar = _progress_bar(start, steps) if sys.stderr.isatty() else None
        self._last_line = 0.0

    def _cut(self, step: int) -> None:
        """Take the rows of later steps out of the files."""
        for file in self._files.values():
            file.close()
        self._files = {}
        for name in ("metrics", "quarantine", "samples"):
            truncate_jsonl(self.run_dir / f"{name}.jsonl", step)
        self.skipped = Skipped(self.quarantined())

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier step: what was written of later ones is cut."""
        self._cut(step)
        for tracker in self._trackers:
            tracker.rewind(step)

    def _append(self, name: str, row: dict) -> None:
        if name not in self._files:
            self._files[name] = open(self.run_dir / f"{name}.jsonl", "a", encoding="utf-8")
        self._files[name].write(json.dumps(row) + "\n")
        self._files[name].flush()

    def log_step(self, row: dict) -> None:
        """One step's figures, and a line of progress now and then."""
        self.log(row)
        self._progress(row)

    def log(self, row: dict) -> None:
        self._append("metrics", row)
        figures = {name: value for name, value in row.items() if name != "step"}
        for tracker in self._trackers:
            tracker.log(figures, row["step"])

    def log_samples(self, row: dict) -> None:
        self._append("samples", row)

    def quarantine(self, rows: list[dict]) -> None:
        for row in rows:
            self._append("quarantine", row)
        self.skipped.add(rows)

    def quarantined(self) -> Iterator[dict]:
        """The rows that are in quarantine when the run goes on."""
        return read_jsonl(self.run_dir / "quarantine.jsonl")

    def _progress(self, row: dict) -> None:
        losses = {k[5:]: v for k, v in row.items() if k.startswith("loss/") and k.count("/") == 2}
        text = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        text += f"  {row['tokens_per_second']:,.0f} tokens/s  lr {row['lr']:.1e}"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=row["step"], text=text)
            return
        now = time.monotonic()
        if now - self._last_line > SECONDS_BETWEEN_LINES or row["step"] in (self.start + 1, self.steps):
            self._last_line = now
            seconds = round((now - self.began) / (row["step"] - self.start) * (self.steps - row["step"]))
            left = f"{seconds // 60}:{seconds % 60:02d} left"
            _print(f"step {row['step']:>5}/{self.steps}  loss {row['loss']:.3f}  {text}  {left}")

    def say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            _print(text)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        for file in (*self._files.values(), *self._trackers):
            file.close()


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more: no reason to end
        print(text, file=sys.stderr)


class Silent:
    """The monitor of the ranks that write nothing."""

    def __init__(self):
        self.skipped = Skipped()

    def quarantined(self) -> Iterator[dict]:
        return iter(())

    def rewind(self, step: int) -> None: ...

    def log_step(self, row: dict) -> None: ...

    def log(self, row: dict) -> None: ...

    def log_samples(self, row: dict) -> None: ...

    def quarantine(self, rows: list[dict]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


def _progress_bar(start: int, steps: int):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(20),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
    )
    bar.add_task("train", total=steps, completed=start, text="")
    bar.start()
    return bar
