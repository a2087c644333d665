"""A tag for each word of a text: named entities, parts of speech. A word's first token answers (Devlin et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SampleError
from ..tokens import Tokens
from . import base


@dataclass
class Config:
    classes: list[str] = field(default_factory=list)  # the tags
    dropout: float = 0.0  # of a token's vector, in training

    def __post_init__(self):
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError("classes are at least two different tags")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout is a share from 0 to below 1")


class Head(base.LabelHead):
    """One linear layer on the outputs of the words' first tokens: logits (M, C)."""

    Config, label, per_token = Config, "tags", True

    def __init__(self, config: Config, width: int, modalities: list[str]):
        super().__init__(config, width, modalities)
        self.dropout = nn.Dropout(config.dropout)
        self.logits = nn.Linear(width, len(config.classes))
        nn.init.normal_(self.logits.weight, std=0.02)
        nn.init.zeros_(self.logits.bias)

    @staticmethod
    def encode(config: Config, value, text: base.TextView) -> tuple[Tensor, Tensor]:
        """Tag numbers (M,) of the words that the sequence holds, and the row of each one's first token."""
        words = text.row.get("words", text.text.split(" "))
        if not isinstance(value, list) or not isinstance(words, list) or len(value) != len(words):
            count = len(value) if isinstance(value, list) else "no"
            raise SampleError("label", f"{count} tags for {len(words)} words")
        if " ".join(map(str, words)) != text.text:
            raise SampleError("label", "its words, joined by one space, are not its text")
        if unknown := [tag for tag in map(str, value) if tag not in config.classes]:
            raise SampleError("label", f"{unknown[0][:60]!r} is none of the {len(config.classes)} tags")
        rows = first_tokens([str(word) for word in words], text.spans())
        numbers = torch.tensor([config.classes.index(str(tag)) for tag in value[: len(rows)]])
        return numbers, torch.from_numpy(rows) + text.offset

    def forward(self, output, labels: Tokens, rows: Tensor) -> Tensor:
        return self.logits(self.dropout(output.tokens.content.index_select(0, rows))).float()

    def loss(self, output, labels: Tokens, rows: Tensor) -> Tensor:
        return F.cross_entropy(self(output, labels, rows), labels.content, reduction="none")

    def decode(self, predictions: Tensor, text: base.TextView) -> dict:
        """{"tags": one a word; words beyond the model's window have none}."""
        return {"tags": [self.config.classes[number] for number in predictions.argmax(-1).tolist()]}


def first_tokens(words: list[str], spans: np.ndarray) -> np.ndarray:
    """The row of the first token of each word, words being joined by one space; those of the words that lie wholly
    within the tokens, whose first and last byte are `spans` (T, 2)."""
    lengths = np.array([len(word.encode()) for word in words])
    begins = np.concatenate([[0], (lengths + 1).cumsum()[:-1]]) if len(words) else np.zeros(0, int)
    inside = (begins + lengths <= spans[-1, 1]) & (lengths > 0)
    # the token that holds the word's first byte; empty ones, as the begin token, hold none
    return np.searchsorted(spans[:, 1], begins[: int(inside.cumprod().sum())], side="right")
