"""Bits per byte of text under a model that was trained to guess the next token: comparable across vocabularies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..batch import Sample, collate, count_targets
from .embed_corpus import Encoded, figure


@dataclass
class Config:
    batch: int = 16  # texts at a time


def run(encoded: Encoded, config: Config, model=None) -> dict[str, dict]:
    """`text/bits_per_byte`; nothing where no objective of the model scores text token by token."""
    name = next((n for n, o in model.objectives.items() if hasattr(o, "score") and "text" in model.parts[n]), None)
    if name is None or "text" not in encoded.things:
        return {}
    tokenizer = model.tokenizers["text"]
    bits, sizes = [], []
    for start in range(0, len(encoded.things["text"].raw), config.batch):
        texts = encoded.things["text"].raw[start : start + config.batch]
        totals, lengths = _score(model, name, tokenizer, texts)
        bits += totals
        sizes += lengths
    bits, sizes = np.array(bits), np.array(sizes, dtype=float)
    return {"text/bits_per_byte": figure(bits, np.arange(len(bits)), None, weights=sizes)}


@torch.no_grad()
def _score(model, name: str, tokenizer, texts: list[str]) -> tuple[list[float], list[int]]:
    """Bits and bytes of each text."""
    objective, place = model.objectives[name], model.modalities.index("text")
    arranged, owner, sizes = [], [], [0] * len(texts)
    for number, text in enumerate(texts):
        for window in tokenizer.read(text):
            window = window.replace(modality=torch.full_like(window.modality, place))
            arranged.append((len(arranged), objective.arrange(Sample({"text": window}))))
            owner.append(number)
            sizes[number] += tokenizer.count_bytes(window.content.tolist())
    batch = collate(
        {name: arranged}, model.modalities, {name: count_targets([a for _, a in arranged], model.modalities)}
    )
    batch = batch.to(model.device)
    targets = batch.tasks[name]
    nats = objective.score(model(batch), targets, "text").double().cpu()
    window_of = torch.searchsorted(targets.sequence.cpu().contiguous(), targets.tokens["text"].sequence.cpu())
    totals = torch.zeros(len(texts), dtype=torch.double).index_add(0, torch.tensor(owner)[window_of], nats)
    return (totals / math.log(2)).tolist(), sizes
