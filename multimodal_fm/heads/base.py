"""What a file of this folder offers: `Head`, which adapts what the backbone made of a sequence to one use.

N tokens, S sequences, M labels, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..tokenizers.base import Tokenizer
from ..tokens import Tokens

if TYPE_CHECKING:
    from ..model import Output

Pooling = Literal["mean", "attention", "first"]
"""mean: of a sequence's tokens; attention: a learned query's weighted mean of them (Lee et al. 2019); first: its first
token, which is the begin token of a text or the class token of a model that has one (BERT, Devlin et al. 2019)."""


class Head(nn.Module):
    """A subclass sets `Config`, a dataclass of its settings, and defines `__init__` and `forward`.

    A modality's number is its place in `modalities`. (`nn.ParameterDict` sorts its keys: look parameters up by name.)
    """

    Config: Any
    pooling: str = "mean"  # which vector of a sequence is its pooled output: `mean`, `first` or `last` of its tokens

    def __init__(self, config: Any, width: int, modalities: list[str]):
        super().__init__()
        self.config, self.modalities = config, list(modalities)

    def bind(self, tokenizers: dict[str, Tokenizer]) -> None:
        """Called once, when the model is built, with its tokenizers: for a head that makes content of a modality."""

    def forward(self, pooled: Tensor, modality: Tensor) -> Tensor:
        """From pooled outputs (S, D) and the number of each sequence's modality (S,) to what the head is for."""
        raise NotImplementedError


class LabelHead(Head):
    """A head that is trained on labels, by the objective `supervised`.

    A subclass defines `encode`, `forward`, `loss` and `decode`; `label` names the field that holds labels unless the
    objective says otherwise.
    """

    label = ".cls"
    per_token = False  # labels are of words of a text, of which the first window is read

    @staticmethod
    def encode(config: Any, value: Any, text: TextView) -> tuple[Tensor, Tensor]:
        """The label of a sample as what `loss` compares (M, ...), and the rows (M,) of the sequence that answer.

        A row of -1 is the whole sequence. `value` is what the field holds. Raises SampleError.
        """
        raise NotImplementedError

    def forward(self, output: Output, labels: Tokens, rows: Tensor) -> Tensor:
        """Predictions (M, ...). `labels` names the sequences (`labels.sequence`) and `rows` the tokens that are asked
        for; their content is not looked at."""
        raise NotImplementedError

    def loss(self, output: Output, labels: Tokens, rows: Tensor) -> Tensor:
        """One loss for each label (M,); the content of `labels` is what `encode` returned."""
        raise NotImplementedError

    def decode(self, predictions: Tensor, text: TextView) -> dict:
        """A sample's prediction (M, ...) in plain data."""
        raise NotImplementedError


class TextView:
    """A sample's text and where its tokens lie in it, worked out when a head asks for it.

    read: gives the text. ids: of the sequence's tokens of that text (T,). offset: how many tokens precede them in the
    sequence. spans: gives the bytes of a text that each of its ids stands for (T, 2). row: the sample's JSON.
    """

    def __init__(self, read, ids, offset: int = 0, spans=None, row: dict | None = None):
        self._read, self._ids, self.offset, self._spans, self.row = read, ids, offset, spans, row or {}

    @property
    def text(self) -> str:
        return self._read()

    def spans(self) -> np.ndarray:
        """The first byte and the one after the last of each token (T, 2) in the UTF-8 of the text."""
        assert self._spans is not None
        return self._spans(self.text, self._ids.tolist())


class Pool(nn.Module):
    """From the backbone's output to one vector a sequence."""

    def __init__(self, kind: Pooling, width: int):
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.query = nn.Parameter(torch.randn(width) * width**-0.5)
            self.value = nn.Linear(width, width, bias=False)
            nn.init.eye_(self.value.weight)

    def forward(self, output: Output, sequence: Tensor) -> Tensor:
        """Vectors (M, D) of the sequences named in `sequence` (M,)."""
        if self.kind == "mean":
            pooled = output.mean_pool()
        elif self.kind == "first":
            pooled = output.tokens.content.float().index_select(0, output.first_rows())
        else:
            content = output.tokens.content
            weight = output.softmax((content @ self.query.to(content.dtype)).float() * content.shape[1] ** -0.5)
            pooled = output.sum_pool(self.value(content).float() * weight[:, None])
        return pooled.index_select(0, sequence)
