"""Packing in three stages, each of which continues where it was stopped.

    read    the sources are indexed and cut into chunks of samples; each chunk is read and checked (in parallel)
    assign  duplicates and splits are decided, in order; it is written down which samples each shard holds
    write   the shards are written (in parallel), then quarantine.jsonl, card.md and croissant.json

A file is whole or absent: it is written under another name, forced to the disk and renamed. What a stage writes depends
on the sources and settings alone, not on the number of workers, so a pack that was killed and resumed has the same
bytes. Memory: a sample for each worker, and some 150 bytes a sample to assign them. Disk: what was read is kept once
more until its shards are written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .. import __version__
from ..corpus import fields, index, shards, storage
from ..errors import SampleError, UserError
from ..reports import data_card
from ..stream.cluster import Executor, open_executor
from ..stream.worker_pool import Job
from . import codes, dedup, sources
from .assign import assign
from .samples import RawSample, collect_texts, content_fields, cut_sample, join_documents, modality_of
from .settings import CODES, Settings
from .sources import SourceIndex
from .state import Chunk, State, json_line, make_progress, open_atomic, read_json, write_json
from .validate import check_sample

FORMAT = 2  # of the working files


def pack(settings: Settings, to: str | Path, workers: int = 1, show: bool = False, cluster: str = "") -> dict:
    """Pack the sources into the folder `to`; returns the facts of the data card. workers 0: all in this process.

    cluster, and torchrun: see `stream.cluster.open_executor`; ranks but the first return an empty map.
    Raises UserError where the sources hold nothing, a split stays empty, or `to` lies inside a source or holds anything
    but the same pack, finished or not.
    """
    if workers < 0:
        raise UserError("--workers is at least 0")
    missing = [name for name in ("imagehash", "datasketch") if not importlib.util.find_spec(name)]
    if settings.dedup == "near" and missing:
        raise UserError(f"--dedup near needs {' and '.join(missing)}: pip install multimodal_fm[pack]")
    state = State(Path(to).resolve())
    for source in settings.sources:
        if os.path.isdir(source) and state.to.is_relative_to(os.path.realpath(source)):
            raise UserError(f"--to {to} lies inside the source {source}: give a folder outside of it")
    try:
        state.to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{to}: {error.strerror}") from None
    with open_executor(cluster, workers) as executor:
        return _pack(settings, to, state, executor, show) if executor else {}


def _pack(settings: Settings, to: str | Path, state: State, executor: Executor, show: bool) -> dict:
    with state.lock():
        codec = codes.serialize(settings.codes) if settings.codes else b""
        if (facts := _begin(state, settings, codec)) is not None:
            print(f"{to}: already there, packed with the same settings", file=sys.stderr)
            return facts
        with make_progress(show) as progress:
            _index_sources(state, settings, executor, progress)
            if not state.assigned:
                _read_chunks(state, executor, progress)
                try:
                    assign(state, progress)
                except UserError:
                    state.clear()  # so that other settings can be given
                    raise
            _write_shards(state, executor, progress)
        return _finish(state)


def _begin(state: State, settings: Settings, codec: bytes) -> dict | None:
    """Make the state ready; returns the facts of a pack that is finished."""
    wanted = {"format": FORMAT, **dataclasses.asdict(settings)}
    if codec:
        wanted["codes"] = hashlib.sha256(codec).hexdigest()  # wherever the run lies, and whatever it learns meanwhile
    else:
        del wanted["codes"], wanted["codes_member"]
    wanted["sources"] = [os.path.abspath(s) if os.path.exists(s) else s for s in settings.sources]
    before = read_json(state.file("settings.json")) if state.file("settings.json").exists() else None
    if before is None and (foreign := [p.name for p in state.to.iterdir() if p.name != ".pack"]):
        raise UserError(f"{state.to} holds other files ({foreign[0]}, ...): give a new or an empty folder")
    if before != wanted:
        if state.file("plan.json").exists() or state.file("done.json").exists():
            before = before or {}
            names = (name for name in wanted | before if wanted.get(name) != before.get(name))
            named = ", ".join(sorted(name.replace("_", "-") for name in names))
            raise UserError(f"{state.to} was packed with other settings ({named}): give another folder, or remove it")
        state.clear()  # nothing was read yet: the settings before may have been refused
        write_json(state.file("settings.json"), wanted)
    if state.file("done.json").exists():
        done = read_json(state.file("done.json"))
        for name, size in done["files"].items():
            if not (state.to / name).exists() or (state.to / name).stat().st_size != size:
                raise UserError(f"{state.to}: {name} is missing or changed since it was packed; remove the folder")
        state.clear()
        return done["facts"]
    state.prepare()
    if codec:
        storage.write_atomic(codes.codec_file(state), codec)
    return None


def _index_sources(state: State, settings: Settings, executor: Executor, progress) -> None:
    """Count the samples of all sources. From then on the plan stands, and no source may change."""
    if state.file("plan.json").exists():
        plan = state.plan()
        for source, indexed in zip(plan.sources, plan.indexes):
            if not state.assigned and sources.stamp_of(source) != indexed.stamp:
                raise UserError(f"{source.name} changed since the packing began: remove {state.to} and start again")
        return
    listed = sources.list_sources(settings)
    waiting = [number for number in range(len(listed)) if not state.source(number).exists()]
    task = progress.add_task("indexing", total=len(waiting))
    jobs = ((state, number, listed[number], settings) for number in waiting)
    for _ in executor.run(_index_source, jobs, most=len(waiting)):
        progress.advance(task)
    indexes = [SourceIndex(**read_json(state.source(number))) for number in range(len(listed))]
    plan = {
        "settings": dataclasses.asdict(settings),
        "sources": [dataclasses.asdict(source) for source in listed],
        "classes": sources.number_classes(listed, indexes),
    }
    write_json(state.file("plan.json"), plan)


def _index_source(job: tuple) -> None:
    state, number, source, settings = job
    indexed = sources.index_source(source, settings, str(state.source(number, "")))
    write_json(state.source(number), dataclasses.asdict(indexed))


def _read_chunks(state: State, executor: Executor, progress) -> None:
    plan = state.plan()
    task = progress.add_task("reading", total=sum(indexed.count for indexed in plan.indexes))

    def jobs() -> Iterator[tuple[State, Chunk]]:
        for chunk in plan.chunks():
            if state.chunk(chunk.number, ".jsonl").exists():
                progress.advance(task, chunk.stop - chunk.start)
            else:
                yield state, chunk

    for (_, chunk), _ in executor.run(_read_chunk, jobs(), _Crashes(state)):
        progress.advance(task, chunk.stop - chunk.start)


@dataclasses.dataclass
class _Crashes:
    """Leaves a sample out from then on over which two processes have ended."""

    state: State
    counts: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)  # by chunk and sample

    def __call__(self, job: Job, worker: int, exit_code: int) -> None:
        number = job.argument[1].number
        current = self.state.chunk(number, ".current")
        sample = int(current.read_text() or -1) if current.exists() else -1
        self.counts[number, sample] += 1
        if self.counts[number, sample] == 2 and sample >= 0:
            write_json(self.state.chunk(number, ".crashed"), [*_crashed(self.state, number), sample])
        elif self.counts[number, sample] > 2:
            raise UserError(f"a worker process ended again (exit code {exit_code}) at sample {sample} of {current}")


def _crashed(state: State, chunk: int) -> list[int]:
    path = state.chunk(chunk, ".crashed")
    return read_json(path) if path.exists() else []


def _read_chunk(job: tuple[State, Chunk]) -> None:
    """Write a chunk's members to one file and a record for each sample, or piece of a long text, to another."""
    state, chunk = job
    plan, crashed = state.plan(), _crashed(state, chunk.number)
    source, indexed, base = plan.sources[chunk.source], plan.indexes[chunk.source], str(state.source(chunk.source, ""))
    current = state.chunk(chunk.number, ".current")
    with (
        open_atomic(state.chunk(chunk.number, ".jsonl")) as records,  # last of the three to get its name
        open_atomic(state.chunk(chunk.number, ".members")) as members,
        open_atomic(state.chunk(chunk.number, ".minhash")) as minhash,
        open(current, "w") as decoding,
    ):
        for number in range(chunk.start, chunk.stop):
            os.pwrite(decoding.fileno(), f"{number:12d}".encode(), 0)
            if number in crashed:
                lost = [["", "crash", "a decoder ended its process, twice"]]
                records.write(json_line({"key": str(number), "lost": lost}))
                continue
            sample = sources.read(source, indexed, plan.settings, base, plan.classes, number)
            pieces = cut_sample(sample, plan.settings)
            # The pieces of one document never end up in two splits. A text file is one document.
            document = f"{chunk.source}:{number}" if len(pieces) > 1 else None
            if source.kind == "shard" and source.path.lower().endswith(".txt"):
                document = f"{chunk.source}"
            for piece in pieces:
                record = _describe(piece, state, plan.settings, indexed.columns, members, minhash)
                if document and "members" in record:
                    record["document"] = dedup.short_digest(document.encode())
                records.write(json_line(record))
    current.unlink(missing_ok=True)


