"""Guess hidden tokens. `replace` is BERT's and RoBERTa's way (a fresh choice each time), `drop` is MAE's: hidden tokens
never enter the backbone and a light decoder guesses them. Either works on any modality.

Devlin et al. 2019, Liu et al. 2019, He et al. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..backbone import Config as BackboneConfig
from ..batch import Example, Sample, Targets
from ..tokens import Tokens, layout


@dataclass
class Config:
    hide: Literal["replace", "drop"] = "replace"
    share: float | dict[str, float] = (
        0.3  # of each sequence's tokens that are hidden; by modality, others are left whole
    )
    swap: float = 0.1  # replace: of the hidden tokens, the share that another token of the sequence stands in for,
    keep: float = 0.1  # and the share that stays to be seen
    fuse: bool = False  # all parts of a sample in one sequence, so that they are guessed from each other
    decoder: BackboneConfig = field(default_factory=lambda: BackboneConfig(width=128, depth=1, heads=4))  # drop


def arrange(config: Config, sample: Sample, generator: torch.Generator) -> Example:
    """Hide a random share of each part's tokens; at least one token stays and, of two or more, one is hidden."""
    seen, hidden, targets, at, rows, time = [], [], [], [], 0, 0.0
    for number, (modality, part) in enumerate(sample.parts.items()):
        if config.fuse:  # one sequence: its time goes on from part to part
            part = part.replace(position=part.position + torch.tensor([time, 0.0, 0.0]))
            time = float(part.position[:, 0].max()) + 1
        else:
            part = part.replace(sequence=part.sequence + number)
        share = config.share.get(modality, 0.0) if isinstance(config.share, dict) else config.share
        count = min(max(round(share * len(part)), 1), len(part) - 1) if share > 0 else 0
        choice = torch.randperm(len(part), generator=generator)
        guess, rest = choice[:count].sort().values, choice[count:].sort().values
        if config.hide == "drop":
            shown, cover, answer = part.select(rest), None, torch.full((count,), -1)
        else:
            shown, cover = _replace(config, part, guess, generator)
            answer = guess + rows
        seen.append(shown)
        hidden.append(cover)
        targets.append(part.select(guess))
        at.append(answer)
        rows += len(shown)
    return Example(seen, hidden, targets, at, sample.group)


def _replace(config: Config, part: Tokens, guess: Tensor, generator: torch.Generator) -> tuple[Tokens, Tensor]:
    fate = torch.rand(len(guess), generator=generator)
    swapped, covered = guess[fate < config.swap], guess[fate >= config.swap + config.keep]
    donors = torch.randint(len(part), (len(swapped),), generator=generator)
    content = part.content.clone()
    content[swapped] = part.content[donors]
    cover = torch.zeros(len(part), dtype=torch.bool)
    cover[covered] = True
    return part.replace(content=content), cover


class Objective(nn.Module):
    def __init__(self, config: Config, model):
        super().__init__()
        self.config, self.modalities = config, list(model.modalities)
        self.width = model.config.width
        if config.hide == "drop":
            width = config.decoder.width
            self.narrow = nn.Linear(self.width, width, bias=False)
            self.blank = nn.Parameter(torch.randn(len(self.modalities), width) * 0.02)
            self.decoder = Backbone(config.decoder, len(self.modalities))
        else:
            width = self.width
        wanted = config.share if isinstance(config.share, dict) else self.modalities
        self.predict = nn.ModuleDict(
            {modality: model.predictor(modality, width) for modality in self.modalities if modality in wanted}
        )

    def loss(self, output, targets: Targets) -> tuple[Tensor, dict[str, float]]:
        """The mean over modalities of the mean over the step's targets tokens of that modality; the report has each modality's."""
        answers = self._decode(output, targets) if self.config.hide == "drop" else None
        loss, report = output.zero(), {}
        for modality, tokens in targets.tokens.items():
            vectors = answers[modality] if answers else output.tokens.content.index_select(0, targets.at[modality])
            mean = self.predict[modality](vectors, tokens.content).sum() / targets.counts[modality]
            loss = loss + mean / len(targets.counts)
            report[modality] = mean.detach()
        return loss, report

    def _decode(self, output, targets: Targets) -> dict[str, Tensor]:
        """A light Transformer reads what the backbone made of the seen tokens, and a blank for each targets one."""
        if not targets.tokens:
            return {}
        questions = list(targets.tokens.values())
        sequence = torch.cat([q.sequence for q in questions])
        wanted = torch.zeros(output.sequences + 1, dtype=torch.bool, device=sequence.device)
        wanted[sequence] = True  # the last row, for filler, stays False
        seen = output.tokens.select(wanted[output.tokens.sequence].nonzero()[:, 0])
        blanks = torch.cat([q.modality for q in questions])
        both = Tokens(
            torch.cat([self.narrow(seen.content), self.blank.index_select(0, blanks)]),
            torch.cat([seen.position, *(q.position for q in questions)]),
            torch.cat([seen.sequence, sequence]),
            torch.cat([seen.order, *(q.order for q in questions)]),
            torch.cat([seen.modality, blanks]),
        )
        rows = layout(both.sequence, both.order)
        read = self.decoder(both.select(rows))
        answers = read.content.index_select(0, torch.argsort(rows)[len(seen) :])
        return dict(zip(targets.tokens, answers.split([len(q) for q in questions]), strict=True))
