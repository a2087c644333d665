"""The rows that an index searches: `Rows`, exactly, and `Segment`, the large part on disk, by graphs too.

    DIR/index/manifest.json          what the segment was made of, its files with their sizes and hashes, its recall
    DIR/index/segment-*/items.bin    the items, ordered by modality: of each a JSON list of its columns
                        offsets.bin  where each of the N begins, and where the last ends
                        vectors.bin  their vectors (N, E), as stored in the collection
                        lookup.bin   for the N rows: hashes of the ids in ascending order, the rows of these
                        parts.bin    the file of the collection that each row came from
                        graph-*.bin  for a modality with many items, a graph of usearch (HNSW, Malkov and Yashunin 2018)

A graph is made of vectors of fewer bits and only proposes candidates, which are then compared exactly. How far it is
searched is chosen when it is made: the least at which the nearest 10 of sampled items, without themselves, are found
with the recall that was asked for, measured against exact search.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..corpus import storage
from ..corpus.fields import matches
from ..errors import UserError
from .base import Item
from .collection import COLUMNS, DTYPES, FORMAT, Collection, Manifest, Part, import_arrow, seal, unseal

FOLDER, FILE = "index", "manifest.json"
GRAPH_TYPES = {"i8": "i8", "f16": "f16", "f32": "f32"}
BLOCK_ROWS, BLOCK_QUERIES = 8192, 256  # compared at a time: memory does not grow with the collection
HASH_BYTES = 16 << 20  # of a file that are hashed together, several at a time
CANDIDATES = 32  # that a graph proposes where 10 are wanted
FEW_ROWS = 20_000  # of those that fit a filter: so many are compared exactly, whatever graph there is
SAMPLED, EXPANSIONS = 256, (32, 64, 96, 128, 192, 256, 384, 512, 1024)
SIMPLE = re.compile(r"\w(?:[\w ./:-]*\w)?")  # a value of a filter that its JSON spells as it is
SPELLED_OTHERWISE = ("None", "True", "False", "nan", "inf")
ITEMS, OFFSETS, VECTORS, LOOKUP, PARTS = "items.bin", "offsets.bin", "vectors.bin", "lookup.bin", "parts.bin"


@dataclass(frozen=True)
class Settings:
    """How a segment is made."""

    exact_below: int = 20_000  # items of a modality; with more it gets a graph
    dtype: str = "i8"  # of a graph's vectors: i8, f16, f32
    connectivity: int = 16  # links of an item
    expansion_add: int = 128  # candidates that are looked at where an item is added
    recall: float = 0.98  # of the nearest 10, that a graph is to have

    def __post_init__(self):
        if self.dtype not in GRAPH_TYPES:
            raise UserError(f"--dtype of an index is one of {', '.join(GRAPH_TYPES)}, not {self.dtype!r}")
        if self.exact_below < 0 or not 2 <= self.connectivity <= 512 or not 1 <= self.expansion_add <= 65_536:
            raise UserError("--exact-below is 0 or more, connectivity 2 to 512, expansion_add 1 to 65536")
        if not 0 < self.recall <= 1:
            raise UserError("--recall is above 0 and at most 1")


def hash_ids(ids: Sequence[str]) -> np.ndarray:
    """64 bits (N,) of each id; ids are compared whole wherever one is asked for."""
    digests = (hashlib.blake2b(one.encode("utf-8", "replace"), digest_size=8).digest() for one in ids)
    return np.frombuffer(b"".join(digests), "<u8")


def pack_items(table: Any) -> tuple[np.ndarray, np.ndarray]:
    """An Arrow table of items as bytes (B,), a JSON list of the columns for each, and where each begins (N + 1,)."""
    *columns, fields = (table[name].to_pylist() for name in COLUMNS)  # the fields are JSON already
    lists = [f"{json.dumps(row)[:-1]}, {one}]".encode() for row, one in zip(zip(*columns), fields, strict=True)]
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return np.frombuffer(bytearray(b"".join(lists)), np.uint8), offsets


Found = tuple[np.ndarray, np.ndarray]
"""Scores (Q, K), and the rows (Q, K) that have them; minus infinity stands where there is none."""


class Rows:
    """Items and their vectors (N, E), rows of one modality side by side.

    Args:
        packed: the items, as of `pack_items`; they and the vectors may be mapped from files.
        spans: the rows [start, stop) of each modality.
        hashes: of the ids (N,).
    """

    def __init__(
        self,
        packed: tuple[np.ndarray, np.ndarray],
        vectors: np.ndarray,
        spans: dict[str, tuple[int, int]],
        hashes: np.ndarray,
    ):
        self.packed, self.offsets = packed
        self.view = self.packed.data
        self.array, self.spans, self.hashes = vectors, spans, hashes
        self.vectors = torch.from_numpy(vectors)
        self.fits = functools.lru_cache(maxsize=16)(self._fits)

    def __len__(self) -> int:
        return len(self.vectors)

    def items(self, rows: np.ndarray) -> list[Item]:
        """The items of these rows, in their order."""
        spans = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist())
        return [Item(*json.loads(str(self.view[start:stop], "ascii"))) for start, stop in spans]

    @functools.cached_property
    def lookup(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of the ids (N,) in ascending order, and the rows (N,) of these."""
        order = np.argsort(self.hashes, kind="stable")
        return self.hashes[order], order

    def rows_of(self, hashes: np.ndarray) -> list[np.ndarray]:
        """The rows, any number of them, whose id has each of these hashes."""
        known, rows = self.lookup
        low, high = (np.searchsorted(known, hashes, side) for side in ("left", "right"))
        return [rows[a:b].astype(np.int64) for a, b in zip(low, high)]

    def _fits(self, where: tuple[tuple[str, str], ...]) -> np.ndarray:
        """Which rows (N,) fit a filter. Those whose JSON has the values somewhere in it are looked at one by one."""
        arrow, compute = import_arrow(), _import_compute()
        buffers = [None, arrow.py_buffer(self.offsets), arrow.py_buffer(self.packed)]
        items, mask = arrow.Array.from_buffers(arrow.large_binary(), len(self), buffers), np.ones(len(self), bool)
        for _, value in where:
            if SIMPLE.fullmatch(value) and value not in SPELLED_OTHERWISE:
                mask &= compute.match_substring(items, json.dumps(value)[1:-1]).to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(mask)
        for start in range(0, len(rows), BLOCK_ROWS):
            some = rows[start : start + BLOCK_ROWS]
            mask[some] = [matches(item.fields, dict(where)) for item in self.items(some)]
        return mask

    def search(self, queries: np.ndarray, top: int, modality: str, mask: np.ndarray) -> Found:
        """Scores and rows (Q, K) of the nearest of one modality among the rows of `mask`; K is at most `top`, and where
        fewer fit, the score is minus infinity."""
        return self.search_exactly(queries, top, modality, mask)

    def search_exactly(self, queries: np.ndarray, top: int, modality: str, mask: np.ndarray) -> Found:
        """As `search`, comparing all rows of the mask, `BLOCK_ROWS` by `BLOCK_QUERIES` at a time."""
        start, stop = self.spans.get(modality, (0, 0))
        kept = np.flatnonzero(mask[start:stop]) + start
        best = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        for a in range(0, len(kept), BLOCK_ROWS):
            rows = torch.from_numpy(kept[a : a + BLOCK_ROWS])
            whole = int(rows[-1] - rows[0]) + 1 == len(rows)
            block = self.vectors[int(rows[0]) : int(rows[-1]) + 1] if whole else self.vectors.index_select(0, rows)
            block, scores, places = block.float(), [], []
            for part in torch.from_numpy(queries).split(BLOCK_QUERIES):
                score, place = (part @ block.T).topk(min(top, len(rows)))
                scores.append(score)
                places.append(rows[place])
            best = merge([best, (torch.cat(scores).numpy(), torch.cat(places).numpy())], top)
        return best


