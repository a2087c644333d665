"""Learned tokens that stand before each sequence: a class token (BERT, Devlin et al. 2019), or the prompt of prompt
tuning (Lester et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..tokens import Tokens, make_sequence
from . import base


@dataclass
class Config:
    count: int = 1  # tokens before each sequence

    def __post_init__(self):
        if not 1 <= self.count <= 1024:
            raise ValueError("count is from 1 to 1024")


class Tokenizer(base.Tokenizer):
    """Reads nothing of a sample."""

    Config, extensions = Config, ()

    def read(self, raw, generator=None) -> list[Tokens]:
        return []

    def prompt(self) -> Tokens:
        count = self.config.count
        position = torch.zeros(count, 3)
        position[:, 0] = torch.arange(-count, 0)
        return make_sequence(torch.arange(count), position)

    def embedder(self, width: int) -> nn.Module:
        return Embed(self.config.count, width)

    def predictor(self, width: int) -> nn.Module:
        raise ValueError("learned tokens cannot be predicted")


class Embed(nn.Embedding):
    """Numbers (N,) -> (N, D)."""

    def __init__(self, count: int, width: int):
        super().__init__(count, width)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, content: Tensor) -> Tensor:
        return self.weight.index_select(0, content)
