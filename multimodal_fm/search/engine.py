"""Searches a collection: hits by modality, near copies folded, scores that can be understood.

Vectors of two modalities lie in two regions of the space (the modality gap: Liang et al. 2022, arXiv:2203.02053), so
that nearly every text is nearer to a text than the best picture is. Scores are therefore compared within a modality
only, and beside each stands what it means in this collection: the per cent of a random sample of its items of that
modality that are farther from the query.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..errors import UserError, printable
from ..model import Model
from .base import Hit, Index, Item, Where
from .query import Query, embed_queries

NEAR_COPY = 0.98  # a cosine from which on two items of a modality are near copies
BACKGROUND = 1000  # items of a modality that scores are compared with
BACKGROUND_SECONDS = 600.0  # after which they are drawn again: the collection may have grown
MARGIN = 8  # hits that are looked at beyond those wanted, so that ties are told apart by exact scores
MAX_CANDIDATES = 4096  # that are looked at for one query where nearly all hits are near copies of each other
DECIMALS = 7  # of scores by which hits are ranked; below it float32 is noise, and ids decide
TIE = 1e-6  # by which a score of the background has to be lower to count as farther
MAX_DEPTH = 16  # of the fields of an item that are told

_samples: weakref.WeakKeyDictionary[Index, dict[str, tuple[float, np.ndarray]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Found:
    """A hit and what is folded into it."""

    item: Item
    score: float  # cosine with the query, -1 to 1
    standing: float  # per cent of the background that is farther from the query
    copies: list[Item] = field(default_factory=list)  # near copies of it among the hits, the nearest to the query first


@dataclass(frozen=True)
class Background:
    """The scores of a random sample of a collection's items of one modality."""

    count: int
    median: float
    highest: float


@dataclass(frozen=True)
class Results:
    """What a query found, by modality; `results["image"]` is the list of its pictures."""

    query: Query
    vector: np.ndarray  # (E,) of the query, float64
    hits: dict[str, list[Found]]
    background: dict[str, Background]

    def __getitem__(self, modality: str) -> list[Found]:
        return self.hits.get(modality, [])

    def __str__(self) -> str:
        return render(self)

    def rows(self) -> list[dict[str, Any]]:
        """All hits in plain JSON types, those of one modality after those of another."""
        return [found_to_data(one) for found in self.hits.values() for one in found]

    def to_data(self) -> dict[str, Any]:
        """Plain JSON types."""
        hits = {modality: [found_to_data(one) for one in found] for modality, found in self.hits.items()}
        background = {modality: asdict(own) for modality, own in self.background.items()}
        return {"query": _plain(self.query.to_data()), "hits": hits, "background": background}


@dataclass(frozen=True)
class _Options:
    top: int
    to: str
    where: Where | None
    near: float | None  # None: nothing is folded
    min_score: float


def search(index: Index, model: Model | None, query: Query, top: int = 10, to: str = "", **options) -> Results:
    """What one query finds; see `search_many`."""
    return search_many(index, model, [query], top, to, **options)[0]


def search_many(index: Index, model: Model | None, queries: Sequence[Query], top: int = 10, to: str = "",
                **options) -> list[Results]:  # fmt: skip
    """What each query finds: of each modality, or of `to`, the `top` nearest items, near copies folded.

    Arguments as for `attempt_many`. Raises UserError for the first query that is wrong.
    """
    found = attempt_many(index, model, queries, top, to, **options)
    answers = [one for one in found if isinstance(one, Results)]
    if len(answers) < len(found):
        raise next(one for one in found if isinstance(one, UserError))
    return answers


