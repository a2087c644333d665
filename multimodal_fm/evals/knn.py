"""k nearest neighbours on the frozen features, each sample against all others: no training, no choice to tune."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .embed_corpus import Encoded, figure, labelled


@dataclass
class Config:
    labels: str = ".cls"  # `.cls` or a JSON field
    group: str = ""  # samples of an equal group are not each other's neighbours
    k: int = 10


def run(encoded: Encoded, config: Config, model=None) -> dict[str, dict]:
    """`knn/MODALITY/accuracy`, the vote weighted by the cosine."""
    figures = {}
    for modality in encoded.things:
        found = labelled(encoded, modality, config.labels, config.group)
        if not found:
            continue
        features, labels, groups, chance = found
        unit = features - features.mean(0)
        unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-9)
        right = np.zeros(len(labels))
        for start in range(0, len(labels), 1024):
            rows = slice(start, start + 1024)
            cosine = unit[rows] @ unit.T
            cosine[groups[rows, None] == groups[None]] = -np.inf
            k = min(config.k, len(labels) - 1)
            near = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
            weight = np.exp(np.take_along_axis(cosine, near, 1) / 0.1)  # a sample of the own group weighs nothing
            votes = np.zeros((len(near), labels.max() + 1))
            np.add.at(votes, (np.arange(len(near))[:, None], labels[near]), weight)
            right[rows] = votes.argmax(1) == labels[rows]
        figures[f"knn/{modality}/accuracy"] = figure(right, groups, chance)
    return figures
