"""The index of a shard: a small file beside it, through which any sample is reached and its bytes are checked.

`NAME.mmidx` stands beside the shard, or in the cache folder where the shard's folder cannot be written. Layout, all
little endian: the magic, the version (u32), the length of a JSON head (u32), the head's CRC-32 (u32), twelve zeros, the
head, then the tables:

    members  (M,)  `MEMBER`: offset, length, CRC-32, two measures (pixels wide and high; milliseconds and rate), ending,
                   CRC-16 of what belongs to the member but its content: its headers and its padding
    first    (N+1,) u32: sample i's members are `first[i] : first[i + 1]`
    makeup   (N,) u16: which of the head's makeups (the endings that a sample has) the sample is of
    places   (N+1,) u32: sample i's key is `names[places[i] : places[i + 1]]`
    names    UTF-8

The head holds the shard's size, time stamp and SHA-256, the CRC-32 of what follows the last member, the counts, what
was refused, and the tables' SHA-256. So each byte of a shard is answered for by one member or by the end.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import SampleError, UserError
from . import storage
from .scan import LARGEST, Window, block_of, checks, crc_of, digest_of, scan

MAGIC, VERSION, START = b"mmidx\r\n\0", 2, 32
MEMBER = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("crc", "<u4"),
        ("a", "<u4"),
        ("b", "<u4"),
        ("ending", "<u2"),
        ("frame", "<u2"),
    ]
)
NAMED = 10_000  # how many refusals the head names; it counts them all
PIECE = 2000  # bytes of a piece of plain text


@dataclass(frozen=True)
class Refused:
    """Something in a shard that is not delivered: a line for the ledger."""

    shard: str
    key: str
    part: str
    reason: str
    detail: str


class Damaged(ValueError):
    """An index file is not what was written."""


class Index:
    """What an index file holds; the tables are mapped, not read. Raises OSError, ValueError and, of these, Damaged."""

    def __init__(self, shard: str, file: Path):
        self.shard, self.file = shard, file
        held = _mapped(file)
        start = held[:START].tobytes()
        if start[:8] != MAGIC:
            raise Damaged("not an index")
        if int.from_bytes(start[8:12], "little") != VERSION:
            raise ValueError("not an index of this version")
        place = START + int.from_bytes(start[12:16], "little")
        text = held[START:place].tobytes()
        if start != _start(text):
            raise Damaged("its head is not what was written")
        self.head = json.loads(text)
        samples, members, self.endings = self.head["samples"], self.head["members"], self.head["endings"]
        shapes = (
            (MEMBER, members),
            ("<u4", samples + 1),
            ("<u2", samples),
            ("<u4", samples + 1),
            ("u1", self.head["names"]),
        )
        tables, ends = [], np.cumsum([place, *(np.dtype(kind).itemsize * count for kind, count in shapes)]).tolist()
        if ends[-1] != len(held):
            raise Damaged("its tables are not as long as its head says")
        for (kind, _), (begin, end) in zip(shapes, itertools.pairwise(ends), strict=True):
            tables.append(held[begin:end].view(kind))
        self.members, self.first, self.makeup, self.places, self.names = tables
        self._checked = False

    def __len__(self) -> int:
        return self.head["samples"]

    @property
    def makeups(self) -> list[list[str]]:
        """The sets of endings that samples have."""
        return self.head["makeups"]

    @property
    def refused(self) -> list[Refused]:
        return [Refused(self.shard, *row) for row in self.head["refused"]]

    def key(self, sample: int) -> str:
        return self.names[self.places[sample] : self.places[sample + 1]].tobytes().decode()

    def spans(self, sample: int) -> dict[str, tuple[int, int, int]]:
        """Offset, length and CRC-32 of the sample's members by ending."""
        rows = self.members[self.first[sample] : self.first[sample + 1]].tolist()
        return {self.endings[row[5]]: row[:3] for row in rows}

    def check(self) -> None:
        """Raises UserError where the tables are damaged. They are looked through once, before a sample is looked up."""
        if not self._checked and not self.whole():
            raise UserError(
                f"{self.shard}: its index {self.file} is damaged; `mmfm inspect --rebuild {self.shard}` makes it anew"
            )
        self._checked = True

    def read(
        self, sample: int, endings=(), most: int = LARGEST
    ) -> tuple[dict[str, bytes], list[tuple[str, SampleError]]]:
        """The sample's members, all or those with the given endings, none of more than `most` bytes, and which of them
        cannot be had and why."""
        members, failed = {}, []
        for ending, (offset, length, crc) in self.spans(sample).items():
            if endings and ending not in endings:
                continue
            try:
                if length > most:
                    raise SampleError("byte-limit", f"{length} bytes, the limit is {most}")
                data = storage.read(self.shard, offset, length)
                if len(data) != length or zlib.crc32(data) != crc:
                    raise SampleError("crc", f"{length} bytes at {offset} are not those that were indexed")
                members[ending] = data
            except OSError as error:
                failed.append((ending, SampleError("read", str(error)[:200])))
            except SampleError as error:
                failed.append((ending, error))
        return members, failed

    def differences(self) -> Iterator[tuple[int, str, str, str]]:
        """Sample (-1: none), ending, reason and detail of all that is not as it was indexed. Reads the whole shard.

        Every byte belongs to one sample: a header and padding to its member's, what follows the last member to the last.
        Raises OSError, SampleError.
        """
        size = storage.stamp(self.shard)[0]
        read, end, sample_of = Window(self.shard, size), 0, np.repeat(np.arange(len(self)), np.diff(self.first))
        for sample, row in zip(sample_of.tolist(), self.members):
            ending, offset, length = self.endings[row["ending"]], int(row["offset"]), int(row["length"])
            crc, frame, _, end = checks(read, end, offset, length, size, block_of(self.shard))
            if crc != row["crc"]:
                yield sample, ending, "crc", f"{length} bytes at {offset} are not those that were indexed"
            elif frame != row["frame"]:
                yield sample, ending, "shard", f"the header or the padding of {length} bytes at {offset} is damaged"
        if crc_of(read, end, size) != self.head["tail"]:
            yield len(self) - 1, "", "shard", f"what follows the last member, from byte {end} on, is damaged"

    def whole(self) -> bool:
        """Whether the tables are what the head says that they are."""
        return _digest(self.members, self.first, self.makeup, self.places, self.names) == self.head["tables"]