def merge(found: Sequence[Found], top: int) -> Found:
    """The highest of several lists of scores, and their rows; where two are equal, the first."""
    scores, rows = (np.concatenate(columns, 1) for columns in zip(*found, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _import_compute() -> Any:
    import_arrow()
    import pyarrow.compute

    return pyarrow.compute


def rows_of_parts(collection: Collection, parts: list[Part], dim: int) -> tuple[Rows, np.ndarray]:
    """Parts of a collection in memory, and the places in the log (N,) of the rows. Raises UserError."""
    arrow = import_arrow()
    read = [collection.read(part, dim) for part in parts]
    table = arrow.concat_tables([table for table, _ in read]).combine_chunks()
    modalities = np.array(table["modality"].to_pylist(), object)
    order = np.argsort(modalities.astype(str), kind="stable")
    vectors = np.concatenate([vectors for _, vectors in read])[order]
    names, counts = np.unique(modalities.astype(str), return_counts=True)
    ends = np.cumsum(counts)
    spans = {str(name): (int(end - n), int(end)) for name, n, end in zip(names, counts, ends)}
    table = table.take(arrow.array(order))
    return Rows(pack_items(table), vectors, spans, hash_ids(table["id"].to_pylist())), order


class Segment(Rows):
    """The large part of an index, mapped from its files, all of which are verified first.

    Raises UserError where one of them is damaged; `build` makes it anew.
    """

    def __init__(self, collection: Collection, manifest: Manifest):
        self.folder, dim = collection.folder / FOLDER, manifest.dim
        self.mend = f"mmfm index {collection.folder} makes it anew of the embeddings"
        about = unseal((self.folder / FILE).read_bytes(), self.folder / FILE, self.mend)
        if (about["model"], about["dim"], about["dtype"]) != (manifest.model, dim, manifest.dtype):
            raise UserError(f"{self.folder} is of another model or dimension than the embeddings: {self.mend}")
        self.about, self.made_of = about, {name: sha256 for name, sha256 in about["parts"]}
        here = self.folder / Path(about["segment"]).name
        count, kind = about["count"], np.dtype(DTYPES[manifest.dtype])
        self._verify(here, about["files"])
        lengths = {VECTORS: count * dim * kind.itemsize, LOOKUP: count * 12, PARTS: count * 4, OFFSETS: count * 8 + 8}
        for name, length in lengths.items():
            if about["files"][name]["bytes"] != length:
                raise UserError(f"{here / name} is not of {count} rows: {self.mend}")
        offsets = _map(here / OFFSETS, np.dtype("<i8"), (count + 1,))
        spans = {name: (start, stop) for name, (start, stop) in about["spans"].items()}
        if int(offsets[-1]) != about["files"][ITEMS]["bytes"] or sum(b - a for a, b in spans.values()) != count:
            raise UserError(f"{here / ITEMS}: its items are not as many as the vectors: {self.mend}")
        packed = _map(here / ITEMS, np.dtype("u1"), (int(offsets[-1]),)), offsets
        super().__init__(packed, _map(here / VECTORS, kind, (count, dim)), spans, np.zeros(0, "<u8"))
        known, rows = np.dtype("<u8"), np.dtype("<u4")
        self.lookup = _map(here / LOOKUP, known, (count,)), _map(here / LOOKUP, rows, (count,), 8 * count)
        self.part_of_row = _map(here / PARTS, np.dtype("<u4"), (count,))
        self._lock = threading.Lock()  # usearch shares its buffers among searches of one graph
        self.graphs = {name: self._open_graph(here, name) for name in about["graphs"]}

    def _verify(self, here: Path, files: dict[str, dict]) -> None:
        """Compare all bytes of all files with their hashes."""
        jobs = []
        for name, wanted in files.items():
            file = here / Path(name).name
            if not file.is_file() or file.stat().st_size != wanted["bytes"]:
                what = f"{file.stat().st_size} bytes, not {wanted['bytes']}" if file.is_file() else "it is missing"
                raise UserError(f"{file} is damaged ({what}): {self.mend}")
            jobs += [(file, number, digest) for number, digest in enumerate(wanted["sha256"])]
        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for (file, number, digest), found in zip(jobs, pool.map(lambda job: _hash_block(*job[:2]), jobs)):
                if found != digest:
                    raise UserError(f"{file} is damaged (block {number}): {self.mend}")

    def _open_graph(self, here: Path, modality: str) -> Any:
        file, (start, stop) = here / _graph_file(list(self.spans).index(modality)), self.spans[modality]
        graph = import_usearch().Index.restore(str(file), view=True)
        if graph is None or len(graph) != stop - start or graph.ndim != self.vectors.shape[1]:
            raise UserError(f"{file} is not a graph of these {stop - start} items: {self.mend}")
        return graph

    def search(self, queries: np.ndarray, top: int, modality: str, mask: np.ndarray) -> Found:
        """By the modality's graph, where it has one; as many more candidates are taken as the mask leaves out, and
        where that does not give `top` rows, all are compared."""
        start, stop = self.spans.get(modality, (0, 0))
        fit = int(np.count_nonzero(mask[start:stop]))
        if modality not in self.graphs or fit <= FEW_ROWS or not len(queries):
            return self.search_exactly(queries, top, modality, mask)
        wanted = CANDIDATES * -(-top // 10)
        while (taken := wanted * (stop - start) // fit) <= min(4096, (stop - start) // 8):
            expansion = self.about["graphs"][modality]["expansion"] * taken // CANDIDATES
            found = merge([self.propose(queries, modality, taken, expansion, mask)], top)
            if found[0].shape[1] == top and np.isfinite(found[0]).all():
                return found
            wanted *= 4
        return self.search_exactly(queries, top, modality, mask)

    def propose(self, queries: np.ndarray, modality: str, taken: int, expansion: int, mask: np.ndarray) -> Found:
        """What a graph proposes, `taken` rows in no order, with exact scores; minus infinity outside of the mask."""
        graph = self.graphs[modality]
        with self._lock:
            graph.expansion_search = max(expansion, taken)
            found = graph.search(queries, taken)
        rows = np.asarray(found.keys).reshape(len(queries), -1).astype(np.int64)
        counts = np.asarray(found.counts) if len(queries) > 1 else np.array([len(found)])
        there = np.arange(rows.shape[1]) < counts[:, None]
        rows[~there] = self.spans[modality][0]
        there &= mask[rows]
        scores = np.empty(rows.shape, np.float32)
        for a in range(0, len(rows), 64):  # as many as the processor's cache holds
            vectors = torch.from_numpy(self.array[rows[a : a + 64]]).float().numpy()  # some times faster than NumPy's
            scores[a : a + 64] = np.matmul(vectors, queries[a : a + 64, :, None])[:, :, 0]
        scores[~there] = -np.inf
        return scores, rows


def _graph_file(number: int) -> str:
    return f"graph-{number}.bin"


def _map(file: Path, kind: np.dtype, shape: tuple, offset: int = 0) -> np.ndarray:
    """A file, or a part of it, in memory as it is needed. Nothing is written to it."""
    return np.memmap(file, kind, "c", offset, shape) if shape[0] else np.zeros(shape, kind)


def _hash_block(file: Path, number: int) -> str:
    with open(file, "rb", buffering=0) as opened:
        opened.seek(number * HASH_BYTES)
        return hashlib.sha256(_read_fully(opened, HASH_BYTES)).hexdigest()


def _read_fully(opened, size: int) -> bytes:
    data = opened.read(size)
    while data and len(data) < size and (more := opened.read(size - len(data))):
        data += more
    return data


def import_usearch() -> Any:
    """The module `usearch.index`. Raises UserError."""
    try:
        import usearch.index
    except ImportError:
        raise UserError('large collections are searched by usearch: pip install "multimodal_fm[search]"') from None
    return usearch.index


# --------------------------------------------------------------------------------------------------------------- build


def build(
    collection: Collection, settings: Settings, advance: Callable[[int, int], None] = lambda done, total: None
) -> dict:
    """Make the segment of all that the collection now holds, in the place of the one before; returns its manifest.

    advance: takes how many items of a graph are done, and how many it is to have. What is killed on the way has changed
    nothing. Raises UserError.
    """
    manifest = collection.manifest()
    log = manifest.visible()
    alive = live_rows(collection, manifest, log)
    home = collection.folder / FOLDER
    here = home / f"segment-{secrets.token_hex(6)}"
    here.mkdir(parents=True)
    try:
        spans = _write_rows(collection, manifest, log, alive, here)
        count = sum(stop - start for start, stop in spans.values())
        about = {
            "format": FORMAT, "model": manifest.model, "dim": manifest.dim, "dtype": manifest.dtype, "count": count,
            "segment": here.name, "spans": spans, "parts": [[part.name, part.sha256] for part in log],
            "settings": asdict(settings), "graphs": {}, "files": {},
        }  # fmt: skip
        vectors = torch.from_numpy(_map(here / VECTORS, np.dtype(DTYPES[manifest.dtype]), (count, manifest.dim)))
        for number, (modality, (start, stop)) in enumerate(spans.items()):
            if stop - start > settings.exact_below:
                _build_graph(vectors, start, stop, settings, here / _graph_file(number), advance)
                about["graphs"][modality] = {"expansion": EXPANSIONS[-1], "recall": 0.0}
        about["files"] = {file.name: _describe(file) for file in sorted(here.iterdir())}
        storage.sync_folder(here)
        _write_manifest(home, about)
    except BaseException:
        shutil.rmtree(here, ignore_errors=True)
        raise
    for folder in home.glob("segment-*"):
        if folder != here:
            shutil.rmtree(folder, ignore_errors=True)
    return measure(collection, settings.recall) if about["graphs"] else about


def _write_manifest(home: Path, about: dict) -> None:
    storage.write_atomic(home / FILE, seal(about))
    storage.sync_folder(home)


def _describe(file: Path) -> dict:
    """A file's size and the hashes of its blocks; it is synced."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
    size = file.stat().st_size
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        blocks = list(pool.map(functools.partial(_hash_block, file), range(-(-size // HASH_BYTES))))
    return {"bytes": size, "sha256": blocks}


def live_rows(collection: Collection, manifest: Manifest, log: list[Part]) -> list[np.ndarray]:
    """For each file of the log, which of its rows (N,) no later one replaces or deletes; nothing of a deletion lives.

    Raises UserError where one of them is damaged.
    """
    hashes = []
    for part in log:
        if part.deletes:
            hashes.append(hash_ids(collection.read_ids(part)))
        else:
            hashes.append(hash_ids(collection.read(part, manifest.dim, ["id"])[0]["id"].to_pylist()))
    return last_of_each(hashes, [part.deletes for part in log])


def last_of_each(hashes: list[np.ndarray], deletes: list[bool]) -> list[np.ndarray]:
    """For each list of hashes, which stand in no later place of the log; none of a deletion."""
    if not hashes:
        return []
    flat = np.concatenate(hashes)
    _, last = np.unique(flat[::-1], return_index=True)
    alive = np.zeros(len(flat), bool)
    alive[len(flat) - 1 - last] = True
    pieces = np.split(alive, np.cumsum([len(one) for one in hashes])[:-1])
    return [piece & (not deleted) for piece, deleted in zip(pieces, deletes)]


def _write_rows(
    collection: Collection, manifest: Manifest, log: list[Part], alive: list[np.ndarray], here: Path
) -> dict[str, list[int]]:
    """Write the files of a segment but for its graphs, one part in memory at a time; the rows of each modality."""
    arrow = import_arrow()
    spans: dict[str, list[int]] = {}
    hashes, numbers, lengths, at = [], [], [np.zeros(1, np.int64)], 0
    with open(here / VECTORS, "wb") as file, open(here / ITEMS, "wb") as items:
        for modality in sorted({name for part in log for name in part.counts}):
            start = at
            for number, (part, live) in enumerate(zip(log, alive)):
                if part.deletes or modality not in part.counts:
                    continue
                table, vectors = collection.read(part, manifest.dim)
                kept = np.flatnonzero(live & (np.array(table["modality"].to_pylist(), object) == modality))
                table = table.take(arrow.array(kept))
                packed, offsets = pack_items(table)
                items.write(packed.data)
                lengths.append(np.diff(offsets))
                file.write(np.ascontiguousarray(vectors[kept]).data)
                hashes.append(hash_ids(table["id"].to_pylist()))
                numbers.append(np.full(len(kept), number, "<u4"))
                at += len(kept)
            spans[modality] = [start, at]
    (here / OFFSETS).write_bytes(np.cumsum(np.concatenate(lengths), dtype="<i8").tobytes())
    flat = np.concatenate([*hashes, np.zeros(0, "<u8")])
    order = np.argsort(flat, kind="stable").astype("<u4")
    (here / LOOKUP).write_bytes(flat[order].tobytes() + order.tobytes())
    (here / PARTS).write_bytes(np.concatenate([*numbers, np.zeros(0, "<u4")]).tobytes())
    return {modality: span for modality, span in spans.items() if span[1] > span[0]}


def _build_graph(vectors: Tensor, start: int, stop: int, settings: Settings, file: Path, advance: Callable) -> None:
    graph = import_usearch().Index(
        ndim=vectors.shape[1],
        metric="cos",
        dtype=settings.dtype,
        connectivity=settings.connectivity,
        expansion_add=settings.expansion_add,
    )
    for first in range(start, stop, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, stop)
        graph.add(np.arange(first, last, dtype=np.uint64), vectors[first:last].float().numpy(),
                  threads=len(os.sched_getaffinity(0)))  # fmt: skip
        advance(last - start, stop - start)
    graph.save(str(file))


def measure(collection: Collection, recall: float) -> dict:
    """Choose how far the graphs of a segment are searched, and note the recall; until then it is as far as ever."""
    segment = Segment(collection, collection.manifest())
    about = segment.about
    everything = np.ones(len(segment), bool)
    sampled = np.random.default_rng(0).choice(len(segment), min(SAMPLED, len(segment)), replace=False)
    queries = segment.array[np.sort(sampled)].astype(np.float32)
    for modality in about["graphs"]:
        truth = _nearest_others(*segment.search_exactly(queries, 11, modality, everything), np.sort(sampled))
        for expansion in EXPANSIONS:
            found = segment.propose(queries, modality, CANDIDATES, expansion, everything)
            nearest = _nearest_others(*merge([found], 11), np.sort(sampled))
            hit = [len(set(a) & set(b)) / len(a) for a, b in zip(truth, nearest)]
            about["graphs"][modality] = {"expansion": expansion, "recall": float(np.mean(hit))}
            if about["graphs"][modality]["recall"] >= recall:
                break
    _write_manifest(collection.folder / FOLDER, {"format": FORMAT, **about})
    return about


def _nearest_others(scores: np.ndarray, rows: np.ndarray, queries: np.ndarray) -> list[list[int]]:
    """The nearest 10 rows of each query, which is a row itself, without that."""
    return [[row for row in own if row != query][:10] for own, query in zip(rows.tolist(), queries.tolist())]
