"""A number of a sequence, such as a rating, or how alike two texts are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import SampleError
from ..tokens import Tokens
from . import base


@dataclass
class Config:
    pool: base.Pooling = "mean"  # from the tokens of a sequence to one vector
    mean: float = 0.0  # of the training labels
    std: float = 1.0  # of the training labels; the loss is in units of it

    def __post_init__(self):
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError("mean is a number and std one above 0")


class Head(base.LabelHead):
    """One linear layer on the pooled output, in units of the labels: (M,)."""

    Config, label = Config, "score"

    def __init__(self, config: Config, width: int, modalities: list[str]):
        super().__init__(config, width, modalities)
        self.pool = base.Pool(config.pool, width)
        self.value = nn.Linear(width, 1)
        nn.init.normal_(self.value.weight, std=0.02)
        nn.init.zeros_(self.value.bias)

    @staticmethod
    def encode(config: Config, value, text: base.TextView) -> tuple[Tensor, Tensor]:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise SampleError("label", f"{str(value)[:60]!r} is no number")
        return torch.tensor([number]), torch.tensor([-1])

    def forward(self, output, labels: Tokens, rows: Tensor) -> Tensor:
        return self.value(self.pool(output, labels.sequence))[:, 0].float() * self.config.std + self.config.mean

    def loss(self, output, labels: Tokens, rows: Tensor) -> Tensor:
        """The squared error, in units of the labels' variance."""
        return ((self(output, labels, rows) - labels.content) / self.config.std).square()

    def decode(self, predictions: Tensor, text: base.TextView) -> dict:
        return {"score": float(predictions.mean())}
