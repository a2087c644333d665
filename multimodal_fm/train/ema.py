"""The exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from .layouts import local


@torch.no_grad()
def update(
    ema: nn.Module, model: nn.Module, step: int, decay: float, skipped: Tensor | None = None, fused: bool = True
) -> None:
    """Moves the parameters and the floating-point buffers of `ema`, such as a codebook, towards those of `model`, a
    module of the same architecture; copies its other buffers.

    Nothing moves where `skipped`, a scalar on the device, is 1. The decay rises to `decay` as (1 + step) / (10 + step),
    so that the random start is soon forgotten. Of sharded modules each rank moves its own rows.

    All parameters move in one call: old - share * (old - new) is a step of gradient descent with weight decay 1 along
    `new`, which torch fuses over a list of tensors and leaves out where `found_inf` says so, without reading it back.
    fused: as in `optim.build`; without it `skipped` must be 0.
    """
    decay = min(decay, (1 + step) / (10 + step))
    pairs = list(zip(ema.parameters(), model.parameters(), strict=True))
    rows = [(local(old), local(new).detach()) for old, new in pairs]
    rows = [(old, new) for old, new in rows if old.numel()]
    fused = fused and not any(old.is_meta for old, _ in rows)
    inf: dict = {"found_inf": skipped} if fused else {}
    sgd(
        [old for old, _ in rows], [new for _, new in rows], [None] * len(rows), fused=fused, **inf,
        lr=1 - decay, weight_decay=1.0, maximize=True, momentum=0.0, dampening=0.0, nesterov=False,
    )  # fmt: skip
    share = 1 - decay if skipped is None else (1 - decay) * (1 - skipped)
    for old, new in zip(ema.buffers(), model.buffers(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, share)
        else:
            old.copy_(new)