def attempt_many(
    index: Index,
    model: Model | None,
    queries: Sequence[Query],
    top: int = 10,
    to: str = "",
    where: Where | None = None,
    fold: bool = True,
    near: float = NEAR_COPY,
    min_score: float = -math.inf,
) -> list[Results | UserError]:
    """What each query finds, or what is wrong with it, for callers that answer several people at once.

    model: that of the collection; None where all queries consist of items of the collection. Items that a query names
    are not among its own hits. where: only items whose fields have these values. fold: of hits of one modality whose
    cosine with each other is at least `near`, or whose texts are equal, only the first is told, with the others as its
    `copies`: those among the hits that were looked at to find `top`. min_score: hits below it are left out.

    Scores are computed in float64 from the vectors that the collection holds, whatever it searches with; equal ones
    are told apart by the id. Raises UserError where the options are wrong or the collection is of another model.
    """
    if top < 1 or top > MAX_CANDIDATES:
        raise UserError(f"top is 1 to {MAX_CANDIDATES}, not {top}")
    modalities = _targets(index, model, to)
    options = _Options(top, to, where, near if fold else None, min_score)
    vectors = embed_queries(index, model, queries)
    right = [number for number, vector in enumerate(vectors) if not isinstance(vector, UserError)]
    answers: list[Any] = list(vectors)
    for number in right:
        answers[number] = Results(queries[number], np.asarray(vectors[number]), {}, {})
    for modality in modalities if right else ():
        stack = np.stack([np.asarray(vectors[number]) for number in right])
        background = get_background(index, modality) @ stack.T
        try:
            found = _search_modality(index, stack, [queries[number].ids for number in right], modality, options)
        except UserError:
            _samples[index].pop(modality, None)  # all of its items may have been deleted since they were drawn
            raise
        for place, number in enumerate(right):
            scores = background[:, place]
            if to or found[place]:
                answers[number].hits[modality] = [_with_standing(one, scores) for one in found[place]]
            if len(scores):
                answers[number].background[modality] = Background(
                    len(scores), float(np.median(scores)), float(scores.max())
                )
    return answers


def _targets(index: Index, model: Model | None, to: str) -> list[str]:
    """The modalities to be searched: those that the collection has. They are known by their background, since to count
    a large collection for each query would take long."""
    asked = [to] if to else sorted(index.counts()) if model is None else model.modalities
    if not (there := [modality for modality in asked if len(get_background(index, modality))]):
        have = ", ".join(index.counts())
        other = f"--to {to}: the collection has {have}" if to else f"the model reads nothing of the collection's {have}"
        raise UserError(other if have else "the collection is empty")
    return there


def get_background(index: Index, modality: str) -> np.ndarray:
    """Unit vectors (N, E) of a random sample of a modality, float64; kept for ten minutes."""
    kept = _samples.setdefault(index, {})
    drawn, sample = kept.get(modality, (-math.inf, np.empty(0)))
    if not len(sample) or time.monotonic() - drawn > BACKGROUND_SECONDS:
        sample = _unit(index.sample(modality, BACKGROUND).reshape(-1, index.dim))
        kept[modality] = (time.monotonic(), sample)
    return sample


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _with_standing(found: Found, background: np.ndarray) -> Found:
    farther = background < found.score - TIE
    return Found(found.item, found.score, 100.0 * float(farther.mean()) if len(farther) else 100.0, found.copies)


def _search_modality(
    index: Index, vectors: np.ndarray, named: list[set[str]], modality: str, options: _Options
) -> list[list[Found]]:
    """The hits of each query; as long as folding leaves too few of them, more are asked for."""
    found: list[list[Found]] = [[] for _ in vectors]
    pending = list(range(len(vectors)))
    ask = options.top * (1 if options.near is None else 2) + MARGIN + max(map(len, named))
    while pending:
        answers = index.search(vectors[pending].astype(np.float32), ask, modality, options.where)
        stored = dict.fromkeys(hit.item.id for hits in answers for hit in hits)
        kept = {item.id: vector for item, vector in index.get(list(stored))} if stored else {}
        again = []
        for number, hits in zip(pending, answers, strict=True):
            own = [hit for hit in hits if hit.item.id in kept and hit.item.id not in named[number]]
            found[number] = _rank(vectors[number], own, kept, options)
            lowest = hits[-1].score if hits else -math.inf
            if len(found[number]) < options.top and len(hits) == ask < MAX_CANDIDATES and lowest >= options.min_score:
                again.append(number)
        pending, ask = again, min(4 * ask, MAX_CANDIDATES)
    return found


