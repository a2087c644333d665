"""Bring the modalities of a sample together: InfoNCE (CLIP, Radford et al. 2021) or the sigmoid loss (SigLIP, Zhai et
al. 2023) over all pairs of modalities that the samples have, with a learned temperature.

With `views: 2` each modality is read twice, and is a pair with itself too: a view finds the other view of its sample
among all views of the step (NT-Xent of SimCLR, Chen et al. 2020), so that samples of one modality teach as well. Views
of pictures and sounds differ by the tokenizer's augmentation; those of texts by the field and the window that is drawn
and, with `drop_ratio`, by the tokens that are left out (SimCSE, Gao et al. 2021, has dropout there, of which this
network has none).

Samples of an equal group are never each other's negatives.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..batch import Example, Pairs, Sample, Targets
from ..losses import pairwise
from ..model import full
from ..tokens import constant
from . import base

MAX_SCALE = 100.0  # as in CLIP


@dataclass
class Config(base.Config):
    loss: Literal["infonce", "sigmoid"] = "infonce"  # over all pairs of a step (CLIP), or pair by pair (SigLIP)
    head: str = "retrieval"  # the head of the model whose vectors are compared
    scale: float = 14.0  # what cosines are multiplied by at the start; learned, at most 100
    bias: float = -10.0  # sigmoid: what is added at the start; learned
    hard_negatives: float = 0.0
    """infonce: negatives weigh exp(this times their cosine), in mean 1, so that the nearest weigh most (Robinson et al.
    2021); 0: all weigh the same."""
    pairs: dict[str, float] = field(default_factory=dict)
    """Weights of the pairs' losses in their mean, as in {text_audio: 0.5}; a pair that is not named weighs 1."""
    views: int = 1  # readings of each modality of a sample; with 2 each modality is a pair with itself, as image_image
    drop_ratio: float | dict[str, float] = 0.0  # of each sequence's tokens, left out at random; a map: by modality

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.scale <= MAX_SCALE:
            raise ValueError(f"scale is above 0, at most {MAX_SCALE:g}")
        if not 0 <= self.hard_negatives < math.inf or (self.hard_negatives and self.loss != "infonce"):
            raise ValueError("hard_negatives is a number from 0 up, with loss: infonce")
        if not all(0 < weight < math.inf for weight in self.pairs.values()):
            raise ValueError("pairs are weights above 0")
        if self.views not in (1, 2):
            raise ValueError("views is 1 or 2")
        if not all(0 <= ratio < 1 for ratio in base.all_values(self.drop_ratio)):
            raise ValueError("drop_ratio is from 0 to below 1")


class Objective(base.Objective):
    Config = Config
    whole_step, uses_groups, maxima = True, True, ("largest_logit",)

    def __init__(self, config: Config, model, modalities: list[str]):
        super().__init__(config, model, modalities)
        if config.head not in model.heads:
            raise ValueError(
                f"contrastive: the model has no head {config.head!r} (there are: {', '.join(model.heads)})"
            )
        self.pair_weights = {
            f"{a}_{b}": config.pairs.get(f"{a}_{b}", config.pairs.get(f"{b}_{a}", 1.0))
            for a, b in itertools.product(modalities, repeat=2)
        }
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))
        self.bias = nn.Parameter(torch.tensor(config.bias)) if config.loss == "sigmoid" else None

    @staticmethod
    def min_modalities(config: Config, modalities: list[str]) -> int:
        return 1 if config.views > 1 else 2

    @staticmethod
    def views(config: Config) -> int:
        return config.views

    @staticmethod
    def problems(config: Config, modalities: list[str]):
        if len(modalities) < 2 and config.views < 2:
            yield "modalities", "must be at least two, which are brought together, or with `views: 2`"
        yield from base.check_modalities("drop_ratio", config.drop_ratio, modalities)
        both = itertools.combinations if config.views < 2 else itertools.combinations_with_replacement
        names = ["_".join(pair) for a, b in both(modalities, 2) for pair in ((a, b), (b, a))]
        if unknown := [name for name in config.pairs if name not in names]:
            yield "pairs", f"names {', '.join(unknown)}; there are {', '.join(names[::2])}"

    @staticmethod
    def arrange(config: Config, sample: Sample, generator: torch.Generator | None = None) -> Example:
        """One sequence for each view of each modality, nothing to be predicted."""
        views = [(m, tokens) for view in (sample.tokens, *sample.views) for m, tokens in view.items()]
        inputs = []
        for number, (modality, tokens) in enumerate(views):
            count = round(base.by_modality(config.drop_ratio, modality, 0.0) * len(tokens))
            if count := min(count, len(tokens) - 1):
                tokens = tokens.select(torch.randperm(len(tokens), generator=generator)[count:].sort().values)
            inputs.append(tokens.replace(sequence=constant(number, len(tokens))))
        return Example(inputs, [None] * len(inputs), group=sample.group)

    def features(self, output, targets: Targets) -> Tensor:
        """Unit vectors (S, E) of the task's sequences."""
        return output.embedding(targets.sequence, targets.modality, self.config.head)

    def compare(
        self, features: Tensor, pairs: dict[str, Pairs], rows: range | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted mean loss over the pairs of modalities; the figures are each pair's accuracy, how far the
        features are spread, the learned scale and the largest logit."""
        losses, weights, largest = [], [], features.new_zeros(())
        figures: dict[str, Tensor] = {}
        share = 1.0 if rows is None else len(rows) / max(1, len(features))  # of figures that all ranks have in common
        for name, pair in pairs.items():
            left, right = (full(features.index_select(0, own)) for own in pair.rows)
            matches = pairwise.Matches(pair.groups, pair.columns, pair.own(rows))
            if self.bias is None:
                scored = pairwise.info_nce(left, right, self.log_scale, matches, self.config.hard_negatives)
            else:
                scored = pairwise.sigmoid(left, right, self.log_scale, self.bias, matches)
            loss, figures[f"{name}_accuracy"], most = scored
            largest = torch.maximum(largest, most)
            weights.append(self.pair_weights[name])
            losses.append(weights[-1] * loss)
        if not losses:
            return (features * 0.0).sum(), figures
        common = base.measure_spread(features) | {"scale": self.log_scale.detach().exp()}
        figures |= {name: figure * share for name, figure in common.items()} | {"largest_logit": largest}
        return torch.stack(losses).sum() / sum(weights), figures

    @torch.no_grad()
    def after_update(self) -> None:
        """Keeps the learned scale within bounds; a clamp inside the loss would stop its gradient there for good."""
        self.log_scale.clamp_(max=math.log(MAX_SCALE))
