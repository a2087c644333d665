"""Embeds shards, folders and tables into a collection, in parallel, and goes on where it was stopped.

Worker processes read samples and turn them into raw tokens, this process runs the model. What has been embedded is
published as a part of the collection every so often, with the range of samples that it stands for, so that after a kill
the same command does the rest. Under torchrun, or whatever sets RANK and WORLD_SIZE, each process takes its share of
the samples; they meet in the collection alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batch import MAX_TOKENS
from ..corpus import index
from ..corpus.fields import matches, parse_map
from ..errors import SampleError, UserError
from ..model import Model, load
from ..pack import sources as packed
from ..pack import tables
from ..pack.samples import AUDIO_FILES, IMAGE_FILES, RawSample, collect_texts
from ..pack.settings import Settings as PackSettings
from ..pack.sources import Source, SourceIndex
from ..pack.state import make_progress
from ..stream.cluster import Ray, open_executor
from ..stream.crash_log import CrashLog
from ..stream.worker_pool import MAX_DEATHS, Job, WorkerPool, raise_after_deaths
from ..tokenizers.base import Tokenizer
from ..tokens import Tokens
from .base import Item
from .collection import Collection, model_hash

WORK = ".embed"  # the folder of working files, in that of the collection
UNIT, JOB = 256, 8  # samples that one rank takes together, and that a worker reads at once
PART_ROWS, PART_SECONDS = 8192, 30.0  # after which what has been embedded is published
LOCK_SECONDS = 5.0  # for a worker of a killed process that had not let go of its lock yet
MAX_FIELD = 4096  # characters of a field's JSON; a longer one is not kept for filters


@dataclass(frozen=True)
class Settings:
    """What is embedded, and how. Raises UserError."""

    sources: list[str]
    where: dict[str, str] = field(default_factory=dict)  # keep the samples whose JSON has these values
    dtype: str = "float16"  # of the vectors in the files: float16 or float32
    workers: int = 1  # processes that decode; 0: none but this one
    batch_tokens: int = MAX_TOKENS  # that the backbone reads at a time
    image_column: str = ""
    text_column: str = ""
    audio_column: str = ""
    key_column: str = ""
    allow_outside: bool = False  # tables may name files outside of their folder and hosts on private networks

    def __post_init__(self):
        if not self.sources:
            raise UserError("give at least one SOURCE to embed")
        if self.workers < 0 or self.batch_tokens < 1:
            raise UserError("--workers is at least 0, --batch-tokens at least 1")

    def pack(self) -> PackSettings:
        """The settings by which sources are read."""
        columns = {name: getattr(self, f"{name}_column") for name in ("image", "text", "audio", "key")}
        named = {f"{name}_column": value for name, value in columns.items()}
        return PackSettings(self.sources, allow_outside=self.allow_outside, **named)


@dataclass
class _Opened:
    """A source whose samples have been counted."""

    source: Source
    indexed: SourceIndex
    base: str  # of its working files
    name: str  # in the collection
    version: str  # changes with what it holds, and with how it is read
    known: dict[str, tuple[str, int]] = field(default_factory=dict)  # the part and row of earlier vectors, by id


@dataclass
class _Input:
    """An item with its sequences of raw tokens; without them its vector is known."""

    item: Item
    tokens: list[Tokens] | None


def embed_on_cluster(
    run: str, device: str, out: str | Path, settings: Settings, cluster: str, show: bool = False
) -> dict:
    """The same as `embed`, each machine of a Ray cluster, or each of its GPUs, its share. Raises UserError."""
    added, skipped, result = 0, [], {}
    with open_executor(cluster, 0) as executor, make_progress(show) as progress:
        assert isinstance(executor, Ray)
        gpus = executor.gpus if device != "cpu" else 0
        ranks = gpus or executor.machines
        jobs = ((run, device, str(out), settings, rank, ranks) for rank in range(ranks))
        task = progress.add_task("embedding", total=ranks)
        for _, result in executor.run(_embed_share, jobs, gpus=min(1, gpus)):
            progress.advance(task)
            added, skipped = added + result["added"], skipped + result["skipped"]
    counts = Collection(Path(out)).manifest().counts()
    return {**result, "items": sum(counts.values()), "counts": counts, "added": added, "skipped": skipped}


def _embed_share(job: tuple[str, str, str, Settings, int, int]) -> dict:
    run, device, out, settings, rank, ranks = job
    return embed(load(run, device=device), run, out, settings, share=(rank, ranks))


def embed(
    model: Model,
    run: str,
    out: str | Path,
    settings: Settings,
    show: bool = False,
    share: tuple[int, int] | None = None,
) -> dict:
    """Embed what the sources hold into the collection in `out`; what is there already is left as it is.

    Returns {"out", "items", "counts" (by modality, of all that is there), "added", "skipped" (rows as in
    quarantine.jsonl)}. show: progress on standard error. share: this process's number and how many there are; without
    it RANK and WORLD_SIZE. Raises UserError.
    """
    if "retrieval" not in model.heads:
        raise UserError(f"{run}: this model has no retrieval head, which makes the vectors that are searched")
    some = torch.ones(1, model.width, device=model.device), torch.zeros(1, dtype=torch.long, device=model.device)
    dim = int(model.heads["retrieval"](*some).shape[-1])
    rank, ranks = share or (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    out, listed = Path(out), packed.list_sources(settings.pack())
    for source in settings.sources:
        if os.path.isdir(source) and out.resolve().is_relative_to(os.path.realpath(source)):
            raise UserError(f"--out {out} lies inside the source {source}: give a folder outside of it")
    collection = Collection(out)
    collection.create(model_hash(model), run, dim, settings.dtype)
    work = out / WORK / f"rank-{rank}"
    (work / "sources").mkdir(parents=True, exist_ok=True)
    with collection.locked(f"{WORK}/lock-{rank}", wait=LOCK_SECONDS):
        opened, skipped = _open_sources(collection, listed, settings, work / "sources")
        jobs = list(_share(collection, opened, rank, ranks))
        reader = _Reader(opened, settings, model.tokenizers, CrashLog(work / "decoding", settings.workers))
        writer = _Writer(collection, model, opened, settings)
        with contextlib.closing(reader), make_progress(show) as progress:
            task = progress.add_task("embedding", total=sum(stop - start for _, start, stop in jobs))
            for job, (inputs, refused) in reader.read(jobs):
                writer.add(job, inputs, refused)
                progress.advance(task, job[2] - job[1])
            writer.publish()
        shutil.rmtree(work, ignore_errors=True)
    counts = collection.manifest().counts()
    items = sum(counts.values())
    return {
        "out": str(out),
        "items": items,
        "counts": counts,
        "added": writer.added,
        "skipped": skipped + writer.skipped,
    }


# ------------------------------------------------------------------------------------------------------------- sources


def _open_sources(
    collection: Collection, listed: list[Source], settings: Settings, work: Path
) -> tuple[list[_Opened], list[dict]]:
    """The sources that are not complete yet, and what was refused while their samples were counted."""
    shutil.rmtree(work)
    work.mkdir()
    how, opened, skipped = settings.pack(), {}, []
    for number, source in enumerate(listed):
        name = source.path + (f":{source.split}" if source.split else "")
        if name in opened:
            continue
        base = "" if source.kind == "shard" else str(work / f"{number:06d}")
        indexed = packed.index_source(source, how, base)
        version = _version(source, indexed, base, settings, how)
        before = collection.manifest().sources.get(name)
        manifest = collection.begin_source(name, source.kind, version, indexed.count)
        collection.drop_damaged(name)
        rows = [_row(name, source.path, **one) for one in indexed.refused]
        if before is None or before.version != version:
            collection.quarantine(rows, replace=None if before and before.following == version else name)
        elif not manifest.missing(name, version, indexed.count):
            rows = []
        skipped += rows
        one = opened[name] = _Opened(source, indexed, base, name, version)
        if manifest.sources[name].version != version:
            one.known = _known(collection, name, manifest.sources[name].version)
    return list(opened.values()), skipped


def _version(source: Source, indexed: SourceIndex, base: str, settings: Settings, how: PackSettings) -> str:
    """A hash of what a source holds: a shard's content, a table's size and time, those of all files of a folder."""
    stamp: list = [source.kind, indexed.count, indexed.stamp, how.columns, settings.where, settings.allow_outside]
    if source.kind == "shard":
        stamp[2] = index.open_index(source.path, how.max_text).head["sha256"]
    digest = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode())
    for number in range(indexed.count if source.kind == "folder" else 0):
        for name in tables.read_row(base, number)[1].values():
            with contextlib.suppress(OSError):  # it is reported when it is read
                status = os.stat(os.path.join(source.path, name))
                digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _known(collection: Collection, name: str, version: str) -> dict[str, tuple[str, int]]:
    """Where the vectors of a source's earlier version are, by id: the same input need not be embedded again."""
    manifest, known = collection.manifest(), {}
    for part in manifest.parts:
        if (part.source, part.version) == (name, version):
            ids = collection.read(part, manifest.dim, ["id"])[0]["id"].to_pylist()
            known.update((one, (part.name, row)) for row, one in enumerate(ids))
    return known


