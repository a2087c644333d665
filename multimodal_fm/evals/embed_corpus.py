"""A corpus as a model sees it: each distinct thing once, with its vector, and the items that hold it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

from ..corpus.fields import lookup, parse_map
from ..corpus.shards import Corpus
from ..errors import Lost
from ..model import Model
from ..stream.quarantine import ledger_row


@dataclass
class Things:
    """The distinct things of one kind: T of them."""

    vectors: torch.Tensor  # (T, E) unit
    features: torch.Tensor  # (T, D)
    raw: list  # what `read` took: text as a string, else the item's members of that kind
    items: list[list[int]]  # the items that hold each


@dataclass
class Encoded:
    """The items of a corpus, the things in them, and what could not be read."""

    corpus: Corpus
    things: dict[str, Things]  # by kind
    rows: list[dict]  # each item's JSON
    held: list[dict[str, list[int]]]  # each item's things by kind
    lost: list[dict] = field(default_factory=list)

    def texts(self, item: int) -> list[str]:
        return [self.things["text"].raw[t] for t in self.held[item].get("text", [])]

    def key(self, item: int) -> str:
        return self.corpus.key(item)

    def value(self, item: int, name: str) -> str | None:
        """The item's JSON field (dots go deeper), or `.cls`, as text; None where it has none."""
        if name == ".cls":
            raw = self.corpus.raw(item, ("cls",))
            return raw["cls"].decode(errors="replace").strip() if raw else None
        found = lookup(self.rows[item], name)
        return None if found is None else str(found)

    def groups(self, item: int, name: str) -> set[str]:
        """What the item means: its field `name`, or where no name is given its texts, or else the item alone."""
        value = self.value(item, name) if name else None
        if value is not None:
            return {value}
        texts = {text.strip() for text in self.texts(item)} if not name and "text" in self.things else set()
        return texts or {f"item {item}"}


def encode(model: Model, corpus: Corpus, parts: list[str] = (), progress=lambda done, total: None) -> Encoded:
    """Read every item and embed every distinct thing (by its bytes) once. Nothing is random in it."""
    readers = {kind: _Reader(model, kind) for kind in model.kinds if not parts or kind in parts}
    rows, held, lost = [], [], []
    for item in range(len(corpus)):
        raw, broken = corpus.read(item)
        rows.append(parse_map(raw.get("json")))
        mine, failed = (
            {},
            [(ending, error) for ending, error in broken if any(ending in r.endings for r in readers.values())],
        )
        for kind, reader in readers.items():
            if numbers := reader.add(item, raw, failed):
                mine[kind] = numbers
        lost += [ledger_row(corpus, item, kind, error, None) for kind, error in failed]
        held.append(mine)
        progress(item + 1, len(corpus))
    things = {kind: reader.things() for kind, reader in readers.items() if reader.raw}
    return Encoded(corpus, things, rows, held, lost)


class _Reader:
    """Collects one kind's distinct things and embeds them a few hundred at a time."""

    def __init__(self, model: Model, kind: str):
        self.model, self.kind, self.tokenizer = model, kind, model.tokenizers[kind]
        self.endings = self.tokenizer.module.extensions
        self.raw, self.items, self.waiting = [], [], []
        self.known: dict[bytes, int] = {}  # content -> number
        self.made: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, item: int, raw: dict, failed: list) -> list[int]:
        """The numbers of the item's things of this kind; what cannot be read goes to `failed` with the reason."""
        numbers = []
        try:
            for thing in things_in(self.tokenizer, raw):
                number = self._number(thing)
                if number not in numbers:
                    numbers.append(number)
                    self.items[number].append(item)
        except Lost as error:
            failed.append((self.kind, error))
        return numbers

    def _number(self, thing) -> int:
        name = _content(thing)
        if name not in self.known:
            sequences = self.tokenizer.module.read(self.tokenizer.settings, thing)
            self.known[name] = len(self.raw)
            self.raw.append(thing)
            self.items.append([])
            self.waiting.append(sequences)
            if len(self.waiting) == 256:
                self._flush()
        return self.known[name]

    def _flush(self) -> None:
        if self.waiting:
            self.made.append(tuple(t.cpu() for t in self.model.vectors(self.kind, self.waiting)))
            self.waiting = []

    def things(self) -> Things:
        self._flush()
        return Things(*(torch.cat(values) for values in zip(*self.made, strict=True)), self.raw, self.items)


def things_in(tokenizer, raw: dict) -> list:
    """What the item offers of one kind, each in the form that `read` takes. Raises Lost."""
    members = {ending: data for ending, data in raw.items() if ending in tokenizer.module.extensions}
    if not members or not hasattr(tokenizer.module, "things"):
        return [members] if members else []
    return tokenizer.module.things(tokenizer.settings, members)


def _content(thing) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in sorted(thing.items()) if isinstance(thing, dict) else [("", thing.encode("utf-8", "surrogatepass"))]:
        digest.update(part[0].encode() + b"\0" + part[1])
    return digest.digest()


def figure(values, clusters, chance: float | None, median: bool = False, weights=None) -> dict:
    """The mean (or median) of `values` (Q,) with a 95 % interval from 1,000 bootstrap draws of whole clusters (Q,).

    With weights (Q,) the sum of the values over the sum of the weights.
    """
    generator = np.random.default_rng(0)
    _, cluster = np.unique(clusters, return_inverse=True)
    number = cluster.max() + 1
    draws = generator.multinomial(number, np.full(number, 1 / number), size=1000)  # how often each cluster is drawn
    if median:
        order = np.argsort(values, kind="stable")
        weight = np.cumsum(draws[:, cluster[order]], axis=1)
        drawn = values[order][(weight < weight[:, -1:] / 2).sum(1)]
        value = float(np.median(values))
    else:
        weights = np.ones(len(values)) if weights is None else weights
        sums = np.bincount(cluster, weights=values, minlength=number)
        counts = np.bincount(cluster, weights=weights, minlength=number)
        drawn = (draws @ sums) / (draws @ counts)
        value = float(values.sum() / weights.sum())
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high), "chance": chance, "n": len(values)}


def labelled(encoded: Encoded, kind: str, name: str, group: str) -> tuple | None:
    """Features (T, D), labels (T,), groups (T,) and the commonest label's share, of one kind's labelled things.

    None where there are fewer than two labels, or too few things to split. Without a group each thing is its own.
    """
    things = encoded.things[kind]
    rows = [(t, encoded.value(items[0], name), items[0]) for t, items in enumerate(things.items)]
    rows = [row for row in rows if row[1] is not None]
    names, labels = np.unique([label for _, label, _ in rows], return_inverse=True)
    if len(names) < 2 or len(rows) < 10 or np.bincount(labels).max() < 2:
        return None
    own = [encoded.value(item, group) if group else None for _, _, item in rows]
    own = [f"thing {thing}" if value is None else value for (thing, _, _), value in zip(rows, own, strict=True)]
    groups = np.unique(own, return_inverse=True)[1]
    if groups.max() < len(names):  # a group a label: what is held out could not be learned from the rest
        groups = np.arange(len(rows))
    features = things.features[[thing for thing, _, _ in rows]].double().numpy()
    return features, labels, groups, float(np.bincount(labels).max() / len(labels))
