"""A linear probe: logistic regression on the frozen features, in folds that no group straddles."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from . import base
from .embed_corpus import EmbeddedCorpus
from .metrics import estimate, labeled_modalities


@dataclass
class Config:
    labels: str = ".cls"  # `.cls` or a JSON field
    group: str = ""  # inputs of an equal group are in the same fold
    folds: int = 5


class Evaluator(base.Evaluator):
    Config = Config

    def run(self, embedded: EmbeddedCorpus, config: Config, model=None, objectives=None) -> dict[str, dict]:
        """`probe/MODALITY/accuracy` of held-out inputs, over those whose class occurs in another group too."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        figures = {}
        for modality, data in labeled_modalities(embedded, config):
            right = np.zeros(len(data.labels))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # classes smaller than the number of folds, and slow convergence
                for train, test in split_folds(data.labels, data.groups, config.folds):
                    if len(np.unique(data.labels[train])) < 2:
                        right[test] = data.labels[test] == data.labels[train][0]
                        continue
                    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
                    probe.fit(data.features[train], data.labels[train])
                    right[test] = probe.predict(data.features[test]) == data.labels[test]
            scored = data.scored
            figures[f"probe/{modality}/accuracy"] = estimate(right[scored], data.groups[scored], data.chance)
        return figures


def split_folds(labels: np.ndarray, groups: np.ndarray, folds: int):
    """Pairs of training and test numbers that cover all rows once; a group is on one side of each."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(folds, np.bincount(labels).max(), len(np.unique(groups)))
    return StratifiedGroupKFold(folds, shuffle=True, random_state=0).split(labels, labels, groups)
