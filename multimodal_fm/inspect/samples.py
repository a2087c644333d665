"""What a training run would get: every part is decoded."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from ..corpus.index import Index
from ..corpus.shards import Config as Source
from ..errors import SampleError
from .verify import whose

SHOWN = 10_000  # characters of a text that a row gives


def every_sample(indexes: list[Index], tokenizers: dict) -> Iterator[dict]:
    """A row a sample, its parts really read, and one for each refused thing of which nothing is left."""
    for one in indexes:
        refused: dict[str, dict[str, str]] = {}
        nameless = []
        for row in one.refused:
            key = whose(one, row)
            if key:
                refused.setdefault(key, {})[row.part or "sample"] = row.reason
            else:
                nameless.append(row.reason)
        for sample in range(len(one)):
            yield _describe_sample(one, sample, tokenizers, refused.pop(one.key(sample), {}))
        for key, lost in [*refused.items(), *(("", {"shard": reason}) for reason in nameless)]:
            yield {"shard": one.shard, "key": key, "outcome": "skip", "lost": lost}
        if (more := one.head["refused_count"] - len(one.refused)) > 0:
            print(f"{one.shard}: {more} more were refused, which the index does not name", file=sys.stderr)


def _describe_sample(one: Index, sample: int, tokenizers: dict, lost: dict[str, str]) -> dict:
    """What comes of a sample, of which `lost` is known to be refused: its outcome and a description of each part."""
    parts, lost = {}, dict(lost)
    for modality, plugin in tokenizers.items():
        found, reason = described(one, sample, plugin)
        if found is not None:
            parts[modality] = found[:SHOWN] if isinstance(found, str) else found
        if reason is not None:
            lost[modality] = reason.reason
    if not parts and not lost:
        lost["sample"] = "empty"
    outcome = "skip" if not parts else "partial" if lost else "ok"
    return {"shard": one.shard, "key": one.key(sample), "outcome": outcome, "lost": lost, **parts}


def described(one: Index, sample: int, plugin) -> tuple[object, SampleError | None]:
    """What a sample has of one modality, None where it has none that can be read, and what is lost of it."""
    if set(one.makeups[one.makeup[sample]]).isdisjoint(plugin.extensions):
        return None, None
    members, failed = one.read(sample, plugin.extensions, Source.bytes)
    reason = failed[0][1] if failed else None
    if not members:
        return None, reason
    try:
        return plugin.describe(members), reason
    except SampleError as error:
        return None, error
