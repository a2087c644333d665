"""Decides over all samples: which are copies, which split each goes to, what every shard holds under which keys."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import numpy as np

from ..corpus import storage
from ..errors import UserError
from ..reports import data_card
from . import dedup
from .samples import safe_key
from .settings import SPLITS, Settings
from .sources import Source
from .state import Plan, State, json_line, open_atomic, write_json

LABEL_SHARE = 20  # a text that so many samples of a source have on average is a label, and ties none of them together
TEXT, IMAGE, AUDIO, HASHED = 1, 2, 4, 8
SAMPLE = np.dtype(
    [
        ("content", "u8", 2),  # equal: a copy
        ("other", "u8"),  # of the fields beside media and text
        ("group", "u8"),  # chooses the split
        ("key", "u8"),
        ("source", "i4"),
        ("modalities", "u1"),  # TEXT, IMAGE, AUDIO; HASHED: one image, with a perceptual hash
        ("image", "u8"),  # of all images; 0: none
        ("audio", "u8"),
        ("phash", "u8"),
        ("colors", "u1", 48),
        ("signature", "i8"),  # the first row in `words`; -1: none
    ]
)
LINK = np.dtype([("key", "u8"), ("sample", "i8")])  # samples with an equal key have something in common


class SampleTable:
    """What is compared of all samples that can be read, in order: `samples` (N,), and for each thing that samples may
    share a row of `ties`, `texts` or `phashes`; `words` (T, NUM_PERM) holds the signatures of the texts of the samples
    `signed` (T,)."""

    def __init__(self, state: State, plan: Plan, advance: Callable[[], None]):
        self.families = list(dict.fromkeys(source.family for source in plan.sources))
        numbers = {family: number for number, family in enumerate(self.families)}
        kinds = (SAMPLE, LINK, LINK, LINK, np.int64)
        columns = [[np.zeros(0, kind)] for kind in kinds]
        count = signed = 0
        with open(state.file("signatures"), "wb") as words:
            for chunk in plan.chunks():
                advance()
                rows, ties, texts, phashes, owners = [], [], [], [], []
                for record in state.records(chunk):
                    if "members" not in record:
                        continue
                    sample = count + len(rows)
                    rows.append(_row(record, numbers[plan.sources[chunk.source].family], signed + len(owners)))
                    shared = (record["group"], record.get("document"), *record["image"], *record["audio"])
                    ties += [(int(one, 16) ^ (n < 2), sample) for n, one in enumerate(shared) if one]
                    texts += [(int(one, 16), sample) for one in record["texts"]]
                    phashes += [(int(one, 16), sample) for one in record.get("phash", ())]
                    owners += [sample] * record.get("signatures", 0)
                with open(state.chunk(chunk.number, ".minhash"), "rb") as file:
                    shutil.copyfileobj(file, words)
                for column, kind, values in zip(columns, kinds, (rows, ties, texts, phashes, owners)):
                    column.append(np.array(values, kind))
                count, signed = count + len(rows), signed + len(owners)
        self.samples, self.ties, self.texts, self.phashes, self.signed = map(np.concatenate, columns)
        self.words = np.zeros((0, dedup.NUM_PERM), np.uint32)
        if signed:
            self.words = np.memmap(state.file("signatures"), np.uint32, "r").reshape(-1, dedup.NUM_PERM)

    def __len__(self) -> int:
        return len(self.samples)


def _row(record: dict, source: int, signature: int) -> tuple:
    content, phash = record["content"], record.get("phash", [])
    hashed = len(phash) == len(record["image"]) == 1
    modalities = TEXT * bool(record["texts"]) | IMAGE * bool(record["image"]) | AUDIO * bool(record["audio"])
    media = [dedup.short_digest(*map(str.encode, sorted(record[m]))) if record[m] else "0" for m in ("image", "audio")]
    return (
        (int(content[:16], 16), int(content[16:], 16)),
        int(record["other"], 16),
        int(record["group"] or content[:16], 16),
        int(dedup.short_digest(safe_key(record["key"]).encode()), 16),
        source,
        modalities | HASHED * hashed,
        *(int(one, 16) for one in media),
        int(phash[0], 16) if hashed else 0,
        tuple(bytes.fromhex(record["colors"][0])) if hashed else (0,) * 48,
        signature if "signatures" in record else -1,
    )


def find_copies(table: SampleTable, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """For each sample the one (N,) that it is a copy of, or itself, and the kind (N,): 0 none, 1 exact, 2 near."""
    own = np.arange(len(table))
    original = own if settings.dedup == "none" else dedup.first_equal(table.samples["content"])
    kind = (original != own).astype(np.uint8)
    if settings.dedup == "near":
        edges = find_near_copies(table)
        nearest = dedup.clusters(len(table), edges[(kind[edges] == 0).all(1)])
        near = (kind == 0) & (nearest != own)
        kind[near], original = 2, np.where(near, nearest, original)
    return original, kind


def find_near_copies(table: SampleTable) -> np.ndarray:
    """Pairs (E, 2) of samples of the same modalities that are all nearly equal (audio and other fields: equal)."""
    samples, words = table.samples, table.words

    def is_near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        one, other = samples[a], samples[b]
        near = np.logical_and.reduce([one[name] == other[name] for name in ("modalities", "audio", "other")])
        alike = dedup.hamming(one["phash"], other["phash"]) <= dedup.MAX_BITS
        alike &= np.abs(one["colors"].astype(np.int16) - other["colors"]).max(1, initial=0) <= dedup.MAX_COLOR
        near &= np.where(one["modalities"] & HASHED, alike, one["image"] == other["image"])
        rows = np.flatnonzero(near & (one["signature"] >= 0))
        first, second = one["signature"][rows], other["signature"][rows]
        near[rows] = dedup.similarity(words, first, second) >= dedup.NEAR_TEXT
        return near

    hashed = (samples["modalities"] & HASHED) > 0
    images, texts = np.flatnonzero(hashed), np.flatnonzero(~hashed & (samples["signature"] >= 0))
    image_bands = dedup.image_bands(samples["phash"][images])
    text_bands = dedup.text_bands(words, samples["signature"][texts])
    pairs = [
        rows[dedup.near_pairs(bands, lambda a, b, rows=rows: is_near(rows[a], rows[b]), dedup.WINDOW)]
        for rows, bands in ((images, image_bands), (texts, text_bands))
    ]
    return np.concatenate(pairs)


def find_label_sources(samples: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The sources of media whose texts are labels ("dog", a hundred times) rather than captions."""
    owners = samples["source"][texts["sample"]]
    return np.array(
        [
            source
            for source in np.unique(owners)
            if (samples["modalities"][samples["source"] == source] >= IMAGE).all()
            and (samples["source"] == source).sum() >= LABEL_SHARE * len(np.unique(texts["key"][owners == source]))
        ],
        np.int64,
    )


