"""The rows of `quarantine.jsonl`, which name what could not be read, and the check that it is not too much."""

from __future__ import annotations

from collections.abc import Iterable

from ..corpus.scan import Rejection
from ..corpus.shards import Corpus
from ..errors import SampleError

MIN_BAD = 5  # bad samples, of which fewer never end a run


def quarantine_row(corpus: Corpus, index: int, modality: str, error: SampleError, step: int | None) -> dict:
    """The row of a sample's modality that could not be read."""
    return {
        "source": corpus.name,
        "shard": corpus.shard(index),
        "key": corpus.key(index),
        "part": modality,
        "reason": error.reason,
        "detail": error.detail,
        "step": step,
    }


def refused_row(source: str, refused: Rejection) -> dict:
    """The row of something that the index of a shard refused."""
    row = {"shard": refused.shard, "key": refused.key, "part": refused.member}
    return {"source": source, **row, "reason": refused.reason, "detail": refused.detail, "step": None}


def strict_message(row: dict) -> str:
    """What a strict run says when it ends, at the first row."""
    name = " ".join(filter(None, (row["shard"], row["key"], row["part"])))
    return f"strict: {row['source']}: {name}: {row['reason']} ({row['detail']}); mend it, or train without strict"


class BadFraction:
    """Counts the bad samples of each source, to end a run in which their fraction exceeds `limit`.

    Until the whole source has been read, the fraction is the lower end of its confidence interval (Wilson 1927).
    """

    def __init__(self, limit: float, corpora: dict[str, Corpus], rows: Iterable[dict]):
        self.limit, self.corpora = limit, corpora
        self.bad: dict[str, set[int]] = {name: set() for name in corpora}  # hashes, which take little memory
        self.add(row for row in rows if row["step"])

    def add(self, rows: Iterable[dict]) -> None:
        for row in rows:
            if row["source"] in self.bad:  # else a source that the run has no more
                self.bad[row["source"]].add(hash((row["shard"], row["key"])))

    def message(self, samples_read: dict[str, int]) -> str:
        """What a run that must end says; empty where it may go on. samples_read: by source."""
        for name, corpus in self.corpora.items():
            refused = sum(one.head["rejection_count"] for one in corpus.indexes)
            read = min(len(corpus), samples_read.get(name, 0))
            bad = len(self.bad[name])
            for count, total, what in ((refused, len(corpus) + refused, "parts refused"), (bad, read, "samples bad")):
                if count < MIN_BAD or count <= self.limit * total:
                    continue
                if total >= len(corpus) or _lower_bound(count, total) > self.limit:
                    return (
                        f"source {name}: {count} of {total} {what}, more than max_bad_fraction={self.limit} allows: "
                        "mend the source, or raise max_bad_fraction."
                    )
        return ""


def _lower_bound(count: int, total: int, z: float = 4.0) -> float:
    """The lower end of Wilson's interval of count / total, `z` standard errors wide on each side."""
    fraction = count / total
    center = fraction + z * z / (2 * total)
    return (center - z * (fraction * (1 - fraction) / total + z * z / (4 * total * total)) ** 0.5) / (1 + z * z / total)
