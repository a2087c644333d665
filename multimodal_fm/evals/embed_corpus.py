"""A corpus as a model sees it: each distinct input once, with its vector, and the samples that hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batch import MAX_TOKENS
from ..corpus.fields import lookup, parse_map
from ..corpus.shards import Corpus
from ..errors import SampleError
from ..model import Model
from ..stream.quarantine import quarantine_row
from ..tokens import Tokens


@dataclass
class Inputs:
    """The distinct inputs of one modality, T of them. An input is what its tokenizer reads at once, such as a text."""

    vectors: torch.Tensor  # (T, E) unit; E is 0 where the model has no retrieval head
    features: torch.Tensor  # (T, D)
    texts: list[str | None]  # the input where it is a string; media stay in the corpus (`EmbeddedCorpus.load`)
    samples: list[list[int]]  # the samples that hold each


@dataclass
class Scores:
    """What a figure is the mean of, one value for each of the Q inputs or queries that it is about."""

    values: np.ndarray  # (Q,)
    samples: np.ndarray  # (Q,) the number of a sample that holds each
    clusters: np.ndarray  # (Q,) those of an equal cluster are drawn together by the bootstrap
    chances: np.ndarray  # (Q,) what a guess would get


class EmbeddedCorpus:
    """The samples of a corpus, the inputs in them, and what could not be read.

    Nothing is decoded or embedded before somebody asks for `inputs` or `sample_inputs`.

    Args:
        read: returns inputs, metadata, sample_inputs and skipped, where they are not given.

    Attributes:
        train: the corpus that what is fitted is fitted on; None: `self`, by folds.
        folder: the checkpoint of the model; None where it has none.
        skipped: what could not be read, rows as in quarantine.jsonl.
        notes: what a reader of the figures has to know.
        scores: by name of a figure, what it is the mean of.
        predictions: by name of a trained head, what it said (`heads.Predictions`).
        remeasure: the figures of another view of the corpus, by the evaluators that ran before: with True those that
            compare vectors, with False the others.
    """

    def __init__(
        self,
        corpus: Corpus,
        inputs: dict[str, Inputs] | None = None,
        metadata: list[dict] | None = None,
        sample_inputs: list[dict[str, list[int]]] | None = None,
        read: Callable[[], tuple] | None = None,
    ):
        self.corpus, self._read = corpus, read
        self._inputs, self._metadata, self._sample_inputs = inputs or {}, metadata, sample_inputs or []
        self.train: EmbeddedCorpus | None = None
        self.folder: Path | None = None
        self.skipped: list[dict] = []
        self.notes: list[str] = []
        self.scores: dict[str, Scores] = {}
        self.predictions: dict[str, Any] = {}
        self.remeasure: Callable[[EmbeddedCorpus, bool], dict[str, dict]] = lambda view, pairs: {}

    @property
    def is_read(self) -> bool:
        return self._read is None

    def _ensure(self) -> None:
        if self._read is not None:
            read, self._read = self._read, None
            self._inputs, self._metadata, self._sample_inputs, skipped = read()
            self.skipped += skipped

    @property
    def inputs(self) -> dict[str, Inputs]:
        """By modality."""
        self._ensure()
        return self._inputs

    @property
    def sample_inputs(self) -> list[dict[str, list[int]]]:
        """Each sample's inputs by modality."""
        self._ensure()
        return self._sample_inputs

    @property
    def metadata(self) -> list[dict]:
        """Each sample's JSON."""
        if self._metadata is None:
            self._metadata = [self.corpus.json(sample) for sample in range(len(self.corpus))]
        return self._metadata

    @property
    def has_vectors(self) -> bool:
        """Whether the inputs have unit vectors, which a model without a retrieval head does not give."""
        return all(inputs.vectors.shape[1] for inputs in self.inputs.values())

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def texts(self, sample: int) -> list[str]:
        return [self.inputs["text"].texts[number] or "" for number in self.sample_inputs[sample].get("text", [])]

    def key(self, sample: int) -> str:
        return self.corpus.key(sample)

    def field(self, sample: int, name: str) -> str | None:
        """The sample's JSON field (dots go deeper), or `.cls`, as text; None where it has none."""
        if name == ".cls":
            raw = self.corpus.raw(sample, ("cls",))
            return raw["cls"].decode(errors="replace").strip() if raw else None
        value = lookup(self.metadata[sample], name)
        return None if value is None else str(value)

    def groups(self, sample: int, name: str) -> set[str]:
        """What the sample means: its field `name`, or where no name is given its texts, or else the sample alone."""
        value = self.field(sample, name) if name else None
        if value is not None:
            return {value}
        texts = {text.strip() for text in self.texts(sample)} if not name and "text" in self.inputs else set()
        return texts or {f"sample {sample}"}

    def load(self, model: Model, modality: str, number: int) -> Any:
        """An input in the form that the tokenizer reads, from the corpus again where it is no text.

        Raises SampleError where it cannot be had any more.
        """
        inputs = self.inputs[modality]
        if inputs.texts[number] is not None:
            return inputs.texts[number]
        sample = inputs.samples[number][0]
        offered = split_inputs(model.tokenizers[modality], self.corpus.raw(sample))
        position = self.sample_inputs[sample][modality].index(number)
        distinct = list({_digest(value): value for value in offered}.values())
        if position >= len(distinct):
            raise SampleError("read", "no longer what it was when it was embedded")
        return distinct[position]


