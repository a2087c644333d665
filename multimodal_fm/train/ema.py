"""The exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def update(ema: nn.Module, model: nn.Module, step: int, decay: float, skipped: Tensor | None = None) -> None:
    """Moves the parameters and the floating-point buffers of `ema`, such as a codebook, towards those of `model`, a
    module of the same architecture; copies its other buffers.

    Nothing moves where `skipped`, a scalar on the device, is 1. The decay rises to `decay` as (1 + step) / (10 + step),
    so that the random start is soon forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    share = 1 - decay if skipped is None else (1 - decay) * (1 - skipped)
    for old, new in zip(ema.parameters(), model.parameters(), strict=True):
        old.lerp_(new, share)
    for old, new in zip(ema.buffers(), model.buffers(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, share)
        else:
            old.copy_(new)