def _rank(query: np.ndarray, hits: list[Hit], vectors: dict[str, np.ndarray], options: _Options) -> list[Found]:
    """Hits by exact score, copies folded into the first of them."""
    if not hits:
        return []
    rows = _unit(np.stack([vectors[hit.item.id] for hit in hits]))
    scores = np.clip(rows @ query, -1.0, 1.0)
    order = sorted(range(len(hits)), key=lambda n: (-round(float(scores[n]), DECIMALS), hits[n].item.id))
    order = [number for number in order if scores[number] >= options.min_score]
    found: list[Found] = []
    while order and len(found) < options.top:
        first, *rest = order
        copies = _copies(first, rest, hits, rows, options.near) if options.near is not None else set()
        found.append(Found(hits[first].item, float(scores[first]), 0.0, [hits[n].item for n in rest if n in copies]))
        order = [number for number in rest if number not in copies]
    return found


def _copies(first: int, rest: list[int], hits: list[Hit], rows: np.ndarray, near: float) -> set[int]:
    """Which of the rest are near copies of the first: by their vectors, or of an equal text."""
    cosines, item = rows[rest] @ rows[first] if rest else (), hits[first].item
    text = item.text.strip() if item.modality == "text" else ""
    return {
        number
        for number, cosine in zip(rest, cosines, strict=True)
        if cosine >= near or (text and hits[number].item.text.strip() == text)
    }


def found_to_data(found: Found) -> dict[str, Any]:
    """Plain JSON types; numbers are finite and strings can be written as UTF-8."""
    item = vars(found.item)  # not `asdict`, which copies a stranger's fields to any depth
    copies = [{"id": copy.id, "source": copy.source, "key": copy.key} for copy in found.copies]
    return _plain({**item, "score": found.score, "standing": found.standing, "copies": copies})


def _plain(value: Any, depth: int = 0) -> Any:
    """What every JSON parser reads: a stranger's fields may hold NaN, halves of characters, and any depth."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (dict, list, tuple)) and depth > MAX_DEPTH:
        return None
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(own, depth + 1) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own, depth + 1) for own in value]
    return value if value is None or isinstance(value, (bool, int, float)) else _plain(str(value))


def render(results: Results, notes: Callable[[Found], list[str]] = lambda found: []) -> str:
    """Lines for a person, under each modality's name, and what the figures mean. `notes` says more about a hit."""
    lines = []
    for modality, found in results.hits.items():
        lines += [f"\n{modality}", *(f"  {_line(one, notes(one))}" for one in found)]
    if not any(results.hits.values()):
        return "nothing was found"
    drawn = ", ".join(f"{results.background[modality].count:,} {modality}" for modality in results.hits)
    lines.append(f"\nScores are cosines, to be compared within a modality; % is how many of the items drawn from the "
                 f"collection ({drawn}) are farther.")  # fmt: skip
    return "\n".join(lines)


def _line(found: Found, notes: list[str]) -> str:
    item, copies = found.item, len(found.copies)
    name = ".".join(filter(None, (item.key, item.member)))
    notes = [*notes, f"and {copies} near {'copies' if copies > 1 else 'copy'}"] if copies else notes
    label = item.fields.get("label", item.fields.get("cls"))
    parts = [
        f"{found.score:6.3f} {found.standing:5.1f}%",
        f"{item.source} {name}".strip(),
        f"[{label}]" if isinstance(label, (str, int, float)) else "",
        _shorten(item.text),
        f"({'; '.join(notes)})" if notes else "",
    ]
    return printable("  ".join(filter(None, parts)))


def _shorten(text: str, limit: int = 80) -> str:
    text = " ".join(text[: 8 * limit].split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
