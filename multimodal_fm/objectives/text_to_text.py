"""A task as text: a source and a target made of a sample's fields, such as "trec: How far is it to ..." and "NUM" (T5;
Raffel et al. 2020, section 2.4).

The source is read as a whole, after the sample's other modalities where the task has some; the target is opened by the
text's first id and written token by token, as in `denoise`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..batch import Example, Sample
from ..corpus.fields import lookup, parse
from ..errors import SampleError
from ..tokenizers.base import Tokenizer
from ..tokens import Tokens, constant
from . import base

FIELD = re.compile(r"\{([^{}]+)\}")


@dataclass
class Config(base.Config):
    source: str = "{text}"  # what is read; {NAME} is a field of the sample's JSON (dots go deeper), {txt} the member
    target: str = "{label}"  # what is to be written, likewise

    def __post_init__(self):
        super().__post_init__()
        if not FIELD.search(self.target):
            raise ValueError("target names a field, as in {label}")


class Objective(base.TokenObjective):
    Config = Config
    label_extensions = ("json", "txt")

    def __init__(self, config: Config, model, modalities: list[str]):
        super().__init__(config, model, modalities)
        self.predictors = nn.ModuleDict({"text": model.predictor("text", model.width)})

    @staticmethod
    def problems(config: Config, modalities: list[str]):
        if "text" not in modalities:
            yield "modalities", "must name text, which is read and written"

    @staticmethod
    def one_sequence_per_modality(config: Config) -> bool:
        return False

    @staticmethod
    def min_modalities(config: Config, modalities: list[str]) -> int:
        return len(modalities)

    @staticmethod
    def draws_views(config: Config, modality: str) -> bool:
        return modality != "text"

    @staticmethod
    def read_label(
        config: Config, raw: dict[str, bytes], tokens: dict[str, Tokens], tokenizers: dict[str, Tokenizer]
    ) -> tuple[Tokens, Tokens]:
        """The source, as far as it fits into `max_tokens`, and the target. Raises SampleError."""
        modality = int(tokens["text"].modality[0])
        source, *_ = read_text(fill(config.source, raw), tokenizers["text"], modality)
        target, *more = read_text(fill(config.target, raw), tokenizers["text"], modality)
        if more:
            raise SampleError("label", f"its target has more than {len(target)} tokens")
        return source, target

    @staticmethod
    def arrange(config: Config, sample: Sample, generator: torch.Generator | None = None) -> Example:
        """One sequence: the other modalities and the source with order 0, then the target with orders 1, 2, ..."""
        source, target = sample.label
        *pieces, target = base.fuse([*(t for m, t in sample.tokens.items() if m != "text"), source, target])
        read, predicted, rows = base.shift_right(target, pieces, sum(map(len, pieces)))
        return Example([*pieces, read], [None] * (len(pieces) + 1), [predicted], [rows], sample.group)

    def writes(self) -> dict[str, list[str]]:
        """A target after the other modalities and a source, which is written as the template would."""
        return {"text": self.modalities}

    def arrange_prefix(self, prefix: dict[str, Tokens], target: str, holes: torch.Tensor | None = None) -> base.Prefix:
        """The other modalities in the task's order, then the source."""
        order = [m for m in (*(m for m in self.modalities if m != "text"), "text") if m in prefix]
        return base.Prefix.before(base.fuse(prefix[modality] for modality in order))


def read_text(text: str, tokenizer: Tokenizer, modality: int) -> list[Tokens]:
    """The windows of a text. Raises SampleError where it is blank."""
    return [piece.replace(modality=constant(modality, len(piece))) for piece in tokenizer.read(text)]


def fill(template: str, raw: dict[str, bytes]) -> str:
    """The template with a sample's fields in it. Raises SampleError where one is missing, or no text and no number."""
    row = parse(raw["json"]) if "json" in raw else {}

    def value(match: re.Match) -> str:
        name = match[1]
        found: Any = raw["txt"].decode(errors="replace") if name == "txt" and "txt" in raw else lookup(row, name)
        if not isinstance(found, (str, int, float)):
            raise SampleError("label", f"it has no text or number in {name!r}")
        return str(found)

    return FIELD.sub(value, template)
