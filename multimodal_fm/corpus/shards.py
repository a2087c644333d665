"""Shards: webdataset tars, text files and JSON lines; any sample is reached at random, on disk or on an object store.

A sample is what a shard holds under one key; its members are bytes by ending (`jpg`, `txt`, `json`, ...), as OpenCLIP,
img2dataset and LAION-CLAP write them. A damaged shard gives what is whole and says what is not.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import SampleError, UserError
from . import index, storage
from .fields import matches, parse_map
from .index import Refused

SHARDS = (".tar", ".jsonl", ".txt")  # how a shard's name ends


@dataclass
class Config:
    """One source of samples."""

    shards: str | list[str]  # paths, patterns or URLs of .tar, .txt and .jsonl files
    where: dict[str, str] = field(default_factory=dict)  # keep the samples whose JSON has these values (dots go deeper)
    group: str = ""  # the JSON field that says which samples mean the same; empty: an equal text
    chunk: int = 1  # so many neighbours are read near each other in time: 64 to 256 on an object store
    piece: int = 2000  # .txt: paragraphs are joined, and longer ones cut, to pieces of at most so many bytes
    bytes: int = 200_000_000  # a longer member is not read at all

    def __post_init__(self):
        if self.piece < 16 or self.chunk < 1:
            raise ValueError("piece is at least 16 bytes, chunk at least 1")


class Corpus:
    """The samples of one source, numbered through its shards in order. Raises UserError where there are none."""

    def __init__(self, config: Config, name: str = "source"):
        self.name, self.config = name, config
        self.indexes = index.open_all(
            find(config.shards, f"source {name}"), config.piece, Told(f"source {name}: indexing {{}}, once")
        )
        self.refused: list[Refused] = [refused for one in self.indexes for refused in one.refused]
        self.bounds = list(itertools.accumulate(map(len, self.indexes), initial=0))
        self._kept: np.ndarray | None = None  # the samples that `where` keeps; None: all
        if config.where:
            rows = (self.json(sample) for sample in range(len(self)))
            self._kept = np.flatnonzero([matches(row, config.where) for row in rows])
        if not len(self):
            why = f" with {', '.join(f'{k}={v}' for k, v in config.where.items())}" if config.where else ""
            broken = f" ({_told(self.refused[0])})" if self.refused else ""
            raise UserError(f"source {name}: no samples{why} in {_patterns(config.shards)}{broken}")

    def __len__(self) -> int:
        return self.bounds[-1] if self._kept is None else len(self._kept)

    def _place(self, sample: int) -> tuple[index.Index, int]:
        """The sample's shard and its number there."""
        sample = int(sample if self._kept is None else self._kept[sample])
        shard = bisect.bisect_right(self.bounds, sample) - 1
        self.indexes[shard].check()
        return self.indexes[shard], sample - self.bounds[shard]

    def shard(self, sample: int) -> str:
        return self._place(sample)[0].shard

    def key(self, sample: int) -> str:
        shard, place = self._place(sample)
        return shard.key(place)

    def read(self, sample: int, endings: tuple = ()) -> tuple[dict[str, bytes], list[tuple[str, SampleError]]]:
        """The sample's members, all or those with the given endings, and which of them cannot be had and why."""
        shard, place = self._place(sample)
        return shard.read(place, endings, self.config.bytes)

    def raw(self, sample: int, endings: tuple = ()) -> dict[str, bytes]:
        """The sample's members that can be read, all or those with the given endings."""
        return self.read(sample, endings)[0]

    def measures(self, sample: int) -> dict[str, tuple[int, int, int]]:
        """Length in bytes and the two measures (`index`) of the sample's members by ending."""
        shard, place = self._place(sample)
        rows = shard.members[shard.first[place] : shard.first[place + 1]]
        return {shard.endings[r["ending"]]: (int(r["length"]), int(r["a"]), int(r["b"])) for r in rows}

    def json(self, sample: int) -> dict:
        """The sample's JSON; empty where it has none or a broken one."""
        return parse_map(self.raw(sample, ("json",)).get("json"))

    def having(self, endings: set[str]) -> np.ndarray | range:
        """The numbers of the samples that have a member with any of the endings."""
        fits = [[not endings.isdisjoint(makeup) for makeup in one.makeups] for one in self.indexes]
        if all(map(all, fits)):
            return range(len(self))
        chosen = np.concatenate([np.array(fit, bool)[one.makeup] for fit, one in zip(fits, self.indexes) if len(one)])
        return np.flatnonzero(chosen if self._kept is None else chosen[self._kept])

    def fingerprint(self) -> str:
        """A hash of what the shards hold, in their order, wherever they lie."""
        digest = hashlib.sha256(json.dumps([self.config.where, self.config.piece]).encode())
        for one in self.indexes:
            digest.update(f"{os.path.basename(one.shard)} {one.head['sha256']} {one.head['tables']}\n".encode())
        return digest.hexdigest()


class Told:
    """Says, from two seconds on, which shard is being read: a line with {} for its name."""

    def __init__(self, line: str):
        self.line, self.began = line, time.monotonic()

    def __call__(self, shard: str) -> None:
        if time.monotonic() - self.began > 2:
            print(self.line.replace("{}", shard), file=sys.stderr)


def _told(refused: Refused) -> str:
    return f"{refused.shard}: {refused.reason}: {refused.detail}"


def find(patterns: str | list[str], name: str = "shards") -> list[str]:
    """The files that the patterns name, each pattern's sorted. Raises UserError where a pattern names none."""
    files = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [file for file in storage.find(str(pattern)) if not file.endswith(".mmidx")]
        if not found:
            raise UserError(f"{name}: no file matches {pattern}")
        files += found
    for file in files:
        if not file.endswith(SHARDS):
            if os.path.isdir(file):
                raise UserError(f"{name}: {file} is a folder; name shards, '{file}/*.tar', or make some: mmfm pack")
            packed = file.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst"))
            mend = f"mmfm pack {file} --to FOLDER" if packed else "give a .tar, .txt or .jsonl file"
            raise UserError(f"{name}: {file} cannot be read at random; {mend}")
    return files


def _patterns(patterns: str | list[str]) -> str:
    return patterns if isinstance(patterns, str) else ", ".join(patterns)


def write(path: str | Path, samples) -> None:
    """Write samples, dicts with `__key__` and members by ending (bytes, str or JSON), as one webdataset shard.

    The bytes depend on the samples alone.
    """
    import webdataset

    with webdataset.TarWriter(str(path), mtime=0, user="user", group="group", mode=0o644, encoder=False) as sink:
        for sample in samples:
            members = {name: _encoded(value) for name, value in sample.items() if name != "__key__"}
            sink.write({"__key__": sample["__key__"], **members})


def _encoded(value):
    if isinstance(value, (dict, list, int)):
        return json.dumps(value, ensure_ascii=False).encode()
    return value.encode() if isinstance(value, str) else value
