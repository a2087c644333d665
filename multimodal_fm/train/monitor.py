"""What a run tells: metrics.jsonl, TensorBoard, quarantine.jsonl and a line of progress."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path


def rows_of(path: Path) -> Iterator[dict]:
    """The rows of a JSON-lines file one at a time, none where there is no file; a half-written one is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def cut_back(path: Path, step: int) -> None:
    """Keep the rows of a JSON-lines file up to `step` (rows without a step stay); a half-written last row goes."""
    if not path.exists():
        return
    work = path.with_suffix(".tmp")
    with open(work, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows_of(path) if (row.get("step") or 0) <= step)
    os.replace(work, path)


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
        cut_back(run / "items.jsonl", start)
        self.items = None
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
        if self.items:
            self.items.close()
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


class Skipped:
    """What was left out, as lines for a person: how much, by reason, and the first things by name.

    A part that is met again counts once. Of each only a number is kept, so that a run's memory does not grow with it.
    """

    NAMED = 20

    def __init__(self, lost: Iterable[dict] = ()):
        self.seen: set[int] = set()
        self.reasons: collections.Counter[str] = collections.Counter()
        self.first: dict[tuple, list] = {}  # detail and how often
        self.add(lost)

    def __len__(self) -> int:
        return len(self.seen)

    def add(self, lost: Iterable[dict]) -> None:
        for row in lost:
            which = tuple(row[name] for name in ("source", "shard", "key", "part", "reason"))
            if which in self.first:
                self.first[which][1] += 1
            elif hash(which) not in self.seen:
                self.reasons[row["reason"]] += 1
                if len(self.seen) < self.NAMED:
                    self.first[which] = [row["detail"], 1]
                self.seen.add(hash(which))

    def lines(self) -> list[str]:
        if not self:
            return ["nothing was skipped"]
        counted = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        lines = [f"skipped {len(self)} part{'s' * (len(self) > 1)}: {counted}"]
        for (source, shard, key, part, reason), (detail, times) in self.first.items():
            name = " ".join(filter(None, (shard, key, part)))
            again = f"; {times} times" if times > 1 else ""
            lines.append(f"  {source}: {name}: {reason} ({detail}{again})")
        if len(self) > len(self.first):
            lines.append(f"  and {len(self) - len(self.first)} more, see quarantine.jsonl")
        return lines
