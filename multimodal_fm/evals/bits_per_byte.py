"""Bits per byte of text under a model that was trained to predict the next token: comparable across vocabularies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..batch import Sample, batch_by_tokens
from . import base
from .embed_corpus import EmbeddedCorpus
from .likelihood import score_texts
from .metrics import estimate


@dataclass
class Config:
    pass


class Evaluator(base.Evaluator):
    Config = Config

    def run(self, embedded: EmbeddedCorpus, config: Config, model, objectives) -> dict[str, dict]:
        """`text/bits_per_byte`; nothing where no objective was trained to predict text from the text before it, or the
        tokenizer's ids stand for no certain number of bytes (`format: hugging_face`)."""
        name = next((name for name, objective in objectives.items() if objective.has_likelihood("text")), None)
        if (
            name is None
            or "text" not in embedded.inputs
            or not getattr(model.tokenizers["text"], "counts_bytes", False)
        ):
            return {}
        texts = [text or "" for text in embedded.inputs["text"].texts]
        bits, sizes = measure_bits(model, objectives[name], texts)
        return {"text/bits_per_byte": estimate(bits, np.arange(len(bits)), None, weights=sizes)}


@torch.no_grad()
def measure_bits(model, objective, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The bits under the model, and the bytes, of each text (T,), (T,); long texts are covered by windows."""
    tokenizer, number = model.tokenizers["text"], model.modalities.index("text")
    bits, sizes = torch.zeros(len(texts), dtype=torch.double), np.zeros(len(texts))
    windows = ((owner, window) for owner, text in enumerate(texts) for window in tokenizer.read(text))
    for batch in batch_by_tokens(windows):
        examples, owners = [], []
        for owner, window in batch:
            window = window.replace(modality=torch.full_like(window.modality, number))
            examples.append(objective.arrange(objective.config, Sample({"text": window})))
            owners.append(owner)
            sizes[owner] += tokenizer.count_bytes(window.content.tolist())
        nats, _ = score_texts(model, objective, examples)
        bits.index_add_(0, torch.tensor(owners), nats / math.log(2))
    return bits.numpy(), sizes
