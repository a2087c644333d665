"""A corpus as a model sees it: each distinct thing once, with its vector, and the samples that hold it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

from ..corpus.fields import lookup, parse_map
from ..corpus.shards import Corpus
from ..errors import SampleError
from ..model import Model
from ..stream.quarantine import ledger_row


@dataclass
class Things:
    """The distinct things of one modality: T of them."""

    vectors: torch.Tensor  # (T, E) unit
    features: torch.Tensor  # (T, D)
    raw: list  # what `read` took: text as a string, else the sample's members of that modality
    samples: list[list[int]]  # the samples that hold each


@dataclass
class Encoded:
    """The samples of a corpus, the things in them, and what could not be read."""

    corpus: Corpus
    things: dict[str, Things]  # by modality
    rows: list[dict]  # each sample's JSON
    held: list[dict[str, list[int]]]  # each sample's things by modality
    lost: list[dict] = field(default_factory=list)

    def texts(self, sample: int) -> list[str]:
        return [self.things["text"].raw[t] for t in self.held[sample].get("text", [])]

    def key(self, sample: int) -> str:
        return self.corpus.key(sample)

    def value(self, sample: int, name: str) -> str | None:
        """The sample's JSON field (dots go deeper), or `.cls`, as text; None where it has none."""
        if name == ".cls":
            raw = self.corpus.raw(sample, ("cls",))
            return raw["cls"].decode(errors="replace").strip() if raw else None
        found = lookup(self.rows[sample], name)
        return None if found is None else str(found)

    def groups(self, sample: int, name: str) -> set[str]:
        """What the sample means: its field `name`, or where no name is given its texts, or else the sample alone."""
        value = self.value(sample, name) if name else None
        if value is not None:
            return {value}
        texts = {text.strip() for text in self.texts(sample)} if not name and "text" in self.things else set()
        return texts or {f"sample {sample}"}


def encode(model: Model, corpus: Corpus, parts: list[str] = (), progress=lambda done, total: None) -> Encoded:
    """Read every sample and embed every distinct thing (by its bytes) once. Nothing is random in it."""
    readers = {modality: _Reader(model, modality) for modality in model.modalities if not parts or modality in parts}
    rows, held, lost = [], [], []
    for sample in range(len(corpus)):
        raw, broken = corpus.read(sample)
        rows.append(parse_map(raw.get("json")))
        mine, failed = (
            {},
            [(ending, error) for ending, error in broken if any(ending in r.endings for r in readers.values())],
        )
        for modality, reader in readers.items():
            if numbers := reader.add(sample, raw, failed):
                mine[modality] = numbers
        lost += [ledger_row(corpus, sample, modality, error, None) for modality, error in failed]
        held.append(mine)
        progress(sample + 1, len(corpus))
    things = {modality: reader.things() for modality, reader in readers.items() if reader.raw}
    return Encoded(corpus, things, rows, held, lost)


class _Reader:
    """Collects one modality's distinct things and embeds them a few hundred at a time."""

    def __init__(self, model: Model, modality: str):
        self.model, self.modality, self.tokenizer = model, modality, model.tokenizers[modality]
        self.endings = self.tokenizer.extensions
        self.raw, self.samples, self.waiting = [], [], []
        self.known: dict[bytes, int] = {}  # content -> number
        self.made: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, sample: int, raw: dict, failed: list) -> list[int]:
        """The numbers of the sample's things of this modality; what cannot be read goes to `failed` with the reason."""
        numbers = []
        try:
            for thing in things_in(self.tokenizer, raw):
                number = self._number(thing)
                if number not in numbers:
                    numbers.append(number)
                    self.samples[number].append(sample)
        except SampleError as error:
            failed.append((self.modality, error))
        return numbers

    def _number(self, thing) -> int:
        name = _content(thing)
        if name not in self.known:
            sequences = self.tokenizer.read(thing)
            self.known[name] = len(self.raw)
            self.raw.append(thing)
            self.samples.append([])
            self.waiting.append(sequences)
            if len(self.waiting) == 256:
                self._flush()
        return self.known[name]

    def _flush(self) -> None:
        if self.waiting:
            self.made.append(tuple(t.cpu() for t in self.model.vectors(self.modality, self.waiting)))
            self.waiting = []

    def things(self) -> Things:
        self._flush()
        return Things(*(torch.cat(values) for values in zip(*self.made, strict=True)), self.raw, self.samples)


def things_in(tokenizer, raw: dict) -> list:
    """What the sample offers of one modality, each in the form that `read` takes. Raises SampleError."""
    members = {ending: data for ending, data in raw.items() if ending in tokenizer.extensions}
    return tokenizer.split_inputs(members) if members else []


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


def labelled(encoded: Encoded, modality: str, name: str, group: str) -> tuple | None:
    """Features (T, D), labels (T,), groups (T,) and the commonest label's share, of one modality's labelled things.

    None where there are fewer than two labels, or too few things to split. Without a group each thing is its own.
    """
    things = encoded.things[modality]
    rows = [(t, encoded.value(samples[0], name), samples[0]) for t, samples in enumerate(things.samples)]
    rows = [row for row in rows if row[1] is not None]
    names, labels = np.unique([label for _, label, _ in rows], return_inverse=True)
    if len(names) < 2 or len(rows) < 10 or np.bincount(labels).max() < 2:
        return None
    own = [encoded.value(sample, group) if group else None for _, _, sample in rows]
    own = [f"thing {thing}" if value is None else value for (thing, _, _), value in zip(rows, own, strict=True)]
    groups = np.unique(own, return_inverse=True)[1]
    if groups.max() < len(names):  # a group a label: what is held out could not be learned from the rest
        groups = np.arange(len(rows))
    features = things.features[[thing for thing, _, _ in rows]].double().numpy()
    return features, labels, groups, float(np.bincount(labels).max() / len(labels))
