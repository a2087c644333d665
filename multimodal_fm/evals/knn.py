"""k nearest neighbors on the frozen features, each input against all others, or those of `train`: nothing is tuned.

Neighbors vote with the weight exp(cosine / 0.1), after Wu et al. 2018 (arXiv:1805.01978), on centered features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from . import base
from .embed_corpus import EmbeddedCorpus
from .metrics import find_nearest, labeled_modalities, record

TEMPERATURE = 0.1


@dataclass
class Config:
    labels: str = ".cls"  # `.cls` or a JSON field
    group: str = ""  # inputs of an equal group are not each other's neighbors
    k: int = 10


class Evaluator(base.Evaluator):
    Config = Config

    def run(self, embedded: EmbeddedCorpus, config: Config, model=None, objectives=None) -> dict[str, dict]:
        """`knn/MODALITY/accuracy`, over the inputs whose class occurs in another group too, or in `train`."""
        figures = {}
        for modality, data in labeled_modalities(embedded, config):
            scored, groups = torch.from_numpy(data.scored), torch.from_numpy(data.groups)
            gallery = torch.ones_like(scored) if data.fitted is None else torch.from_numpy(data.fitted)
            features = torch.from_numpy(data.features)
            unit = torch.nn.functional.normalize(features - features[gallery].mean(0), dim=1, eps=1e-9)
            own, others = groups[scored], groups[gallery]
            cosine, near = find_nearest(
                unit[scored], unit[gallery], config.k, lambda rows, a=own, b=others: a[rows, None] == b
            )
            weight = torch.exp(cosine / TEMPERATURE)  # 0 for those of the input's own group
            labels = torch.from_numpy(data.labels)
            votes = torch.zeros(len(near), int(labels.max()) + 1, dtype=torch.double)
            votes.scatter_add_(1, labels[gallery][near], weight)
            right = np.zeros(len(labels))  # features that are NaN get no vote
            right[data.scored] = ((votes.argmax(1) == labels[scored]) & (votes.amax(1) > 0)).numpy()
            figures |= record(embedded, f"knn/{modality}/accuracy", data.scores(right))
        return figures
