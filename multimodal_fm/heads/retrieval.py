"""The vectors that search compares: a sequence's mean, projected by its kind, of unit length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """means (S, D) and kinds (S,) -> unit vectors (S, E); each kind has its own projection."""

    def __init__(self, kinds: int, width: int, dimension: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(kinds, width, dimension) * width**-0.5)

    def forward(self, means: Tensor, kind: Tensor) -> Tensor:
        projected = torch.einsum("sd,kde->ske", means, self.weight)
        picked = projected.gather(1, kind[:, None, None].expand(-1, 1, projected.shape[-1]))[:, 0]
        return F.normalize(picked.float(), dim=-1)
