"""What could not be read: the rows of `quarantine.jsonl`, and when it is too much."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ..corpus.index import Refused
from ..corpus.shards import Corpus
from ..errors import SampleError


def ledger_row(corpus: Corpus, index: int, part: str, error: SampleError, step: int | None) -> dict:
    return {
        "source": corpus.name,
        "shard": corpus.shard(index),
        "key": corpus.key(index),
        "part": part,
        "reason": error.reason,
        "detail": error.detail,
        "step": step,
    }


def refused_row(source: str, refused: Refused) -> dict:
    """The row of something that a shard's index refused."""
    return {"source": source, **dataclasses.asdict(refused), "step": None}


def strict_line(row: dict) -> str:
    """What a run says that ends at the first bad part."""
    name = " ".join(filter(None, (row["shard"], row["key"], row["part"])))
    return f"strict: {row['source']}: {name}: {row['reason']} ({row['detail']}); mend it, or train without strict"


class Bad:
    """Counts how much of each source is bad, and says when it is too much.

    Fewer than `LEAST` bad samples say little. Until the whole source has been seen, what counts is the lower end of an
    interval around the share (Wilson 1927, four standard errors).
    """

    LEAST = 5

    def __init__(self, limit: float, corpora: dict[str, Corpus], lost: Iterable[dict]):
        self.limit, self.corpora = limit, corpora
        self.samples: dict[str, set[int]] = {name: set() for name in corpora}  # a number each, which take little room
        self.add(row for row in lost if row["step"])

    def add(self, lost: Iterable[dict]) -> None:
        for row in lost:
            self.samples[row["source"]].add(hash((row["shard"], row["key"])))

    def line(self, drawn: dict[str, int]) -> str:
        """What a run that must end says; empty where it may go on. drawn: samples read so far, by source."""
        for name, corpus in self.corpora.items():
            refused = sum(one.head["refused_count"] for one in corpus.indexes)
            seen = min(len(corpus), drawn.get(name, 0))
            bad = len(self.samples[name])
            for count, of, what in ((refused, len(corpus) + refused, "parts refused"), (bad, seen, "samples bad")):
                if (
                    count >= self.LEAST
                    and count > self.limit * of
                    and (of >= len(corpus) or _lower(count, of) > self.limit)
                ):
                    return (
                        f"source {name}: {count} of {of} {what}, more than max_bad={self.limit} allows: mend the "
                        "source, or raise max_bad."
                    )
        return ""


def _lower(count: int, of: int, z: float = 4.0) -> float:
    """The lower end of the interval around count / of."""
    share = count / of
    middle = share + z * z / (2 * of)
    return (middle - z * (share * (1 - share) / of + z * z / (4 * of * of)) ** 0.5) / (1 + z * z / of)