def embed_corpus(
    model: Model,
    corpus: Corpus,
    modalities: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EmbeddedCorpus:
    """The corpus, of which every sample is read and every distinct input (by its bytes) embedded once, when somebody
    first looks at them. Nothing is random in it."""
    return EmbeddedCorpus(corpus, read=lambda: _read(model, corpus, modalities, progress))


def _read(model: Model, corpus: Corpus, modalities: Sequence[str], progress: Callable[[int, int], None]) -> tuple:
    chosen = [modality for modality in model.modalities if not modalities or modality in modalities]
    embedders = {modality: _Embedder(model, modality) for modality in chosen}
    metadata, sample_inputs, skipped = [], [], []
    for sample in range(len(corpus)):
        raw, unreadable = corpus.read(sample)
        metadata.append(parse_map(raw.get("json")))
        failed = [(name, error) for name, error in unreadable if any(name in e.extensions for e in embedders.values())]
        numbers = {modality: embedder.add(sample, raw, failed) for modality, embedder in embedders.items()}
        sample_inputs.append({modality: own for modality, own in numbers.items() if own})
        skipped += [quarantine_row(corpus, sample, part, error, None) for part, error in failed]
        progress(sample + 1, len(corpus))
    inputs = {modality: embedder.finish() for modality, embedder in embedders.items() if embedder.texts}
    return inputs, metadata, sample_inputs, skipped


class _Embedder:
    """Collects one modality's distinct inputs and embeds them some thousand tokens at a time."""

    def __init__(self, model: Model, modality: str):
        self.model, self.modality, self.tokenizer = model, modality, model.tokenizers[modality]
        self.extensions = self.tokenizer.extensions
        self.texts, self.samples = [], []
        self.number_of: dict[bytes, int] = {}  # by digest of the content
        self.waiting: list[list[Tokens]] = []
        self.waiting_tokens = 0
        self.embedded: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, sample: int, raw: dict, failed: list) -> list[int]:
        """The numbers of the sample's inputs of this modality; what cannot be read is added to `failed`."""
        numbers = []
        try:
            for value in split_inputs(self.tokenizer, raw):
                number = self._number(value)
                if number not in numbers:
                    numbers.append(number)
                    self.samples[number].append(sample)
        except SampleError as error:
            failed.append((self.modality, error))
        return numbers

    def _number(self, value) -> int:
        digest = _digest(value)
        if digest not in self.number_of:
            sequences = self.tokenizer.read(value)
            self.number_of[digest] = len(self.texts)
            self.texts.append(value if isinstance(value, str) else None)
            self.samples.append([])
            self.waiting.append(sequences)
            self.waiting_tokens += sum(map(len, sequences))
            if self.waiting_tokens >= MAX_TOKENS:
                self._embed()
        return self.number_of[digest]

    def _embed(self) -> None:
        if self.waiting:
            self.embedded.append(embed_sequences(self.model, self.modality, self.waiting))
            self.waiting, self.waiting_tokens = [], 0

    def finish(self) -> Inputs:
        self._embed()
        vectors, features = (torch.cat(column) for column in zip(*self.embedded, strict=True))
        return Inputs(vectors, features, self.texts, self.samples)


def embed_sequences(model: Model, modality: str, inputs: list[list[Tokens]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors (B, E) and features (B, D) of inputs, each of one or several sequences, on the CPU in float32."""
    if "retrieval" in model.heads:
        vectors, features = model.embed_sequences(modality, inputs)
    else:
        vectors, features = model.embed_sequences(modality, inputs, head="")
    return vectors.float().cpu(), features.float().cpu()


def split_inputs(tokenizer, raw: dict) -> list:
    """What a sample's members offer to a tokenizer, each input in the form that `read` takes. Raises SampleError."""
    members = {extension: data for extension, data in raw.items() if extension in tokenizer.extensions}
    return tokenizer.split_inputs(members) if members else []


def _digest(value) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    members = value.items() if isinstance(value, dict) else [("", value.encode("utf-8", "surrogatepass"))]
    for name, data in sorted(members):
        digest.update(name.encode() + b"\0" + data)
    return digest.digest()
