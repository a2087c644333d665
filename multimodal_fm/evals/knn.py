"""k nearest neighbors on the frozen features, each input against all others: nothing is trained, nothing is tuned.

Neighbors vote with the weight exp(cosine / 0.1), after Wu et al. 2018 (arXiv:1805.01978), on centered features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import base
from .embed_corpus import EmbeddedCorpus
from .metrics import estimate, find_nearest, labeled_modalities

TEMPERATURE = 0.1


@dataclass
class Config:
    labels: str = ".cls"  # `.cls` or a JSON field
    group: str = ""  # inputs of an equal group are not each other's neighbors
    k: int = 10


class Evaluator(base.Evaluator):
    Config = Config

    def run(self, embedded: EmbeddedCorpus, config: Config, model=None, objectives=None) -> dict[str, dict]:
        """`knn/MODALITY/accuracy`, over the inputs whose class occurs in another group too."""
        figures = {}
        for modality, data in labeled_modalities(embedded, config):
            scored, groups = torch.from_numpy(data.scored), torch.from_numpy(data.groups)
            unit = torch.from_numpy(data.features - data.features.mean(0))
            unit = torch.nn.functional.normalize(unit, dim=1, eps=1e-9)
            own = groups[scored]
            cosine, near = find_nearest(
                unit[scored], unit, config.k, lambda rows, own=own, groups=groups: own[rows, None] == groups
            )
            weight = torch.exp(cosine / TEMPERATURE)  # 0 for those of the input's own group
            labels = torch.from_numpy(data.labels)
            votes = torch.zeros(len(near), len(labels.unique()), dtype=torch.double)
            votes.scatter_add_(1, labels[near], weight)
            right = (votes.argmax(1) == labels[scored]) & (votes.amax(1) > 0)  # features that are NaN get no vote
            right = right.double().numpy()
            figures[f"knn/{modality}/accuracy"] = estimate(right, data.groups[data.scored], data.chance)
        return figures
