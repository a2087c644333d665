"""A span of a text that answers a question about it, or "no answer" (SQuAD 2.0, Rajpurkar et al. 2018).

Question and context are one text; each of the sequence's tokens may begin or end the answer, and the first, which
stands for no text, is the answer "no answer" (Devlin et al. 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SampleError
from ..tokens import Tokens
from . import base


@dataclass
class Config:
    max_answer_tokens: int = 32  # a predicted answer is no longer

    def __post_init__(self):
        if self.max_answer_tokens < 1:
            raise ValueError("max_answer_tokens is at least 1")


class Head(base.LabelHead):
    """One linear layer that scores each token as a begin and as an end."""

    Config, label, per_token = Config, "answer", True

    def __init__(self, config: Config, width: int, modalities: list[str]):
        super().__init__(config, width, modalities)
        self.scores = nn.Linear(width, 2)
        nn.init.normal_(self.scores.weight, std=0.02)
        nn.init.zeros_(self.scores.bias)

    @staticmethod
    def encode(config: Config, value, text: base.TextView) -> tuple[Tensor, Tensor]:
        """The first and the last token of the answer (1, 2), counted from the row (1,) of the sequence's first token;
        0, 0 is no answer."""
        begin = torch.zeros(1, dtype=torch.long)
        if value is None:
            return torch.zeros(1, 2, dtype=torch.long), begin
        try:
            start, end = int(value["start"]), int(value["end"])
            whole = text.text
            if not 0 <= start < end <= len(whole):
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise SampleError("label", f"the answer {str(value)[:60]} is no place in the text") from None
        first, last = len(whole[:start].encode()), len(whole[:end].encode()) - 1  # bytes
        spans = text.spans()
        if last >= spans[-1, 1]:
            raise SampleError("label", "the answer lies beyond the first max_tokens tokens of the text")
        rows = np.searchsorted(spans[:, 1], [first, last], side="right") + text.offset
        return torch.from_numpy(rows)[None], begin

    def forward(self, output, labels: Tokens, rows: Tensor) -> Tensor:
        """The best answer, and how much higher than no answer it scores: first token, last token, margin (M, 3)."""
        return self._best(output, labels, rows)

    def loss(self, output, labels: Tokens, rows: Tensor) -> Tensor:
        """The mean cross-entropy of the begin and of the end, over the tokens of the sequence."""
        likelihoods = []
        for column, scores in enumerate(self.scores(output.tokens.content).float().unbind(1)):
            likelihoods.append(output.log_softmax(scores).index_select(0, rows + labels.content[:, column]))
        return -torch.stack(likelihoods).mean(0)

    def _best(self, output, labels: Tokens, rows: Tensor) -> Tensor:
        begin, end = self.scores(output.tokens.content).float().unbind(1)
        results = []
        for sequence, first in zip(labels.sequence.tolist(), rows.tolist(), strict=True):
            own = output.tokens.sequence == sequence
            count = int(own[first:].sum())  # without learned tokens that stand before the sequence
            b, e = begin[first : first + count], end[first : first + count]
            pairs = b[1:, None] + e[None, 1:]  # the first token is no answer
            span = torch.arange(count - 1, device=b.device)
            length = span[None] - span[:, None]
            pairs = pairs.masked_fill((length < 0) | (length >= self.config.max_answer_tokens), -torch.inf)
            margin = pairs.max() - (b[0] + e[0])
            place = pairs.argmax()
            results.append(torch.stack([place // (count - 1) + 1.0, place % (count - 1) + 1.0, margin]))
        return torch.stack(results) if results else begin.new_zeros(0, 3)

    def decode(self, predictions: Tensor, text: base.TextView) -> dict:
        """{"answer": the text, empty for no answer, "start", "end": characters of the text, "margin": logits}."""
        begin, end, margin = predictions[0].tolist()
        if margin <= 0:
            return {"answer": "", "start": None, "end": None, "margin": margin}
        spans, data = text.spans(), text.text.encode()
        first, last = spans[int(begin) - text.offset, 0], spans[int(end) - text.offset, 1]
        start, stop = (len(data[:byte].decode(errors="ignore")) for byte in (first, last))
        answer = text.text[start:stop]
        start += len(answer) - len(answer.lstrip())  # a token begins with the space before its word
        return {"answer": answer.strip(), "start": start, "end": start + len(answer.strip()), "margin": margin}
