"""Opens the indexes of shards, and compares every byte of the shards with them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ..corpus import index, storage
from ..corpus.index import Index
from ..corpus.scan import Rejection, hash_shard
from ..corpus.shards import Progress
from ..errors import SampleError
from ..stream.cluster import Executor

MAX_ROWS = 10_000  # damaged parts that are listed; all are counted


@dataclass
class Damage:
    """What differs from the index, or was damaged when the index was built."""

    rows: list[dict] = field(default_factory=list)  # shard, key, part, reason, detail; at most MAX_ROWS
    count: int = 0
    new_shards: int = 0  # shards that had no index to be compared with

    def add(self, shard: str, key: str, part: str, reason: str, detail: str) -> None:
        self.count += 1
        if len(self.rows) < MAX_ROWS:
            self.rows.append({"shard": shard, "key": key, "part": part, "reason": reason, "detail": detail})

    def include(self, other: Damage) -> None:
        """Add what was found elsewhere."""
        self.rows += other.rows[: MAX_ROWS - len(self.rows)]
        self.count += other.count
        self.new_shards += other.new_shards


def open_indexes(
    files: list[str],
    piece: int,
    rebuild: bool = False,
    damage: Damage | None = None,
    tokenizers: Iterable = (),
    executor: Executor | None = None,
) -> list[Index]:
    """The shards' indexes; those that are missing are built, with the measures of the tokenizers.

    executor: where shards are read through; None: in this process. With `damage` each shard is verified, and one whose
    index is damaged is left out. Without it, raises UserError where an index is damaged or a shard has changed.
    """
    progress, tokenizers = Progress("reading {}"), tuple(tokenizers)
    if executor and executor.parallel:
        return _open_in_parallel(files, piece, rebuild, damage, tokenizers, executor)
    if damage is not None:
        return [one for file in files if (one := verify_shard(file, piece, damage, progress)) is not None]
    if rebuild:
        for file in files:
            progress(file)
            index.build(file, piece, tokenizers)
    return _open_checked(files, piece, tokenizers, progress)


def _open_checked(files: list[str], piece: int, tokenizers: tuple, progress) -> list[Index]:
    indexes = index.open_all(files, piece, tokenizers, progress=progress)
    for one in indexes:
        one.check()
    return indexes


def _open_in_parallel(
    files: list[str], piece: int, rebuild: bool, damage: Damage | None, tokenizers: tuple, executor: Executor
) -> list[Index]:
    """The same, shard by shard wherever the executor reads them."""
    progress = Progress("read {}")
    if damage is None:
        jobs = ((file, piece, tokenizers, rebuild) for file in files)
        for (file, *_), _ in executor.run(_build, jobs, most=len(files)):
            progress(file)
        return _open_checked(files, piece, tokenizers, progress)
    parts = {}
    for (file, _), found in executor.run(_verify, ((file, piece) for file in files), most=len(files)):
        progress(file)
        parts[file] = found
    for file in files:
        damage.include(parts[file][0])
    opened = (index.read_existing(file, piece) for file in files if parts[file][1])
    return [one for one in opened if one is not None]


def _build(job: tuple) -> None:
    file, piece, tokenizers, rebuild = job
    (index.build if rebuild else index.open_index)(file, piece, tokenizers)


def _verify(job: tuple[str, int]) -> tuple[Damage, bool]:
    """What is damaged of a shard, and whether its index is whole."""
    damage = Damage()
    return damage, verify_shard(*job, damage) is not None


def verify_shard(shard: str, piece: int, damage: Damage, progress=lambda shard: None) -> Index | None:
    """Compares every byte of the shard with its index, which is returned unless it is damaged itself.

    A shard without an index gets one; only its own headers can then tell damage. Raises UserError.
    """
    progress(shard)
    try:
        one = index.read_existing(shard, piece)
    except index.Damaged as error:
        damage.add(shard, "", "index", "crc", f"{error}; `mmfm inspect --rebuild {shard}` builds it anew")
        return None
    if one is None:
        damage.new_shards += 1
        one = index.build(shard, piece)
    else:
        try:
            _compare(one, damage)
        except (OSError, SampleError) as error:
            damage.add(shard, "", "", "read", str(error))
        if not one.is_intact():
            return None
    for refused in one.rejections:
        if refused.reason == "shard":
            damage.add(shard, _owner(one, refused), refused.member, "shard", refused.detail)
    return one


def _compare(one: Index, damage: Damage) -> None:
    """Adds to `damage` what in a shard differs from its index. Raises OSError, SampleError."""
    storage.reopen_files()
    size, before = storage.stat(one.shard)[0], damage.count
    same = size == one.head["size"] and hash_shard(one.shard, size) == one.head["sha256"]
    if not one.is_intact():
        repair = f"`mmfm inspect --rebuild {one.shard}` builds it anew"
        damage.add(one.shard, "", "index", "crc", f"{one.file}: its tables have changed; {repair}")
        if not same:
            damage.add(one.shard, "", "", "crc", "the shard has changed too; where cannot be told")
    elif not same:
        for sample, extension, reason, detail in one.differences():
            damage.add(one.shard, one.key(sample) if sample >= 0 else "", extension, reason, detail)
        if size != one.head["size"]:
            damage.add(one.shard, "", "", "shard", f"{size} bytes, it was indexed with {one.head['size']}")
        elif damage.count == before:
            damage.add(one.shard, "", "", "crc", "it has changed; in which sample cannot be told")


def refused_rows(one: Index) -> list[dict]:
    """What the scan of a shard refused: shard, key (empty where unknown), part, reason, detail."""
    return [
        {"shard": row.shard, "key": _owner(one, row), "part": row.member, "reason": row.reason, "detail": row.detail}
        for row in one.rejections
    ]


def _owner(one: Index, refused: Rejection) -> str:
    """The key of the sample that what was refused belongs to; empty where it is unknown.

    A damaged header belongs to the sample on both sides of it, or to the neighbor whose name it nearly has.
    """
    where = re.search(r"at byte (\d+)$", refused.detail)
    if refused.key or refused.reason != "shard" or not where or not len(one):
        return refused.key
    offset = int(where[1])
    after = int(np.searchsorted(one.members["offset"], offset))
    rows = [row for row in (after - 1, after) if 0 <= row < len(one.members)]
    keys = [one.key(int(np.searchsorted(one.member_starts, row, "right")) - 1) for row in rows]
    if len(keys) == 2 and keys[0] == keys[1]:
        return keys[0]
    try:
        header = storage.read(one.shard, offset, 100)
    except (OSError, SampleError):
        return ""
    distances = sorted((_bit_distance(header, f"{key}.".encode()[:100]), key) for key in keys)
    clear = len(keys) == 1 or distances[0][0] < distances[1][0]
    return distances[0][1] if distances[0][0] <= 2 and clear else ""


def _bit_distance(header: bytes, name: bytes) -> int:
    """How many bits of `name` differ at the beginning of the header."""
    if len(header) < len(name):
        return 8 * len(name)
    return sum((x ^ y).bit_count() for x, y in zip(header, name))
