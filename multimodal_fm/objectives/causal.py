"""Predict the next token from those before it (GPT; Radford et al. 2019).

With `fuse` the modalities of a sample follow each other in one sequence, and those named in `prefix` are read as one
block and not predicted: captioning is `modalities: [image, text]`, `fuse: true`, `prefix: [image]` (a prefix language
model; Dong et al. 2019, Raffel et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..batch import Example, Sample
from ..tokens import Tokens
from . import base


@dataclass
class Config(base.Config):
    fuse: bool = False  # all modalities of a sample in one sequence, in the task's order
    prefix: list[str] = field(default_factory=list)  # modalities that are read and not predicted
    drop_prefix: float = 0.0
    """fuse: the share of samples of which only the last modality is read, so that its generation can be guided (Ho and
    Salimans 2022)."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.drop_prefix < 1 or (self.drop_prefix and not self.fuse):
            raise ValueError("drop_prefix is a share from 0 to below 1, with fuse: true")


class Objective(base.TokenObjective):
    Config = Config

    def __init__(self, config: Config, model, modalities: list[str]):
        super().__init__(config, model, modalities)
        predicted = [modality for modality in modalities if modality not in config.prefix]
        self.predictors = nn.ModuleDict({m: model.predictor(m, model.width) for m in predicted})

    @staticmethod
    def problems(config: Config, modalities: list[str]):
        if unknown := [modality for modality in config.prefix if modality not in modalities]:
            yield "prefix", f"names no modality of the task: {', '.join(unknown)}"
        if config.prefix and set(config.prefix) >= set(modalities):
            yield "prefix", "leaves no modality to predict"

    @staticmethod
    def one_sequence_per_modality(config: Config) -> bool:
        return not config.fuse

    @staticmethod
    def arrange(config: Config, sample: Sample, generator: torch.Generator | None = None) -> Example:
        """Orders rise token by token; a modality of the prefix shares one order. The row before answers each token."""
        inputs, targets, answers, num_rows = [], [], [], 0
        read = list(sample.tokens)
        if config.drop_prefix and generator is not None and torch.rand((), generator=generator) < config.drop_prefix:
            read = read[-1:]
        pieces = (base.fuse if config.fuse else base.separate)(sample.tokens[modality] for modality in read)
        for modality, tokens in zip(read, pieces, strict=True):
            is_prefix = modality in config.prefix
            steps = torch.zeros(len(tokens), dtype=torch.long) if is_prefix else torch.arange(len(tokens))
            tokens = tokens.replace(order=steps + base.next_order(inputs[-1:] if config.fuse else []))
            first = 0 if config.fuse and inputs else 1  # nothing comes before the first token of a sequence
            predicted = torch.arange(first, first if is_prefix else len(tokens))
            inputs.append(tokens)
            targets.append(tokens.select(predicted))
            answers.append(predicted + num_rows - 1)
            num_rows += len(tokens)
        return Example(inputs, [None] * len(inputs), targets, answers, sample.group)

    def writes(self) -> dict[str, list[str]]:
        before = {m: self.modalities[: self.modalities.index(m)] if self.config.fuse else [] for m in self.modalities}
        return {modality: before[modality] for modality in self.predictors}

    def arrange_prefix(self, prefix: dict[str, Tokens], target: str, holes: Tensor | None = None) -> base.Prefix:
        """The prefix in the task's order, as `arrange` lays it out; the target's order and time go on after it."""
        sample = Sample({m: prefix[m] for m in self.modalities if m in prefix})
        return base.Prefix.before(self.arrange(self.config, sample).inputs)

    def has_likelihood(self, modality: str) -> bool:
        return modality in self.predictors
