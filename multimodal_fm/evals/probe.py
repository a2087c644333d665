"""A linear probe: logistic regression on the frozen features, five folds in which no group straddles."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from .embed_corpus import Encoded, figure, labelled


@dataclass
class Config:
    labels: str = ".cls"  # `.cls` or a JSON field
    group: str = ""  # samples of an equal group are in the same fold
    folds: int = 5


def run(encoded: Encoded, config: Config, model=None) -> dict[str, dict]:
    """`probe/MODALITY/accuracy` over the held-out folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    figures = {}
    for modality in encoded.things:
        found = labelled(encoded, modality, config.labels, config.group)
        if not found:
            continue
        features, labels, groups, chance = found
        count = min(config.folds, np.bincount(labels).max(), len(np.unique(groups)))
        folds = StratifiedGroupKFold(count, shuffle=True, random_state=0)
        right = np.zeros(len(labels))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for fit, test in folds.split(features, labels, groups):
                if len(np.unique(labels[fit])) < 2:
                    right[test] = labels[test] == labels[fit][0]
                    continue
                probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
                probe.fit(features[fit], labels[fit])
                right[test] = probe.predict(features[test]) == labels[test]
        figures[f"probe/{modality}/accuracy"] = figure(right, groups, chance)
    return figures
