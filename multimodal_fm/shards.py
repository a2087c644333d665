"""Shards: webdataset tars, text files and JSON lines; any item is reached at random.

An item is what a shard holds under one key; its members are bytes by ending (`jpg`, `txt`, `json`, ...), as OpenCLIP,
img2dataset and LAION-CLAP write them. A damaged shard gives what is whole and says what is not.
"""

from __future__ import annotations

import functools
import glob
import json
import mmap
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from .errors import BadInput

SHARDS = (".tar", ".jsonl", ".txt")  # how a shard's name ends


@dataclass
class Config:
    """One source of items."""

    shards: str | list[str]  # paths or patterns of .tar, .txt and .jsonl files
    where: dict[str, str] = field(default_factory=dict)  # keep the items whose JSON has these values (dots go deeper)
    group: str = ""  # the JSON field that says which items mean the same; empty: an equal text
    piece: int = 2000  # .txt: paragraphs are joined, and longer ones cut, to pieces of at most so many bytes

    def __post_init__(self):
        if self.piece < 16:
            raise ValueError("piece is at least 16 bytes")


@dataclass(frozen=True)
class Entry:
    """Where an item's members lie: (offset, length) in bytes by ending."""

    shard: str
    key: str
    members: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Refused:
    """Something in a shard that is not delivered: a line for the ledger."""

    shard: str
    key: str
    part: str
    reason: str
    detail: str


class Corpus:
    """The items of one source. `corpus.raw(i)` are the members of item i as bytes by ending."""

    def __init__(self, config: Config, name: str = "source"):
        self.name, self.config = name, config
        self.entries: list[Entry] = []
        self.refused: list[Refused] = []
        for path in find(config.shards, name):
            entries, refused = scan(path, config.piece)
            self.entries += entries
            self.refused += refused
        wanted = config.where
        if wanted:
            self.entries = [entry for entry in self.entries if matches(self._json(entry), wanted)]
        if not self.entries:
            why = f" with {', '.join(f'{k}={v}' for k, v in wanted.items())}" if wanted else ""
            raise BadInput(f"source {name}: no items{why} in {_patterns(config.shards)}")

    def __len__(self) -> int:
        return len(self.entries)

    def raw(self, index: int, endings: tuple = ()) -> dict[str, bytes]:
        """The item's members, all or those with the given endings."""
        entry = self.entries[index]
        wanted = ((e, span) for e, span in entry.members.items() if not endings or e in endings)
        return {ending: read_bytes(entry.shard, *span) for ending, span in wanted}

    def json(self, index: int) -> dict:
        """The item's JSON; empty where it has none or a broken one."""
        return self._json(self.entries[index])

    def _json(self, entry: Entry) -> dict:
        try:
            row = json.loads(read_bytes(entry.shard, *entry.members["json"]))
        except (KeyError, ValueError, RecursionError):
            return {}
        return row if isinstance(row, dict) else {}


def matches(row: dict, wanted: dict[str, str]) -> bool:
    return all(str(lookup(row, name)) == str(value) for name, value in wanted.items())


def lookup(row, name: str):
    """`row["a"]["b"]` for the name `a.b`; None where there is no such field."""
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def find(patterns: str | list[str], name: str = "source") -> list[str]:
    """The files that the patterns name, each pattern's sorted. Raises BadInput where a pattern names none."""
    files = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = sorted(glob.glob(str(pattern), recursive=True))
        if not found:
            raise BadInput(f"source {name}: no file matches {pattern}")
        files += found
    for file in files:
        if not file.endswith(SHARDS):
            mend = "unpack it first: gunzip" if file.endswith((".gz", ".tgz")) else "give a .tar, .txt or .jsonl file"
            raise BadInput(f"source {name}: {file} cannot be read at random; {mend}")
    return files


def _patterns(patterns: str | list[str]) -> str:
    return patterns if isinstance(patterns, str) else ", ".join(patterns)


def scan(path: str, piece: int = 2000) -> tuple[list[Entry], list[Refused]]:
    """The items of one file and what in it is refused. Raises BadInput where the file cannot be opened."""
    try:
        if path.endswith(".tar"):
            return _scan_tar(path)
        if path.endswith(".jsonl"):
            return _scan_lines(path)
        return _scan_paragraphs(path, piece)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None


