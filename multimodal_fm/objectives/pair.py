"""Decide whether two parts that are read together belong together.

`next_sentence` (BERT, Devlin et al. 2019): a text is cut in two at the start of a sentence, and half of the times its
second segment is one of another sample's text. `matching` (image-text matching of ALBEF, Li et al. 2021): half of the
times one modality of a sample is that of another. The other sample is drawn at random from the same source.

It arranges on its own, or follows another objective that arranges what it has prepared, as BERT's masked tokens are
predicted in the same reading: `objectives: {masked: {}, pair: {}}`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import NOT_ASKED, Example, Sample, Targets
from ..model import full
from ..tokens import Tokens, concatenate
from . import base

SENTENCE_END = re.compile(r"""[.!?…。！？][)\]"'”’»]*\s*$|\n\s*$""")


@dataclass
class Config(base.Config):
    kind: Literal["next_sentence", "matching"] = "next_sentence"
    """Whether the second segment of a text follows the first one, or whether the modalities are of one sample."""
    modality: str = "text"  # what is cut in two (next_sentence), or taken from another sample (matching)
    pool: Literal["first", "mean"] = "first"
    """What of a sequence is looked at: its first token (the `prompt` tokenizer's class token, where there is one), or
    the mean of all."""


class Objective(base.Objective):
    Config = Config
    uses_groups, may_follow = True, True

    def __init__(self, config: Config, model, modalities: list[str]):
        super().__init__(config, model, modalities)
        if config.kind == "next_sentence":
            check_positions(model, config.modality)
        width = model.width
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))

    @staticmethod
    def problems(config: Config, modalities: list[str]):
        if config.kind == "next_sentence" and modalities != [config.modality]:
            yield "modality", f"must be all that the task reads; it reads {', '.join(modalities)}"
        elif config.modality not in modalities:
            yield "modality", f"names no modality of the task: {config.modality} (there are: {', '.join(modalities)})"
        if config.kind == "matching" and len(modalities) < 2:
            yield "modalities", "must be at least two, which match or do not"

    @staticmethod
    def misfit(config: Config, one_sequence_per_modality: bool) -> str:
        wrong = config.kind == "matching" and one_sequence_per_modality
        return "needs all modalities of a sample in one sequence (fuse: true)" if wrong else ""

    @staticmethod
    def one_sequence_per_modality(config: Config) -> bool:
        return False

    @staticmethod
    def min_modalities(config: Config, modalities: list[str]) -> int:
        return 2 if config.kind == "matching" else 1

    @staticmethod
    def reads_other(config: Config, modalities: list[str]) -> list[str]:
        return [config.modality]

    @staticmethod
    def read_label(config: Config, raw: dict[str, bytes], tokens: dict[str, Tokens], tokenizers) -> list[int] | None:
        """next_sentence: the tokens of the text that begin a sentence; where there are none, those that begin a word.

        Never the first token of the text.
        """
        if config.kind != "next_sentence" or config.modality not in tokens:
            return None
        tokenizer: Any = tokenizers[config.modality]
        ids = tokens[config.modality].content.tolist()
        return find_starts([decode_after(tokenizer, *pair) for pair in zip([None, *ids], ids)])

    @staticmethod
    def prepare(config: Config, sample: Sample, generator: torch.Generator | None = None) -> Sample:
        """The sample with its text as `BEGIN a END b END`, or with one modality, half of the times of another sample's.

        `match` is 1 where it is the sample's own, 0 where it is not. What cannot be cut in two stays as it is.
        """
        own, other = sample.tokens.get(config.modality), sample.other
        is_cut = config.kind == "next_sentence"
        if own is None or other is None or (not sample.label if is_cut else len(sample.tokens) < 2):
            return sample
        match = int(torch.randint(2, (1,), generator=generator))
        theirs = other.tokens[config.modality]
        if is_cut:
            cut = _draw(sample.label, generator)
            begin = cut if match else _draw(other.label or [1], generator)
            tokens = join_segments(own, cut, own if match else theirs, begin)
        else:
            tokens = own if match else theirs
        return dataclasses.replace(sample, tokens={**sample.tokens, config.modality: tokens}, match=match)

    @staticmethod
    def arrange(config: Config, sample: Sample, generator: torch.Generator | None = None) -> Example:
        """All of it in one sequence, nothing to be predicted but whether it belongs together."""
        inputs = base.fuse(sample.tokens.values())
        return Example(inputs, [None] * len(inputs), group=sample.group)

    def loss(self, output, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross-entropy over the samples of the step that were asked; the figure is the accuracy."""
        if targets.match is None:
            return output.zero(), {}
        if self.config.pool == "first":
            pooled = output.tokens.content.index_select(0, output.first_rows().index_select(0, targets.sequence))
        else:
            pooled = output.mean_pool().index_select(0, targets.sequence)
        logits = full(self.classifier(pooled))
        total = F.cross_entropy(logits, targets.match, ignore_index=NOT_ASKED, reduction="sum")
        right = (logits.argmax(1) == targets.match).sum()
        return total / targets.num_matches, {"accuracy": right.float() / targets.num_matches}


def check_positions(model, modality: str) -> None:
    """Raises ValueError where the backbone learns its positions and has none for the second segment, and where not
    every text ends in END, which ends a segment."""
    if not getattr(model.tokenizers[modality].config, "end_cuts", True):
        raise ValueError("pair: a segment ends in END: set tokenizers.text.end_cuts=true")
    backbone, extent = model.config.backbone, model.tokenizers[modality].extent()
    times, rows, _ = backbone.extent()
    if backbone.block == "classic" and not (backbone.grid and rows > 1):
        raise ValueError("pair: the second segment stands in a row of its own: set backbone.grid=[2, 1]")
    if extent and extent[0] + 1 > times:
        raise ValueError(
            f"pair: two segments have up to {extent[0] + 1} tokens, one END more than max_tokens, and the backbone "
            f"learns {times} times: set backbone.max_positions={extent[0] + 1}"
        )


def decode_after(tokenizer, before: int | None, token: int) -> str:
    """What a token adds to the text of the one before it, the space between two word pieces too."""
    return (
        tokenizer.decode([token])
        if before is None
        else tokenizer.decode([before, token])[len(tokenizer.decode([before])) :]
    )


def find_starts(pieces: list[str]) -> list[int]:
    """Which of a text's pieces, each the text of one token, begin a sentence; where none does, which begin a word.

    Pieces without text, as BEGIN and END, begin nothing, nor does the first piece with text.
    """
    words, sentences, before = [], [], ""
    for row, piece in enumerate(pieces):
        if before and piece.strip() and (piece[0].isspace() or before[-1].isspace()):
            words.append(row)
            blank = piece[: len(piece) - len(piece.lstrip())]
            if SENTENCE_END.search(before + blank):
                sentences.append(row)
        before = (before + piece)[-16:]
    return sentences or words


def join_segments(first: Tokens, end: int, second: Tokens, begin: int) -> Tokens:
    """One sequence of `first` up to its token `end`, its last token (END), and `second` from its token `begin` on, at
    most as many tokens as `first` has from `end` on: one END more than `first` in all.

    Time goes on; the second segment stands in a row of its own, which rotary embedding reads as BERT's token types tell
    the segments apart.
    """
    last = len(first) - 1
    stop = min(len(second) - 1, begin + last - end)
    a = first.select(torch.tensor([*range(end), last]))
    b = second.select(torch.tensor([*range(begin, stop), len(second) - 1]))
    joined = concatenate([a, b])
    position = torch.zeros(len(joined), 3)
    position[:, 0] = torch.arange(len(joined))
    position[len(a) :, 1] = 1.0
    is_causal = bool(first.order.any())
    return joined.replace(
        position=position,
        order=torch.arange(len(joined)) if is_causal else first.order[:1].expand(len(joined)),
        sequence=first.sequence[:1].expand(len(joined)),
        modality=first.modality[:1].expand(len(joined)),
    )


def _draw(rows: list[int], generator) -> int:
    return rows[int(torch.randint(len(rows), (1,), generator=generator))]
