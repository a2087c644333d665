"""The state of a pack, in FOLDER/.pack: files that are whole or absent, the plan of what is read, its rows."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .settings import Settings
from .sources import Listing, Place

CHUNK = 512  # samples read by one task
TEMPORARY = ".packing-"  # how the names of unfinished files begin


def publish(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with publishing(path) as file:
        file.write(data)


@contextlib.contextmanager
def publishing(path: Path):
    """A file to write that takes its name when all of it is on the disk."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with open(temporary, "w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)


def rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path):
    return json.loads(path.read_bytes())


@contextlib.contextmanager
def locked(folder: Path):
    (folder / ".pack").mkdir(exist_ok=True)
    with open(folder / ".pack" / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another mmfm pack is writing there") from None
        yield


@dataclass(frozen=True)
class Chunk:
    """Samples `start:stop` of a place."""

    number: int
    place: int
    start: int
    stop: int


class Plan:
    """All that there is to read, as the state has it; the same in every process."""

    def __init__(self, state: Path):
        data = load(state / "plan.json")
        self.settings = Settings(**data["settings"])
        self.places = [Place(**one) for one in data["places"]]
        self.listings = [Listing(**load(listing_of(state, i))) for i in range(len(self.places))]
        self.labels = data["labels"]

    def chunks(self) -> Iterator[Chunk]:
        number = 0
        for place, listing in enumerate(self.listings):
            for start in range(0, listing.count, CHUNK):
                yield Chunk(number, place, start, min(start + CHUNK, listing.count))
                number += 1


def plan_of(state: Path) -> Plan:
    """The plan, read once a process."""
    return _plan_of(state, (state / "plan.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _plan_of(state: Path, stamp: int) -> Plan:
    return Plan(state)


def listing_of(state: Path, place: int) -> Path:
    return state / "list" / f"{place:06d}.json"


def base_of(state: Path, place: int) -> str:
    return str(state / "list" / f"{place:06d}")


def rows_in(state: Path, chunk: int) -> Path:
    return state / "read" / f"{chunk:06d}.jsonl"


def data_of(state: Path, chunk: int) -> Path:
    return state / "read" / f"{chunk:06d}.bin"


def rows_of(state: Path, plan: Plan) -> Iterator[tuple[Chunk, dict]]:
    for chunk in plan.chunks():
        with open(rows_in(state, chunk.number), "rb") as file:
            for line in file:
                yield chunk, json.loads(line)


def line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def shard_samples(state: Path, name: str) -> Iterator[tuple[str, int, list]]:
    with open(state / "shards" / f"{name}.samples", "rb") as file:
        yield from map(json.loads, file)


class Progress:
    """Bars on standard error, one a stage; nothing at all where `show` is false."""

    def __init__(self, show: bool):
        self.bars, self.bar = None, None
        if show:
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description:8}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
            )
            self.bars = progress.Progress(*columns, console=Console(stderr=True))

    def __enter__(self):
        if self.bars:
            self.bars.start()

    def __exit__(self, *_):
        if self.bars:
            self.bars.stop()

    def stage(self, name: str, total: int | None) -> None:
        if self.bars:
            self.bar = self.bars.add_task(name, total=total)

    def advance(self, count: int = 1) -> None:
        if self.bars:
            self.bars.advance(self.bar, count)