def _scan_tar(path: str) -> tuple[list[Entry], list[Refused]]:
    size = os.path.getsize(path)
    entries, refused, seen = [], [], set()
    key, members, repeated = None, {}, False

    def refuse(part: str, reason: str, detail: str, key: str = ""):
        refused.append(Refused(path, key, part, reason, detail))

    def close():
        if members:
            entries.append(Entry(path, key, dict(members)))

    try:
        archive = tarfile.open(path, "r:")
    except (tarfile.TarError, EOFError) as error:
        return [], [Refused(path, "", "", "shard", f"not a tar archive: {error}")]
    with archive:
        try:
            for member in archive:
                if member.isdir():
                    continue
                name = member.name
                if not member.isreg() or name.startswith("/") or ".." in name.split("/") or len(name) > 1024:
                    refuse("", "name", f"{name[:80]!r} at byte {member.offset}")
                    continue
                folder, _, base = name.rpartition("/")
                stem, _, ending = base.partition(".")
                own, ending = f"{folder}/{stem}" if folder else stem, ending.lower()
                if not stem or not ending:
                    continue
                if member.offset_data + member.size > size:
                    refuse(ending, "shard", f"ends inside the member at byte {member.offset}", own)
                    continue
                if own != key:
                    close()
                    key, members = own, {}
                    repeated = own in seen
                    seen.add(own)
                    if repeated:
                        refuse("", "duplicate", f"key seen before, again at byte {member.offset}", own)
                if repeated:
                    continue
                if ending in members:
                    refuse(ending, "duplicate", f"at byte {members[ending][0]} and {member.offset_data}", own)
                    continue
                members[ending] = (member.offset_data, member.size)
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            refuse("", "shard", f"{error} at byte {archive.offset}")
        else:
            # the standard library takes a damaged header for the end of the archive: look at what it stopped at
            rest = read_bytes(path, archive.offset, tarfile.BLOCKSIZE)
            if any(rest):
                refuse("", "shard", f"damaged header at byte {archive.offset}")
            elif not rest and size:
                refuse("", "shard", "no end of archive: it may have been cut")
    close()
    return entries, refused


def _scan_lines(path: str) -> tuple[list[Entry], list[Refused]]:
    entries, offset = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if line.strip():
                entries.append(Entry(path, str(number), {"json": (offset, len(line))}))
            offset += len(line)
    return entries, []


def _scan_paragraphs(path: str, piece: int) -> tuple[list[Entry], list[Refused]]:
    """Neighbouring paragraphs are joined up to `piece` bytes; a longer one is cut at a space or between characters."""
    if not os.path.getsize(path):
        return [], [Refused(path, "", "", "empty", "no bytes")]
    entries = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        start, size = 0, len(text)
        while start < size:
            end = min(start + piece, size)
            if end < size:
                cut = max(text.rfind(mark, start, end) for mark in (b"\n\n", b"\n \n", b"\r\n\r\n"))
                if cut <= start:
                    cut = max(text.rfind(mark, start, end) for mark in (b"\n", b". ", b" "))
                end = cut + 1 if cut > start else end
                while end < size and 0x80 <= text[end] < 0xC0 and end > start + 1:
                    end -= 1  # not inside a character
            if text[start:end].strip():
                entries.append(Entry(path, str(start), {"txt": (start, end - start)}))
            start = end
    return entries, []


def read_bytes(path: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on, fewer where the file ends. Several processes and threads may read at once."""
    return os.pread(_open(path, os.getpid()).fileno(), length, offset)


@functools.lru_cache(maxsize=256)
def _open(path: str, process: int):
    return open(path, "rb", buffering=0)


def write(path: str | Path, items) -> None:
    """Write items, dicts with `__key__` and members by ending (bytes, str or JSON), as one webdataset shard.

    The bytes depend on the items alone.
    """
    import webdataset

    with webdataset.TarWriter(str(path), mtime=0, user="user", group="group", mode=0o644) as sink:
        for item in items:
            members = {name: _encoded(value) for name, value in item.items() if name != "__key__"}
            sink.write({"__key__": item["__key__"], **members})


def _encoded(value):
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False).encode()
    return value.encode() if isinstance(value, str) else value
