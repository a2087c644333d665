"""An index in a folder (`LocalIndex`), and where to find one: `open_index`, `check_model`.

A collection is searched by its segment, where `build_index` has made one, and exactly in all that came after it: what
is added is another part of the collection, what is deleted a note in it, and neither touches the segment.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from . import segment
from .base import Hit, Index, Item, Where
from .collection import Collection, Manifest, Part, check_queries, check_vectors, model_hash
from .graph import Settings
from .segment import Rows, Segment

RETRIES = 3  # of opening what another process replaces meanwhile
PART_ROWS = 8192  # that are added at once, and of the parts that are searched together
_hashes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of models
COPY_ROWS = 1000  # that are sent to a database at once
UNINDEXED = 100_000  # items outside of the segment, from which on a user is told


def open_index(path: str | Path) -> Index:
    """The index in a folder, or, for postgresql://..., in PostgreSQL. Raises UserError."""
    scheme, colon, _ = str(path).partition("://")
    if not colon:
        return LocalIndex(path)
    if scheme not in ("postgresql", "postgres"):
        raise UserError(f"{scheme}://: an index is a folder, or in PostgreSQL: postgresql://HOST/DATABASE")
    from .postgres import PostgresIndex

    return PostgresIndex.open(str(path))


def check_model(index: Index, model) -> None:
    """Raises UserError where an index was made by another model than this one (or than one of this `model_hash`).

    The hash of a model in memory is worked out once: it must be done with training.
    """
    if isinstance(model, str):
        own = model
    else:
        own = _hashes.get(model) or _hashes.setdefault(model, model_hash(model))
    if own != index.model:
        raise UserError(
            f"the index was made by another model ({index.run}, {index.model[:12]}) than the query's ({own[:12]}): "
            "their vectors cannot be compared; search with that run, or embed and index with this one"
        )