def find_ties(table: SampleTable, settings: Settings, labels: np.ndarray) -> np.ndarray:
    """Pairs (E, 2) of samples that must not be split; equal texts of the sources `labels` tie nothing together."""
    texts = table.texts[~np.isin(table.samples["source"][table.texts["sample"]], labels)]
    edges = [dedup.equal_pairs(links["key"], links["sample"]) for links in (table.ties, texts)]
    if settings.dedup == "near":
        hashes, first, inverse = np.unique(table.phashes["key"], return_index=True, return_inverse=True)
        owners = table.phashes["sample"]
        edges.append(np.stack([owners, owners[first][inverse]], 1))
        pairs = dedup.near_pairs(
            dedup.image_bands(hashes), lambda a, b: dedup.hamming(hashes[a], hashes[b]) <= dedup.MAX_BITS
        )
        edges.append(owners[first][pairs])
        rows = np.flatnonzero(~np.isin(table.samples["source"][table.signed], labels))
        pairs = dedup.near_pairs(
            dedup.text_bands(table.words, rows),
            lambda a, b: dedup.similarity(table.words, rows[a], rows[b]) >= dedup.TIED_TEXT,
            dedup.WINDOW,
        )
        edges.append(table.signed[rows[pairs]])
        for band in dedup.text_bands(table.words, rows):  # beyond the window all that share a band go together
            _, inverse, counts = np.unique(band, return_inverse=True, return_counts=True)
            crowded = np.flatnonzero(counts[inverse] > dedup.WINDOW)
            edges.append(dedup.equal_pairs(band[crowded], table.signed[rows[crowded]]))
    return np.concatenate(edges)


def choose_splits(cluster: np.ndarray, group: np.ndarray, shares: list[float]) -> np.ndarray:
    """The split (N,) of each sample: the smallest group hash (N,) in a cluster (N,) decides for all of it."""
    least = np.full(len(cluster), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, cluster, group)
    draws = (dedup.mix_bits(least[cluster] + dedup.GOLDEN) >> np.uint64(11)) / 2.0**53
    return np.searchsorted(np.cumsum(shares)[:-1], draws, side="right")


