"""Settling: which samples are copies, which split each goes to, what every shard holds under which keys."""

from __future__ import annotations

import array
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..reports import data_card
from . import dedup, samples, split
from .settings import SPLITS, Settings
from .sources import Place
from .state import Plan, Progress, data_of, line, publish, publishing, rows_of


class Table:
    """What settling needs of all samples (N), in order: a few numbers each."""

    def __init__(self, state: Path, plan: Plan, progress: Progress):
        near = plan.settings.dedup == "near"
        names = {family: i for i, family in enumerate(dict.fromkeys(place.family for place in plan.places))}
        content, group, source, modalities = (array.array(code) for code in "QQIB")
        image, audio, phash, doc = (array.array(code) for code in "QQQq")
        ties, tied, texts, texts_of, hashes, hashes_of, signed, signed_of = (array.array("Q") for _ in range(8))
        colors = bytearray()
        words = open(state / "signatures", "wb") if near else None
        count, chunk_, file = 0, -1, None
        for chunk, row in rows_of(state, plan):
            if chunk.number != chunk_:
                progress.advance()
                chunk_ = chunk.number
                if file:
                    file.close()
                file = open(data_of(state, chunk_), "rb") if near else None
            if "members" not in row:
                continue
            content.extend((int(row["content"][:16], 16), int(row["content"][16:], 16)))
            own = row["group"] or row["content"][:16]
            group.append(int(own, 16))
            source.append(names[plan.places[chunk.place].family])
            modalities.append(bool(row["texts"]) | 2 * bool(row["image"]) | 4 * bool(row["audio"]))
            if row["group"]:
                ties.append(int(own, 16) ^ 1)
                tied.append(count)
            for one in (*row["image"], *row["audio"]):
                ties.append(int(one, 16))
                tied.append(count)
            for one in row["texts"]:
                texts.append(int(one, 16))
                texts_of.append(count)
            if near:
                facts = row.get("facts", {})
                found = facts.get("phash", [])
                image.append(_joint(row["image"]))
                audio.append(_joint(row["audio"]))
                single = len(found) == len(row["image"]) == 1
                phash.append(int(found[0], 16) if single else 0)
                colors += bytes.fromhex(facts["colors"][0]) if single else bytes(48)
                modalities[-1] |= 8 * single
                for one in found:
                    hashes.append(int(one, 16))
                    hashes_of.append(count)
                doc.append(-1)
                if "minhash" in row:
                    place, rows = row["minhash"]
                    doc[-1] = len(signed)
                    words.write(os.pread(file.fileno(), rows * dedup.WORDS * 4, place))
                    signed.extend([count] * rows)
            count += 1
        if file:
            file.close()
        self.count = count
        self.content = np.array(content, np.uint64).reshape(-1, 2)
        self.group, self.source = np.array(group, np.uint64), np.array(source, np.int64)
        self.modalities = np.array(modalities, np.uint8)
        self.ties, self.tied = np.array(ties, np.uint64), np.array(tied, np.int64)
        self.texts, self.texts_of = np.array(texts, np.uint64), np.array(texts_of, np.int64)
        self.image, self.audio = np.array(image, np.uint64), np.array(audio, np.uint64)
        self.phash, self.doc = np.array(phash, np.uint64), np.array(doc, np.int64)
        self.colors = np.frombuffer(bytes(colors), np.uint8).reshape(-1, 48)
        self.hashes, self.hashes_of = np.array(hashes, np.uint64), np.array(hashes_of, np.int64)
        self.signed = np.array(signed, np.int64)
        self.words = np.zeros((0, dedup.WORDS), np.uint32)
        if near:
            words.close()
            if len(self.signed):
                self.words = np.memmap(state / "signatures", np.uint32, "r").reshape(-1, dedup.WORDS)
        self.names = list(names)


def _joint(found: list[str]) -> int:
    return int(dedup.digest(*(one.encode() for one in sorted(found)))[:16], 16) if found else 0


