"""Guess the next token from those before it (GPT). With `fuse` an item's parts follow each other in one sequence, and
those named in `prefix` are read as one block and not guessed: captioning is `parts: [image, text]`, `prefix: [image]`.

Radford et al. 2019; prefix language models: Raffel et al. 2020, Dong et al. 2019.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..batch import Arranged, Asked, Item


@dataclass
class Config:
    fuse: bool = False  # all parts of an item in one sequence, in the section's order
    prefix: list[str] = field(default_factory=list)  # kinds that are only read


def arrange(config: Config, item: Item, generator: torch.Generator | None = None) -> Arranged:
    """Orders rise token by token; a part of the prefix shares one order. The row before answers each token."""
    seen, asked, at, order, time, rows = [], [], [], 0, 0.0, 0
    for number, (kind, part) in enumerate(item.parts.items()):
        if not config.fuse:
            order, time = 0, 0.0
        block = kind in config.prefix
        steps = torch.zeros(len(part), dtype=torch.long) if block else torch.arange(len(part))
        part = part.replace(
            position=part.position + torch.tensor([time, 0.0, 0.0]),
            order=steps + order,
            sequence=part.sequence if config.fuse else part.sequence + number,
        )
        order, time = int(part.order[-1]) + 1, float(part.position[:, 0].max()) + 1
        first = 0 if config.fuse and number else 1  # nothing comes before the first token of a sequence
        guess = torch.arange(first, first if block else len(part))
        seen.append(part)
        asked.append(part.select(guess))
        at.append(guess + rows - 1)
        rows += len(part)
    return Arranged(seen, [None] * len(seen), asked, at, item.group)


class Objective(nn.Module):
    def __init__(self, config: Config, model):
        super().__init__()
        self.config = config
        self.predict = nn.ModuleDict(
            {k: model.predictor(k, model.config.width) for k in model.kinds if k not in config.prefix}
        )

    def arrange(self, item: Item) -> Arranged:
        """As in training, for whoever wants a text's score."""
        return arrange(self.config, item)

    def loss(self, output, asked: Asked) -> tuple[Tensor, dict[str, float]]:
        """The mean over kinds of the mean over the step's guessed tokens of that kind; the report has each kind's."""
        loss, report = output.zero(), {}
        for kind in asked.tokens:
            mean = self.score(output, asked, kind).sum() / asked.counts[kind]
            loss = loss + mean / len(asked.counts)
            report[kind] = mean.detach()
        return loss, report

    def score(self, output, asked: Asked, kind: str) -> Tensor:
        """The loss of each guessed token of one kind (M,)."""
        vectors = output.tokens.content.index_select(0, asked.at[kind])
        return self.predict[kind](vectors, asked.tokens[kind].content)
