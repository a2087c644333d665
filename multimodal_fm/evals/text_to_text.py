"""Classes as text: which of the targets that the corpus has is the likeliest after each source (Raffel et al. 2020; by
likelihood in place of writing freely, as Brown et al. 2020, section 2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..batch import MAX_TOKENS, Sample
from ..errors import SampleError
from ..model import Model
from ..objectives.text_to_text import Objective
from ..tokens import Tokens, constant
from . import base
from .embed_corpus import EmbeddedCorpus, Scores
from .likelihood import score_texts
from .metrics import number_groups, record

MAX_TARGETS = 200  # more different ones are not classes


@dataclass
class Config:
    group: str = ""  # the bootstrap draws samples of an equal group together


class Evaluator(base.Evaluator):
    Config = Config

    def run(self, embedded: EmbeddedCorpus, config: Config, model, objectives: dict[str, Any]) -> dict[str, dict]:
        """`text_to_text/TASK/accuracy` for each task of this objective whose fields the corpus has.

        The likelihood is that of the whole target; a tie counts against the sample. Chance is the commonest target's
        share.
        """
        figures = {}
        for name, objective in objectives.items():
            if not isinstance(objective, Objective):
                continue
            task = name.partition("/")[0]
            numbers, samples = read_samples(model, objective, embedded)
            targets = list({tuple(s.label[1].content.tolist()): s.label[1] for s in samples}.values())
            if not 2 <= len(targets) <= MAX_TARGETS:
                if samples:
                    embedded.note(f"{task}: no accuracy: the corpus has {len(targets)} targets, not 2 to {MAX_TARGETS}")
                continue
            nats = rank(model, objective, samples, targets).numpy()
            own = np.array([find(targets, sample.label[1]) for sample in samples])
            rows = np.arange(len(own))
            others = np.where(np.arange(len(targets)) == own[:, None], np.inf, nats).min(1)
            right = (nats[rows, own] < others).astype(float)
            commonest = (own == np.bincount(own).argmax()).astype(float)
            groups = [embedded.field(number, config.group) if config.group else None for number in numbers]
            scores = Scores(right, np.array(numbers), number_groups(groups), commonest)
            figures |= record(embedded, f"text_to_text/{task}/accuracy", scores)
        return figures


def find(targets: list[Tokens], target: Tokens) -> int:
    """The number of the target among these, by its ids."""
    return next(number for number, one in enumerate(targets) if torch.equal(one.content, target.content))


def read_samples(model: Model, objective: Objective, embedded: EmbeddedCorpus) -> tuple[list[int], list[Sample]]:
    """The samples of the corpus that the objective can read, and their numbers."""
    numbers, samples = [], []
    for number in range(len(embedded.corpus)):
        raw, tokens = embedded.corpus.raw(number), {}
        try:
            for modality in objective.modalities:
                tokenizer = model.tokenizers[modality]
                sequence = next(iter(tokenizer.read({e: raw[e] for e in tokenizer.extensions if e in raw})), None)
                if sequence is None:
                    raise SampleError("empty", f"it has no {modality}")
                count = len(sequence)
                tokens[modality] = sequence.replace(modality=constant(model.modalities.index(modality), count))
            label = objective.read_label(objective.config, raw, tokens, model.tokenizers)
        except SampleError:
            continue
        numbers.append(number)
        samples.append(Sample(tokens, label=label))
    return numbers, samples


def rank(model: Model, objective: Objective, samples: Sequence[Sample], targets: Sequence[Tokens]) -> torch.Tensor:
    """The nats (N, T) of each of T targets after each of N samples' sources, on the CPU."""
    nats, waiting, size = [], [], 0
    for sample in samples:
        for target in targets:
            example = objective.arrange(objective.config, Sample(sample.tokens, label=(sample.label[0], target)))
            length = sum(map(len, example.inputs))
            if waiting and size + length > MAX_TOKENS:
                nats.append(score_texts(model, objective, waiting)[0])
                waiting, size = [], 0
            waiting.append(example)
            size += length
    nats.append(score_texts(model, objective, waiting)[0])
    return torch.cat(nats).view(len(samples), len(targets))
