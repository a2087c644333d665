"""What a file of this folder offers: `Head`, which adapts what the backbone made of a sequence to one use."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Head(nn.Module):
    """A subclass sets `Config`, a dataclass of its settings, and defines `__init__` and `forward`.

    A modality's number is its place in `modalities`. (`nn.ParameterDict` sorts its keys: look parameters up by name.)
    """

    Config: Any

    def __init__(self, config: Any, width: int, modalities: list[str]):
        super().__init__()
        self.config, self.modalities = config, list(modalities)

    def forward(self, pooled: Tensor, modality: Tensor) -> Tensor:
        """From pooled outputs (S, D) and the number of each sequence's modality (S,) to what the head is for."""
        raise NotImplementedError
