"""A graph over the rows of one modality: usearch's HNSW (Malkov and Yashunin 2018), whose proposals have exact scores.

How far a graph has to be searched for a recall is measured on items that are left out of it until then: those in it
are easier to find than new queries are. Q queries of E dimensions.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

GRAPH_TYPES = ("i8", "f16", "f32")
BLOCK_ROWS, BLOCK_QUERIES = 8192, 16  # that are added, and compared, at a time
ALONE = 1024  # the first of a graph, one after the other: several threads would lose some of so few to each other
CANDIDATES = 16  # that a graph proposes where 10 are wanted
HELD_OUT = 1024  # items of each modality at which recall is measured; of few items one in 20
FEWEST = 100  # items that a graph is made of
EXPANSIONS = (16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 768, 1024)
LARGE_PAGE, READ_BYTES = 1 << 21, 1 << 24
ENOUGH = 0.9995  # recall beyond which it is not measured

Found = tuple[np.ndarray, np.ndarray]
"""Scores (Q, K), and the rows (Q, K) that have them; minus infinity stands where there is none."""


@dataclass(frozen=True)
class Settings:
    """How a segment is made."""

    exact_below: int = 20_000  # items of a modality; with more it gets a graph
    dtype: str = "i8"  # of a graph's vectors: i8, f16, f32
    connectivity: int = 32  # links of an item; with 16, a few of a million items cannot be reached at all
    expansion_add: int = 128  # candidates that are looked at where an item is added
    recall: float = 0.98  # of the nearest 10, that a graph is searched far enough for

    def __post_init__(self):
        if self.dtype not in GRAPH_TYPES:
            raise UserError(f"--dtype of an index is one of {', '.join(GRAPH_TYPES)}, not {self.dtype!r}")
        if self.exact_below < 0 or not 2 <= self.connectivity <= 512 or not 1 <= self.expansion_add <= 65_536:
            raise UserError("--exact-below is 0 or more, connectivity 2 to 512, expansion_add 1 to 65536")
        if not 0 < self.recall <= 1:
            raise UserError("--recall is above 0 and at most 1")


class Graph:
    """A graph of some rows of `vectors` (N, E), which are float16 or float32 of length one and may be mapped."""

    def __init__(self, index: Any, vectors: Tensor):
        self.index, self.vectors, self.peak = index, vectors, 1.0
        self.memory: mmap.mmap | None = None
        self.whole_numbers = str(index.dtype).rpartition(".")[2].lower() == "i8"
        self.threads = len(os.sched_getaffinity(0))
        self._lock = threading.Lock()  # usearch shares its buffers among searches of one graph

    @classmethod
    def make(cls, vectors: Tensor, settings: Settings) -> Graph:
        """An empty one. Raises UserError where usearch is missing."""
        index = import_usearch().Index(
            ndim=vectors.shape[1],
            metric="ip",  # of vectors of one length it is the cosine, for less
            dtype=settings.dtype,
            connectivity=settings.connectivity,
            expansion_add=settings.expansion_add,
        )
        graph = cls(index, vectors)
        sampled = np.abs(vectors[:: max(1, len(vectors) // 4096)].float().numpy())
        graph.peak = float(np.quantile(sampled, 0.9999))
        return graph

    @classmethod
    def open(cls, file: Path, vectors: Tensor, count: int) -> Graph | None:
        """The one in a file; None where it is not of `count` rows of E dimensions. Raises UserError."""
        memory = read_into_large_pages(file)
        index = import_usearch().Index.restore(str(file) if memory is None else memory, view=True)
        if index is None or len(index) != count or index.ndim != vectors.shape[1]:
            return None
        graph = cls(index, vectors)
        graph.memory = memory  # of which usearch has a view
        return graph

    def add(self, rows: np.ndarray, advance: Callable[[int], None] = lambda done: None) -> None:
        """Add these rows (N,). advance: takes how many are done."""
        starts = [0, *range(ALONE, len(rows), BLOCK_ROWS)] if not len(self.index) else range(0, len(rows), BLOCK_ROWS)
        for first, last in itertools.pairwise([*starts, len(rows)]):
            some = rows[first:last]
            vectors = self._encode(self.vectors[torch.from_numpy(some)].float().numpy(), self.peak)
            self.index.add(some.astype(np.uint64), vectors, threads=self.threads if len(self.index) else 1)
            advance(last)

    def _encode(self, vectors: np.ndarray, peak: np.ndarray | float) -> np.ndarray:
        """Vectors (N, E) as the graph keeps them. For int8 the `peak` of their numbers becomes 127, in place of
        usearch's own cast, by which the length is 127 and most numbers of a long vector are below 10."""
        if not self.whole_numbers:
            return vectors
        scaled = vectors * (127 / peak)
        return np.clip(np.rint(scaled, out=scaled), -127, 127, out=scaled).astype(np.int8)

    def propose(self, queries: np.ndarray, taken: int, expansion: int, mask: np.ndarray) -> Found:
        """What the graph proposes, `taken` rows in no order, with exact scores; minus infinity outside of the mask.

        queries: (Q, E) float32.
        """
        encoded = self._encode(queries, np.abs(queries).max(1, keepdims=True))
        with self._lock:
            self.index.expansion_search = max(expansion, taken)
            found = self.index.search(encoded, taken, threads=self.threads)
        rows = np.asarray(found.keys).reshape(len(queries), -1).astype(np.int64)
        counts = np.asarray(found.counts) if len(queries) > 1 else np.array([len(found)])
        there = np.arange(rows.shape[1]) < counts[:, None]
        rows[~there] = 0
        there &= mask[rows]
        places, scores = torch.from_numpy(rows), np.empty(rows.shape, np.float32)
        for a in range(0, len(rows), BLOCK_QUERIES):  # as many as the cache holds; less than torch.bmm takes
            some = places[a : a + BLOCK_QUERIES]
            vectors = self.vectors.index_select(0, some.flatten()).float().view(*some.shape, -1)
            scores[a : a + BLOCK_QUERIES] = np.matmul(vectors.numpy(), queries[a : a + BLOCK_QUERIES, :, None])[:, :, 0]
        scores[~there] = -np.inf
        return scores, rows

    def measure(self, queries: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[list[float]]:
        """[expansion, recall] of the nearest 10, from a low one on until nearly all are found.

        queries: by modality, (Q, E) float32 and the rows (Q, 10) that exact search finds. The recall is that of the
        modality with the lowest, less one standard error of the mean.
        """
        everything, curve = np.ones(len(self.vectors), bool), []
        for expansion in EXPANSIONS:
            recalls = []
            for asked, truth in queries.values():
                scores, rows = self.propose(asked, CANDIDATES, expansion, everything)
                rows = np.where(np.isfinite(scores), rows, -1)
                best = np.take_along_axis(rows, np.argsort(-scores, axis=1)[:, :10], 1)
                hit = (truth[:, :, None] == best[:, None]).any(2).mean(1)
                recalls.append(hit.mean() - hit.std() / len(hit) ** 0.5)
            curve.append([expansion, round(float(min(recalls)), 5)])
            if curve[-1][1] >= ENOUGH:
                break
        return curve

    def save(self, file: Path) -> None:
        self.index.save(str(file))


def read_into_large_pages(file: Path) -> mmap.mmap | None:
    """A file's bytes in memory of this process, in pages of 2 MiB; None, for a file to be mapped, where the system has
    no such pages or the file is larger than a quarter of the memory.

    A search reads some thousands of vectors in no order: with pages of 4 KiB each costs a walk through their tables, a
    quarter of the time (benchmarks/LOG.md).
    """
    size, room = file.stat().st_size, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    if not hasattr(mmap, "MADV_HUGEPAGE") or not LARGE_PAGE <= size <= room // 4:
        return None
    memory = mmap.mmap(-1, -(-size // LARGE_PAGE) * LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return None
    with open(file, "rb", buffering=0) as opened, memoryview(memory) as view:
        done = 0
        while done < size:
            count = opened.readinto(view[done : min(size, done + READ_BYTES)])
            if not count:
                return None
            done += count
    return memory


def choose_expansion(curve: list[list[float]], recall: float) -> dict[str, float]:
    """The least expansion of a curve (see `Graph.measure`) with this recall, or the last, with the recall it has."""
    expansion, has = next((point for point in curve if point[1] >= recall), curve[-1])
    return {"expansion": int(expansion), "recall": has}


def import_usearch() -> Any:
    """The module `usearch.index`. Raises UserError."""
    try:
        import usearch.index
    except ImportError:
        raise UserError('large collections are searched by usearch: pip install "multimodal_fm[search]"') from None
    return usearch.index