def near_copies(table: Table) -> np.ndarray:
    """Pairs (E, 2) of samples whose parts are of the same modalities, and all nearly equal (sounds: equal)."""
    modalities, doc, words = table.modalities, table.doc, table.words

    def near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        fits = (modalities[a] == modalities[b]) & (table.audio[a] == table.audio[b])
        hashed = (modalities[a] & 8) > 0
        alike = dedup.distance(table.phash[a], table.phash[b]) <= dedup.BITS
        shade = np.abs(table.colors[a].astype(np.int16) - table.colors[b]).max(1) <= dedup.SHADE
        fits &= np.where(hashed, alike & shade, table.image[a] == table.image[b])
        rows = np.flatnonzero(fits & (doc[a] >= 0))
        fits[rows] = dedup.similarity(words, doc[a[rows]], doc[b[rows]]) >= dedup.JACCARD
        return fits

    pictured = np.flatnonzero(modalities & 8)
    written = np.flatnonzero((doc >= 0) & ((modalities & 8) == 0))
    made = [np.zeros((0, 2), np.int64)]
    for rows, bands in (
        (pictured, dedup.picture_bands(table.phash[pictured])),
        (written, dedup.text_bands(words, doc[written])),
    ):
        found = dedup.pairs(bands, lambda a, b, rows=rows: near(rows[a], rows[b]), dedup.WINDOW)
        made.append(rows[found])
    return np.concatenate(made)


def tie(table: Table, settings: Settings) -> tuple[np.ndarray, list[str]]:
    """Pairs (E, 2) of samples that must stay on one side of a split, and the sources whose texts are labels."""
    labels = split.label_sources(table.source, table.source[table.texts_of], table.texts, table.modalities >= 2)
    counts = ~np.isin(table.source[table.texts_of], labels)
    made = [
        dedup.equal_pairs(table.ties, table.tied),
        dedup.equal_pairs(table.texts[counts], table.texts_of[counts]),
    ]
    if settings.dedup == "near":
        distinct, first, which = np.unique(table.hashes, return_index=True, return_inverse=True)
        made.append(np.stack([table.hashes_of, table.hashes_of[first][which]], 1))
        found = dedup.pairs(
            dedup.picture_bands(distinct),
            lambda a, b: dedup.distance(distinct[a], distinct[b]) <= dedup.BITS,
        )
        made.append(table.hashes_of[first][found])
        rows = np.flatnonzero(~np.isin(table.source[table.signed], labels))
        found = dedup.pairs(
            dedup.text_bands(table.words, rows),
            lambda a, b: dedup.similarity(table.words, rows[a], rows[b]) >= dedup.TIED,
            dedup.WINDOW,
        )
        made.append(table.signed[rows[found]])
        for band in dedup.text_bands(table.words, rows):  # beyond the window, what shares a band goes together
            crowded = _crowded(band, dedup.WINDOW)
            made.append(dedup.equal_pairs(band[crowded], table.signed[rows[crowded]]))
    return np.concatenate(made), [table.names[i] for i in labels]


def _crowded(band: np.ndarray, most: int) -> np.ndarray:
    _, which, counts = np.unique(band, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[which] > most)


def settle(state: Path, progress: Progress) -> None:
    """Decide on copies, splits, shards and keys, and write all of it down."""
    plan = Plan(state)
    settings = plan.settings
    progress.stage("settling", 2 * sum(1 for _ in plan.chunks()))
    table = Table(state, plan, progress)
    if not table.count:
        write_ledger(state.parent, _refusals(state, plan))
        raise UserError(f"nothing in the sources can be read: {state.parent}/quarantine.jsonl says why")
    first = dedup.repeated(table.content) if settings.dedup != "none" else np.arange(table.count)
    reason = np.where(first == np.arange(table.count), 0, 1).astype(np.uint8)
    if settings.dedup == "near":
        edges = near_copies(table)
        edges = edges[(reason[edges] == 0).all(1)]
        nearest = dedup.clusters(table.count, edges)
        near = (reason == 0) & (nearest != np.arange(table.count))
        reason[near], first[near] = 2, nearest[near]
    which, labels, largest = np.zeros(table.count, np.int64), [], 0
    if len(settings.split) > 1:
        edges, labels = tie(table, settings)
        cluster = dedup.clusters(table.count, np.concatenate([edges, np.stack([np.arange(table.count), first], 1)]))
        which = split.choose(cluster, table.group, settings.split)
        largest = int(np.bincount(cluster[reason == 0]).max())
    facts = data_card.Facts(settings, [place.family for place in plan.places])
    kept_keys = Keys(state, plan, reason, first)
    shelves = [Shelf(state, name, settings.shard_size) for name in SPLITS[: len(settings.split)]]
    with publishing(state / "quarantine.jsonl") as ledger:
        for place, listing in zip(plan.places, plan.listings):
            for one in listing.refused:
                ledger.write(_ledger(place, **one))
                facts.refuse(one["reason"])
        sample, chunk_ = -1, -1
        for chunk, row in rows_of(state, plan):
            if chunk.number != chunk_:
                chunk_ = chunk.number
                progress.advance()
            place = plan.places[chunk.place]
            for part, why, detail in row.get("lost", ()):
                ledger.write(_ledger(place, row["key"], part, why, detail))
                facts.refuse(why)
            if "members" not in row:
                facts.lose(place.family)
                continue
            sample += 1
            if reason[sample]:
                why = ("", "copy", "near-copy")[reason[sample]]
                ledger.write(_ledger(place, row["key"], "", why, f"of {kept_keys.source_key(int(first[sample]))}"))
                facts.refuse(why)
                facts.duplicate(place.family, why)
                continue
            shelves[which[sample]].add(kept_keys.key(sample, row["key"]), chunk.number, row["members"])
            facts.add(SPLITS[which[sample]], place.family, row)
    names = [name for shelf in shelves for name in shelf.close()]
    facts.rule(labels, largest)
    (state / "signatures").unlink(missing_ok=True)
    data = {"shards": names, "facts": facts.data()}
    publish(state / "settled.json", json.dumps(data).encode())


