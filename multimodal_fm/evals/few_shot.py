"""Few-shot classification in context: k labeled examples, then a query, and the label text that is likeliest next.

Nothing is trained (Brown et al. 2020). Texts stand in one run of text; pictures and sounds each before the text of
their label, as in Flamingo (Alayrac et al. 2022), where the model has a causal objective that fuses them. Two controls
say what is learned from the examples' labels: those of the context shuffled among themselves, and drawn at random (Min
et al. 2022). `calibrated` takes off how likely a label's text is after any query (batch calibration, Zhou et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..batch import MAX_TOKENS, Example
from ..errors import SampleError, UserError
from ..model import Model
from ..objectives.base import fuse, next_order
from ..tokens import Tokens, constant
from . import base
from .embed_corpus import EmbeddedCorpus, Scores
from .likelihood import score_texts
from .metrics import SEED, number_groups, record

SHOTS = [0, 1, 2, 4, 8, 16]
CONTROLS = ("", "shuffled_labels", "random_labels")
TEMPLATE = "{}\n"  # what a text is followed by before its label
MOST_QUERIES = 200  # of a corpus, drawn at random


@dataclass
class Config:
    labels: str = ".cls"  # `.cls` or a JSON field
    group: str = ""  # inputs of an equal group are never each other's examples, and are drawn together by the bootstrap
    class_names: list[str] = field(default_factory=list)
    modalities: list[str] = field(default_factory=list)  # empty: all that can be asked about
    templates: dict[str, list[str]] = field(default_factory=dict)
    shots: list[int] = field(default_factory=list)


@dataclass
class Labeled:
    """Inputs of one modality with the name of each one's class."""

    inputs: list[Any]  # ids of a text, or the tokens of a picture or a sound
    names: list[str]
    samples: list[int]
    groups: list[str | None]


class Evaluator(base.Evaluator):
    Config = Config
    default = False

    def run(
        self, embedded: EmbeddedCorpus, config: Config, model: Model, objectives: dict[str, Any]
    ) -> dict[str, dict]:
        """`few_shot/MODALITY/{k}_shot`, with `_calibrated`, `_shuffled_labels` and `_random_labels` behind it.

        Examples are drawn from `train` where it is given, else from the other inputs of the corpus. Chance is the share
        of the commonest class. Raises UserError for a template without {} and for class names that are too few.
        """
        figures = {}
        for modality in (m for m in model.modalities if not config.modalities or m in config.modalities):
            objective = find_objective(objectives, modality)
            if objective is None or "text" not in model.modalities:
                continue
            queries = read_labeled(model, embedded, modality, config)
            pool = read_labeled(model, embedded.train, modality, config) if embedded.train else queries
            classes = sorted(set(queries.names) | set(pool.names))
            if len(classes) < 2 or len(pool.inputs) < 2 or not queries.inputs:
                continue
            figures |= self._measure(
                embedded, config, Prompter(model, objective, modality, config, classes), queries, pool
            )
        return figures

    def _measure(
        self, embedded, config: Config, prompter: Prompter, queries: Labeled, pool: Labeled
    ) -> dict[str, dict]:
        shots = sorted(config.shots or SHOTS)
        rows, contexts = draw_contexts(queries, pool, max(shots))
        truth = np.array([prompter.classes.index(queries.names[row]) for row in rows])
        samples = np.array([queries.samples[row] for row in rows])
        clusters = number_groups([queries.groups[row] for row in rows])
        commonest = (truth == np.bincount(truth).argmax()).astype(float)
        figures: dict[str, dict] = {}
        for k in shots:
            for control in CONTROLS if k else CONTROLS[:1]:
                prompts = [
                    (queries.inputs[row], [pool.inputs[i] for i in own[:k]], [pool.names[i] for i in own[:k]])
                    for row, own in zip(rows, contexts, strict=True)
                ]
                scores = prompter.score(change_labels(prompts, prompter.classes, control))
                answers = {control: scores} if control else {"": scores, "calibrated": calibrate(scores)}
                for ending, own in answers.items():
                    name = "_".join(filter(None, (f"few_shot/{prompter.modality}/{k}_shot", ending)))
                    right = (own.argmax(1) == truth).astype(float)
                    figures |= record(embedded, name, Scores(right, samples, clusters, commonest))
        for note in prompter.notes:
            embedded.note(note)
        return figures


