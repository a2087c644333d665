"""Bring a sample's parts together, all pairs of modalities that it offers: InfoNCE (CLIP, Radford et al. 2021) or the sigmoid
loss (SigLIP, Zhai et al. 2023), with learned temperature. Samples of an equal group are not each other's negatives.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Example, Sample, Targets
from ..tokens import constant


@dataclass
class Config:
    loss: Literal["infonce", "sigmoid"] = "infonce"
    scale: float = 14.0  # what cosines are multiplied by at the start; learned, at most 100
    bias: float = -10.0  # sigmoid: what is added at the start; learned
    pairs: dict[str, float] = field(default_factory=dict)
    """Weights of the pairs' losses in their mean, as in {text_audio: 0.5}; a pair that is not named weighs 1."""

    def __post_init__(self):
        if not 0 < self.scale <= 100:
            raise ValueError("scale is above 0, at most 100")
        if not all(0 < weight < math.inf for weight in self.pairs.values()):
            raise ValueError("pairs are weights above 0")


def arrange(config: Config, sample: Sample, generator: torch.Generator | None = None) -> Example:
    """One sequence a part, all of it seen, nothing targets: the table of sequences is the question."""
    parts = list(sample.parts.values())
    seen = [part.replace(sequence=constant(number, len(part))) for number, part in enumerate(parts)]
    return Example(seen, [None] * len(seen), group=sample.group)


class Objective(nn.Module):
    whole_step = True

    def __init__(self, config: Config, model):
        super().__init__()
        self.config, self.modalities = config, list(model.modalities)
        names = [f"{a}_{b}" for a, b in itertools.combinations(self.modalities, 2)]
        if unknown := set(config.pairs) - set(names):
            raise ValueError(f"pairs names {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))
        self.bias = nn.Parameter(torch.tensor(config.bias)) if config.loss == "sigmoid" else None

    def features(self, output, targets: Targets) -> Tensor:
        """Unit vectors (S, E) of the task's sequences."""
        return output.embedding(targets.sequence, targets.modality)

    def compare(self, features: Tensor, targets: Targets) -> tuple[Tensor, dict[str, float]]:
        """The (weighted) mean loss over the pairs of modalities that meet in at least one sample, and each pair's accuracy."""
        losses, weights, report = [], [], {}
        for a, b in itertools.combinations(range(len(self.modalities)), 2):
            rows = [(targets.modality == modality).nonzero()[:, 0] for modality in (a, b)]
            samples = [targets.sample[r] for r in rows]
            groups = [targets.group[r] for r in rows]
            pair = samples[0][:, None] == samples[1]  # (A, B)
            if not bool(pair.any()) or min(pair.shape) < 2:
                continue
            left, right = (features.index_select(0, r) for r in rows)
            with torch.autocast(features.device.type, enabled=False):  # bfloat16 would round cosines times 100 away
                logits = left.float() @ right.float().T * self.log_scale.exp().clamp(max=100.0)
            ignored = (groups[0][:, None] == groups[1]) & ~pair
            name = f"{self.modalities[a]}_{self.modalities[b]}"
            weights.append(self.config.pairs.get(name, 1.0))
            losses.append(weights[-1] * self._loss(logits, pair, ignored))
            with torch.no_grad():
                best = logits.masked_fill(ignored, -torch.inf).argmax(1, keepdim=True)
                report[f"{name}_accuracy"] = pair.gather(1, best)[:, 0][pair.any(1)].float().mean()
        if not losses:
            return (features * 0.0).sum(), report
        return torch.stack(losses).sum() / sum(weights), report

    def _loss(self, logits: Tensor, pair: Tensor, ignored: Tensor) -> Tensor:
        if self.config.loss == "sigmoid":
            sign = pair.float() * 2 - 1
            each = -F.logsigmoid(sign * (logits + self.bias))
            return each.masked_fill(ignored, 0.0).sum() / pair.sum()
        logits = logits.masked_fill(ignored, -torch.inf)
        each_way = (_info_nce(logits, pair), _info_nce(logits.T, pair.T))
        return sum(each_way) / 2


def _info_nce(logits: Tensor, pair: Tensor) -> Tensor:
    """Cross-entropy of the right column, over the rows that have one."""
    rows = pair.any(1).nonzero()[:, 0]
    return F.cross_entropy(logits.index_select(0, rows), pair.index_select(0, rows).int().argmax(1))