def _share(collection: Collection, opened: list[_Opened], rank: int, ranks: int) -> Iterator[tuple[int, int, int]]:
    """This rank's jobs: the number of a source and a range of its samples, none of which has been embedded yet."""
    manifest, unit = collection.manifest(), 0
    for number, one in enumerate(opened):
        missing = manifest.missing(one.name, one.version, one.indexed.count)
        for start in range(0, one.indexed.count, UNIT):
            if unit % ranks == rank:
                for low, high in missing:
                    low, high = max(low, start), min(high, start + UNIT)
                    yield from ((number, a, min(a + JOB, high)) for a in range(low, high, JOB))
            unit += 1


def _row(source: str, shard: str, key: str, part: str, reason: str, detail: str) -> dict:
    """A row of quarantine.jsonl."""
    row = {"source": source, "shard": shard, "key": key, "part": part}
    return {**row, "reason": reason, "detail": detail, "step": None}


# ------------------------------------------------------------------------------------------------------------- reading


class _Reader:
    """Reads samples and makes raw tokens of them, in worker processes."""

    def __init__(self, opened: list[_Opened], settings: Settings, tokenizers: Mapping[str, Tokenizer], log: CrashLog):
        self.opened, self.settings, self.tokenizers, self.log = opened, settings, tokenizers, log
        self.how = settings.pack()
        self.pool: WorkerPool | None = None

    def close(self) -> None:
        if self.pool:
            self.pool.close()
        self.log.close()

    def read(self, jobs: Sequence[tuple[int, int, int]]) -> Iterator[tuple[tuple, tuple[list[_Input], list[dict]]]]:
        """Yields each job with its inputs and what could not be read, in the order of the jobs."""
        if not self.settings.workers or not jobs:
            return ((job, self._read(job)) for job in jobs)
        workers = min(self.settings.workers, len(jobs))
        # Not of a low priority: what the model is waiting for would wait for whatever else the machine does.
        self.pool = WorkerPool(self._read, workers, initializer=self.log.use_slot, on_death=self._on_death, nice=0)
        return self.pool.imap(jobs)

    def _on_death(self, job: Job, worker: int, exit_code: int) -> None:
        """A sample over which two processes have ended is left out from then on."""
        killed = exit_code in (-signal.SIGKILL, -signal.SIGTERM)
        samples = [] if killed else self.log.record_crash(worker)
        if not samples or any(self.log.crash_counts[one] > MAX_DEATHS for one in samples):
            raise_after_deaths(job, worker, exit_code)

    def _read(self, job: tuple[int, int, int]) -> tuple[list[_Input], list[dict]]:
        number, start, stop = job
        one, inputs, refused = self.opened[number], [], []
        named: Any = _Named(one.source)
        for sample in range(start, stop):
            if self.log.excludes(named, sample):
                error = SampleError("crash", "a decoder ended its process, twice")
                refused.append(self._refuse(one, str(sample), "", error))
                continue
            self.log.begin(named, sample)
            classes = {word: place for place, word in enumerate(one.indexed.labels)}
            raw = packed.read(one.source, one.indexed, self.how, one.base, classes, sample)
            files = tables.read_row(one.base, sample)[1] if one.source.kind == "folder" else {}
            refused += [self._refuse(one, raw.key, part, error) for part, error in raw.failed]
            self._sample(one, raw, files, inputs, refused)
            self.log.end()
        return inputs, refused

    def _refuse(self, one: _Opened, key: str, part: str, error: SampleError) -> dict:
        return _row(one.name, one.source.path, key, part, error.reason, error.detail)

    def _sample(self, one: _Opened, raw: RawSample, files: dict, inputs: list[_Input], refused: list[dict]) -> None:
        """Add the inputs of a sample, or why there are none."""
        row = parse_map(raw.members.get("json"))
        if self.settings.where and not matches(row, self.settings.where):
            return
        texts, used = collect_texts(raw, row, self.settings.text_column)
        label = raw.members.get("cls", b"")[:20].decode("ascii", "replace").strip()
        others = {name: value for name, value in row.items() if name not in used}
        fields = {name: value for name, value in others.items() if len(json.dumps(value)) <= MAX_FIELD}
        fields |= {"cls": label} if label else {}
        seen = set()
        for modality, tokenizer in self.tokenizers.items():
            try:
                offered = list(offers(tokenizer, raw.members))
            except SampleError as error:
                refused.append(self._refuse(one, raw.key, modality, error))
                continue
            for member, value in offered:
                text = value if isinstance(value, str) else next(iter(texts), "")
                place = (one.source.path, raw.key, member)
                if files:
                    place = (os.path.join(one.source.path, files.get(member, "")), "", "")
                item = Item(_identify(modality, *place, value), modality, *place, text=text, fields=fields)
                if item.id in seen:
                    continue
                seen.add(item.id)
                try:
                    tokens = None if item.id in one.known else tokenizer.read(value)
                except (SampleError, OSError) as error:
                    error = error if isinstance(error, SampleError) else SampleError("read", str(error)[:200])
                    refused.append(self._refuse(one, raw.key, member, error))
                    continue
                if tokens or tokens is None:
                    inputs.append(_Input(item, tokens))