def _describe(sample: RawSample, state: State, settings: Settings, columns: dict[str, str], members, minhash) -> dict:
    """Check a sample and write its members; the record of what assigning it and the data card need to know."""
    kept, record = check_sample(settings, sample.members)
    failed = [(modality_of(part), error) for part, error in sample.failed] + record.pop("failed")
    record["key"] = sample.key
    kept_sample = RawSample(sample.key, kept)
    row = fields.parse_map(kept.get("json"))
    texts, text_fields = collect_texts(kept_sample, row, settings.text_column)
    if texts or kept_sample.has_media:
        record |= _fingerprint(kept, row, texts, text_fields, settings, columns)
        if settings.codes:
            codes.add(state, settings, kept, failed)
        record["members"] = []
        for extension, data in kept.items():
            record["members"].append([extension, members.tell(), len(data)])
            members.write(data)
        record["about"] = data_card.about(row, kept)
        if settings.dedup == "near" and texts:
            signatures = dedup.signatures(texts)
            record["signatures"] = len(signatures)
            minhash.write(signatures.tobytes())
    elif not failed:
        failed = [("", SampleError("empty", "no text, image or audio in it"))]
    if failed:
        record["lost"] = [[part, error.reason, error.detail] for part, error in failed]
    return record


def _fingerprint(
    members: dict[str, bytes],
    row: dict,
    texts: list[str],
    text_fields: set[str],
    settings: Settings,
    columns: dict[str, str],
) -> dict:
    """Hashes of what a sample is: equal `content` is a copy, shared media, texts and groups tie samples together."""
    media = {"image": [], "audio": []}
    locations = {columns[role] for role in ("image", "audio", "key") if role in columns} | text_fields
    other = [json.dumps(content_fields(row, locations), sort_keys=True).encode()]
    for extension in sorted(members):
        if (modality := modality_of(extension)) in media:
            media[modality].append(dedup.digest(members[extension]))
        elif CODES.fullmatch(extension):
            continue  # they follow from the rest
        elif modality != "text" or (extension == "json" and not row):
            other += [extension.encode(), members[extension]]
    others = dedup.digest(*other)
    content = [f"{modality} {one}".encode() for modality in media for one in media[modality]]
    content += [text.encode("utf-8", "replace") for text in texts]
    group = fields.lookup(row, settings.group) if settings.group else None
    return {
        "content": dedup.digest(*content, others.encode()),
        "other": others[:16],
        "texts": sorted({dedup.short_digest(dedup.normalize(text).encode("utf-8", "replace")) for text in texts}),
        **{modality: [one[:16] for one in digests] for modality, digests in media.items()},
        "group": None if group is None else dedup.short_digest(json.dumps(group, sort_keys=True).encode()),
    }


