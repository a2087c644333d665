"""Classes of a sequence: of an image, a sound or a text, or of several modalities that are read as one sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..corpus.fields import label_text, label_texts
from ..errors import SampleError
from ..tokens import Tokens
from . import base


@dataclass
class Config:
    classes: list[str] = field(default_factory=list)  # as the samples' labels spell them
    multi_label: bool = False  # a sample has any number of the classes; its label is a list of them
    pool: base.Pooling = "mean"  # from the tokens of a sequence to one vector
    dropout: float = 0.0  # of the pooled vector, in training
    label_smoothing: float = 0.0  # the share of a label that is spread over all classes (Szegedy et al. 2016)

    def __post_init__(self):
        if len(self.classes) < (1 if self.multi_label else 2) or len(set(self.classes)) < len(self.classes):
            raise ValueError("classes are at least two different names")
        if not 0 <= self.dropout < 1 or not 0 <= self.label_smoothing < 1:
            raise ValueError("dropout and label_smoothing are shares from 0 to below 1")


class Head(base.LabelHead):
    """One linear layer on the pooled output: logits (M, C)."""

    Config = Config

    def __init__(self, config: Config, width: int, modalities: list[str]):
        super().__init__(config, width, modalities)
        self.pool = base.Pool(config.pool, width)
        self.dropout = nn.Dropout(config.dropout)
        self.logits = nn.Linear(width, len(config.classes))
        nn.init.normal_(self.logits.weight, std=0.02)
        nn.init.zeros_(self.logits.bias)

    @staticmethod
    def encode(config: Config, value, text: base.TextView) -> tuple[Tensor, Tensor]:
        """A class number (1,), or with `multi_label` ones and zeros (1, C). Raises SampleError."""
        numbers = []
        for name in label_texts(value) if config.multi_label else [label_text(value)]:
            if name not in config.classes:
                raise SampleError("label", f"{name[:60]!r} is none of the {len(config.classes)} classes")
            numbers.append(config.classes.index(name))
        if config.multi_label:
            label = torch.zeros(1, len(config.classes))
            label[0, numbers] = 1.0
        else:
            label = torch.tensor(numbers)
        return label, torch.tensor([-1])

    def forward(self, output, labels: Tokens, rows: Tensor) -> Tensor:
        return self.logits(self.dropout(self.pool(output, labels.sequence))).float()

    def loss(self, output, labels: Tokens, rows: Tensor) -> Tensor:
        """Cross-entropy, or with `multi_label` the mean binary one over the classes."""
        logits = self(output, labels, rows)
        if self.config.multi_label:
            target = labels.content * (1 - self.config.label_smoothing) + 0.5 * self.config.label_smoothing
            return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
        return F.cross_entropy(logits, labels.content, reduction="none", label_smoothing=self.config.label_smoothing)

    def decode(self, predictions: Tensor, text: base.TextView) -> dict:
        """{"label": the likeliest class, or with `multi_label` those above 0.5, "probabilities": {class: p}}."""
        logits = predictions.float().mean(0)
        shares = (logits.sigmoid() if self.config.multi_label else logits.softmax(0)).tolist()
        named = dict(zip(self.config.classes, shares, strict=True))
        best = (
            [n for n, p in named.items() if p > 0.5] if self.config.multi_label else max(named, key=named.__getitem__)
        )
        return {"label": best, "probabilities": named}