@dataclass(frozen=True)
class _Named:
    """How `CrashLog` names the samples of a source."""

    source: Source

    @property
    def name(self) -> str:
        return self.source.split

    def shard(self, sample: int) -> str:
        return self.source.path

    def key(self, sample: int) -> str:
        return str(sample)


def offers(tokenizer: Tokenizer, members: dict[str, bytes]) -> Iterator[tuple[str, Any]]:
    """The inputs of a modality among a sample's members, each with the ending of its member, in the form that `read`
    takes. Every picture and sound is one, whatever its ending. Raises SampleError."""
    media = next((kind for kind in (IMAGE_FILES, AUDIO_FILES) if not set(kind).isdisjoint(tokenizer.extensions)), None)
    if media:
        for ending, data in members.items():
            if ending in tokenizer.extensions or ending in media:  # tokenizers go by the bytes
                yield ending, {ending if ending in tokenizer.extensions else tokenizer.extensions[0]: data}
        return
    own = {ending: data for ending, data in members.items() if ending in tokenizer.extensions}
    values = tokenizer.split_inputs(own) if own else []
    for value in values:
        yield _ending_of(tokenizer, own, value), value


def _ending_of(tokenizer: Tokenizer, own: dict[str, bytes], value: Any) -> str:
    """The member that an input comes from."""
    for ending, data in own.items() if len(own) > 1 else ():
        with contextlib.suppress(SampleError):
            if value in tokenizer.split_inputs({ending: data}):
                return ending
    return next(iter(own))


