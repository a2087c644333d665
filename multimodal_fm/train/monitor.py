"""What a run tells: metrics.jsonl, TensorBoard, quarantine.jsonl and a line of progress."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ..run_dir.records import Skipped, cut_back, rows_of


class Monitor:
    """Writes a run's records. `start` is the step the run goes on from; later rows of an earlier try are cut."""

    def __init__(self, run: Path, start: int, steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.start, self.steps, self.began = run, start, steps, time.monotonic()
        cut_back(run / "metrics.jsonl", start)
        cut_back(run / "quarantine.jsonl", start)
        self.skipped = Skipped(self.before())
        self.metrics = open(run / "metrics.jsonl", "a", encoding="utf-8")
        self.ledger = open(run / "quarantine.jsonl", "a", encoding="utf-8")
        cut_back(run / "samples.jsonl", start)
        self.samples = None
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        self.bar = _bar(start, steps) if sys.stderr.isatty() else None
        self.said = 0.0

    def log(self, row: dict) -> None:
        """One step's numbers."""
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(name, value, row["step"])
        self._say(row)

    def quarantine(self, rows: list[dict]) -> None:
        for row in rows:
            self.ledger.write(json.dumps(row) + "\n")
        self.ledger.flush()
        self.skipped.add(rows)

    def before(self) -> Iterator[dict]:
        """What was in quarantine when the run went on."""
        return rows_of(self.run / "quarantine.jsonl")

    def trace(self, row: dict) -> None:
        """The samples of one step."""
        self.samples = self.samples or open(self.run / "samples.jsonl", "a", encoding="utf-8")
        self.samples.write(json.dumps(row) + "\n")
        self.samples.flush()

    def _say(self, row: dict) -> None:
        losses = "  ".join(f"{k[5:]} {v:.3f}" for k, v in row.items() if k.startswith("loss/") and k.count("/") == 1)
        text = f"{losses}  {row['tokens_per_second']:,.0f} tokens/s  lr {row['lr']:.1e}"
        if self.bar:
            self.bar.update(0, completed=row["step"], said=text)
            return
        now = time.monotonic()
        if now - self.said > 15 or row["step"] in (self.start + 1, self.steps):
            self.said = now
            pace = (now - self.began) / (row["step"] - self.start)
            left = round(pace * (self.steps - row["step"]))
            clock = f"{left // 60}:{left % 60:02d} left"
            _tell(f"step {row['step']:>5}/{self.steps}  loss {row['loss']:.3f}  {text}  {clock}")

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            _tell(text)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        self.metrics.close()
        self.ledger.close()
        if self.samples:
            self.samples.close()
        self.board.close()


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more: no reason to end
        print(text, file=sys.stderr)


class Silent:
    """What the ranks that do not tell anything have for a monitor."""

    def __init__(self):
        self.skipped = Skipped()

    def before(self) -> Iterator[dict]:
        return iter(())

    def log(self, row: dict) -> None:
        pass

    def trace(self, row: dict) -> None:
        pass

    def quarantine(self, rows: list[dict]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def _bar(start: int, steps: int):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(20),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
        console=Console(stderr=True),
    )
    bar.add_task("train", total=steps, completed=start, said="")
    bar.start()
    return bar
