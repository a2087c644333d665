"""A linear probe: logistic regression on the frozen features, on `train` or in folds that no group straddles."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from . import base
from .embed_corpus import EmbeddedCorpus
from .metrics import labeled_modalities, record


@dataclass
class Config:
    labels: str = ".cls"  # `.cls` or a JSON field
    group: str = ""  # inputs of an equal group are in the same fold
    folds: int = 5


class Evaluator(base.Evaluator):
    Config = Config

    def run(self, embedded: EmbeddedCorpus, config: Config, model=None, objectives=None) -> dict[str, dict]:
        """`probe/MODALITY/accuracy` over held-out inputs whose class occurs in another group too, or in `train`."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        figures = {}
        for modality, data in labeled_modalities(embedded, config):
            right = np.zeros(len(data.labels))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # classes smaller than the number of folds, and slow convergence
                if data.fitted is None:
                    splits = split_folds(data.labels, data.groups, config.folds)
                else:
                    splits = [(np.flatnonzero(data.fitted), np.flatnonzero(data.scored))]
                for train, test in splits:
                    if len(np.unique(data.labels[train])) < 2:
                        right[test] = data.labels[test] == data.labels[train][0]
                        continue
                    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
                    probe.fit(data.features[train], data.labels[train])
                    right[test] = probe.predict(data.features[test]) == data.labels[test]
            figures |= record(embedded, f"probe/{modality}/accuracy", data.scores(right))
        return figures


def split_folds(labels: np.ndarray, groups: np.ndarray, folds: int):
    """Pairs of training and test numbers that cover all rows once; a group is on one side of each."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(folds, np.bincount(labels).max(), len(np.unique(groups)))
    return StratifiedGroupKFold(folds, shuffle=True, random_state=0).split(labels, labels, groups)