def _ledger(place: Place, key: str, part: str, reason: str, detail: str) -> bytes:
    row = {"source": place.source, "shard": place.name, "key": key, "part": part, "reason": reason, "detail": detail}
    return json.dumps(row | {"step": None}, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _refusals(state: Path, plan: Plan) -> Iterator[bytes]:
    for place, listing in zip(plan.places, plan.listings):
        for one in listing.refused:
            yield _ledger(place, **one)
    for chunk, row in rows_of(state, plan):
        for part, why, detail in row.get("lost", ()):
            yield _ledger(plan.places[chunk.place], row["key"], part, why, detail)


def write_ledger(folder: Path, lines: Iterator[bytes]) -> None:
    with publishing(folder / "quarantine.jsonl") as file:
        file.writelines(lines)


class Keys:
    """Keys that are safe as names and unique in the whole pack; the second of a name is NAME~2."""

    def __init__(self, state: Path, plan: Plan, reason: np.ndarray, first: np.ndarray):
        hashes, wanted, self.named, sample = array.array("Q"), set(np.unique(first[reason > 0]).tolist()), {}, -1
        for chunk, row in rows_of(state, plan):
            if "members" in row:
                sample += 1
                key = samples.safe_key(row["key"])
                hashes.append(int(dedup.digest(key.encode())[:16], 16))
                if sample in wanted:
                    self.named[sample] = f"{row['key']} in {plan.places[chunk.place].name}"
        keys = np.array(hashes, np.uint64)
        kept = np.flatnonzero(reason == 0)
        order = kept[np.argsort(keys[kept], kind="stable")]
        new = np.ones(len(order), bool)
        new[1:] = keys[order[1:]] != keys[order[:-1]]
        starts = np.flatnonzero(new)[np.cumsum(new) - 1]
        self.turn = np.zeros(len(keys), np.int64)
        self.turn[order] = np.arange(len(order)) - starts

    def key(self, sample: int, key: str) -> str:
        turn = int(self.turn[sample])
        return f"{samples.safe_key(key)}~{turn + 1}" if turn else samples.safe_key(key)

    def source_key(self, sample: int) -> str:
        return self.named[sample]


class Shelf:
    """The shards of one split: each takes samples until it is full. What it holds is written down, not yet its bytes."""

    def __init__(self, state: Path, split: str, size: int):
        self.state, self.split, self.most = state, split, size
        self.names, self.file, self.size = [], None, 0

    def add(self, key: str, chunk: int, members: list) -> None:
        size = sum(512 + -(-length // 512) * 512 for _, _, length in members)
        if self.file and self.size + size + 10_240 > self.most:
            self._shut()
        if not self.file:
            self.names.append(f"{self.split}-{len(self.names):06d}")
            self.size = 0
            self.opened = publishing(self.state / "shards" / f"{self.names[-1]}.samples")
            self.file = self.opened.__enter__()
        self.file.write(line([key, chunk, members]))
        self.size += size

    def _shut(self) -> None:
        self.opened.__exit__(None, None, None)
        self.file = None

    def close(self) -> list[str]:
        if self.file:
            self._shut()
        return self.names
