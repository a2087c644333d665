"""Searches a corpus by a text, a picture or a sound."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass

from ..corpus.shards import SHARDS, Corpus
from ..corpus.shards import Config as Source
from ..errors import SampleError, printable
from ..evals.embed_corpus import EmbeddedCorpus, embed_corpus, embed_sequences
from ..evals.metrics import find_nearest
from ..model import Model


@dataclass
class Hit:
    """An input of a sample that is near to the query."""

    modality: str
    score: float  # cosine with the query
    shard: str
    key: str
    members: list[str]  # extensions of the sample's members that the modality reads
    label: str | None  # the JSON field `label`, else the `.cls` member
    text: str  # the text that matched, else the sample's first
    number: int  # which of the sample's inputs of this modality matched, from 1 on: which caption
    of: int
    window: int  # which of the input's windows is nearest to the query, from 1 on
    windows: int
    samples: int  # how many samples hold this very input

    def line(self) -> str:
        name = f"{self.key}.{self.members[0]}" if len(self.members) == 1 else self.key
        notes = [f"{self.modality} {self.number} of {self.of}"] if self.of > 1 else []
        notes += [f"window {self.window} of {self.windows}"] if self.windows > 1 else []
        notes += [f"and {self.samples - 1} more samples"] if self.samples > 1 else []
        parts = [
            f"{self.score:6.3f}",
            f"{self.shard} {name}",
            f"[{self.label}]" if self.label else "",
            _shorten(self.text),
            f"({'; '.join(notes)})" if notes else "",
        ]
        return printable("  ".join(filter(None, parts)))


def split_query(words: list[str]) -> tuple[list[str], str]:
    """Shards, and the query that stands behind them where `--in` took it too: what follows the last name of a file."""
    last = max((i for i, word in enumerate(words) if _names_shards(word)), default=0)
    return words[: last + 1], " ".join(words[last + 1 :])


def _names_shards(word: str) -> bool:
    return word.endswith(SHARDS) or "://" in word or os.path.exists(word)


def search(
    model: Model, given: dict, shards: list[str], where: dict[str, str], top: int = 5
) -> tuple[dict[str, list[Hit]], list[dict]]:
    """The `top` inputs of every modality nearest to the one input given, by modality, and what could not be read.

    given: modality -> input, in a form that `Model.embed` takes. The skipped are rows as in quarantine.jsonl.
    """
    vectors = next(iter(model.embed(**{modality: [value] for modality, value in given.items()}).values())).cpu()
    embedded = embed_corpus(model, Corpus(Source(shards, where=where), "in"))
    hits = {}
    for modality, inputs in embedded.inputs.items():
        scores, numbers = find_nearest(vectors, inputs.vectors, top)
        pairs = zip(scores[0].tolist(), numbers[0].tolist(), strict=True)
        hits[modality] = [_hit(model, embedded, modality, number, score, vectors[0]) for score, number in pairs]
    return hits, embedded.skipped


def _hit(model: Model, embedded: EmbeddedCorpus, modality: str, number: int, score: float, query) -> Hit:
    inputs = embedded.inputs[modality]
    sample = inputs.samples[number][0]
    own, text = embedded.sample_inputs[sample], inputs.texts[number]
    try:
        windows = model.tokenizers[modality].read(embedded.load(model, modality, number))
        nearest = 0
        if len(windows) > 1:
            nearest = int((embed_sequences(model, modality, [[window] for window in windows])[0] @ query).argmax())
    except SampleError:  # the shard has changed since
        windows, nearest = [None], 0
    extensions = set(model.tokenizers[modality].extensions)
    label = embedded.field(sample, "label")
    return Hit(
        modality=modality,
        score=score,
        shard=embedded.corpus.shard(sample),
        key=embedded.key(sample),
        members=sorted(extensions.intersection(embedded.corpus.measures(sample))),
        label=embedded.field(sample, ".cls") if label is None else label,
        text=next(iter(embedded.texts(sample)), "") if text is None else text,
        number=own[modality].index(number) + 1,
        of=len(own[modality]),
        window=nearest + 1,
        windows=len(windows),
        samples=len(inputs.samples[number]),
    )


def render(hits: dict[str, list[Hit]], as_json: bool = False) -> str:
    """Lines for a person, under each modality's name, or a JSON object a line."""
    if as_json:
        return "\n".join(json.dumps(dataclasses.asdict(hit)) for own in hits.values() for hit in own)
    return "\n".join(f"\n{modality}\n" + "\n".join(f"  {hit.line()}" for hit in own) for modality, own in hits.items())


def _shorten(text: str, limit: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