def _write_shards(state: State, executor: Executor, progress) -> None:
    """Write the missing shards; what was read of a chunk is removed with the last shard that needs it."""
    names = read_json(state.file("assigned.json"))["shards"]
    waiting = [name for name in names if not state.shard(name, ".json").exists()]
    task = progress.add_task("writing", total=len(waiting))
    chunks = {name: {chunk for _, chunk, _ in state.shard_samples(name)} for name in waiting}
    needed = Counter(chunk for name in waiting for chunk in chunks[name])
    waiting.sort(key=lambda name: (max(chunks[name]), name))

    for (_, name), _ in executor.run(_write_shard, ((state, name) for name in waiting)):
        for chunk in chunks[name]:
            needed[chunk] -= 1
            if not needed[chunk]:
                state.chunk(chunk, ".members").unlink(missing_ok=True)
        progress.advance(task)


def _write_shard(job: tuple[State, str]) -> None:
    state, name = job
    path = state.to / f"{name}.tar"
    with open_atomic(path) as file:
        members, settings = _shard_members(state, name), state.plan().settings
        if settings.text_block:
            members = join_documents(members, settings.text_block, settings.text_column)
        shards.write(file.name, members)
        written = {"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}
    index.build(str(path))
    write_json(state.shard(name, ".json"), written)


def _shard_members(state: State, name: str) -> Iterator[dict]:
    current, file = None, None
    for key, chunk, members in state.shard_samples(name):
        if chunk != current:
            if file:
                file.close()
            file, current = open(state.chunk(chunk, ".members"), "rb"), chunk
        assert file is not None
        yield {"__key__": key, **{e: os.pread(file.fileno(), length, offset) for e, offset, length in members}}
    if file:
        file.close()


def _finish(state: State) -> dict:
    """Write the quarantine, the card and the mark that all is done; then the working files are not needed any more."""
    assigned = read_json(state.file("assigned.json"))
    written = [read_json(state.shard(name, ".json")) for name in assigned["shards"]]
    facts = data_card.measure(assigned["facts"], state.to, written)
    if codes.codec_file(state).exists():
        facts["codec"] = codes.describe(state, state.plan().settings)
    state.publish_quarantine()
    card = data_card.markdown(facts, written)  # a field or the name of a source may not be encodable
    storage.write_atomic(state.to / "card.md", card.encode("utf-8", "backslashreplace"))
    write_json(state.to / "croissant.json", data_card.croissant(facts, written, state.to.name), indent=1)
    files = [one["name"] for one in written] + ["quarantine.jsonl", "card.md", "croissant.json"]
    sizes = {name: (state.to / name).stat().st_size for name in files}
    write_json(state.file("done.json"), {"version": __version__, "files": sizes, "facts": facts})
    state.clear()
    return facts
