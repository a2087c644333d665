"""Optimizers and schedules: AdamW, Muon for the matrices (Jordan et al. 2024), warm-up, cosine or a late decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass
class Config:
    name: Literal["adamw", "muon"] = "adamw"  # muon: the backbone's matrices; the rest stays with AdamW
    lr: float = 1e-3
    muon_lr: float = 5e-3
    weight_decay: float = 0.05
    betas: list[float] = None  # AdamW
    clip: float = 1.0  # the largest norm of the whole gradient; 0 is no limit
    warmup: int = 20  # steps
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"  # wsd: warm up, stay, decay
    decay: float = 0.3  # wsd: the last share of the steps, over which the rate falls to `final`
    final: float = 0.0  # of the full rate

    def __post_init__(self):
        self.betas = list(self.betas or [0.9, 0.98])
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas are two numbers from 0 to below 1")
        numbers = (self.lr, self.muon_lr, self.weight_decay, self.clip, self.decay, self.final)
        if not all(0 <= value < float("inf") for value in numbers):
            raise ValueError("rates, decays and clip are numbers from 0 up")


def factor(config: Config, step: int, steps: int) -> float:
    """What the learning rates are multiplied by at `step` of `steps`."""
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "cosine":
        done = max(0.0, step - config.warmup) / max(1, steps - config.warmup)
        return warm * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
    if config.schedule == "wsd":
        left = (steps - step) / max(1.0, config.decay * steps)
        return warm * (config.final + (1 - config.final) * min(1.0, left))
    return warm


def build(config: Config, model: nn.Module) -> list[torch.optim.Optimizer]:
    """One optimizer, or two with Muon. Vectors, gains, embeddings and temperatures are not decayed."""
    matrices, plain, decayed = [], [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if config.name == "muon" and name.startswith("backbone.blocks.") and weight.ndim == 2:
            matrices.append(weight)
        elif weight.ndim >= 2 and "embed" not in name and not name.endswith(("vectors", "blank")):
            decayed.append(weight)
        else:
            plain.append(weight)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


def set_rates(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * share