def find_objective(objectives: dict[str, Any], modality: str) -> Any:
    """The first that gives the likelihood of text after the modality; None where there is none.

    For text one that was trained on texts alone goes before one that was trained on texts after something else.
    """
    able = [objective for objective in objectives.values() if objective.has_likelihood("text")]
    fusing = [one for one in able if not one.one_sequence_per_modality(one.config)]
    if modality == "text":
        return next((objective for objective in able if objective not in fusing), next(iter(able), None))
    return next((one for one in fusing if modality in one.modalities and one.modalities[-1] == "text"), None)


def read_labeled(model: Model, embedded: EmbeddedCorpus, modality: str, config: Config) -> Labeled:
    """The inputs with a class that has a name; what cannot be read is left out, as everywhere."""
    tokenizer, found = model.tokenizers[modality], Labeled([], [], [], [])
    number = model.modalities.index(modality)
    for sample in range(len(embedded.corpus)):
        name = name_class(embedded, sample, config)
        if name is None:
            continue
        try:
            raw = embedded.corpus.raw(sample)
            offered = tokenizer.split_inputs({e: raw[e] for e in tokenizer.extensions if e in raw})
            value: Any = next(iter(offered), None)
            if value is not None and modality == "text":
                value = tokenizer.encode(value.strip())  # pyright: ignore[reportAttributeAccessIssue]
            elif value is not None:
                value = next(iter(tokenizer.read(value)), None)
                value = None if value is None else value.replace(modality=constant(number, len(value)))
        except SampleError:
            continue
        if value is not None:
            found.inputs.append(value)
            found.names.append(name)
            found.samples.append(sample)
            found.groups.append(embedded.field(sample, config.group) if config.group else None)
    return found


def name_class(embedded: EmbeddedCorpus, sample: int, config: Config) -> str | None:
    """A sample's class in words: one that is a number by `class_names`, or else by the field `label`."""
    label = embedded.field(sample, config.labels)
    if label is None or not label.isdecimal():
        return label
    if not config.class_names:
        name = embedded.field(sample, "label")
        return None if name is None or name.isdecimal() else name
    if int(label) >= len(config.class_names):
        raise UserError(f"class_names: {len(config.class_names)} names, but there is a class {label}")
    return config.class_names[int(label)]


def draw_contexts(queries: Labeled, pool: Labeled, most: int) -> tuple[list[int], list[list[int]]]:
    """The numbers of the queries, and for each those of its examples in the pool: those of fewer shots come first.

    An example is never the query itself, nor of its group.
    """
    draw = np.random.default_rng(SEED)
    rows = sorted(draw.permutation(len(queries.inputs))[:MOST_QUERIES].tolist())
    contexts = []
    for row in rows:
        own = []
        for i in draw.permutation(len(pool.inputs)).tolist():
            same = pool is queries and i == row
            if len(own) < most and not same and (pool.groups[i] is None or pool.groups[i] != queries.groups[row]):
                own.append(i)
        contexts.append(own)
    return rows, contexts


def change_labels(prompts: list[tuple], classes: list[str], control: str) -> list[tuple]:
    """The prompts with the labels of the context as they are, shuffled among its examples, or drawn at random."""
    draw, changed = np.random.default_rng(SEED + 1), []
    for query, examples, names in prompts:
        if control == "shuffled_labels":
            names = [names[i] for i in draw.permutation(len(names))]
        elif control == "random_labels":
            names = [classes[i] for i in draw.integers(len(classes), size=len(names))]
        changed.append((query, examples, names))
    return changed


def calibrate(scores: np.ndarray) -> np.ndarray:
    """Log-likelihoods (Q, C) with each class's share of the mean posterior over all queries taken off."""
    posterior = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    return posterior - np.logaddexp.reduce(posterior, axis=0) + np.log(len(scores))


