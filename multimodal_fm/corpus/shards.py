"""Shards: webdataset tars, text files and JSON lines, of which any sample is read at random, locally or remotely.

A sample is what a shard holds under one key: its members' bytes by extension (`jpg`, `txt`, `json`, ...), as OpenCLIP,
img2dataset and LAION-CLAP write them. A damaged shard delivers whatever is intact and reports the rest.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SampleError, UserError
from ..tokenizers.base import Tokenizer
from . import index, storage
from .fields import lookup, matches, parse_map
from .scan import Rejection

SHARDS = (".tar", ".jsonl", ".txt")  # the extensions of shards


@dataclass
class Config:
    """One source of samples."""

    shards: str | list[str]  # paths, glob patterns or URLs of .tar, .txt and .jsonl files
    validation: str | list[str] = ""  # held-out shards of the same kind, for `validate_every`
    where: dict[str, str] = field(default_factory=dict)  # keep the samples whose JSON has these values (dots go deeper)
    group: str = ""  # the JSON field that says which samples mean the same; empty: those with the same text do
    chunk: int = 1  # adjacent samples that are read near each other in time: 64 to 256 on an object store
    piece_bytes: int = 2000  # .txt: paragraphs are joined, and longer ones cut, to samples of at most so many bytes
    max_bytes: int = 200_000_000  # a longer member is not read at all
    augment: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Augmentation settings of tokenizers, by modality, that hold for this source in place of the tokenizer's own: for
    captions that a flip, a crop or a change of color would make false."""

    def __post_init__(self):
        if self.piece_bytes < 16 or self.chunk < 1:
            raise ValueError("piece_bytes is at least 16, chunk at least 1")


