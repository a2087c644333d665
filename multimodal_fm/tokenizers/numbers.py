"""Series of numbers: the member `npy` of a sample, an array (N, dims) whose rows are tokens (Garg et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor, nn

from ..corpus import arrays
from ..errors import SampleError
from ..tokens import Tokens, make_sequence
from . import base


@dataclass
class Config:
    dims: int = 1  # numbers a token
    max_tokens: int = 256  # rows a sequence: training draws a window of a longer series, evaluation covers it
    weighted: bool = False  # one more column weighs each token's error, and is not read: 0 where it cannot be foretold

    def __post_init__(self):
        if self.dims < 1 or self.max_tokens < 2:
            raise ValueError("dims is at least 1, max_tokens at least 2")


class Tokenizer(base.Tokenizer):
    """Content (N, dims) float32, with `weighted` (N, dims + 1); positions (index, 0, 0)."""

    Config, extensions = Config, ("npy",)

    def read(self, raw, generator: Random | None = None) -> list[Tokens]:
        """`raw` is a sample's members by extension or an array (N, dims), (N,) where dims is 1. Raises SampleError."""
        if isinstance(raw, dict):
            if "npy" not in raw:
                return []
            raw = raw["npy"]
        values, limit = self._array(raw), self.config.max_tokens
        if generator is not None:
            start = generator.randrange(max(len(values) - limit, 0) + 1)
            return [_sequence(values[start : start + limit])]
        return [_sequence(values[start : start + limit]) for start in range(0, len(values), limit)]

    def _array(self, raw) -> np.ndarray:
        try:
            values = (arrays.parse(raw) if isinstance(raw, bytes) else np.asarray(raw)).astype(np.float32)
        except (ValueError, TypeError) as error:
            raise SampleError("decode", f"not an array of numbers: {error}") from None
        columns = self.config.dims + self.config.weighted
        values = values[:, None] if values.ndim == 1 and columns == 1 else values
        if values.ndim != 2 or values.shape[1] != columns:
            raise SampleError("decode", f"an array {values.shape}, not (N, {columns})")
        if not len(values):
            raise SampleError("empty", "no numbers in it")
        if not np.isfinite(values).all():
            raise SampleError("decode", "not all of its numbers are finite")
        return values

    def embedder(self, width: int) -> nn.Module:
        return Embed(self.config.dims, width)

    def predictor(self, width: int) -> nn.Module:
        return Predict(width, self.config.dims)


def _sequence(values: np.ndarray) -> Tokens:
    position = torch.zeros(len(values), 3)
    position[:, 0] = torch.arange(len(values))
    return make_sequence(torch.from_numpy(np.ascontiguousarray(values)), position)


class Embed(nn.Linear):
    """Numbers (N, dims), or (N, dims + 1) of which the last weighs errors, -> (N, D)."""

    def forward(self, content: Tensor) -> Tensor:
        return super().forward(content[:, : self.in_features])


class Predict(nn.Module):
    """Mean squared errors (M,), weighted by the last column where there is one more, of rows (M, dims) foretold from
    vectors (M, D)."""

    def __init__(self, width: int, dims: int):
        super().__init__()
        self.dims, self.project = dims, nn.Linear(width, dims)

    def forward(self, vectors: Tensor, content: Tensor) -> Tensor:
        errors = (self.project(vectors).float() - content[:, : self.dims]).square().mean(1)
        return errors * content[:, self.dims] if content.shape[1] > self.dims else errors