class Prompter:
    """Lays examples and a query out as one sequence, and says how likely each class's text is to go on."""

    def __init__(self, model: Model, objective: Any, modality: str, config: Config, classes: list[str]):
        self.model, self.objective, self.modality, self.classes = model, objective, modality, classes
        self.notes: list[str] = []
        text: Any = model.tokenizers["text"]
        self.begin, self.end = text.read("a")[0].content[[0, -1]].tolist()
        template = (config.templates.get("text") or [TEMPLATE])[0]
        if "{}" not in template:
            raise UserError(f"templates: {template!r} has no {{}} for the text")
        before, _, after = template.partition("{}")
        self.before, self.after = text.encode(before), text.encode(after)
        ending = "\n\n" if modality == "text" else ""
        self.labels = {name: text.encode(f"{name}{ending}") for name in classes}
        self.most = text.generation().length

    def score(self, prompts: list[tuple]) -> np.ndarray:
        """The log-likelihood (Q, C), in nats, of each class's text after each prompt (query, examples, names)."""
        flat = ((row, example) for row, prompt in enumerate(prompts) for example in self._arrange(*prompt))
        batches = ([example for _, example in batch] for batch in _batches(flat))
        nats = torch.cat([score_texts(self.model, self.objective, batch)[0] for batch in batches])
        return -nats.numpy().reshape(len(prompts), len(self.classes))

    def _arrange(self, query: Any, examples: list, names: list[str]) -> Iterator[Example]:
        """An example for each class, whose targets are the tokens of the class's text alone."""
        if self.modality == "text":
            room = self.most - 1 - (len(examples) + 1) * (len(self.before) + len(self.after))
            longest = max(map(len, self.labels.values()))
            each = (room - sum(len(self.labels[name]) for name in names) - longest) // (len(examples) + 1)
            if each < 1:
                raise UserError(
                    f"few_shot: {len(examples)} examples do not fit into max_tokens={self.most}: fewer shots"
                )
            if any(len(one) > each for one in (*examples, query)):
                self.note(f"texts: cut to {each} tokens where {len(examples)} examples and a query stand in a context")
            context = [self.begin]
            for ids, name in zip(examples, names, strict=True):
                context += [*self.before, *ids[:each], *self.after, *self.labels[name]]
            context += [*self.before, *query[:each], *self.after]
            pieces: list[tuple[Any, bool]] = [(context, False)]
        else:
            pieces = []
            for tokens, name in zip(examples, names, strict=True):
                pieces += [(tokens, True), ([self.begin, *self.labels[name], self.end], False)]
            pieces += [(query, True), ([self.begin], False)]
        for name in self.classes:
            answer = [*self.labels[name], *([] if self.modality == "text" else [self.end])]
            yield lay_out(self.model, pieces, answer, self._is_prefix())

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def _is_prefix(self) -> bool:
        return self.modality in getattr(self.objective.config, "prefix", [])


def lay_out(model: Model, pieces: list[tuple[Any, bool]], answer: list[int], is_prefix: bool) -> Example:
    """One sequence of pieces, (ids or tokens, whether they are a medium), and the answer's ids, which are predicted.

    Orders and times go on from piece to piece as the causal objective arranges them; a medium of its `prefix` is a
    block that is read as a whole.
    """
    pieces, inputs = [*pieces, (answer, False)], []
    fused = fuse(content if is_medium else _text(model, content) for content, is_medium in pieces)
    for tokens, (_, is_medium) in zip(fused, pieces, strict=True):
        steps = torch.zeros(len(tokens), dtype=torch.long) if is_medium and is_prefix else torch.arange(len(tokens))
        inputs.append(tokens.replace(order=steps + next_order(inputs[-1:])))
    count = sum(map(len, inputs))
    return Example(inputs, [None] * len(inputs), [inputs[-1]], [torch.arange(count - len(answer), count) - 1])


def _text(model: Model, ids: list[int]) -> Tokens:
    position = torch.zeros(len(ids), 3)
    position[:, 0] = torch.arange(len(ids))
    zeros = constant(0, len(ids))
    return Tokens(torch.tensor(ids), position, zeros, zeros, constant(model.modalities.index("text"), len(ids)))


def _batches(examples: Iterator[tuple[int, Example]]) -> Iterator[list[tuple[int, Example]]]:
    """Lists of successive examples of at most about `MAX_TOKENS` tokens together."""
    batch, size = [], 0
    for row, example in examples:
        own = sum(map(len, example.inputs))
        if batch and size + own > MAX_TOKENS:
            yield batch
            batch, size = [], 0
        batch.append((row, example))
        size += own
    if batch:
        yield batch
