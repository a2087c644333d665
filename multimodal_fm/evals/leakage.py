"""The leakage audit: which test inputs are copies, or near copies, of what the model was trained on.

Trained on: the sources of the run's config (and of the run that it was started from), where the run is the user's own,
the evaluation's `train`, and `trained_on`. An input is looked for in this order, and counted once:

- exact: the same bytes, or the same text;
- near: images of 64 pixels and more by perceptual hash and mean colors, texts that are equal but for case, width and
  spaces, or whose MinHash says a Jaccard similarity of 0.8: as `mmfm pack --dedup near` decides;
- embedding: the nearest input of a source is nearer than 99.9 % of that source's own inputs have their nearest, so that
  of inputs drawn as the source's were one in a thousand is named by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..batch import MAX_TOKENS
from ..corpus.shards import Config as Source
from ..corpus.shards import Corpus
from ..errors import SampleError, UserError
from ..pack import dedup
from ..run_dir import checkpoint, trust
from . import base
from .embed_corpus import EmbeddedCorpus, embed_sequences, split_inputs
from .metrics import estimate, find_nearest, is_about

KINDS = ("exact", "near", "embedding")
QUANTILE = 0.999  # of the source's own nearest neighbors: what lies above is a near copy
CALIBRATED = 2000  # of the source's inputs whose nearest neighbors are looked up
MIN_CALIBRATED = 100  # a source of fewer inputs has no such quantile
NAMED = 5  # copies that a figure names


@dataclass
class Config:
    trained_on: list[str] = field(default_factory=list)  # shards, beside what the run's config and `train` name
    max_samples: int = 50_000  # of a source that are read, spread evenly over it
    max_embedded: int = 10_000  # of these that are embedded, spread as evenly


class Evaluator(base.Evaluator):
    Config, default, after_others = Config, False, True

    def run(self, embedded: EmbeddedCorpus, config: Config, model, objectives=None) -> dict[str, dict]:
        """`leakage/MODALITY/{exact,near,embedding}`, shares of the test inputs, and scores without their samples.

        The shares have "count", "searched" (training inputs) and "first", the first few by name. Beside each score of
        another evaluator that leaks bear upon, `leakage/FIGURE/without_leaks` is that of the other samples, and
        "left_out" says how many are not among them. Of a pair of modalities a text alone is no leak: "a dog" is said of
        many a picture. Nothing where nothing is known of the training data; a note then says so.
        """
        searches = {modality: _Search(model, embedded, modality) for modality in embedded.inputs}
        sources = 0
        for name, corpus in _training_corpora(embedded, config):
            sources += 1
            rows = _spread(len(corpus), config.max_samples)
            if len(rows) < len(corpus):
                embedded.note(f"leakage: {len(rows)} of the {len(corpus)} samples of {name} were compared")
            every = -(-len(rows) // config.max_embedded)
            if every > 1:
                embedded.note(f"leakage: one sample in {every} of {name} was embedded to look for near copies")
            for number, sample in enumerate(rows):
                raw = corpus.raw(sample)
                for search in searches.values():
                    search.compare(raw, (name, corpus.key(sample)), embed=number % every == 0)
            for search in searches.values():
                search.finish_source()
        if not sources:
            embedded.note("leakage: not measured: what the model was trained on is not known; name it in `trained_on`")
            return {}
        figures = {}
        for modality, search in searches.items():
            figures |= search.figures(f"leakage/{modality}")
        leaked = {modality: search.leaked_samples() for modality, search in searches.items()}
        for name, scores in embedded.scores.items():
            about = [modality for modality in leaked if is_about(name, modality, objectives)]
            about = [modality for modality in about if modality != "text"] or about
            out = np.isin(scores.samples, list(set().union(*(leaked[modality] for modality in about))))
            if not out.any():
                continue
            if out.all():
                embedded.note(f"leakage: {name}: all {len(out)} are copies of training data: no score is left")
                continue
            kept = estimate(scores.values[~out], scores.clusters[~out], float(scores.chances[~out].mean()))
            figures[f"leakage/{name}/without_leaks"] = kept | {"left_out": int(out.sum())}
        return figures


def _training_corpora(embedded: EmbeddedCorpus, config: Config) -> Iterator[tuple[str, Corpus]]:
    """What the model, and what was fitted on its features, was trained on, by name; notes say what cannot be read."""
    sources: dict[str, Source] = {}
    if embedded.folder is not None:
        sources |= _configured_sources(embedded, embedded.folder, set())
    if config.trained_on:
        sources["trained_on"] = Source(list(config.trained_on))
    if embedded.train is not None:
        yield "train", embedded.train.corpus
    for name, source in sources.items():
        try:
            corpus = Corpus(source, name)
        except UserError as error:
            embedded.note(f"leakage: not compared with {name}: {error}")
            continue
        yield name, corpus


def _configured_sources(embedded: EmbeddedCorpus, folder: Path, seen: set[Path]) -> dict[str, Source]:
    """The sources of the checkpoint's config, and of that which it was started from."""
    if not trust.is_own(folder, checkpoint.MANIFEST):
        embedded.note(f"leakage: {folder} was not trained here by you: the sources that it names are not read")
        return {}
    seen.add(folder.resolve())
    config, sources = checkpoint.read_data(folder, "config"), {}
    given = config.get("init") or {}
    for init in dict.fromkeys(given.values() if isinstance(given, dict) else (str(given),)):
        try:
            start = checkpoint.newest(init)
        except UserError as error:
            embedded.note(
                f"leakage: what {folder} was started from is not there, nor what that was trained on ({error})"
            )
        else:
            if start.resolve() not in seen:
                found = _configured_sources(embedded, start, seen)
                sources |= {f"{name} of {init}": source for name, source in found.items()}
    for name, own in config["sources"].items():
        settings = {key: own[key] for key in ("shards", "where", "piece_bytes") if key in own}
        sources[name] = Source(**settings)
    return sources


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


