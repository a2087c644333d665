"""The rows that an index searches: `Rows`, exactly, and `Segment`, the large part on disk, by graphs too.

    DIR/index/manifest.json          what the segment was made of, its files with their sizes and hashes, its recall
    DIR/index/segment-*/items.bin    the items, ordered by modality: of each a JSON list of its columns
                        offsets.bin  where each of the N begins, and where the last ends
                        vectors.bin  their vectors (N, E), as stored in the collection
                        lookup.bin   for the N rows: hashes of the ids in ascending order, the rows of these
                        parts.bin    the file of the collection that each row came from
                        graph-*.bin  for a modality with many items, a graph (`graph.py`)

A graph is made of vectors of fewer bits and only proposes candidates, which are then compared exactly. How far it is
searched is the least at which the nearest 10 are found with the recall that was asked for: that of items of all
modalities that were left out of it while it was measured against exact search.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..corpus import storage
from ..corpus.fields import matches
from ..errors import UserError
from .base import Item
from .collection import COLUMNS, DTYPES, FORMAT, Collection, Manifest, Part, import_arrow, seal, unseal
from .graph import CANDIDATES, FEWEST, HELD_OUT, Found, Graph, Settings, choose_expansion

FOLDER, FILE = "index", "manifest.json"
BLOCK_ROWS, BLOCK_QUERIES = 8192, 256  # compared at a time: memory does not grow with the collection
HASH_BYTES = 16 << 20  # of a file that are hashed together, several at a time
FEW_ROWS = 20_000  # of those that fit a filter: so many are compared exactly, whatever graph there is
SIMPLE = re.compile(r"\w(?:[\w ./:-]*\w)?")  # a value of a filter that its JSON spells as it is
SPELLED_OTHERWISE = ("None", "True", "False", "nan", "inf")
ITEMS, OFFSETS, VECTORS, LOOKUP, PARTS = "items.bin", "offsets.bin", "vectors.bin", "lookup.bin", "parts.bin"


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
        lists = ",".join([str(self.view[start:stop], "ascii") for start, stop in spans])
        return [Item(*columns) for columns in json.loads(f"[{lists}]")]

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

    def search(self, queries: np.ndarray, top: int, modality: str, mask: np.ndarray, fit: int | None = None) -> Found:
        """Scores and rows (Q, K) of the nearest of one modality among the rows of `mask`; K is at most `top`, and where
        fewer fit, the score is minus infinity. fit: how many rows of the modality the mask has, where that is known."""
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
    scores, rows = found[0] if len(found) == 1 else (np.concatenate(columns, 1) for columns in zip(*found))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    queries = np.arange(len(scores))[:, None]  # as of np.take_along_axis, which takes longer than one query's search
    return scores[queries, order], rows[queries, order]


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

    def _open_graph(self, here: Path, modality: str) -> Graph:
        file, (start, stop) = here / _graph_file(list(self.spans).index(modality)), self.spans[modality]
        graph = Graph.open(file, self.vectors, stop - start)
        if graph is None:
            raise UserError(f"{file} is not a graph of these {stop - start} items: {self.mend}")
        return graph

    def search(self, queries: np.ndarray, top: int, modality: str, mask: np.ndarray, fit: int | None = None) -> Found:
        """By the modality's graph, where it has one; as many more candidates are taken as the mask leaves out, and
        where that does not give `top` rows, all are compared."""
        start, stop = self.spans.get(modality, (0, 0))
        if fit is None:  # a tenth of a millisecond for a million rows
            fit = int(np.count_nonzero(mask[start:stop]))
        if modality not in self.graphs or fit <= FEW_ROWS or not len(queries):
            return self.search_exactly(queries, top, modality, mask)
        wanted = CANDIDATES * -(-top // 10)
        while (taken := wanted * (stop - start) // fit) <= min(4096, (stop - start) // 8):
            expansion = self.about["graphs"][modality]["expansion"] * taken // CANDIDATES
            found = merge([self.graphs[modality].propose(queries, taken, expansion, mask)], top)
            if found[0].shape[1] == top and np.isfinite(found[0]).all():
                return found
            wanted *= 4
        return self.search_exactly(queries, top, modality, mask)


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
        vectors = _map(here / VECTORS, np.dtype(DTYPES[manifest.dtype]), (count, manifest.dim))
        bare = Rows((np.zeros(0, "u1"), np.zeros(1, "<i8")), vectors, spans, np.zeros(0, "<u8"))
        about["graphs"] = _build_graphs(bare, settings, here, advance)
        about["files"] = {file.name: _describe(file) for file in sorted(here.iterdir())}
        storage.sync_folder(here)
        _write_manifest(home, about)
    except BaseException:
        shutil.rmtree(here, ignore_errors=True)
        raise
    for stray in [*home.glob("segment-*"), *home.glob(".tmp-*")]:  # also of those who were killed
        if stray.is_dir() and stray != here:
            shutil.rmtree(stray, ignore_errors=True)
        elif stray.is_file():
            stray.unlink(missing_ok=True)
    return about


def choose_recall(collection: Collection, about: dict, recall: float) -> dict:
    """Search the graphs of a segment as far as this recall asks for, from now on; returns its manifest."""
    for graph in about["graphs"].values():
        graph.update(choose_expansion(graph["curve"], recall))
    about["settings"]["recall"] = recall
    _write_manifest(collection.folder / FOLDER, {"format": FORMAT, **about})
    return about


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
) -> dict[str, tuple[int, int]]:
    """Write the files of a segment but for its graphs, one part in memory at a time; the rows of each modality."""
    arrow = import_arrow()
    spans: dict[str, tuple[int, int]] = {}
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
            spans[modality] = start, at
    (here / OFFSETS).write_bytes(np.cumsum(np.concatenate(lengths), dtype="<i8").tobytes())
    flat = np.concatenate([*hashes, np.zeros(0, "<u8")])
    order = np.argsort(flat, kind="stable").astype("<u4")
    (here / LOOKUP).write_bytes(flat[order].tobytes() + order.tobytes())
    (here / PARTS).write_bytes(np.concatenate([*numbers, np.zeros(0, "<u4")]).tobytes())
    return {modality: span for modality, span in spans.items() if span[1] > span[0]}


def _build_graphs(rows: Rows, settings: Settings, here: Path, advance: Callable[[int, int], None]) -> dict[str, dict]:
    """Make the graphs of the modalities with many items; what the manifest says of each, with its recall."""
    sizes = {name: stop - start for name, (start, stop) in rows.spans.items()}
    drawn = {name: np.random.default_rng(0).permutation(size) + rows.spans[name][0] for name, size in sizes.items()}
    held = {name: np.sort(drawn[name][: min(HELD_OUT, -(-size // 20))]) for name, size in sizes.items()}
    queries = {name: rows.vectors[torch.from_numpy(own)].float().numpy() for name, own in held.items()}
    about = {}
    for number, (name, (start, stop)) in enumerate(rows.spans.items()):
        if sizes[name] <= max(settings.exact_below, FEWEST):
            continue
        graph, mask = Graph.make(rows.vectors, settings), np.ones(len(rows), bool)
        mask[held[name]] = False
        first = np.flatnonzero(mask[start:stop]) + start
        graph.add(first, lambda done, total=stop - start: advance(done, total))
        asked = {of: (some, rows.search_exactly(some, 10, name, mask)[1]) for of, some in queries.items()}
        curve = graph.measure(asked)
        graph.add(held[name])
        advance(stop - start, stop - start)
        graph.save(here / _graph_file(number))
        about[name] = {**choose_expansion(curve, settings.recall), "curve": curve}
    return about