def _identify(modality: str, source: str, key: str, member: str, value: Any) -> str:
    """The id of an input: of its content and its place."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (modality, source, key, member):
        digest.update(part.encode("utf-8", "surrogateescape" if part == source else "replace") + b"\0")
    members = value.items() if isinstance(value, dict) else [("", str(value).encode("utf-8", "surrogatepass"))]
    for name, data in sorted(members):
        digest.update(name.encode() + b"\0" + data)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- embedding


class _Writer:
    """Embeds inputs, `batch_tokens` at a time, and publishes them, those of one source together."""

    def __init__(self, collection: Collection, model: Model, opened: list[_Opened], settings: Settings):
        self.collection, self.model, self.opened, self.settings = collection, model, opened, settings
        manifest = collection.manifest()
        self.dim, parts = manifest.dim, {part.name: part for part in manifest.parts}
        self.read_part = functools.lru_cache(maxsize=8)(lambda name: collection.read(parts[name], self.dim, ["id"])[1])
        self.added, self.skipped = 0, []
        self._clear()

    def _clear(self) -> None:
        self.source, self.ranges, self.refused = -1, [], []
        self.waiting: dict[str, list[_Input]] = {}
        self.sizes: Counter[str] = Counter()
        self.items: list[Item] = []
        self.vectors: list[np.ndarray] = []
        self.began = time.monotonic()

    def add(self, job: tuple[int, int, int], inputs: list[_Input], refused: list[dict]) -> None:
        """Take what was read of a range of samples."""
        source, start, stop = job
        waiting = len(self.items) + sum(map(len, self.waiting.values()))
        if source != self.source or waiting >= PART_ROWS or time.monotonic() - self.began > PART_SECONDS:
            self.publish()
        self.source = source
        if self.ranges and self.ranges[-1][1] == start:
            self.ranges[-1][1] = stop
        else:
            self.ranges.append([start, stop])
        self.refused += refused
        for one in inputs:
            modality = one.item.modality
            if one.tokens is None:
                part, row = self.opened[source].known[one.item.id]
                self.items.append(one.item)
                self.vectors.append(np.asarray(self.read_part(part)[row : row + 1], np.float32))
                continue
            self.waiting.setdefault(modality, []).append(one)
            self.sizes[modality] += sum(map(len, one.tokens))
            if self.sizes[modality] >= self.settings.batch_tokens:
                self._embed(modality)

    def _embed(self, modality: str) -> None:
        inputs, self.sizes[modality] = self.waiting.pop(modality), 0
        sequences = [one.tokens or [] for one in inputs]
        vectors = self.model.embed_sequences(modality, sequences, self.settings.batch_tokens)[0].float().cpu().numpy()
        finite = np.isfinite(vectors).all(1) & (np.linalg.norm(vectors, axis=1) > 0.5)
        for one, good in zip(inputs, finite):
            if not good:
                name, item = self.opened[self.source].name, one.item
                detail = "the model's vector is not finite"
                self.refused.append(_row(name, item.source, item.key, item.member, "not-finite", detail))
        self.items += [one.item for one, good in zip(inputs, finite) if good]
        self.vectors.append(vectors[finite])
        self.added += int(finite.sum())

    def publish(self) -> None:
        """What this has returned from outlives a kill."""
        if self.source >= 0:
            for modality in list(self.waiting):
                self._embed(modality)
            if self.refused:
                self.skipped += self.refused
                self.collection.quarantine(self.refused)
            one = self.opened[self.source]
            vectors = np.concatenate([*self.vectors, np.zeros((0, self.dim), np.float32)])
            self.collection.append(self.items, vectors, one.name, one.version, self.ranges)
        self._clear()