class _Search:
    """Looks for one modality's test inputs among training inputs, a source at a time.

    Attributes:
        found: by kind, for each test input that has a copy the source and the key of the first.
    """

    def __init__(self, model, embedded: EmbeddedCorpus, modality: str):
        self.model, self.embedded, self.modality = model, embedded, modality
        self.tokenizer, self.inputs = model.tokenizers[modality], embedded.inputs[modality]
        self.found: dict[str, dict[int, tuple[str, str]]] = {kind: {} for kind in KINDS}
        self.searched = 0
        self.sources_embedded = 0
        self.exact: dict[str, int] = {}
        self.normal: dict[str, int] = {}  # texts but for case, width and spaces
        self.marks: dict[int, Any] = {}  # test input -> perceptual hash and colors, or MinHash
        for number in range(len(self.inputs.samples)):
            try:
                value = embedded.load(model, modality, number)
            except SampleError:
                continue
            self.exact[_digest(value)] = number
            if isinstance(value, str):
                self.normal.setdefault(dedup.normalize(value), number)
            if (mark := self._mark(value)) is not None:
                self.marks[number] = mark
        self._begin_source()

    def _begin_source(self) -> None:
        self.seen: set[str] = set()
        self.train_marks: list[Any] = []
        self.mark_names: list[tuple[str, str]] = []
        self.features: list[torch.Tensor] = []
        self.feature_names: list[tuple[str, str]] = []
        self.waiting: list[list] = []
        self.tokens = 0

    def _mark(self, value: Any) -> Any:
        """What near copies have in common; None where the input is too small, or where the extra `pack` is missing."""
        try:
            if isinstance(value, str):
                return dedup.signature(dedup.shingles(value))
            if self.modality == "image":
                pixels = self.tokenizer.decode_picture(next(value[n] for n in self.tokenizer.extensions if n in value))
                if min(pixels.shape[:2]) >= dedup.MIN_SIDE:
                    picture = Image.fromarray(pixels)
                    colors = np.frombuffer(bytes.fromhex(dedup.mean_colors(picture)), np.uint8)
                    return int(dedup.perceptual_hash(picture), 16), colors
        except SampleError:
            pass
        except ImportError as error:
            self.embedded.note(
                f"leakage: no near copies of {self.modality} ({error}; pip install 'multimodal_fm[pack]')"
            )
        return None

    def compare(self, raw: dict, name: tuple[str, str], embed: bool) -> None:
        """Take in a training sample's members; equal inputs of a source are looked at once."""
        try:
            values = split_inputs(self.tokenizer, raw)
        except SampleError:
            return
        for value in values:
            digest = _digest(value)
            if digest in self.seen:
                continue
            self.seen.add(digest)
            self.searched += 1
            number = self.exact.get(digest)
            if number is not None:
                self.found["exact"].setdefault(number, name)
                continue
            number = self.normal.get(dedup.normalize(value)) if isinstance(value, str) else None
            if number is not None:
                self.found["near"].setdefault(number, name)
            elif (mark := self._mark(value)) is not None:
                self.train_marks.append(mark)
                self.mark_names.append(name)
            if embed:
                self._embed(value, name)

    def _embed(self, value: Any, name: tuple[str, str]) -> None:
        try:
            sequences = self.tokenizer.read(value)
        except SampleError:
            return
        self.waiting.append(sequences)
        self.feature_names.append(name)
        self.tokens += sum(map(len, sequences))
        if self.tokens >= MAX_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self.waiting:
            self.features.append(embed_sequences(self.model, self.modality, self.waiting)[1])
            self.waiting, self.tokens = [], 0

    def finish_source(self) -> None:
        """Look for near copies among the inputs of the source that has been taken in, and forget these."""
        self._flush()
        if self.train_marks and self.marks:
            for number, row in self._near_text() if self.modality == "text" else self._near_images():
                if number not in self.found["exact"]:
                    self.found["near"].setdefault(number, self.mark_names[row])
        if len(self.feature_names) >= MIN_CALIBRATED:
            self.sources_embedded += 1
            features = torch.cat(self.features)
            scores, rows = find_copies(self.inputs.features, features)
            known = self.found["exact"].keys() | self.found["near"].keys()
            for number in torch.nonzero(scores > 0).ravel().tolist():
                if number not in known:
                    self.found["embedding"].setdefault(number, self.feature_names[int(rows[number])])
        self._begin_source()

    def _near_images(self) -> Iterator[tuple[int, int]]:
        hashes, colors = (np.array(column) for column in zip(*self.train_marks))
        hashes = hashes.astype(np.uint64)
        for number, (own, own_colors) in self.marks.items():
            alike = dedup.hamming(hashes, np.array(own, np.uint64)) <= dedup.MAX_BITS
            for row in np.flatnonzero(alike):
                if np.abs(colors[row].astype(int) - own_colors).max() <= dedup.MAX_COLOR:
                    yield number, int(row)
                    break

    def _near_text(self) -> Iterator[tuple[int, int]]:
        numbers = list(self.marks)
        words = np.stack([*self.marks.values(), *self.train_marks])
        count = len(numbers)

        def is_near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            near = (a < count) != (b < count)
            near[near] = dedup.similarity(words, a[near], b[near]) >= dedup.NEAR_TEXT
            return near

        pairs = dedup.near_pairs(dedup.text_bands(words, np.arange(len(words))), is_near, dedup.WINDOW)
        for test, row in np.sort(pairs, 1).tolist():
            yield numbers[test], row - count

    def leaked_samples(self) -> set[int]:
        return {sample for found in self.found.values() for number in found for sample in self.inputs.samples[number]}

    def figures(self, name: str) -> dict[str, dict]:
        figures, count = {}, len(self.inputs.samples)
        taken: set[int] = set()
        for kind, found in self.found.items():
            if kind == "embedding" and not self.sources_embedded:
                self.embedded.note(f"{name}/embedding: not measured: no source has {MIN_CALIBRATED} inputs or more")
                continue
            if kind == "near" and not self.marks and not self.normal:
                small = f"images below {dedup.MIN_SIDE} pixels have no perceptual hash"
                self.embedded.note(
                    f"{name}/near: not measured: {small if self.modality == 'image' else 'for images and text only'}"
                )
                continue
            numbers = sorted(found.keys() - taken)  # what a later source has an exact copy of is no near copy
            taken |= found.keys()
            hit = np.zeros(count)
            hit[numbers] = 1
            chance = 1 - QUANTILE**self.sources_embedded if kind == "embedding" else None
            first = [
                {"test": self.embedded.key(self.inputs.samples[number][0]), "train": found[number][1]}
                | {"source": found[number][0]}
                for number in numbers[:NAMED]
            ]
            more = {"count": len(numbers), "searched": self.searched, "first": first}
            figures[f"{name}/{kind}"] = estimate(hit, np.arange(count), chance) | more
            if numbers:
                named = ", ".join(f"{one['test']} = {one['train']} of {one['source']}" for one in first)
                self.embedded.note(f"{name}/{kind}: {len(numbers)} of {count} test inputs: {named}")
        return figures


def find_copies(test: torch.Tensor, train: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much each test input's nearest training input is nearer than chance explains, above 0 for near copies,
    and which it is: (Q,), (Q,) from features (Q, D) and (T, D).

    The threshold is the `QUANTILE` of the cosine of training inputs with their own nearest neighbors, of features that
    are centered on the training inputs' mean.
    """
    mean = train.mean(0)
    own, queries = (torch.nn.functional.normalize(x - mean, dim=1, eps=1e-9) for x in (train, test))
    rows = torch.tensor(_spread(len(own), CALIBRATED))
    columns = torch.arange(len(own))
    nearest = find_nearest(own[rows], own, 1, lambda block: rows[block, None] == columns)[0][:, 0]
    scores, numbers = find_nearest(queries, own, 1)
    return scores[:, 0] - torch.quantile(nearest, QUANTILE), numbers[:, 0]


def _digest(value: Any) -> str:
    if isinstance(value, str):
        return dedup.digest(value.encode("utf-8", "surrogatepass"))
    return dedup.digest(*(value[name] for name in sorted(value)))
