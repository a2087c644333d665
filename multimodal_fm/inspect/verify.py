"""Opening shards, and whether they are what was indexed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from ..corpus import index, storage
from ..corpus.index import Index, Refused
from ..corpus.shards import Told
from ..errors import SampleError, UserError

NAMED = 10_000  # damaged parts that are named; all are counted


@dataclass
class Damage:
    """What is not as it was indexed, or was damaged already then."""

    rows: list[dict] = field(default_factory=list)  # shard, key, part, reason, detail; at most NAMED
    count: int = 0
    new: int = 0  # shards that had no index to be compared with

    def add(self, shard: str, key: str, part: str, reason: str, detail: str) -> None:
        self.count += 1
        if len(self.rows) < NAMED:
            self.rows.append({"shard": shard, "key": key, "part": part, "reason": reason, "detail": detail})


def open_all(files: list[str], piece: int, rebuild: bool = False, damage: Damage | None = None) -> list[Index]:
    """The shards' indexes, built where there is none; with `damage` all that is damaged goes there.

    A shard whose index cannot be believed is then left out. Raises UserError where a shard is another one than its index
    says, or an index is damaged, and there is no `damage` to take it.
    """
    told = Told("reading {}")
    if damage is not None:
        return [one for file in files if (one := verify(file, piece, damage, told)) is not None]
    if rebuild:
        for file in files:
            told(file)
            index.build(file, piece)
    indexes = index.open_all(files, piece, told)
    for one in indexes:
        if not one.whole():
            raise UserError(f"{one.shard}: {one.file} is damaged; `mmfm inspect --rebuild {one.shard}` makes it anew")
    return indexes


def verify(shard: str, piece: int, damage: Damage, told=lambda shard: None) -> Index | None:
    """Read every byte of the shard and compare it with its index, which is returned unless it is damaged itself.

    A shard that has no index yet gets one, and has nothing but its own headers to be compared with. Raises UserError.
    """
    told(shard)
    try:
        one = index.known(shard, piece)
    except index.Damaged as error:
        damage.add(shard, "", "index", "crc", f"{error}; `mmfm inspect --rebuild {shard}` makes it anew")
        return None
    if one is None:
        damage.new += 1
        one = index.build(shard, piece)
    else:
        try:
            _compare(one, damage)
        except (OSError, SampleError) as error:
            damage.add(shard, "", "", "read", str(error))
        if not one.whole():
            return None
    for refused in one.refused:
        if refused.reason == "shard":
            damage.add(shard, whose(one, refused), refused.part, "shard", refused.detail)
    return one


def _compare(one: Index, damage: Damage) -> None:
    """Adds what in a shard is not as it was indexed. Raises OSError, SampleError."""
    storage.forget(one.shard)
    size, before = storage.size(one.shard), damage.count
    same = size == one.head["size"] and index.digest_of(one.shard, size) == one.head["sha256"]
    if not one.whole():
        mend = f"`mmfm inspect --rebuild {one.shard}` makes it anew"
        damage.add(one.shard, "", "index", "crc", f"{one.file}: its tables are not what was written; {mend}")
        if not same:
            damage.add(one.shard, "", "", "crc", "the shard is not what was indexed either, where cannot be told")
        return
    if same:
        return
    for sample, ending, reason, detail in one.differences():
        damage.add(one.shard, one.key(sample) if sample >= 0 else "", ending, reason, detail)
    if size != one.head["size"]:
        damage.add(one.shard, "", "", "shard", f"{size} bytes, it was indexed with {one.head['size']}")
    elif damage.count == before:
        damage.add(one.shard, "", "", "crc", "not what was indexed, in which sample cannot be told")


def whose(one: Index, refused: Refused) -> str:
    """The key of the sample that a refused thing belongs to; empty where nobody knows.

    A damaged header belongs to the sample on both sides of it, or to the neighbour whose name it nearly has.
    """
    place = re.search(r"at byte (\d+)$", refused.detail)
    if refused.key or refused.reason != "shard" or not place or not len(one):
        return refused.key
    offset = int(place[1])
    after = int(np.searchsorted(one.members["offset"], offset))
    beside = [row for row in (after - 1, after) if 0 <= row < len(one.members)]
    keys = [one.key(int(np.searchsorted(one.first, row, "right")) - 1) for row in beside]
    if len(keys) == 2 and keys[0] == keys[1]:
        return keys[0]
    try:
        block = storage.read(one.shard, offset, 100)
    except (OSError, SampleError):
        return ""
    near = sorted((_bits(block, f"{key}.".encode()[:100]), key) for key in keys)
    return near[0][1] if near[0][0] <= 2 and (len(near) == 1 or near[0][0] < near[1][0]) else ""


def _bits(block: bytes, name: bytes) -> int:
    """How many bits of the name stand otherwise at the beginning of the block."""
    if len(block) < len(name):
        return 8 * len(name)
    return sum((x ^ y).bit_count() for x, y in zip(block, name))
