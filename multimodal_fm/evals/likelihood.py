"""How likely texts are, by an objective that predicts them token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch import Example, count_targets
from ..model import Model, autocast


@torch.no_grad()
def score_texts(model: Model, objective: Any, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """The nats (B,) of the text tokens that each example, of one sequence, predicts, in float64, and how many they are
    (B,); on the CPU."""
    counts = count_targets(examples, model.modalities)
    batch = model.collate({"score": list(enumerate(examples))}, {"score": counts})
    targets = batch.tasks["score"]
    with autocast(model.device, model.device.type == "cuda"):
        nats = objective.score(model(batch), targets, "text").double().cpu()
    owner = torch.searchsorted(targets.sequence.cpu(), targets.tokens["text"].sequence.cpu())
    sums = torch.zeros(len(examples), dtype=torch.double).index_add(0, owner, nats)
    return sums, torch.bincount(owner, minlength=len(examples))
