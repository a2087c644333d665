"""The working files of a pack, in TO/.pack: each is whole or absent, so that a pack that was stopped can be resumed."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..corpus import storage
from ..errors import UserError
from .settings import Settings
from .sources import Source, SourceIndex

CHUNK = 512  # samples that one job reads
TEMPORARY = ".tmp-"  # the names of unfinished files begin with this, here and in `storage`
FOLDERS = ("sources", "chunks", "shards")


@contextlib.contextmanager
def open_atomic(path: Path):
    """A file to write in parts, which gets its name when all of it is on the disk."""
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    with open(temporary, "w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, data, indent: int | None = None) -> None:
    storage.write_atomic(path, json.dumps(data, indent=indent).encode() + b"\n")


def read_json(path: Path):
    return json.loads(path.read_bytes())


def json_line(row) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


@dataclass(frozen=True)
class Chunk:
    """Samples `start:stop` of a source, which one job reads."""

    number: int
    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """All that is to be read."""

    settings: Settings
    sources: list[Source]
    indexes: list[SourceIndex]
    classes: dict[str, int]

    def chunks(self) -> Iterator[Chunk]:
        number = 0
        for source, indexed in enumerate(self.indexes):
            for start in range(0, indexed.count, CHUNK):
                yield Chunk(number, source, start, min(start + CHUNK, indexed.count))
                number += 1


@dataclass(frozen=True)
class State:
    """Where the working files of the pack into the folder `to` are."""

    to: Path

    def file(self, name: str) -> Path:
        return self.to / ".pack" / name

    def source(self, number: int, suffix: str = ".json") -> Path:
        """What was found in a source: `.json`, and what reading it at random needs."""
        return self.file("sources") / f"{number:06d}{suffix}"

    def chunk(self, number: int, suffix: str) -> Path:
        """What was read: `.jsonl`, a record a sample; `.members`, their bytes; `.minhash`, signatures of texts.

        While it is read: `.current`, the sample being decoded; `.crashed`, samples that ended their process twice.
        """
        return self.file("chunks") / f"{number:06d}{suffix}"

    def shard(self, name: str, suffix: str) -> Path:
        """`.samples`: what the shard is to hold; `.json`: what was written."""
        return self.file("shards") / f"{name}{suffix}"

    @property
    def assigned(self) -> bool:
        """Whether it is decided what each shard holds."""
        return self.file("assigned.json").exists()

    @contextlib.contextmanager
    def lock(self):
        """Raises UserError where another process packs into the same folder."""
        self.file("").mkdir(exist_ok=True)
        with open(self.file("lock"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.to}: another mmfm pack is writing there") from None
            yield

    def prepare(self) -> None:
        """Make the folders and remove files that were being written when a pack was stopped."""
        for file in [*self.to.glob(f"{TEMPORARY}*"), *self.file("").rglob(f"{TEMPORARY}*")]:
            file.unlink()
        for name in FOLDERS:
            self.file(name).mkdir(exist_ok=True)

    def clear(self) -> None:
        """Remove all but the settings and what is finished."""
        for name in ("plan.json", "assigned.json", "quarantine.jsonl", "signatures", "codec.safetensors"):
            self.file(name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(self.file(name), ignore_errors=True)

    def publish_quarantine(self) -> None:
        with open(self.file("quarantine.jsonl"), "rb") as rows:
            storage.write_atomic(self.to / "quarantine.jsonl", rows)

    def plan(self) -> Plan:
        """The plan, read once in each process."""
        return _load_plan(self, self.file("plan.json").stat().st_mtime_ns)

    def records(self, chunk: Chunk) -> Iterator[dict]:
        with open(self.chunk(chunk.number, ".jsonl"), "rb") as file:
            yield from map(json.loads, file)

    def shard_samples(self, name: str) -> Iterator[tuple[str, int, list]]:
        """Key, chunk and members [extension, offset, length] of each sample of a shard."""
        with open(self.shard(name, ".samples"), "rb") as file:
            yield from map(json.loads, file)


@functools.lru_cache(maxsize=2)
def _load_plan(state: State, mtime: int) -> Plan:
    data = read_json(state.file("plan.json"))
    indexes = [SourceIndex(**read_json(state.source(i))) for i in range(len(data["sources"]))]
    return Plan(Settings(**data["settings"]), [Source(**one) for one in data["sources"]], indexes, data["classes"])


def make_progress(show: bool):
    """A `rich.progress.Progress` on standard error, which shows nothing where `show` is false."""
    from rich import progress
    from rich.console import Console

    columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn())
    text = progress.TextColumn("{task.description:9}")
    return progress.Progress(text, *columns, console=Console(stderr=True), disable=not show)
