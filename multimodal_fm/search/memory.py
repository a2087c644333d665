"""A collection in memory, searched exactly: what `mmfm search RUN QUERY --in SHARDS` embeds on the fly."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from ..corpus.fields import matches
from ..corpus.shards import Corpus
from ..errors import SampleError
from ..evals.embed_corpus import EmbeddedCorpus, embed_corpus, embed_sequences
from ..model import Model
from .base import Hit, Index, Item, Where
from .collection import check_queries, check_vectors, model_hash


class MemoryIndex(Index):
    """An `Index` of which nothing outlives the process. E dimensions."""

    def __init__(self, model: str, run: str, dim: int):
        self.model, self.run, self.dim = model, run, dim
        self._items: dict[str, tuple[Item, np.ndarray]] = {}
        self._stacks: dict[str, tuple[list[Item], np.ndarray]] = {}  # by modality; made when they are asked for

    def __len__(self) -> int:
        return len(self._items)

    def counts(self) -> dict[str, int]:
        return dict(Counter(item.modality for item, _ in self._items.values()))

    def _stack(self, modality: str) -> tuple[list[Item], np.ndarray]:
        """The items of a modality, or of all, and their vectors (N, E)."""
        if modality not in self._stacks:
            chosen = [pair for pair in self._items.values() if not modality or pair[0].modality == modality]
            vectors = np.stack([vector for _, vector in chosen]) if chosen else np.empty((0, self.dim), np.float32)
            self._stacks[modality] = [item for item, _ in chosen], vectors
        return self._stacks[modality]

    def search(self, vectors: np.ndarray, top: int, modality: str = "", where: Where | None = None) -> list[list[Hit]]:
        vectors = check_queries(vectors, self.dim, top)
        items, stack = self._stack(modality)
        if where:
            kept = [number for number, item in enumerate(items) if matches(item.fields, dict(where))]
            items, stack = [items[number] for number in kept], stack[kept]
        answers = []
        for query in vectors:  # one by one, so that a query's scores do not depend on the others
            scores = stack @ query
            order = np.argsort(-scores, kind="stable")[:top]
            answers.append([Hit(items[number], float(scores[number])) for number in order])
        return answers

    def get(self, ids: Sequence[str]) -> list[tuple[Item, np.ndarray]]:
        return [self._items[one] for one in ids if one in self._items]

    def sample(self, modality: str, count: int) -> np.ndarray:
        _, stack = self._stack(modality)
        if len(stack) <= count:
            return stack
        return stack[np.random.default_rng(0).choice(len(stack), count, replace=False)]

    def add(self, items: Iterable[Item], vectors: np.ndarray) -> None:
        items = list(items)
        vectors = check_vectors(vectors, len(items), self.dim)
        self._items |= {item.id: (item, vector) for item, vector in zip(items, vectors, strict=True)}
        self._stacks = {}

    def delete(self, ids: Sequence[str]) -> int:
        self._stacks = {}
        return sum(self._items.pop(one, None) is not None for one in dict.fromkeys(ids))

    def close(self) -> None:
        pass


class CorpusIndex(MemoryIndex):
    """The inputs of a corpus, each distinct one once, as `embed_corpus` gives them.

    Attributes:
        skipped: what could not be read, rows as in quarantine.jsonl.
    """

    def __init__(self, model: Model, corpus: Corpus):
        embedded = embed_corpus(model, corpus)
        dim = next((inputs.vectors.shape[1] for inputs in embedded.inputs.values()), 0)
        super().__init__(model_hash(model), str(model.origin[0]) if model.origin else "", dim)
        self._model, self._embedded = model, embedded
        self._places: dict[str, tuple[str, int]] = {}  # by id: the modality, and the number among its inputs
        for modality, inputs in embedded.inputs.items():
            items = [_item(model, embedded, modality, number) for number in range(len(inputs.vectors))]
            self._places |= {item.id: (modality, number) for number, item in enumerate(items)}
            self.add(items, inputs.vectors.numpy())
        self.skipped = embedded.skipped

    def notes(self, item: Item, query: np.ndarray) -> list[str]:
        """Which input of its sample an item is and which of its windows is the nearest to the query (E,), where there
        are several, and in how many more samples it is."""
        modality, number = self._places[item.id]
        holders = self._embedded.inputs[modality].samples[number]
        own = self._embedded.sample_inputs[holders[0]][modality]
        notes = [f"{modality} {own.index(number) + 1} of {len(own)}"] if len(own) > 1 else []
        try:
            windows = self._model.tokenizers[modality].read(self._embedded.load(self._model, modality, number))
        except SampleError:  # the shard has changed since
            windows = []
        if len(windows) > 1:
            vectors = embed_sequences(self._model, modality, [[window] for window in windows])[0].numpy()
            notes.append(f"window {int((vectors @ query).argmax()) + 1} of {len(windows)}")
        return notes + ([f"and {len(holders) - 1} more samples"] if len(holders) > 1 else [])


def _item(model: Model, embedded: EmbeddedCorpus, modality: str, number: int) -> Item:
    inputs = embedded.inputs[modality]
    sample = inputs.samples[number][0]
    shard, key, text = embedded.corpus.shard(sample), embedded.key(sample), inputs.texts[number]
    place = embedded.sample_inputs[sample][modality].index(number)
    members = sorted(set(model.tokenizers[modality].extensions).intersection(embedded.corpus.measures(sample)))
    label = embedded.field(sample, ".cls")
    return Item(
        id=hashlib.blake2b(
            f"{shard}\0{key}\0{modality}\0{place}".encode("utf-8", "surrogatepass"), digest_size=16
        ).hexdigest(),
        modality=modality,
        source=shard,
        key=key,
        member=members[0] if len(members) == 1 else "",
        text=next(iter(embedded.texts(sample)), "") if text is None else text,
        fields=embedded.metadata[sample] | ({"cls": label} if label is not None else {}),
    )
