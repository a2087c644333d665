"""Queries: texts, pictures, sounds and items of the collection, added up and subtracted.

The vector of a query is the weighted sum of the unit vectors u of its parts, scaled to length one,

    q = (w1 u1 + w2 u2 + ...) / |w1 u1 + w2 u2 + ...|,

so that a part of weight 2 counts twice and one of weight -1 is what the hits should not be like. A single part of any
positive weight is the part itself.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..corpus.shards import SHARDS
from ..errors import SampleError, UserError
from ..model import Model, load
from ..pack.samples import modality_of
from .base import Index
from .index import check_model

ID = "id"  # stands in place of a modality where a part is an item of the collection
MAX_PARTS = 32
MIN_LENGTH = 1e-4  # a sum that is shorter, as a share of the weights, has no direction


@dataclass(frozen=True)
class Part:
    modality: str  # or `ID`
    value: Any  # a text; a path (`pathlib.Path`), bytes or whatever else `Model.embed` takes; the id of an item
    weight: float = 1.0

    def name(self) -> str:
        """What it is, for people: the text, the file, the id."""
        if isinstance(self.value, (str, os.PathLike)):
            return os.fspath(self.value)
        return f"{len(self.value)} bytes" if isinstance(self.value, bytes) else type(self.value).__name__


@dataclass(frozen=True)
class Query:
    parts: tuple[Part, ...]

    @property
    def ids(self) -> set[str]:
        """The items of the collection that it names."""
        return {part.value for part in self.parts if part.modality == ID}

    def to_data(self) -> list[dict[str, Any]]:
        return [{part.modality: part.name(), "weight": part.weight} for part in self.parts]


def parse_query(parts: Sequence[Mapping[str, Any]]) -> Query:
    """A query of parts like {"text": "at night", "weight": 0.5}, {"image": ...}, {"audio": ...}, {"id": ...}.

    A part has one modality, or the id of an item of the collection, and a weight, 1 where none is given; below 0 it is
    subtracted. A picture or a sound is bytes, a `pathlib.Path` or what else `Model.embed` takes, but no string: what
    comes over a wire names no file. Raises UserError that says which part is wrong.
    """
    if not parts or len(parts) > MAX_PARTS:
        raise UserError(f"a query has 1 to {MAX_PARTS} parts, not {len(parts)}")
    return Query(tuple(_parse_part(part, f"query part {number}") for number, part in enumerate(parts, 1)))


def _parse_part(part: Mapping[str, Any], name: str) -> Part:
    kinds = [str(key) for key, value in part.items() if key != "weight" and value is not None]
    if len(kinds) != 1:
        raise UserError(f"{name} is one of text, image, audio and id, not {' and '.join(kinds) or 'nothing'}")
    (kind,), value, weight = kinds, part[kinds[0]], part.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or not weight:
        raise UserError(f"{name}: its weight is {weight!r}; give a number that is not 0")
    if kind in ("text", ID):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{name}: {'the text is empty' if isinstance(value, str) else f'the {kind} is no string'}")
    elif isinstance(value, str):
        raise UserError(f"{name}: the {kind} is a string; give its bytes or a pathlib.Path")
    elif isinstance(value, (bytes, bytearray, memoryview)):
        value = bytes(value)
    return Part(kind, value, float(weight))


def to_part(given: Any) -> Mapping[str, Any]:
    """A part for `parse_query`: of a text, a file or what is one already. Raises UserError."""
    if isinstance(given, str):
        return {"text": given}
    if isinstance(given, os.PathLike):
        modality = modality_of(os.path.splitext(os.fspath(given))[1][1:].lower())
        if modality not in ("image", "audio"):
            raise UserError(f"{os.fspath(given)}: its ending does not tell a picture or a sound: say {{'image': ...}}")
        return {modality: given}
    if not isinstance(given, Mapping):
        raise UserError(f"a part of a query is a text, a pathlib.Path or a dict, not {type(given).__name__}")
    return given


def split_query(words: list[str]) -> tuple[list[str], str]:
    """Shards, and the query that stands behind them where `--in` took it too: what follows the last name of a file."""
    last = max((i for i, word in enumerate(words) if _names_shards(word)), default=0)
    return words[: last + 1], " ".join(words[last + 1 :])


def _names_shards(word: str) -> bool:
    return word.endswith(SHARDS) or "://" in word or os.path.exists(word)


def load_model(index: Index, run: str | Path = "", device: str = "auto") -> Model:
    """The model that made a collection: of the folder `run`, or of the one that the collection names.

    A collection is data: a server or a hub that it names is not opened unless `run` says so too. Raises UserError.
    """
    if not run and not os.path.isdir(index.run):
        raise UserError(f"the model that made the collection is not there ({index.run or 'it names none'}): "
                        "name its run folder with --run, run= in Python")  # fmt: skip
    model = load(run or index.run, device=device)
    check_model(index, model)
    return model


def embed_queries(index: Index, model: Model | None, queries: Sequence[Query]) -> list[np.ndarray | UserError]:
    """The unit vector (E,), float64, of each query, or what is wrong with it: one bad query spoils no other.

    The parts of all queries go through the model together, each modality once. Without a model queries may only
    consist of items of the collection. Raises UserError where the collection is of another model.
    """
    if model is not None:
        check_model(index, model)
    wrong: dict[int, UserError] = {}
    units: dict[tuple[int, int], np.ndarray] = {}
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, query in enumerate(queries):
        for place, part in enumerate(query.parts):
            places[part.modality].append((number, place))
    for modality, own in places.items():
        values = [queries[number].parts[place].value for number, place in own]
        for place, found in zip(own, _embed(index, model, modality, values), strict=True):
            if isinstance(found, UserError):
                part = queries[place[0]].parts[place[1]]
                wrong.setdefault(place[0], UserError(f"query part {place[1] + 1} ({modality} {part.name()}): {found}"))
            else:
                units[place] = found
    return [wrong.get(n) or _combine(query, [units[n, p] for p in range(len(query.parts))])
            for n, query in enumerate(queries)]  # fmt: skip


def _embed(index: Index, model: Model | None, modality: str, values: list) -> list[np.ndarray | UserError]:
    """A vector (E,) of each value, or what is wrong with it."""
    if modality == ID:
        known = {item.id: vector for item, vector in index.get(list(dict.fromkeys(values)))}
        return [known.get(value, UserError("the collection has no such item")) for value in values]
    if model is None or modality not in model.modalities:
        reads = "there is no model to read it" if model is None else f"the model reads {', '.join(model.modalities)}"
        return [UserError(reads)] * len(values)
    found: list[Any] = [_read(model, modality, value) for value in values]
    good = [number for number, one in enumerate(found) if not isinstance(one, UserError)]
    if good:
        vectors = model.embed_sequences(modality, [found[number] for number in good])[0].float().cpu().numpy()
        for number, vector in zip(good, vectors, strict=True):
            found[number] = vector if np.isfinite(vector).all() else UserError("the model makes no finite vector of it")
    return found


def _read(model: Model, modality: str, value: Any) -> Any:
    """The sequences of an input, or what is wrong with it."""
    try:
        sequences = model.tokenizers[modality].read(os.fspath(value) if isinstance(value, os.PathLike) else value)
    except (SampleError, OSError) as error:
        return UserError(error.strerror if isinstance(error, OSError) and error.strerror else str(error))
    return sequences or UserError("there is nothing in it")


def _combine(query: Query, units: list[np.ndarray]) -> np.ndarray | UserError:
    """The query's vector by the formula above."""
    weights = np.array([part.weight for part in query.parts])
    rows = np.stack(units).astype(np.float64)
    total = weights @ (rows / np.linalg.norm(rows, axis=1, keepdims=True))
    length = float(np.linalg.norm(total))
    if not length > MIN_LENGTH * np.abs(weights).sum():
        return UserError("the parts of the query cancel out, so that nothing is left to search for: change a weight")
    return total / length
