"""Give raw content back from discrete codes: an autoencoder whose codec is the model (VQ-VAE, van den Oord et al. 2017;
FSQ, Mentzer et al. 2023).

The backbone reads all of a picture or a sound, the head `codes` makes a code of each output, and its decoder makes raw
content of the codes again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Batch, Example, Reading, Sample, Targets, plan_reading
from ..heads.codes import Head
from ..transfer import move
from . import base


@dataclass
class Config(base.Config):
    head: str = "codes"  # the head of the model that quantizes and decodes
    l1: float = 0.0  # weight of the mean absolute error beside the mean squared one
    commitment: float = 0.25  # vq: weight of the squared distance of what is quantized from its code

    def __post_init__(self):
        super().__post_init__()
        if not all(0 <= weight < math.inf for weight in (self.l1, self.commitment)):
            raise ValueError("l1 and commitment are numbers from 0 up")


class Objective(base.Objective):
    Config = Config

    def __init__(self, config: Config, model, modalities: list[str]):
        super().__init__(config, model, modalities)
        if config.head not in model.heads:
            raise ValueError(f"autoencode: the model has no head {config.head!r} (there are: {', '.join(model.heads)})")
        head = model.heads[config.head]
        if not isinstance(head, Head):
            raise ValueError(f"autoencode: the head {config.head!r} makes no codes")
        if modalities != [head.modality]:
            raise ValueError(f"autoencode: the head {config.head!r} codes {head.modality}, not {', '.join(modalities)}")
        self.update_codebook: Callable = head.update_codebook
        self.learns_codebook, self.dim = head.learns_codebook, head.config.dim
        self.seen: list[tuple[Tensor, Tensor]] = []  # of this step: vectors (N, C) and the codes (N,) that they chose

    @staticmethod
    def problems(config: Config, modalities: list[str]):
        if len(modalities) > 1:
            yield "modalities", "must be the one that the head codes"

    @staticmethod
    def arrange(config: Config, sample: Sample, generator: torch.Generator | None = None) -> Example:
        """All of it is read, and all of it is to be given back: each token's own row answers."""
        inputs = base.separate(sample.tokens.values())
        rows = torch.arange(sum(map(len, inputs))).split([len(tokens) for tokens in inputs])
        return Example(inputs, [None] * len(inputs), inputs, list(rows), sample.group)

    @staticmethod
    def plan(config: Config, batch: Batch, targets: Targets) -> DecoderPlan | None:
        return plan_decoder(batch, targets) if targets.tokens else None

    def loss(self, output, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared error of the values, in the tokenizer's own scale, over the step's tokens.

        Figures, each a mean over the step's tokens: `psnr` or `snr`, the decibels of a token's sequence;
        `codebook_use`, the share of the codebook that its microbatch uses, and `perplexity`, of the codes of that.
        """
        loss, figures = output.zero(), {}
        head = output.heads[self.config.head]
        for modality, tokens in targets.tokens.items():
            vectors = head.project(output.tokens.content.index_select(0, targets.rows[modality]))
            quantized, codes = head.quantize(vectors)
            plan: DecoderPlan = targets.plan
            reading = plan.reading
            laid = quantized.index_select(0, reading.tokens.content)
            values = head.decode(laid, reading.tokens, reading.attention, reading.routing)
            values = values.index_select(0, reading.rows)
            target = head.reconstructor.target(tokens.content)
            error = (values - target).square().mean(1)
            each = error + self.config.l1 * (values - target).abs().mean(1) if self.config.l1 else error
            if head.learns_codebook:
                code = head.lookup(codes).detach()
                each = each + self.config.commitment * (vectors - code).square().mean(1)
                if self.training:
                    self.seen.append((vectors.detach(), codes))
            loss = loss + each.sum() / targets.counts[modality]
            with torch.no_grad():
                decibels = sequence_decibels(head, error, target, plan.owner, plan.num_sequences)
                use, perplexity = codebook_use(codes, head.config.codebook_size)
                share = len(tokens) / targets.counts[modality]
                figures[head.reconstructor.quality] = decibels.sum() / targets.counts[modality]
                figures |= {"codebook_use": use * share, "perplexity": perplexity * share}
        return loss, figures

    @torch.no_grad()
    def update_statistics(self, skipped: Tensor, gather: Callable[[Tensor], list[Tensor]]) -> None:
        if not self.learns_codebook:
            return
        seen, self.seen = self.seen, []
        device = skipped.device
        vectors = torch.cat([torch.zeros(0, self.dim, device=device), *(own for own, _ in seen)])
        codes = torch.cat([torch.zeros(0, dtype=torch.long, device=device), *(own for _, own in seen)])
        vectors, codes = torch.cat(gather(vectors)), torch.cat(gather(codes))
        if not skipped:
            self.update_codebook(vectors, codes)


@dataclass(frozen=True)
class DecoderPlan:
    """What the head's decoder reads: the M targets."""

    reading: Reading
    owner: Tensor  # (M,): each target's sequence, numbered from 0 on
    num_sequences: int

    def to(self, device) -> DecoderPlan:
        return move(self, device)


def plan_decoder(batch: Batch, targets: Targets) -> DecoderPlan:
    (tokens,) = targets.tokens.values()
    numbers, owner = tokens.sequence.unique(return_inverse=True)
    return DecoderPlan(plan_reading(tokens, len(batch.by_modality.counts)), owner, len(numbers))


def sequence_decibels(head, error: Tensor, target: Tensor, owner: Tensor, count: int) -> Tensor:
    """For each token (M,) the decibels of its sequence, by the mean squared error (M,) of its values."""
    sums = torch.stack([torch.ones_like(error), error, target.square().mean(1)], 1)
    totals = sums.new_zeros(count, 3).index_add(0, owner, sums)
    means = totals[:, 1:] / totals[:, :1]
    return head.reconstructor.decibels(means[:, 0], means[:, 1]).index_select(0, owner)


def codebook_use(codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The share of a codebook of this size that codes (M,) use, and the perplexity of their distribution."""
    counts = torch.zeros(size, device=codes.device).index_add(0, codes, torch.ones(len(codes), device=codes.device))
    shares = counts / counts.sum()
    return (counts > 0).float().mean(), torch.special.entr(shares).sum().exp()