def _mapped(file: Path) -> np.ndarray:
    """A file's bytes (N,), not read but mapped. No file stays open for it, as one does for each of numpy's maps: there
    may be more shards than a process may have files open. Raises OSError."""
    size = os.stat(file).st_size
    try:
        found = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from None
    found.flags.writeable = False
    return found


def opened(shard: str, piece: int = PIECE, progress: Callable[[str], None] = lambda shard: None) -> Index:
    """The shard's index, made where there is none. Raises UserError where the shard is gone or is another one by now."""
    try:
        storage.forget(shard)  # what this process may have open is the file that was there before
        size, mark = storage.stamp(shard)
    except OSError as error:
        raise UserError(f"{shard}: {error.strerror or error}") from None
    found = []
    for file in _files(shard, piece):
        try:
            found.append(Index(shard, file))
        except (OSError, ValueError):
            continue  # none there, or of another version, or damaged: it is made again
        if found[-1].head["size"] == size and found[-1].head["mark"] == mark:
            return found[-1]
    same = any(one.head["size"] == size and one.head["sha256"] == digest_of(shard, size) for one in found)
    if found and not same:
        raise UserError(
            f"{shard}: is not the file that {found[0].file} was made of; `mmfm inspect --rebuild {shard}` makes it anew"
        )  # a copy of it, or the same with another time, gets an index of its own
    progress(shard)
    return build(shard, piece)


def known(shard: str, piece: int = PIECE) -> Index | None:
    """The index that was made before, whatever the shard is by now; None where there is none. Raises Damaged."""
    for file in _files(shard, piece):
        try:
            return Index(shard, file)
        except Damaged as error:
            raise Damaged(f"{file}: {error}") from None
        except (OSError, ValueError):
            continue
    return None


def open_all(
    shards: list[str], piece: int = PIECE, progress: Callable[[str], None] = lambda shard: None
) -> list[Index]:
    """The shards' indexes, several made at a time."""
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda shard: opened(shard, piece, progress), shards))


