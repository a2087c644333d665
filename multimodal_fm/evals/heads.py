"""What a trained head says of the labels of a corpus: the scores of classes, tags, answers and numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import MAX_TOKENS, Batch, Example, Sample, count_targets
from ..corpus.fields import label_text, label_texts
from ..corpus.shards import Corpus
from ..errors import SampleError
from ..heads.base import TextView
from ..model import Model, autocast
from ..objectives.supervised import Bound, Objective, label_value, view_text
from ..stream.quarantine import quarantine_row
from ..tokens import Tokens, constant
from . import base, task_metrics
from .embed_corpus import EmbeddedCorpus, Scores
from .metrics import record


@dataclass
class Config:
    labels: str = ""  # `.cls` or a JSON field; empty: the field that the head was trained on
    group: str = ""  # inputs of an equal group are drawn together by the bootstrap


@dataclass
class Prediction:
    """What a head says of one sample, and what is right."""

    sample: int  # its number in the corpus
    label: Any  # as the sample has it
    output: Tensor  # of the head (M, ...); the mean of a long sample's windows
    text: TextView


@dataclass
class Predictions:
    head: str  # its name in the model
    found: list[Prediction] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)  # rows as in quarantine.jsonl


class Evaluator(base.Evaluator):
    Config = Config

    def run(self, embedded: EmbeddedCorpus, config: Config, model, objectives) -> dict[str, dict]:
        """`HEAD/MEASURE` of each head that was trained on labels which the corpus has."""
        figures = {}
        for objective in (one for one in objectives.values() if isinstance(one, Objective)):
            predictions = predict(model, objective, embedded.corpus, config.labels)
            embedded.predictions[predictions.head] = predictions
            embedded.skipped += predictions.skipped
            if not predictions.found:
                embedded.note(
                    f"{predictions.head}: no sample has a label in {_label_field(model, objective, config)!r}"
                )
                continue
            samples = [one.sample for one in predictions.found]
            groups = [min(embedded.groups(sample, config.group)) if config.group else str(sample) for sample in samples]
            clusters = np.unique(groups, return_inverse=True)[1]
            measured = measure(model, predictions, clusters)
            figures |= {f"{predictions.head}/{name}": figure for name, figure in measured.items()}
            right = np.array([row["score"] for row in rows_of(model, predictions, embedded.corpus)])
            name = f"{predictions.head}/accuracy"
            if name in figures and "chance" in figures[name]:
                chances = np.full(len(right), figures[name]["chance"] or 0.0)
                record(embedded, name, Scores(right, np.array(samples), clusters, chances))
        return figures


def _label_field(model: Model, objective: Objective, config: Config) -> str:
    return config.labels or bind(model, objective).label


def bind(model: Model, objective: Objective) -> Bound:
    return objective.bind(objective.config, model.config.heads)


@torch.no_grad()
def predict(model: Model, objective: Objective, corpus: Corpus, labels: str = "") -> Predictions:
    """What the objective's head says of each sample that has a label. What cannot be read is named in `skipped`.

    A sound, or a text that is classified as a whole, longer than the model reads at once is covered by windows.
    """
    bound, head = bind(model, objective), objective.config.head
    label_field, predictions = labels or bound.label, Predictions(head)
    windowed = not objective.config.fuse and not bound.head.cls.per_token  # pyright: ignore[reportOptionalMemberAccess]
    outputs: dict[int, list[Tensor]] = {}

    def flush(pairs: list) -> None:
        examples = [(number, example) for number, (_, example) in enumerate(pairs)]
        answers = run_head(model, objective, examples)
        for (owner, _), answer in zip(pairs, answers, strict=True):
            outputs.setdefault(owner, []).append(answer)

    held, size = [], 0
    for number in range(len(corpus)):
        raw, failed = corpus.read(number)
        try:
            if failed and any(name in _extensions(model, objective) for name, _ in failed):
                raise failed[0][1]
            value = label_value(raw, label_field)
            views = read_views(model, objective.modalities, raw, windowed)
            text = view_text(raw, views[0], model.tokenizers, objective.config.fuse)
            label = bound.head.cls.encode(bound.head.config, value, text)  # pyright: ignore[reportOptionalMemberAccess]
        except SampleError as error:
            predictions.skipped.append(quarantine_row(corpus, number, "label", error, None))
            continue
        predictions.found.append(Prediction(number, value, torch.empty(0), text))
        for view in views:
            example = objective.arrange(bound, Sample(view, label=label))
            held.append((len(predictions.found) - 1, example))
            size += sum(map(len, example.inputs))
        if size >= MAX_TOKENS:
            flush(held)
            held, size = [], 0
    if held:
        flush(held)
    for number, own in outputs.items():
        predictions.found[number].output = torch.stack(own).mean(0) if len(own) > 1 else own[0]
    return predictions


def _extensions(model: Model, objective: Objective) -> set[str]:
    return {e for modality in objective.modalities for e in model.tokenizers[modality].extensions}


def read_views(model: Model, modalities: list[str], raw: dict, windowed: bool) -> list[dict[str, Tokens]]:
    """The sequences of a sample by modality, not augmented; several where a long one is covered by windows.

    Raises SampleError where one of the modalities is missing.
    """
    found = {}
    for modality in modalities:
        tokenizer = model.tokenizers[modality]
        members = {e: raw[e] for e in tokenizer.extensions if e in raw} if isinstance(raw, dict) else raw
        sequences = tokenizer.read(members) if members else []
        if not sequences:
            raise SampleError("label", f"it has no {modality}")
        number = model.modalities.index(modality)
        found[modality] = [s.replace(modality=constant(number, len(s))) for s in sequences]
    if windowed and len(modalities) == 1:
        return [{modalities[0]: sequence} for sequence in found[modalities[0]]]
    return [{modality: sequences[0] for modality, sequences in found.items()}]


@torch.no_grad()
def run_head(model: Model, objective: Objective, examples: list[tuple[int, Example]]) -> list[Tensor]:
    """The head's output (M, ...) for each example, on the CPU in float32."""
    counts = {"head": count_targets([example for _, example in examples], model.modalities)}
    batch: Batch = model.collate({"head": examples}, counts)
    targets = batch.tasks["head"]
    head: Any = model.heads[objective.config.head]
    answers: dict[int, Tensor] = {}
    with autocast(model.device, model.device.type == "cuda"):
        output = model(batch)
        for modality, labels in targets.tokens.items():
            values = head(output, labels, targets.rows[modality]).float().cpu()
            sequence = labels.sequence.cpu()
            for number in sequence.unique().tolist():
                answers[number] = values[sequence == number]
    width = next(iter(answers.values())) if answers else torch.empty(0)
    return [answers.get(number, width[:0]) for number in targets.sequence.tolist()]