def build_index(
    folder: str | Path,
    settings: Settings | None = None,
    report: Callable[[str], None] = lambda line: None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Make the index of a collection's folder, unless it is there and whole; returns its manifest.

    report takes lines for the user. Raises UserError where there is nothing in it, a part of it is damaged, or another
    process makes it.
    """
    collection, settings = Collection(folder), settings or Settings()
    with collection.locked(".writer", wait=0):
        manifest = collection.manifest()
        if not sum(manifest.counts().values()):
            raise UserError(f"{folder} holds no items: mmfm embed RUN SOURCE --out {folder}")
        about = _existing(collection, manifest, settings, report)
        if about is None:
            about = segment.build(collection, settings, advance)
    for modality, (start, stop) in about["spans"].items():
        graph, how = about["graphs"].get(modality), f"searched exactly (at most {settings.exact_below} items)"
        if graph:
            how = (f"HNSW in {settings.dtype}, recall@10 {graph['recall']:.4f} of exact search at expansion "
                   f"{graph['expansion']}")  # fmt: skip
        report(f"{modality}: {stop - start} items, {how}")
    return about


def _existing(collection: Collection, manifest: Manifest, settings: Settings, report: Callable) -> dict | None:
    """The segment that is there, if it is of all that the collection holds, by these settings, and whole."""
    try:
        found = Segment(collection, manifest).about
    except (UserError, OSError, KeyError, ValueError, TypeError) as error:
        if (collection.folder / segment.FOLDER / segment.FILE).exists():
            report(f"made anew: {error}")
        return None
    if found["parts"] != [[part.name, part.sha256] for part in manifest.visible()]:
        return None
    if not all("curve" in graph for graph in found["graphs"].values()):  # it was measured by an earlier rule
        return None
    if found["settings"] == asdict(settings):
        return found
    if {**found["settings"], "recall": 0} == {**asdict(settings), "recall": 0}:
        return segment.choose_recall(collection, found, settings.recall)
    return None


@dataclass
class _State:
    """What is searched: rows, and which of them (N,) nothing has replaced or deleted. The segment is the first."""

    manifest: Manifest
    pieces: list[tuple[Rows, np.ndarray]]

    @functools.cached_property
    def counts_by_piece(self) -> list[dict[str, int]]:
        """Of each piece, its items by modality."""
        return [
            {name: int(np.count_nonzero(alive[start:stop])) for name, (start, stop) in rows.spans.items()}
            for rows, alive in self.pieces
        ]

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Items by modality."""
        counts = collections.Counter()
        for own in self.counts_by_piece:
            counts.update(own)
        return {modality: count for modality, count in sorted(counts.items()) if count}


class LocalIndex:
    """The index of a collection's folder; see `base.Index`.

    Several threads and processes may search it while another writes; each search sees what was there when it began.
    All files are verified when they are opened: a damaged one is refused by name, with what makes it anew.
    """

    def __init__(self, folder: str | Path):
        self.collection, self._lock = Collection(folder), threading.RLock()
        self._stamp: tuple = ()
        self._segment: tuple[tuple, Segment | None] = ((), None)
        self._loaded: dict[tuple[str, ...], tuple[Rows, np.ndarray]] = {}
        self._told = False
        self._state = self._current()
        self.model, self.run, self.dim = (getattr(self._state.manifest, name) for name in ("model", "run", "dim"))

    def _current(self) -> _State:
        """What the files hold now; they are read again only where they have changed."""
        with self._lock:
            attempt = 0
            while True:
                stamps = self._stamps()
                if stamps == self._stamp:
                    return self._state
                try:
                    self._state, self._stamp = self._load(stamps[1]), stamps
                except (UserError, OSError, KeyError, ValueError, TypeError) as error:
                    if attempt < RETRIES and self._stamps() != stamps:  # another process replaced what was being read
                        attempt += 1
                        continue
                    if isinstance(error, UserError):
                        raise
                    home = self.collection.folder
                    raise UserError(f"{home / segment.FOLDER}: {error!r}: mmfm index {home} makes it anew") from None

    def _stamps(self) -> tuple[tuple, tuple]:
        return _stamp(self.collection.file), _stamp(self.collection.folder / segment.FOLDER / segment.FILE)

    def _load(self, stamp: tuple) -> _State:
        manifest = self.collection.manifest()
        if stamp != self._segment[0]:
            self._segment = (stamp, Segment(self.collection, manifest) if stamp else None)
        large = self._segment[1]
        made_of = large.made_of if large else {}
        log = manifest.visible()
        later = [part for part in log if made_of.get(part.name) != part.sha256]
        groups = list(_group(later))
        loaded = {_names(group): self._read(group, manifest) for group in groups}
        self._loaded = {names: one for names, one in loaded.items() if isinstance(one, tuple)}
        hashes = [one if isinstance(one, np.ndarray) else _in_order(*one) for one in loaded.values()]
        living = segment.last_of_each(hashes, [isinstance(one, np.ndarray) for one in loaded.values()])
        pieces = [(one[0], live[one[1]]) for one, live in zip(loaded.values(), living) if isinstance(one, tuple)]
        if large:
            alive = _alive_in(large, {part.name: part.sha256 for part in log}, hashes)
            pieces.insert(0, (large, alive))
        self._tell(sum(part.rows for part in later if not part.deletes))
        return _State(manifest, pieces)

    def _read(self, group: list[Part], manifest: Manifest) -> tuple[Rows, np.ndarray] | np.ndarray:
        """Rows and their places in the log, or the hashes of deleted ids."""
        if group[0].deletes:
            return segment.hash_ids(self.collection.read_ids(group[0]))
        return self._loaded.get(_names(group)) or segment.rows_of_parts(self.collection, group, manifest.dim)

    def _tell(self, unindexed: int) -> None:
        if unindexed > UNINDEXED and not self._told:
            self._told = True
            print(f"{self.collection.folder}: {unindexed} items are in memory and searched exactly; mmfm index "
                  f"{self.collection.folder} makes it faster", file=sys.stderr)  # fmt: skip

    def __len__(self) -> int:
        return sum(self._current().counts.values())

    def counts(self) -> dict[str, int]:
        return dict(self._current().counts)

    def search(self, vectors: np.ndarray, top: int, modality: str = "", where: Where | None = None) -> list[list[Hit]]:
        """See `base.Index.search`. Raises UserError where the index is empty or the query is no vector of its own."""
        state = self._current()
        counts = state.counts
        if not counts:
            raise UserError(f"{self.collection.folder} is empty: mmfm embed RUN SOURCE --out {self.collection.folder}")
        if modality and modality not in counts:
            raise UserError(f"{self.collection.folder} holds {', '.join(counts)}, no {modality!r}")
        queries = check_queries(vectors, self.dim, top)
        found, at = [], 0
        for (piece, alive), own in zip(state.pieces, state.counts_by_piece):
            mask = alive & piece.fits(tuple(sorted((k, str(v)) for k, v in where.items()))) if where else alive
            for name in [modality] if modality else counts:
                scores, rows = piece.search(queries, top, name, mask, None if where else own.get(name, 0))
                found.append((scores, rows + at))
            at += len(piece)
        return self._hits(state, *segment.merge(found, top))

    def _hits(self, state: _State, scores: np.ndarray, rows: np.ndarray) -> list[list[Hit]]:
        there = np.isfinite(scores)
        flat, at = rows[there], 0
        items: list[Any] = [None] * len(flat)
        for piece, _ in state.pieces:
            own = np.flatnonzero((flat >= at) & (flat < at + len(piece)))
            for place, item in zip(own.tolist(), piece.items(flat[own] - at)):
                items[place] = item
            at += len(piece)
        hits = map(Hit, items, scores[there].clip(-1, 1).tolist())
        return [list(itertools.islice(hits, count)) for count in there.sum(1).tolist()]

    def get(self, ids: Sequence[str]) -> list[tuple[Item, np.ndarray]]:
        """See `base.Index.get`."""
        found: dict[str, tuple[Item, np.ndarray]] = {}
        for piece, rows in self._find(ids):
            vectors = piece.vectors[torch.from_numpy(rows)].float().numpy()
            for item, vector in zip(piece.items(rows), vectors):
                found[item.id] = item, vector / np.linalg.norm(vector)
        return [found[one] for one in dict.fromkeys(ids) if one in found]

    def sample(self, modality: str, count: int) -> np.ndarray:
        """See `base.Index.sample`."""
        living = []
        for piece, alive in self._current().pieces:
            start, stop = piece.spans.get(modality, (0, 0))
            living.append((piece, start + np.flatnonzero(alive[start:stop])))
        total, at, found = sum(len(rows) for _, rows in living), 0, [np.empty((0, self.dim), np.float32)]
        chosen = np.sort(np.random.default_rng(0).choice(total, min(count, total), replace=False)) if total else []
        for piece, rows in living:
            own = rows[[number - at for number in chosen if at <= number < at + len(rows)]]
            found.append(piece.vectors[torch.from_numpy(own)].float().numpy())
            at += len(rows)
        return np.concatenate(found)

    def _find(self, ids: Sequence[str]) -> list[tuple[Rows, np.ndarray]]:
        """The living rows of these ids."""
        wanted, hashes, found = set(ids), segment.hash_ids(list(ids)), []
        for piece, alive in self._current().pieces if len(hashes) else ():
            rows = np.unique(np.concatenate([*piece.rows_of(hashes), np.zeros(0, np.int64)]))
            rows = rows[alive[rows]]
            kept = rows[[item.id in wanted for item in piece.items(rows)]] if len(rows) else rows
            if len(kept):
                found.append((piece, kept))
        return found

    def add(self, items: Iterable[Item], vectors: np.ndarray) -> None:
        """See `base.Index.add`. Raises UserError where items and vectors do not go together."""
        items = list(items)
        vectors = check_vectors(vectors, len(items), self.dim)
        for item in items:
            if not item.id or not item.modality:
                raise UserError(f"item {item.id or item.key or item.source!r} has no id or no modality")
            try:
                json.dumps(item.fields)
            except (TypeError, ValueError) as error:
                raise UserError(f"item {item.id}: its fields are no JSON: {error}") from None
        for start in range(0, len(items), PART_ROWS):
            self.collection.append(items[start : start + PART_ROWS], vectors[start : start + PART_ROWS])

    def delete(self, ids: Sequence[str]) -> int:
        """See `base.Index.delete`."""
        there = [item.id for piece, rows in self._find(ids) for item in piece.items(rows)]
        if there:
            self.collection.delete(there)
        return len(there)

    def close(self) -> None:
        """Let go of the files."""
        with self._lock:
            self._stamp, self._segment, self._loaded = (), ((), None), {}
            self._state = _State(self._state.manifest, [])


def _stamp(file: Path) -> tuple:
    """What changes when a file is replaced; empty where there is none."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return ()
    return status.st_mtime_ns, status.st_ino, status.st_size


def _names(parts: list[Part]) -> tuple[str, ...]:
    """What tells parts from others, in a folder that was made anew too."""
    return tuple(f"{part.name} {part.sha256}" for part in parts)


def _group(parts: list[Part]) -> Iterable[list[Part]]:
    """Parts that follow each other, together at most `PART_ROWS` rows where they are small; deletions alone."""
    group: list[Part] = []
    for part in parts:
        if group and (part.deletes or sum(one.rows for one in group) + part.rows > PART_ROWS):
            yield group
            group = []
        if part.deletes:
            yield [part]
        else:
            group.append(part)
    if group:
        yield group


def _in_order(rows: Rows, order: np.ndarray) -> np.ndarray:
    """The hashes of rows in the order of the log."""
    hashes = np.empty(len(rows), "<u8")
    hashes[order] = rows.hashes
    return hashes


def _alive_in(large: Segment, log: dict[str, str], later: list[np.ndarray]) -> np.ndarray:
    """Which rows (N,) of the segment are of parts that still count, and not replaced or deleted later."""
    still = np.array([log.get(name) == sha256 for name, sha256 in large.about["parts"]], bool)
    alive = still[large.part_of_row] if len(large) else np.zeros(0, bool)
    for hashes in later:
        alive[np.concatenate([*large.rows_of(hashes), np.zeros(0, np.int64)])] = False
    return alive


def copy_to(folder: str | Path, url: str, name: str = "", report: Callable[[str], None] = lambda line: None) -> int:
    """Copy a collection into PostgreSQL, in whose table NAME it is then kept; returns how many items there are.

    Raises UserError.
    """
    from .postgres import PostgresIndex

    local = LocalIndex(folder)
    name = name or Path(folder).resolve().name
    target = PostgresIndex.create(url, name, local.model, local.run, local.dim)
    done = 0
    for piece, alive in local._current().pieces:
        for rows in np.array_split(np.flatnonzero(alive), -(-int(alive.sum()) // COPY_ROWS) or 1):
            vectors = piece.vectors[torch.from_numpy(rows)].float().numpy()
            if len(rows):
                target.add(piece.items(rows), check_vectors(vectors, len(rows), local.dim))
            done += len(rows)
            report(f"{done} items copied")
    target.build()
    target.close()
    return done
