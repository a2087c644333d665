"""A map of a collection in two dimensions: near on the map is near for the model. Made once, kept beside the index."""

from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ..corpus.storage import write_atomic
from ..search.base import Index, Item

ITEMS = 4000  # on the map at most; of a larger collection a sample
PROBES = 16  # random directions that the sample is drawn from
VERSION = 1


def draw(index: Index, count: int, seed: int = 0) -> list[tuple[Item, np.ndarray]]:
    """About `count` items, or all where there are no more, with their vectors: of each modality in its proportion.

    Taken from the neighborhoods of random directions, since an index answers nothing but searches; the ids in order,
    so that the same index gives the same.
    """
    generator, found = np.random.default_rng(seed), set()
    counts = index.counts()
    total = max(sum(counts.values()), 1)
    for modality, own in counts.items():
        wanted = own if total <= count else max(1, count * own // total)
        probes = 1 if wanted == own else min(PROBES, wanted)
        vectors = generator.standard_normal((probes, index.dim)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        top = -(-wanted // probes)
        found |= {hit.item.id for hits in index.search(vectors, top, modality) for hit in hits}
    return index.get(sorted(found))


def arrange(vectors: np.ndarray, modalities: list[str], seed: int = 0) -> tuple[np.ndarray, str]:
    """Places (N, 2) in [0, 1] for unit vectors (N, E), and the method's name.

    UMAP (McInnes et al. 2018) where it is installed, else t-SNE (van der Maaten and Hinton 2008). Each modality is
    centered first: the vectors of a modality lie in a cone of their own (Liang et al. 2022), and a map would show
    little but that.
    """
    vectors = np.array(vectors, np.float32)
    for modality in set(modalities):
        rows = np.array([one == modality for one in modalities])
        vectors[rows] -= vectors[rows].mean(0)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    if len(vectors) < 8:
        places, method = _principal(vectors), "PCA"
    else:
        places, method = _neighbors(vectors, seed)
    low, high = places.min(0), places.max(0)
    return (places - low) / np.maximum(high - low, 1e-9), method


def _principal(vectors: np.ndarray) -> np.ndarray:
    centered = vectors - vectors.mean(0)
    left, scale, _ = np.linalg.svd(np.pad(centered, ((0, max(0, 2 - len(centered))), (0, 0))), full_matrices=False)
    return (left * scale)[: len(vectors), :2]


def _neighbors(vectors: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    try:
        import umap  # pyright: ignore
    except ImportError:
        from sklearn.manifold import TSNE

        settings: Any = {"init": "pca", "metric": "cosine", "perplexity": min(30, (len(vectors) - 1) / 3)}
        return TSNE(random_state=seed, **settings).fit_transform(vectors), "t-SNE"
    reducer = umap.UMAP(n_neighbors=min(15, len(vectors) - 1), metric="cosine", random_state=seed, n_jobs=1)
    return np.asarray(reducer.fit_transform(vectors)), "UMAP"


class Map:
    """The map of an index, made in a process of its own when it is first asked for.

    Args:
        file: where it is kept; made anew when other items are drawn than it was made of.
        pool: where it is made; without it, a process of its own.
    """

    def __init__(self, index: Index, file: Path, items: int = ITEMS, pool: Executor | None = None):
        self.index, self.file, self.items = index, file, items
        self._lock = threading.Lock()
        self.pool = pool
        self._future: Future | None = None
        self._data: dict | None = None
        self._drawn: list[tuple[Item, np.ndarray]] = []
        self._state: tuple = ()

    def get(self) -> dict | None:
        """The map as plain data; None while it is being made. Raises what making it raised."""
        with self._lock:
            state = (len(self.index), *sorted(self.index.counts().items()))
            if state != self._state and self._future is None:
                self._state, self._data = state, None
                self._drawn = draw(self.index, self.items)
                self._data = self._kept()
            if self._data is None and self._future is None:
                self._start()
            if self._future is not None and self._future.done():
                future, self._future = self._future, None
                try:
                    self._data = self._finish(*future.result())
                except BrokenExecutor:  # its process was killed: the next who asks has a new one
                    self.pool = None
                    raise
            return self._data

    def _digest(self) -> str:
        digest = hashlib.sha256(f"{VERSION} {self.index.model}".encode())
        for item, _ in self._drawn:
            digest.update(item.id.encode() + b"\0")
        return digest.hexdigest()

    def _kept(self) -> dict | None:
        try:
            data = json.loads(self.file.read_bytes())
            return data["map"] if data["of"] == self._digest() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _start(self) -> None:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        vectors = np.array([vector for _, vector in self._drawn], np.float32).reshape(len(self._drawn), -1)
        try:
            self._future = self.pool.submit(arrange, vectors, [item.modality for item, _ in self._drawn])
        except BrokenExecutor:
            self.pool = None
            raise

    def _finish(self, places: np.ndarray, method: str) -> dict:
        items = [item for item, _ in self._drawn]
        data = {
            "method": method,
            "items": len(self.index),
            "ids": [item.id for item in items],
            "modalities": [item.modality for item in items],
            "texts": [item.text[:120] for item in items],
            "x": [round(float(x), 4) for x in places[:, 0]],
            "y": [round(float(y), 4) for y in places[:, 1]],
        }
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.file, json.dumps({"of": self._digest(), "map": data}).encode())
        except OSError:
            pass  # a folder that may not be written: it is made again next time
        return data

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
