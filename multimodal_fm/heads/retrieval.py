"""The vectors that search compares: a sequence's pooled output, projected by its modality, of unit length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import base


@dataclass
class Config:
    embed_dim: int = 256  # the length of the vectors
    pool: Literal["mean", "first", "last"] = "mean"
    """Of a sequence's tokens; first is the class token of a model that has one, or the begin token of a text (BERT's
    [CLS]), last the end token of a text (CLIP)."""

    def __post_init__(self):
        if self.embed_dim < 1:
            raise ValueError("embed_dim is at least 1")


class Head(base.Head):
    """Pooled outputs (S, D) and modalities (S,) -> unit vectors (S, E); each modality has its own projection."""

    Config = Config

    def __init__(self, config: Config, width: int, modalities: list[str]):
        super().__init__(config, width, modalities)
        self.pooling = config.pool
        self.projection = nn.ParameterDict(
            {m: nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5) for m in modalities}
        )

    def forward(self, pooled: Tensor, modality: Tensor) -> Tensor:
        projected = torch.einsum("sd,kde->ske", pooled, torch.stack([self.projection[m] for m in self.modalities]))
        chosen = projected.gather(1, modality[:, None, None].expand(-1, 1, projected.shape[-1]))[:, 0]
        return F.normalize(chosen.float(), dim=-1)
