"""What a run tells: metrics.jsonl, TensorBoard, quarantine.jsonl and a line of progress."""

from __future__ import annotations

import collections
import json
import os
import sys
import time
from pathlib import Path


def cut_back(path: Path, step: int) -> list[dict]:
    """Keep the rows of a JSON-lines file up to `step` (rows without a step stay); a half-written last row goes."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and (row.get("step") or 0) <= step:
                rows.append(row)
        work = path.with_suffix(".tmp")
        work.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(work, path)
    return rows


class Monitor:
    """Writes a run's records. `start` is the step the run goes on from; later rows of an earlier try are cut."""

    def __init__(self, run: Path, start: int, steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self.start, self.steps, self.began = start, steps, time.monotonic()
        cut_back(run / "metrics.jsonl", start)
        self.lost = cut_back(run / "quarantine.jsonl", start)
        self.metrics = open(run / "metrics.jsonl", "a", encoding="utf-8")
        self.ledger = open(run / "quarantine.jsonl", "a", encoding="utf-8")
        cut_back(run / "items.jsonl", start)
        self.items = None
        self.run = run
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
        self.lost += rows

    def trace(self, row: dict) -> None:
        """The items of one step."""
        self.items = self.items or open(self.run / "items.jsonl", "a", encoding="utf-8")
        self.items.write(json.dumps(row) + "\n")
        self.items.flush()

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
            print(f"step {row['step']:>5}/{self.steps}  loss {row['loss']:.3f}  {text}  {clock}", file=sys.stderr)

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        self.metrics.close()
        self.ledger.close()
        if self.items:
            self.items.close()
        self.board.close()


class Silent:
    """What the ranks that do not tell anything have for a monitor."""

    def __init__(self):
        self.lost: list[dict] = []

    def log(self, row: dict) -> None:
        pass

    def trace(self, row: dict) -> None:
        pass

    def quarantine(self, rows: list[dict]) -> None:
        self.lost += rows

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


def summary(lost: list[dict], most: int = 20) -> list[str]:
    """Lines for a person: how much was left out, by reason, and each thing by name."""
    if not lost:
        return ["nothing was skipped"]
    events = collections.defaultdict(list)
    for row in lost:
        events[tuple(row[name] for name in ("source", "shard", "key", "part", "reason"))].append(row["detail"])
    reasons = collections.Counter(reason for *_, reason in events)
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    lines = [f"skipped {len(events)} part{'s' * (len(events) > 1)}: {counted}"]
    for (source, shard, key, part, reason), details in list(events.items())[:most]:
        name = " ".join(filter(None, (shard, key, part)))
        again = f"; {len(details)} times" if len(details) > 1 else ""
        lines.append(f"  {source}: {name}: {reason} ({details[0]}{again})")
    if len(events) > most:
        lines.append(f"  and {len(events) - most} more, see quarantine.jsonl")
    return lines
