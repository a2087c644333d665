"""Packing, in three stages, each of which goes on where it was stopped: read, settle, write.

    read    the sources are listed, cut into chunks of samples, each chunk is read, checked and put aside (in parallel)
    settle  copies and splits are decided, in order; every shard's samples and keys are written down
    write   the shards (in parallel), then quarantine.jsonl, card.md and croissant.json

A file is whole or absent: it is written under another name, forced to the disk and renamed. What a stage makes depends
on the sources and settings alone, not on the number of workers, so a pack that was killed and resumed gives the same
bytes. Memory: a sample for each worker, and for settling some 100 bytes a sample. Disk: what was read is kept once more,
until its shards are written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .. import __version__
from ..corpus import fields, index, shards
from ..errors import SampleError, UserError
from ..reports import data_card
from . import dedup, samples, sources
from . import workers as pool
from .finish import settle, write_ledger
from .settings import Settings
from .sources import Listing
from .state import (
    TEMPORARY,
    Chunk,
    Plan,
    Progress,
    base_of,
    data_of,
    line,
    listing_of,
    load,
    locked,
    plan_of,
    publish,
    publishing,
    rename,
    rows_in,
    shard_samples,
)

FORMAT = 1  # of the state


def pack(settings: Settings, to: str | Path, workers: int = 1, show: bool = False) -> dict:
    """Pack the sources into the folder `to`; returns what `data_card.facts` counts. workers 0: all in this process.

    Raises UserError where the sources hold nothing, or `to` holds anything but the same pack, finished or not.
    """
    if workers < 0:
        raise UserError("--workers is at least 0")
    missing = [name for name in ("imagehash", "datasketch") if not importlib.util.find_spec(name)]
    if settings.dedup == "near" and missing:
        raise UserError(f"--dedup near needs {' and '.join(missing)}: pip install multimodal_fm[pack]")
    folder = Path(to).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{to}: {error.strerror}") from None
    with locked(folder):
        state = folder / ".pack"
        if (done := _begin(folder, settings)) is not None:
            print(f"{to}: already there, packed with the same settings", file=sys.stderr)
            return done
        progress = Progress(show)
        with progress:
            _list(state, settings, folder, workers, progress)
            _read(state, workers, progress)
            if not (state / "settled.json").exists():
                settle(state, progress)
            _write(state, folder, workers, progress)
        return _finish(state, folder)


def _begin(folder: Path, settings: Settings) -> dict | None:
    """Make the state ready; what was counted where this pack is finished."""
    state = folder / ".pack"
    asked = {"format": FORMAT, **dataclasses.asdict(settings)}
    asked["sources"] = [os.path.abspath(s) if os.path.exists(s) else s for s in settings.sources]
    before = load(state / "settings.json")["asked"] if (state / "settings.json").exists() else None
    if before is None and (foreign := [p.name for p in folder.iterdir() if p.name != ".pack"]):
        raise UserError(f"{folder} holds other files ({foreign[0]}, ...): give a new or an empty folder")
    if before != asked:
        if (state / "plan.json").exists() or (state / "done.json").exists():
            names = ", ".join(sorted(k.replace("_", "-") for k in asked | before if asked.get(k) != before.get(k)))
            raise UserError(f"{folder} was packed with other settings ({names}): give another folder, or remove it")
        _tidy(state)  # nothing was read yet: it may have stopped over one of the settings
        publish(state / "settings.json", json.dumps({"asked": asked}).encode())
    if (state / "done.json").exists():
        done = load(state / "done.json")
        for name, size in done["files"].items():
            if not (folder / name).exists() or (folder / name).stat().st_size != size:
                raise UserError(f"{folder}: {name} is missing or changed since it was packed; remove the folder")
        _tidy(state)
        return done["facts"]
    for left in [*folder.glob(f"{TEMPORARY}*"), *state.rglob(f"{TEMPORARY}*")]:
        left.unlink()
    for name in ("list", "read", "shards"):
        (state / name).mkdir(exist_ok=True)
    return None


def _list(state: Path, settings: Settings, folder: Path, workers: int, progress: Progress) -> None:
    """Number the samples of all places; then the plan stands, whatever becomes of the sources."""
    if (state / "plan.json").exists():
        plan = Plan(state)
        for place, listing in zip(plan.places, plan.listings):
            if not (state / "settled.json").exists() and sources.changed(place, listing):
                raise UserError(f"{place.name} changed since the packing began: remove {folder} and start again")
        return
    found = sources.places(settings, folder)
    progress.stage("listing", len(found))
    waiting = [i for i in range(len(found)) if not listing_of(state, i).exists()]
    progress.advance(len(found) - len(waiting))
    jobs = ((state, i, found[i], settings) for i in waiting)
    pool.run(_prepare, jobs, min(workers, len(waiting)), lambda *_: progress.advance())
    listings = [Listing(**load(listing_of(state, i))) for i in range(len(found))]
    labels = sorted({word for place, one in zip(found, listings) if place.kind != "hub" for word in one.labels})
    data = {
        "settings": dataclasses.asdict(settings),
        "places": [dataclasses.asdict(place) for place in found],
        "labels": labels,
    }
    publish(state / "plan.json", json.dumps(data).encode())


def _prepare(job: tuple) -> None:
    state, number, place, settings = job
    listing = sources.prepare(place, settings, base_of(state, number))
    publish(listing_of(state, number), json.dumps(dataclasses.asdict(listing)).encode())


def _read(state: Path, workers: int, progress: Progress) -> None:
    if (state / "settled.json").exists():
        return
    plan = Plan(state)
    chunks = list(plan.chunks())
    progress.stage("reading", sum(listing.count for listing in plan.listings))

    def waiting():
        for chunk in chunks:
            if rows_in(state, chunk.number).exists():
                progress.advance(chunk.stop - chunk.start)
            else:
                yield state, chunk

    def died(job):
        """A decoder that ended its process did it twice at this sample: the next time it is left out."""
        at = state / "read" / f"{job[1].number:06d}.at"
        crashed = [*_crashed(state, job[1].number), int(at.read_text())]
        if len(set(crashed)) < len(crashed):
            raise RuntimeError(f"a process died again over {at.name}, sample {crashed[-1]}")
        publish(_crashes(state, job[1].number), json.dumps(crashed).encode())

    pool.run(_survey, waiting(), workers, lambda job, _: progress.advance(job[1].stop - job[1].start), died)


def _crashes(state: Path, chunk: int) -> Path:
    return state / "read" / f"{chunk:06d}.crashed"


def _crashed(state: Path, chunk: int) -> list[int]:
    path = _crashes(state, chunk)
    return load(path) if path.exists() else []


def _survey(job: tuple[Path, Chunk]) -> None:
    """Read a chunk: its members to one file, and a row a sample (a piece of a long text is a sample) to another."""
    from .validate import check, is_something, part_of

    state, chunk = job
    plan = plan_of(state)
    settings, place, listing = plan.settings, plan.places[chunk.place], plan.listings[chunk.place]
    crashed = _crashed(state, chunk.number)
    at = state / "read" / f"{chunk.number:06d}.at"
    with publishing(rows_in(state, chunk.number)) as rows, publishing(data_of(state, chunk.number)) as data, open(
        at, "w"
    ) as here:  # fmt: skip
        for number in range(chunk.start, chunk.stop):
            os.pwrite(here.fileno(), f"{number:12d}".encode(), 0)
            if number in crashed:
                lost = ["", "crash", "a decoder ended its process, twice"]
                rows.write(line({"key": str(number), "lost": [lost]}))
                continue
            raw = sources.read(place, settings, listing, base_of(state, chunk.place), plan.labels, number)
            for one in samples.pieces(raw, settings):
                kept, facts, failed = check(settings, one.members)
                failed = [(part_of(part), error) for part, error in one.failed] + failed
                row = {"key": one.key}
                if is_something(settings, kept):
                    row |= _described(settings, kept, facts, data) | {"members": []}
                    for ending, value in kept.items():
                        row["members"].append([ending, data.tell(), len(value)])
                        data.write(value)
                elif not failed:
                    failed = [("", SampleError("empty", "no text, picture or sound in it"))]
                if failed:
                    row["lost"] = [[part, error.reason, error.detail] for part, error in failed]
                rows.write(line(row))
    at.unlink(missing_ok=True)


def _described(settings: Settings, members: dict[str, bytes], facts: dict, data) -> dict:
    """What settling and the card need to know of a sample."""
    row = fields.parse_map(members.get("json"))
    texts = samples.all_texts(members, settings.text_column or samples.TABLE_TEXT[0])
    media = {"image": [], "audio": []}
    for ending in sorted(members):
        for modality, endings in (("image", samples.IMAGE_FILES), ("audio", samples.AUDIO_FILES)):
            if ending in endings:
                media[modality].append(dedup.digest(members[ending]))
    content = [f"{modality} {one}".encode() for modality in media for one in media[modality]]
    content += [text.encode("utf-8", "replace") for text in texts]
    group = fields.lookup(row, settings.group) if settings.group else None
    made = {
        "content": dedup.digest(*content),
        "texts": sorted({dedup.digest(dedup.plain(text).encode("utf-8", "replace"))[:16] for text in texts}),
        **{modality: [one[:16] for one in found] for modality, found in media.items()},
        "group": None if group is None else dedup.digest(json.dumps(group, sort_keys=True).encode())[:16],
        "bytes": sum(len(text.encode("utf-8", "replace")) for text in texts),
        "about": data_card.about(row, members),
    }
    if facts:
        made["facts"] = facts
    if settings.dedup == "near" and texts:
        words = dedup.signatures(texts)
        made["minhash"] = [data.tell(), len(words)]
        data.write(words.tobytes())
    return made


def _write(state: Path, folder: Path, workers: int, progress: Progress) -> None:
    """Write the shards that are not there yet; a chunk is dropped when the last shard that needs it stands."""
    names = load(state / "settled.json")["shards"]
    progress.stage("writing", len(names))
    waiting, needed, by_name = [], Counter(), {}
    for name in names:
        if (state / "shards" / f"{name}.json").exists():
            progress.advance()
            continue
        by_name[name] = {chunk for _, chunk, _ in shard_samples(state, name)}
        needed.update(by_name[name])
        waiting.append(name)
    waiting.sort(key=lambda name: (max(by_name[name]), name))

    def done(job, _):
        for chunk in by_name[job[2]]:
            needed[chunk] -= 1
            if not needed[chunk]:
                data_of(state, chunk).unlink(missing_ok=True)
        progress.advance()

    pool.run(_write_shard, ((state, folder, name) for name in waiting), workers, done)


def _write_shard(job: tuple[Path, Path, str]) -> None:
    state, folder, name = job
    path = folder / f"{name}.tar"
    temporary = folder / f"{TEMPORARY}{os.getpid()}-{path.name}"
    shards.write(temporary, _members(state, name))
    digest, size = hashlib.sha256(), 0
    with open(temporary, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
        os.fsync(file.fileno())
    rename(temporary, path)
    index.build(str(path))
    made = {"name": path.name, "bytes": size, "sha256": digest.hexdigest()}
    publish(state / "shards" / f"{name}.json", json.dumps(made).encode())


def _members(state: Path, name: str) -> Iterator[dict]:
    opened, file = None, None
    for key, chunk, members in shard_samples(state, name):
        if chunk != opened:
            if file:
                file.close()
            file, opened = open(data_of(state, chunk), "rb"), chunk
        yield {"__key__": key, **{e: os.pread(file.fileno(), length, place) for e, place, length in members}}
    if file:
        file.close()


def _finish(state: Path, folder: Path) -> dict:
    """The ledger, the card, and the mark that all is done; then the state is no longer needed."""
    settled = load(state / "settled.json")
    made = [load(state / "shards" / f"{name}.json") for name in settled["shards"]]
    facts = settled["facts"]
    with open(state / "quarantine.jsonl", "rb") as file:
        write_ledger(folder, file)
    publish(folder / "card.md", data_card.markdown(facts, made).encode())
    publish(
        folder / "croissant.json", json.dumps(data_card.croissant(facts, made, folder.name), indent=1).encode() + b"\n"
    )
    files = [one["name"] for one in made] + ["quarantine.jsonl", "card.md", "croissant.json"]
    sizes = {name: (folder / name).stat().st_size for name in files}
    facts["bytes"] = sum(one["bytes"] for one in made)
    data = {"version": __version__, "files": sizes, "facts": facts}
    publish(state / "done.json", json.dumps(data).encode())
    _tidy(state)
    return facts


def _tidy(state: Path) -> None:
    for name in ("list", "read", "shards"):
        shutil.rmtree(state / name, ignore_errors=True)
    for name in ("plan.json", "settled.json", "quarantine.jsonl", "signatures"):
        (state / name).unlink(missing_ok=True)
