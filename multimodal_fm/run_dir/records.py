"""The JSON-lines files of a run folder: metrics, what was skipped, which samples each step read."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..corpus.storage import write_atomic
from ..errors import printable


def read_jsonl(path: Path) -> Iterator[dict]:
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


def truncate_jsonl(path: Path, step: int) -> None:
    """Keep the rows of a JSON-lines file up to `step` (rows without a step stay); a half-written last row goes."""
    if not path.exists():
        return
    rows = (row for row in read_jsonl(path) if (row.get("step") or 0) <= step)
    write_atomic(path, (f"{json.dumps(row)}\n".encode() for row in rows))


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
            lines.append(f"  {printable(f'{source}: {name}: {reason} ({detail}{again})')}")
        if len(self) > len(self.first):
            lines.append(f"  and {len(self) - len(self.first)} more, see quarantine.jsonl")
        return lines
