"""Predict what the averaged model makes of the whole sequence, where the model sees only a part of it.

data2vec (Baevski et al. 2022): a hidden token's target is the mean of a teacher's last blocks at its place, each
normalized. With `hide: drop`, a light decoder and several masks for one reading of the teacher it is data2vec 2.0
(Baevski et al. 2023). The teacher is the run's averaged model (`ema_decay`), which is saved and resumed with the run. A
block's output here is that of its residual stream, fairseq's `end_of_block_targets`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Config as BackboneConfig
from ..batch import Batch, Example, Sample, Targets
from ..model import full
from ..tokens import Tokens, constant
from . import base

Norm = Literal["instance", "layer", "none"]


@dataclass
class Config(base.Config):
    hide: Literal["drop", "replace"] = "drop"  # not read at all (data2vec 2.0), or read as a mask token (data2vec)
    mask_ratio: float | dict[str, float] = 0.6  # of each sequence's tokens; a map names it by modality, others: none
    num_masks: int = 1  # masks a sample, each a sequence that the model reads; the teacher reads the sample once
    mask_block: int | dict[str, int] = 1  # hidden tokens come in blocks of so many a side, in time, rows and columns
    keep_block: int | dict[str, int] = 1  # visible tokens come in such blocks (the inverse block masks of data2vec 2.0)
    average_layers: int = 0  # the last blocks of the teacher whose mean is predicted; 0: all
    target_norm: Norm | dict[str, Norm] = "instance"
    """How each block's outputs are normalized: over the tokens of a sequence (instance), over the features of a token
    (layer), or not at all. A map names it by modality, others: instance."""
    loss_beta: float = 0.0  # from which error on the loss is linear (smooth L1); 0: squared errors
    fuse: bool = False  # all modalities of a sample in one sequence, so that they are predicted from each other
    decoder: BackboneConfig = field(default_factory=lambda: BackboneConfig(width=128, depth=1, num_heads=4))
    """`hide: drop`: the Transformer that predicts what was dropped."""

    def __post_init__(self):
        super().__post_init__()
        if not all(0 <= ratio <= 1 for ratio in base.all_values(self.mask_ratio)):
            raise ValueError("mask_ratio is from 0 to 1")
        blocks = (*base.all_values(self.mask_block), *base.all_values(self.keep_block))
        if min(self.num_masks, *blocks) < 1 or self.average_layers < 0:
            raise ValueError("num_masks, mask_block and keep_block are at least 1, average_layers at least 0")
        if not 0 <= self.loss_beta < float("inf"):
            raise ValueError("loss_beta is a number from 0 up")

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
        depth = model.config.backbone.depth
        if config.average_layers > depth:
            raise ValueError(f"latent: average_layers={config.average_layers} of a backbone of {depth} blocks")
        self.teacher_layers = config.average_layers or depth
        self.predictors = nn.ModuleDict({m: nn.Linear(width, model.width) for m in predicted})

    @staticmethod
    def problems(config: Config, modalities: list[str]):
        for key in ("mask_ratio", "mask_block", "keep_block", "target_norm"):
            yield from base.check_modalities(key, getattr(config, key), modalities)
        if not any(config.ratio(modality) > 0 for modality in modalities):
            yield "mask_ratio", "hides nothing"

    @staticmethod
    def one_sequence_per_modality(config: Config) -> bool:
        return not config.fuse and config.num_masks == 1

    @staticmethod
    def arrange(config: Config, sample: Sample, generator: torch.Generator | None = None) -> Example:
        """For each mask a sequence with a random share of each modality's tokens hidden, and the whole for the teacher;
        at least one token stays and, of two or more, one is hidden."""
        whole = base.fuse(sample.tokens.values()) if config.fuse else list(sample.tokens.values())
        own = [0 if config.fuse else number for number in range(len(whole))]
        first_rows = torch.tensor([0, *map(len, whole)]).cumsum(0).tolist()  # of each piece, for the teacher
        example, num_rows = Example([], [], group=sample.group), 0
        for mask in range(config.num_masks):
            for modality, piece, number, first in zip(sample.tokens, whole, own, first_rows, strict=False):
                tokens = piece.replace(sequence=constant(mask * (own[-1] + 1) + number, len(piece)))
                masked, visible = _draw_mask(config, modality, tokens, generator)
                if config.hide == "drop":
                    shown, hide, rows = tokens.select(visible), None, torch.full((len(masked),), -1)
                else:
                    shown, hide, rows = tokens, torch.zeros(len(tokens)), masked + num_rows
                    hide[masked] = 1.0
                example.inputs.append(shown)
                example.hidden.append(hide)
                example.targets.append(tokens.select(masked).replace(content=torch.zeros(len(masked))))
                example.rows.append(rows)
                example.teacher_rows.append(masked + first)
                num_rows += len(shown)
        example.teacher.extend(p.replace(sequence=constant(n, len(p))) for p, n in zip(whole, own, strict=True))
        return example

    @staticmethod
    def plan(config: Config, batch: Batch, targets: Targets) -> base.DecoderPlan | None:
        return base.plan_decoder(batch, targets) if config.hide == "drop" and targets.tokens else None

    def loss(self, output, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over modalities of the mean error over the step's target tokens and their features.

        Figures, by modality: that mean; and the standard deviation of targets and of predictions over the tokens of a
        microbatch, mean over the features. Both fall to 0 where the representation collapses.
        """
        decoded = self.decode(output, targets) if self.config.hide == "drop" else None
        loss, figures = output.zero(), {}
        for modality, tokens in targets.tokens.items():
            if decoded is None:
                vectors = output.tokens.content.index_select(0, targets.rows[modality])
            else:
                vectors = decoded[modality]
            predicted = full(self.predictors[modality](vectors))
            wanted = self.read_targets(output.teacher, targets.teacher_rows[modality], modality)
            mean = self._errors(predicted, wanted).mean(1).sum() / targets.counts[modality]
            loss = loss + mean / len(targets.counts)
            share = len(tokens) / targets.counts[modality]  # so that the figures of microbatches add up
            figures[modality] = mean.detach()
            figures[f"{modality}_target_std"] = share * wanted.std(0, correction=0).mean()
            figures[f"{modality}_prediction_std"] = share * predicted.detach().std(0, correction=0).mean()
        return loss, figures

    @torch.no_grad()
    def read_targets(self, teacher, rows: Tensor, modality: str) -> Tensor:
        """What is to be predicted (M, D): the mean of the teacher's last blocks, each normalized, at `rows` (M,)."""
        norm = base.by_modality(self.config.target_norm, modality, "instance")
        layers = []
        for state in teacher.states[-self.teacher_layers :]:
            if norm == "instance":
                layers.append(teacher.instance_norm(full(state)).index_select(0, rows))
            else:
                chosen = full(state.index_select(0, rows))
                layers.append(F.layer_norm(chosen, chosen.shape[1:]) if norm == "layer" else chosen)
        return torch.stack(layers).mean(0)

    def _errors(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        if self.config.loss_beta:
            return F.smooth_l1_loss(predicted, wanted, reduction="none", beta=self.config.loss_beta)
        return (predicted - wanted).square()


def _draw_mask(config: Config, modality: str, tokens: Tokens, generator) -> tuple[Tensor, Tensor]:
    """The rows of the tokens that are hidden, and of those that stay, each in order."""
    ratio, length = config.ratio(modality), len(tokens)
    count = min(max(round(ratio * length), 1), length - 1) if ratio > 0 else 0
    mask_block, keep_block = (base.by_modality(b, modality, 1) for b in (config.mask_block, config.keep_block))
    if keep_block > 1:  # blocks of what stays come first
        shuffled = _blocks_first(tokens.position, keep_block, generator).flip(0)
    else:
        shuffled = _blocks_first(tokens.position, mask_block, generator)
    return shuffled[:count].sort().values, shuffled[count:].sort().values


def _blocks_first(position: Tensor, side: int, generator) -> Tensor:
    """A random order of rows (N,) in which those of a block of `side` tokens in time, rows and columns stand together;
    the first of them is the block's center."""
    shuffled = torch.randperm(len(position), generator=generator)
    if side == 1:
        return shuffled
    low, high = (side - 1) // 2, side // 2
    apart = position[None] - position[shuffled][:, None]  # (centers, N, 3)
    inside = ((apart >= -low) & (apart <= high)).all(-1)
    block = inside.int().argmax(0)  # the first block, in their order, that holds each row
    rank = torch.empty_like(shuffled)
    rank[shuffled] = torch.arange(len(shuffled))  # within a block by chance
    return torch.argsort(block * len(position) + rank)
