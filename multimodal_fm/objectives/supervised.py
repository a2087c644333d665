"""Learn labels that the samples carry, scored by a head of the model: the objective of tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import Example, Sample, Targets
from ..config import Plugin
from ..corpus.fields import lookup, parse, parse_map
from ..errors import SampleError
from ..heads.base import LabelHead, TextView
from ..tokens import Tokens, constant
from . import base


@dataclass
class Config(base.Config):
    head: str = "classify"  # the head of the model that scores the labels
    label: str = ""  # the field of the JSON that holds them, or .cls; empty: the one that the head is made for
    fuse: bool = False  # all modalities of a sample in one sequence, in the task's order: a label of a pair


@dataclass
class Bound:
    """The settings, and the head's."""

    config: Config
    head: Plugin | None

    @property
    def label(self) -> str:
        assert self.head is not None
        return self.config.label or self.head.cls.label


class Objective(base.Objective):
    Config = Config
    label_extensions = ("cls", "json", "txt")

    def __init__(self, config: Config, model, modalities: list[str]):
        super().__init__(config, model, modalities)
        if config.head not in model.heads:
            raise ValueError(f"supervised: the model has no head {config.head!r} (there are: {', '.join(model.heads)})")
        if not isinstance(model.heads[config.head], LabelHead):
            raise ValueError(f"supervised: the head {config.head!r} is not trained on labels")

    @staticmethod
    def problems(config: Config, modalities: list[str]):
        if len(modalities) > 1 and not config.fuse:
            yield "fuse", "must be true where a sample's label is that of several modalities together"

    @staticmethod
    def one_sequence_per_modality(config: Config) -> bool:
        return not config.fuse

    @staticmethod
    def min_modalities(config: Config, modalities: list[str]) -> int:
        return len(modalities)

    @staticmethod
    def draws_views(config: Config, modality: str) -> bool:
        return modality != "text"  # labels are of words at their places, and a short text is read whole anyway

    @staticmethod
    def bind(config: Config, heads: dict[str, Plugin], tokenizers=None) -> Bound:
        return Bound(config, heads.get(config.head))

    @staticmethod
    def read_label(config: Bound, raw: dict[str, bytes], tokens: dict[str, Tokens], tokenizers) -> Any:
        """The label as what the head's `loss` compares (M, ...), and the rows (M,) that answer. Raises SampleError."""
        assert config.head is not None
        text = view_text(raw, tokens, tokenizers, config.config.fuse)
        return config.head.cls.encode(config.head.config, label_value(raw, config.label), text)

    @staticmethod
    def arrange(config: Bound, sample: Sample, generator: torch.Generator | None = None) -> Example:
        """All of the sample is read, each token by each other one of its sequence; the label is to be predicted."""
        inputs = base.fuse(sample.tokens.values()) if config.config.fuse else list(sample.tokens.values())
        if sample.label is None:
            return Example(inputs, [None] * len(inputs), group=sample.group)
        label, rows = sample.label
        count = len(rows)
        zeros = constant(0, count)
        target = Tokens(label, torch.zeros(count, 3), zeros, zeros, constant(int(inputs[0].modality[0]), count))
        return Example(inputs, [None] * len(inputs), [target], [rows], sample.group)

    def loss(self, output, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the labels of the step."""
        loss = output.zero()
        for modality, labels in targets.tokens.items():
            each = output.heads[self.config.head].loss(output, labels, targets.rows[modality])
            loss = loss + each.sum() / sum(targets.counts.values())
        return loss, {}


def label_value(raw: dict[str, bytes], field: str) -> Any:
    """What the field of a sample's JSON, or its `.cls`, holds. Raises SampleError where it has none."""
    if field == ".cls":
        if "cls" not in raw:
            raise SampleError("label", "it has no .cls")
        return raw["cls"].decode(errors="replace").strip()
    row = parse(raw["json"]) if "json" in raw else {}
    value = lookup(row, field)
    if value is None and not _has(row, field):
        raise SampleError("label", f"its JSON has no field {field!r}")
    return value


def _has(row: Any, field: str) -> bool:
    above, _, last = field.rpartition(".")
    row = lookup(row, above) if above else row
    return isinstance(row, dict) and last in row


def view_text(raw: dict[str, bytes], tokens: dict[str, Tokens], tokenizers, fuse: bool) -> TextView:
    """What a head that labels words needs to know of the sample's text."""
    offset = 0
    if fuse:
        for modality, piece in tokens.items():
            if modality == "text":
                break
            offset += len(piece)

    def read() -> str:
        inputs = tokenizers["text"].split_inputs(raw)
        if not inputs:
            raise SampleError("label", "it has no text")
        return inputs[0]

    ids = tokens["text"].content if "text" in tokens else torch.zeros(0, dtype=torch.long)
    spans = tokenizers["text"].spans if "text" in tokenizers else None
    return TextView(read, ids, offset, spans, parse_map(raw.get("json")))
