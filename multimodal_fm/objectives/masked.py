"""Predict hidden tokens, of any modality.

`hide: replace` is BERT's way with RoBERTa's fresh choice each time (Devlin et al. 2019, Liu et al. 2019); with `hide:
drop` hidden tokens never enter the backbone and a light decoder predicts them (MAE, He et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..backbone import Config as BackboneConfig
from ..batch import Batch, Example, Sample, Targets
from ..tokens import Tokens
from . import base


@dataclass
class Config(base.Config):
    hide: Literal["replace", "drop"] = "replace"  # by a mask token (BERT), or not read at all (MAE)
    mask_ratio: float | dict[str, float] = (
        0.3  # of each sequence's tokens; a map names it by modality, and leaves the others whole
    )
    random_ratio: float = 0.1  # replace: of the hidden tokens, those replaced by another token of the sequence
    keep_ratio: float = 0.1  # replace: of the hidden tokens, those that stay to be seen
    fuse: bool = False  # all modalities of a sample in one sequence, so that they are predicted from each other
    decoder: BackboneConfig = field(default_factory=lambda: BackboneConfig(width=128, depth=1, num_heads=4))
    """`hide: drop`: the Transformer that predicts what was dropped."""

    def __post_init__(self):
        super().__post_init__()
        ratios = (*base.all_values(self.mask_ratio), self.random_ratio + self.keep_ratio)
        if not all(0 <= ratio <= 1 for ratio in ratios):
            raise ValueError("mask_ratio, and random_ratio and keep_ratio together, are from 0 to 1")

    def ratio(self, modality: str) -> float:
        return base.by_modality(self.mask_ratio, modality, 0.0)


class Objective(base.DecodingObjective):
    Config = Config

    def __init__(self, config: Config, model, modalities: list[str]):
        super().__init__(config, model, modalities)
        predicted = [modality for modality in modalities if config.ratio(modality) > 0]
        width = model.width
        if config.hide == "drop":
            width = config.decoder.width
            self.add_decoder(config.decoder, model, predicted)
        self.predictors = nn.ModuleDict({m: model.predictor(m, width) for m in predicted})

    @staticmethod
    def problems(config: Config, modalities: list[str]):
        yield from base.check_modalities("mask_ratio", config.mask_ratio, modalities)
        if not any(config.ratio(modality) > 0 for modality in modalities):
            yield "mask_ratio", "hides nothing"

    @staticmethod
    def one_sequence_per_modality(config: Config) -> bool:
        return not config.fuse

    @staticmethod
    def arrange(config: Config, sample: Sample, generator: torch.Generator | None = None) -> Example:
        """Hide a random share of each modality's tokens; at least one stays and, of two or more, one is hidden."""
        inputs, hidden, targets, answers, num_rows = [], [], [], [], 0
        pieces = (base.fuse if config.fuse else base.separate)(sample.tokens.values())
        for modality, tokens in zip(sample.tokens, pieces, strict=True):
            ratio = config.ratio(modality)
            count = min(max(round(ratio * len(tokens)), 1), len(tokens) - 1) if ratio > 0 else 0
            shuffled = torch.randperm(len(tokens), generator=generator)
            masked, visible = shuffled[:count].sort().values, shuffled[count:].sort().values
            if config.hide == "drop":
                shown, hide, rows = tokens.select(visible), None, torch.full((count,), -1)
            else:
                shown, hide = _replace(config, tokens, masked, generator)
                rows = masked + num_rows
            inputs.append(shown)
            hidden.append(hide)
            targets.append(tokens.select(masked))
            answers.append(rows)
            num_rows += len(shown)
        return Example(inputs, hidden, targets, answers, sample.group)

    def fills(self) -> dict[str, list[str]]:
        if self.config.hide == "drop":
            return {}
        return {m: [o for o in self.modalities if o != m] if self.config.fuse else [] for m in self.predictors}

    def arrange_holes(self, prefix: dict[str, Tokens], target: str, tokens: Tokens, hidden: Tensor) -> Example:
        """The modalities in the task's order, in one sequence; each hidden token's own row answers it."""
        given, rows = prefix | {target: tokens}, hidden.nonzero()[:, 0]
        read = [modality for modality in self.modalities if modality in given]
        inputs, which = base.fuse(given[modality] for modality in read), read.index(target)
        first_row = sum(map(len, inputs[:which]))
        hide = [hidden if modality == target else None for modality in read]
        return Example(inputs, hide, [inputs[which].select(rows)], [rows + first_row])

    @staticmethod
    def plan(config: Config, batch: Batch, targets: Targets) -> base.DecoderPlan | None:
        return base.plan_decoder(batch, targets) if config.hide == "drop" and targets.tokens else None

    def loss(self, output, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over modalities of the mean over the step's target tokens; the figures are each modality's."""
        decoded = self.decode(output, targets) if self.config.hide == "drop" else None
        loss, figures = output.zero(), {}
        for modality, tokens in targets.tokens.items():
            if decoded is None:
                vectors = output.tokens.content.index_select(0, targets.rows[modality])
            else:
                vectors = decoded[modality]
            mean = self.predictors[modality](vectors, tokens.content).sum() / targets.counts[modality]
            loss = loss + mean / len(targets.counts)
            figures[modality] = mean.detach()
        return loss, figures


def _replace(config: Config, tokens: Tokens, masked: Tensor, generator) -> tuple[Tokens, Tensor]:
    """The tokens with some of the masked ones swapped, and which are hidden (N,)."""
    draw = torch.rand(len(masked), generator=generator)
    random, hidden = masked[draw < config.random_ratio], masked[draw >= config.random_ratio + config.keep_ratio]
    donors = torch.randint(len(tokens), (len(random),), generator=generator)
    content = tokens.content.clone()
    content[random] = tokens.content[donors]
    hide = torch.zeros(len(tokens), dtype=torch.bool)
    hide[hidden] = True
    return tokens.replace(content=content), hide
