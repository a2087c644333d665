"""The vectors that search compares: a sequence's mean, projected by its modality, of unit length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """means (S, D) and modalities (S,) -> unit vectors (S, E); each modality has its own projection."""

    def __init__(self, modalities: int, width: int, dimension: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(modalities, width, dimension) * width**-0.5)

    def forward(self, means: Tensor, modality: Tensor) -> Tensor:
        projected = torch.einsum("sd,kde->ske", means, self.weight)
        picked = projected.gather(1, modality[:, None, None].expand(-1, 1, projected.shape[-1]))[:, 0]
        return F.normalize(picked.float(), dim=-1)