class Corpus:
    """The samples of one source, numbered through its shards in order.

    Args:
        name: what messages call the source.
        tokenizers: those of the run, whose measures the indexes must hold; see `index.open_index`.
        write_index: whether indexes may be written beside the shards; say False for shards of somebody else.

    Raises UserError where a shard cannot be read, or no sample is left, or none of them has the field `config.group`.
    """

    GROUP_SAMPLES = 1000  # that are searched for the field

    def __init__(
        self,
        config: Config,
        name: str = "source",
        tokenizers: Iterable[Tokenizer] = (),
        write_index: bool = True,
    ):
        self.name, self.config = name, config
        shards = list_shards(config.shards, f"source {name}")
        progress = Progress(f"source {name}: indexing {{}}, once")
        self.indexes = index.open_all(shards, config.piece_bytes, tokenizers, write_index, progress)
        self.rejections: list[Rejection] = [rejection for one in self.indexes for rejection in one.rejections]
        self._starts = list(itertools.accumulate(map(len, self.indexes), initial=0))
        self._kept: np.ndarray | None = None  # the samples that `where` keeps; None: all
        if config.where:
            self._kept = np.flatnonzero([matches(self.json(sample), config.where) for sample in range(len(self))])
        if not len(self):
            why = f" with {', '.join(f'{k}={v}' for k, v in config.where.items())}" if config.where else ""
            first = next((f" ({r.shard}: {r.reason}: {r.detail})" for r in self.rejections), "")
            patterns = config.shards if isinstance(config.shards, str) else ", ".join(config.shards)
            raise UserError(f"source {name}: no samples{why} in {patterns}{first}")
        self._check_group()

    def __len__(self) -> int:
        return self._starts[-1] if self._kept is None else len(self._kept)

    def _check_group(self) -> None:
        rows = self.samples_with({"json"}) if self.config.group else ()
        fields: dict[str, None] = {}
        for number in range(count := min(len(rows), self.GROUP_SAMPLES)):
            row = self.json(rows[number * len(rows) // count])
            if lookup(row, self.config.group) is not None:
                return
            fields |= dict.fromkeys(row)
        if self.config.group:
            have = f"their JSON has {', '.join(list(fields)[:20])}" if fields else "they have no JSON with fields"
            raise UserError(f"source {self.name}: no sample has the field that group={self.config.group} names; {have}")

    def _locate(self, sample: int) -> tuple[index.Index, int]:
        """The index of the sample's shard, and the sample's number there."""
        sample = int(sample if self._kept is None else self._kept[sample])
        shard = bisect.bisect_right(self._starts, sample) - 1
        self.indexes[shard].check()
        return self.indexes[shard], sample - self._starts[shard]

    def shard(self, sample: int) -> str:
        return self._locate(sample)[0].shard

    def key(self, sample: int) -> str:
        shard, number = self._locate(sample)
        return shard.key(number)

    def read(self, sample: int, extensions: tuple = ()) -> tuple[dict[str, bytes], list[tuple[str, SampleError]]]:
        """The sample's members, all or those with the given extensions, and which of them cannot be had and why."""
        shard, number = self._locate(sample)
        return shard.read(number, extensions, self.config.max_bytes)

    def raw(self, sample: int, extensions: tuple = ()) -> dict[str, bytes]:
        """The sample's members that can be read, all or those with the given extensions."""
        return self.read(sample, extensions)[0]

    def measures(self, sample: int) -> dict[str, tuple[int, int, int]]:
        """Each member's bytes and the two numbers of its tokenizer's `measure`, by extension."""
        shard, number = self._locate(sample)
        rows = shard.members[shard.member_starts[number] : shard.member_starts[number + 1]]
        return {shard.extensions[r["extension"]]: (int(r["length"]), int(r["a"]), int(r["b"])) for r in rows}

    def json(self, sample: int) -> dict:
        """The sample's JSON; empty where it has none, or none that is a map."""
        return parse_map(self.raw(sample, ("json",)).get("json"))

    def samples_with(self, extensions: set[str]) -> np.ndarray | range:
        """The numbers of the samples that have a member with any of the extensions."""
        fits = [[not extensions.isdisjoint(names) for names in one.extension_sets] for one in self.indexes]
        if all(map(all, fits)):
            return range(len(self))
        shards = zip(fits, self.indexes, strict=True)
        chosen = np.concatenate([np.array(fit, bool)[one.extension_set_ids] for fit, one in shards if len(one)])
        return np.flatnonzero(chosen if self._kept is None else chosen[self._kept])

    def fingerprint(self) -> str:
        """A hash of which samples there are and in what order, wherever the shards lie and whoever measured them."""
        settings = [self.config.where, self.config.piece_bytes, index.VERSION]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for one in self.indexes:
            digest.update(f"{os.path.basename(one.shard)} {one.head['sha256']}\n".encode())
        return digest.hexdigest()


class Progress:
    """Prints, from two seconds on, which shard is being read: `line` with the shard in place of {}."""

    def __init__(self, line: str):
        self.line, self.began = line, time.monotonic()

    def __call__(self, shard: str) -> None:
        if time.monotonic() - self.began > 2:
            print(self.line.replace("{}", shard), file=sys.stderr)


def list_shards(patterns: str | list[str], name: str = "shards") -> list[str]:
    """The files that the patterns name, each pattern's sorted. Raises UserError where a pattern names none."""
    shards = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        files = [file for file in storage.list_files(str(pattern)) if not file.endswith(".mmidx")]
        if not files:
            raise UserError(f"{name}: no file matches {pattern}")
        shards += files
    for file in shards:
        if not file.endswith(SHARDS):
            if os.path.isdir(file):
                raise UserError(f"{name}: {file} is a folder; name shards, '{file}/*.tar', or make some: mmfm pack")
            packed = file.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst"))
            mend = f"mmfm pack {file} --to FOLDER" if packed else "give a .tar, .txt or .jsonl file"
            raise UserError(f"{name}: {file} cannot be read at random; {mend}")
    return shards


def write(path: str | Path, samples: Iterable[dict]) -> None:
    """Writes samples, each a dict with `__key__` and members by extension (bytes, str or JSON), as a webdataset shard.

    The bytes depend on the samples alone.
    """
    from webdataset.writer import TarWriter

    with TarWriter(str(path), mtime=0, user="user", group="group", mode=0o644, encoder=False) as sink:
        for sample in samples:
            members = {name: _encode(value) for name, value in sample.items() if name != "__key__"}
            sink.write({"__key__": sample["__key__"], **members})


def _encode(value):
    if isinstance(value, (dict, list, int)):
        return json.dumps(value, ensure_ascii=False).encode()
    return value.encode() if isinstance(value, str) else value
