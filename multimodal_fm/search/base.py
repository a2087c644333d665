"""What an index holds and answers, wherever it is kept: items with unit vectors, found by cosine.

E dimensions of a vector, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Where = Mapping[str, str]  # field -> value: an item fits where each of its fields reads so, as text


@dataclass(frozen=True)
class Item:
    """One input of a collection: a text, a picture or a sound."""

    id: str  # of its content and its place: the same input of the same source has the same id in every run
    modality: str
    source: str  # the file: a shard, a table, or the medium itself
    key: str = ""  # of the sample in the shard; empty where the file is the medium
    member: str = ""  # the extension of the sample's member, as in `jpg`; empty where the file is the medium
    text: str = ""  # the text itself; of a picture or a sound what is said about it, if anything
    fields: dict[str, Any] = field(default_factory=dict)  # what its sample says besides, for filters


@dataclass(frozen=True)
class Hit:
    """An item that is near to a query."""

    item: Item
    score: float  # the cosine, -1 to 1


class Index(Protocol):
    """A collection that can be searched. Vectors are float32 of length one; every method raises UserError where the
    files or the server are not to be had or are damaged."""

    model: str  # the hash of the model that made the vectors (`collection.model_hash`); queries of others are refused
    run: str  # where that model was when the collection was made
    dim: int  # E

    def __len__(self) -> int:
        """How many items there are."""
        ...

    def counts(self) -> dict[str, int]:
        """How many items of each modality there are."""
        ...

    def search(self, vectors: np.ndarray, top: int, modality: str = "", where: Where | None = None) -> list[list[Hit]]:
        """The `top` nearest items of each query, the nearest first: of one modality, or of all.

        vectors: (Q, E) float32. A filter is exact: where `top` items fit it, `top` are returned.
        """
        ...

    def get(self, ids: Sequence[str]) -> list[tuple[Item, np.ndarray]]:
        """The items of these ids and their vectors (E,); those that are not there are left out."""
        ...

    def sample(self, modality: str, count: int) -> np.ndarray:
        """The vectors (N, E) of `count` items of a modality, or of all where there are fewer: drawn at random, the same
        ones as long as the collection stays as it is."""
        ...

    def add(self, items: Iterable[Item], vectors: np.ndarray) -> None:
        """Add items, or replace those of the same id. What this has returned from outlives a kill."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Delete items; returns how many there were."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...
