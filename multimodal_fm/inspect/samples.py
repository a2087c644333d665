"""What a training run would get: every part is decoded."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from ..corpus.index import Index
from ..corpus.shards import Config as Source
from ..errors import Lost
from .verify import whose

SHOWN = 10_000  # characters of a text that a row gives


def every_sample(indexes: list[Index], tokenizers: dict) -> Iterator[dict]:
    """A row an item, its parts really read, and one for each refused thing of which nothing is left."""
    for one in indexes:
        refused: dict[str, dict[str, str]] = {}
        nameless = []
        for row in one.refused:
            key = whose(one, row)
            if key:
                refused.setdefault(key, {})[row.part or "item"] = row.reason
            else:
                nameless.append(row.reason)
        for item in range(len(one)):
            yield sample(one, item, tokenizers, refused.pop(one.key(item), {}))
        for key, lost in [*refused.items(), *(("", {"shard": reason}) for reason in nameless)]:
            yield {"shard": one.shard, "key": key, "outcome": "skip", "lost": lost}
        if (more := one.head["refused_count"] - len(one.refused)) > 0:
            print(f"{one.shard}: {more} more were refused, which the index does not name", file=sys.stderr)


def sample(one: Index, item: int, tokenizers: dict, lost: dict[str, str]) -> dict:
    """What comes of an item, of which `lost` is known to be refused: its outcome and a description of each part."""
    parts, lost = {}, dict(lost)
    for kind, plugin in tokenizers.items():
        found, reason = described(one, item, plugin)
        if found is not None:
            parts[kind] = found[:SHOWN] if isinstance(found, str) else found
        if reason is not None:
            lost[kind] = reason.reason
    if not parts and not lost:
        lost["item"] = "empty"
    outcome = "skip" if not parts else "partial" if lost else "ok"
    return {"shard": one.shard, "key": one.key(item), "outcome": outcome, "lost": lost, **parts}


def described(one: Index, item: int, plugin) -> tuple[object, Lost | None]:
    """What an item has of one kind, None where it has none that can be read, and what is lost of it."""
    if set(one.makeups[one.makeup[item]]).isdisjoint(plugin.module.extensions):
        return None, None
    members, failed = one.read(item, plugin.module.extensions, Source.bytes)
    reason = failed[0][1] if failed else None
    if not members:
        return None, reason
    try:
        if hasattr(plugin.module, "describe"):
            return plugin.module.describe(plugin.settings, members), reason
        views = plugin.module.read(plugin.settings, members)
        return {"tokens": sum(map(len, views))} if views else None, reason
    except Lost as error:
        return None, error