def split_samples(table: SampleTable, settings: Settings, original: np.ndarray) -> tuple[np.ndarray, list[str], int]:
    """The split (N,) of each sample, the sources whose texts are labels, and the size of the largest cluster.

    Raises UserError where a split would be empty.
    """
    labels = find_label_sources(table.samples, table.texts)
    own = np.arange(len(table))
    edges = [find_ties(table, settings, labels), np.stack([own, original], 1)]
    cluster = dedup.clusters(len(table), np.concatenate(edges))
    split = choose_splits(cluster, table.samples["group"], settings.split)
    kept = original == own
    sizes = np.bincount(cluster[kept])
    for number, name in enumerate(SPLITS[: len(settings.split)]):
        if not (split[kept] == number).any():
            raise UserError(
                f"--split leaves {name} empty: the {kept.sum():,} samples can be split into {(sizes > 0).sum():,} "
                "(what shares an image, audio, a text or a document stays together); give more samples or other shares"
            )
    return split, [table.families[i] for i in labels], int(sizes.max())


def assign(state: State, progress) -> None:
    """Decide on copies, splits, shards and keys, and write all of it down. Raises UserError where nothing can be read
    or a split would be empty."""
    plan = state.plan()
    settings = plan.settings
    task = progress.add_task("assigning", total=2 * sum(1 for _ in plan.chunks()))
    table = SampleTable(state, plan, lambda: progress.advance(task))
    original, copy = find_copies(table, settings)
    split, labels, largest = np.zeros(len(table), np.int64), [], 0
    if len(table) and len(settings.split) > 1:
        split, labels, largest = split_samples(table, settings, original)
    repeat = np.zeros(len(table), np.int64)  # how many samples that are kept have the same key already
    repeat[copy == 0] = dedup.count_before(table.samples["key"][copy == 0])
    originals, names = set(original[copy > 0].tolist()), {}
    facts = data_card.Facts(settings, plan.sources, plan.indexes, labels, largest)
    writers = [ShardWriter(state, name, settings.shard_size) for name in SPLITS[: len(settings.split)]]
    with open_atomic(state.file("quarantine.jsonl")) as quarantine:

        def refuse(source: Source, key: str, part: str, reason: str, detail: str) -> None:
            row = {"source": source.given, "shard": source.name, "key": key, "part": part}
            row |= {"reason": reason, "detail": detail, "step": None}
            quarantine.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            facts.refused[reason] += 1

        for source, indexed in zip(plan.sources, plan.indexes):
            for one in indexed.refused:
                refuse(source, **one)
        sample = -1
        for chunk in plan.chunks():
            progress.advance(task)
            source = plan.sources[chunk.source]
            for record in state.records(chunk):
                for part, reason, detail in record.get("lost", ()):
                    refuse(source, record["key"], part, reason, detail)
                if "members" not in record:
                    facts.count(source, "lost")
                    continue
                sample += 1
                if sample in originals:
                    names[sample] = f"{record['key']} in {source.name}"
                if copy[sample]:
                    reason = ("", "copy", "near-copy")[copy[sample]]
                    refuse(source, record["key"], "", reason, f"of {names[int(original[sample])]}")
                    facts.count(source, reason)
                    continue
                key = safe_key(record["key"]) + (f"~{repeat[sample] + 1}" if repeat[sample] else "")
                writers[split[sample]].add(key, chunk.number, record["members"])
                facts.count(source, "samples")
                facts.add(record)
    shards = [name for writer in writers for name in writer.close()]
    state.file("signatures").unlink(missing_ok=True)
    if not len(table):
        state.publish_quarantine()
        raise UserError(f"nothing in the sources can be read: {state.to}/quarantine.jsonl says why")
    write_json(state.file("assigned.json"), {"shards": shards, "facts": facts.data()})


class ShardWriter:
    """Writes down which samples the shards of one split hold; their bytes follow when all is decided."""

    def __init__(self, state: State, split: str, max_bytes: int):
        self.state, self.split, self.max_bytes = state, split, max_bytes
        self.names, self.samples, self.bytes = [], [], 0

    def add(self, key: str, chunk: int, members: list) -> None:
        size = sum(512 + -(-length // 512) * 512 for _, _, length in members)
        if self.samples and self.bytes + size + 10_240 > self.max_bytes:
            self.close()
        self.samples.append(json_line([key, chunk, members]))
        self.bytes += size

    def close(self) -> list[str]:
        """Finish the shard; returns the names of all shards."""
        if self.samples:
            self.names.append(f"{self.split}-{len(self.names):06d}")
            storage.write_atomic(self.state.shard(self.names[-1], ".samples"), self.samples)
            self.samples, self.bytes = [], 0
        return self.names
