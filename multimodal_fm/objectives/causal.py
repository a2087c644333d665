"""Guess the next token from those before it (GPT). With `fuse` a sample's parts follow each other in one sequence, and
those named in `prefix` are read as one block and not guessed: captioning is `modalities: [image, text]`, `prefix: [image]`.

Radford et al. 2019; prefix language models: Raffel et al. 2020, Dong et al. 2019.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..batch import Example, Sample, Targets


@dataclass
class Config:
    fuse: bool = False  # all parts of a sample in one sequence, in the task's order
    prefix: list[str] = field(default_factory=list)  # modalities that are only read


def arrange(config: Config, sample: Sample, generator: torch.Generator | None = None) -> Example:
    """Orders rise token by token; a part of the prefix shares one order. The row before answers each token."""
    seen, targets, at, order, time, rows = [], [], [], 0, 0.0, 0
    for number, (modality, part) in enumerate(sample.parts.items()):
        if not config.fuse:
            order, time = 0, 0.0
        block = modality in config.prefix
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
        targets.append(part.select(guess))
        at.append(guess + rows - 1)
        rows += len(part)
    return Example(seen, [None] * len(seen), targets, at, sample.group)


class Objective(nn.Module):
    def __init__(self, config: Config, model):
        super().__init__()
        self.config = config
        self.predict = nn.ModuleDict(
            {k: model.predictor(k, model.config.width) for k in model.modalities if k not in config.prefix}
        )

    def arrange(self, sample: Sample) -> Example:
        """As in training, for whoever wants a text's score."""
        return arrange(self.config, sample)

    def loss(self, output, targets: Targets) -> tuple[Tensor, dict[str, float]]:
        """The mean over modalities of the mean over the step's guessed tokens of that modality; the report has each modality's."""
        loss, report = output.zero(), {}
        for modality in targets.tokens:
            mean = self.score(output, targets, modality).sum() / targets.counts[modality]
            loss = loss + mean / len(targets.counts)
            report[modality] = mean.detach()
        return loss, report

    def score(self, output, targets: Targets, modality: str) -> Tensor:
        """The loss of each guessed token of one modality (M,)."""
        vectors = output.tokens.content.index_select(0, targets.at[modality])
        return self.predict[modality](vectors, targets.tokens[modality].content)