def measure(model: Model, predictions: Predictions, clusters=None) -> dict[str, dict]:
    """The figures of a head's predictions, by what the head is for."""
    plugin = model.config.heads[predictions.head]
    found, kind, config = predictions.found, plugin.name, plugin.config
    if kind == "classify":
        logits = torch.cat([one.output for one in found])
        numbers = {name: number for number, name in enumerate(config.classes)}
        if config.multi_label:
            truth = np.zeros(logits.shape)
            for row, one in enumerate(found):
                truth[row, [numbers[name] for name in label_texts(one.label)]] = 1
            return task_metrics.multi_label(logits.sigmoid().numpy(), truth, config.classes, clusters)
        labels = np.array([numbers[label_text(one.label)] for one in found])
        return task_metrics.classification(logits.double().softmax(1).numpy(), labels, config.classes, clusters)
    decoded = [model.heads[predictions.head].decode(one.output, one.text) for one in found]  # pyright: ignore
    if kind == "tag":
        pairs = [(d["tags"], [str(tag) for tag in one.label]) for d, one in zip(decoded, found, strict=True)]
        pairs = [(said + ["O"] * (len(tags) - len(said)), tags) for said, tags in pairs]  # beyond the window: no entity
        return task_metrics.tagging([said for said, _ in pairs], [tags for _, tags in pairs], clusters)
    if kind == "span":
        return task_metrics.spans(
            [d["answer"] or None for d in decoded], [right_answers(one) for one in found], clusters
        )
    if kind == "regress":
        said, right = [d["score"] for d in decoded], [float(one.label) for one in found]
        return task_metrics.regression(np.array(said), np.array(right), clusters)
    return {}


def answer_text(one: Prediction) -> str | None:
    return None if one.label is None else one.text.text[int(one.label["start"]) : int(one.label["end"])]


def right_answers(one: Prediction) -> list[str] | None:
    """All answers that count as right, of which a sample's JSON may have several."""
    if one.label is None:
        return None
    own = one.text.row.get("answers")
    several = isinstance(own, list) and own and all(isinstance(answer, str) for answer in own)
    return own if several else [answer_text(one) or ""]


def rows_of(model: Model, predictions: Predictions, corpus: Corpus) -> list[dict]:
    """A row for each sample, {"key", "label", "predicted", "score": 1 for right, "confidence"}, for files and pages."""
    plugin, rows = model.config.heads[predictions.head], []
    for one in predictions.found:
        said = model.heads[predictions.head].decode(one.output, one.text)  # pyright: ignore
        label, confidence = one.label, None
        if plugin.name == "classify":
            predicted, shares = said["label"], said["probabilities"]
            if plugin.config.multi_label:
                label = sorted(label_texts(label))
                predicted, confidence = sorted(predicted), None
                both = len(set(label) & set(predicted))
                score = 2 * both / (len(label) + len(predicted)) if label or predicted else 1.0
            else:
                label = label_text(label)
                confidence, score = shares[predicted], float(predicted == label)
        elif plugin.name == "tag":
            predicted, label = said["tags"], [str(tag) for tag in label]
            score = sum(a == b for a, b in zip(predicted, label)) / max(1, len(label))
        elif plugin.name == "span":
            predicted, label, confidence = said["answer"], answer_text(one), said["margin"]
            score = task_metrics.spans([predicted or None], [right_answers(one)])["f1"]["value"]
        else:
            predicted, label = said["score"], float(label)
            score = -abs(predicted - label)
        rows.append(
            {
                "key": corpus.key(one.sample),
                "label": label,
                "predicted": predicted,
                "score": float(score),
                "confidence": confidence,
            }
        )
    return rows