def _files(shard: str, piece: int) -> list[Path]:
    """Where the shard's index may be, the better place first."""
    suffix = f".{piece}.mmidx" if shard.endswith(".txt") else ".mmidx"
    name = hashlib.sha256(os.fsencode(shard if storage.is_remote(shard) else os.path.abspath(shard))).hexdigest()[:32]
    cached = storage.cache_folder() / "indexes" / f"{name}{suffix}"
    if storage.is_remote(shard):
        return [cached]
    beside = Path(shard + suffix)
    return [beside, cached] if beside.exists() or os.stat(beside.parent or ".").st_mode & 0o222 else [cached]


def build(shard: str, piece: int = PIECE) -> Index:
    """Read the whole shard and write its index. Raises UserError where the shard cannot be read or the index written."""
    try:
        storage.forget(shard)
        size, mark = storage.stamp(shard)
        head, tables = _tables(shard, size, piece)
        head |= {"shard": os.path.basename(shard), "size": size, "mark": mark, "sha256": digest_of(shard, size)}
        if storage.stamp(shard) != (size, mark):
            raise UserError(f"{shard}: changes while it is read")
    except (OSError, SampleError) as error:
        raise UserError(f"{shard}: {getattr(error, 'strerror', '') or error}") from None
    head["tables"] = _digest(*tables)
    text = json.dumps(head, ensure_ascii=True).encode()
    text += b" " * (-len(text) % 16)
    failed = None
    for file in _files(shard, piece):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as temporary:
                try:
                    temporary.write(_start(text) + text)
                    for table in tables:
                        temporary.write(table.tobytes())
                    temporary.flush()
                    os.fsync(temporary.fileno())
                    os.chmod(temporary.name, 0o644)
                    os.replace(temporary.name, file)
                except BaseException:
                    os.unlink(temporary.name)
                    raise
            return Index(shard, file)
        except OSError as error:
            failed = error
    raise UserError(f"{shard}: its index cannot be written, {failed}; set MMFM_CACHE to a folder that can be")


def _start(text: bytes) -> bytes:
    """What stands before the head `text`."""
    numbers = (VERSION, len(text), zlib.crc32(text))
    return (MAGIC + b"".join(number.to_bytes(4, "little") for number in numbers)).ljust(START, b"\0")


def _digest(*tables: np.ndarray) -> str:
    digest = hashlib.sha256()
    for table in tables:
        digest.update(np.ascontiguousarray(table).view("u1"))
    return digest.hexdigest()


def _tables(shard: str, size: int, piece: int) -> tuple[dict, list[np.ndarray]]:
    read = Window(shard, size)
    found = scan(shard, read, piece)
    endings: dict[str, int] = {}
    makeups: dict[tuple[str, ...], int] = {}
    counts: list[int] = []
    rows, makeup, end = [], [], 0
    for sample in found.samples:
        which = makeups.setdefault(tuple(sample), len(makeups))
        if which == len(counts):
            counts.append(0)
        counts[which] += 1
        makeup.append(which)
        for ending, (offset, length) in sample.items():
            crc, frame, first, end = checks(read, end, offset, length, size, block_of(shard))
            a, b = measure(ending, first, length)
            rows.append((offset, length, crc, a, b, endings.setdefault(ending, len(endings)), frame))
    names = [key.encode() for key in found.keys]
    tables = [
        np.array(rows, MEMBER),
        np.cumsum([0, *map(len, found.samples)], dtype="<u4"),
        np.array(makeup, "<u2"),
        np.cumsum([0, *map(len, names)], dtype="<u4"),
        np.frombuffer(b"".join(names), "u1"),
    ]
    head = {
        "samples": len(found.samples),
        "members": len(rows),
        "names": len(tables[-1]),
        "endings": list(endings),
        "makeups": [list(one) for one in makeups],
        "counts": counts,
        "refused_count": len(found.refused),
        "refused": found.refused[:NAMED],
        "piece": piece,
        "tail": crc_of(read, end, size),
    }
    return head, tables


def measure(ending: str, data: bytes, length: int) -> tuple[int, int]:
    """What a tokenizer says about a member's size (`measure` in its file); (0, 0) where none does."""
    from ..tokenizers import modules

    for module in modules():
        if ending in module.extensions:
            try:
                a, b = module.measure(data, length)
                return min(int(a), LARGEST), min(int(b), LARGEST)
            except Exception:  # whatever a reader says of damaged bytes: they are refused when they are read
                return 0, 0
    return 0, 0
