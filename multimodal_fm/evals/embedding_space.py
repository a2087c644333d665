"""The shape of the space of vectors: how near what belongs together is, how evenly it is filled, its dimensions.

Alignment and uniformity: Wang and Isola 2020 (arXiv:2005.10242). Modality gap: Liang et al. 2022 (arXiv:2203.02053).
Effective rank: Roy and Vetterli 2007; of features without labels as in RankMe (Garrido et al. 2023, arXiv:2210.02885).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from . import base
from .embed_corpus import EmbeddedCorpus
from .metrics import SEED, bootstrap, bootstrap_rows, jackknife

PAIRS = 1000  # inputs, drawn at random, all of whose pairs count for the uniformity


@dataclass
class Config:
    pass


class Evaluator(base.Evaluator):
    Config = Config
    default = False

    def run(self, embedded: EmbeddedCorpus, config: Config, model=None, objectives=None) -> dict[str, dict]:
        """`space/MODALITY/{uniformity,effective_rank}` and `space/A_B/{alignment,modality_gap}`.

        Effective rank is of the features, the rest of the unit vectors of the retrieval head, where there is one.
        Chance is the alignment of pairs at random; of the others there is none.
        """
        figures = {}
        for modality, inputs in embedded.inputs.items():
            if len(inputs.texts) < 10:
                continue
            features = inputs.features.double().numpy()
            figures[f"space/{modality}/effective_rank"] = jackknife(
                lambda r, f=features: effective_rank(f[r]), len(features)
            )
            if embedded.has_vectors:
                chosen = np.random.default_rng(SEED).permutation(len(features))[:PAIRS]
                kernel = gaussian(inputs.vectors[chosen].double().numpy())
                figures[f"space/{modality}/uniformity"] = bootstrap_rows(
                    lambda times, k=kernel: uniformity(k, times), np.arange(len(chosen)), None
                )
        for a, b in itertools.combinations(embedded.inputs, 2) if embedded.has_vectors else ():
            pairs = [
                (sample, x, y)
                for sample, own in enumerate(embedded.sample_inputs)
                for x, y in itertools.product(own.get(a, []), own.get(b, []))
            ]
            if len(pairs) < 10:
                continue
            samples, x, y = np.array(pairs).T
            first, second = (embedded.inputs[m].vectors[n].double().numpy() for m, n in ((a, x), (b, y)))
            columns = np.concatenate([first, second, ((first - second) ** 2).sum(1, keepdims=True)], 1)
            columns = np.concatenate([columns, np.ones((len(columns), 1))], 1)
            at_random = 2 - 2 * float(first.mean(0) @ second.mean(0))
            name = f"space/{a}_{b}"
            figures[f"{name}/alignment"] = bootstrap(columns[:, -2:], lambda s: s[:, 0] / s[:, 1], samples, at_random)
            figures[f"{name}/modality_gap"] = bootstrap(columns, modality_gap, samples, None)
        return figures


def gaussian(vectors: np.ndarray) -> np.ndarray:
    """exp(-2 |x - y|²) of all pairs (N, N) of unit vectors (N, E)."""
    return np.exp(4 * (vectors @ vectors.T) - 4)


def uniformity(kernel: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The logarithm of the mean of the kernel (N, N) over pairs of two different inputs, drawn so often (B, N)."""
    own = times**2
    pairs = ((times @ kernel) * times).sum(1) - own @ kernel.diagonal()
    return np.log(pairs / (times.sum(1) ** 2 - own.sum(1)))


def effective_rank(features: np.ndarray) -> float:
    """The exponential of the entropy of the singular values, as shares of their sum, of features (N, D)."""
    values = np.linalg.svd(features, compute_uv=False)
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def modality_gap(sums: np.ndarray) -> np.ndarray:
    """The distance of the two modalities' mean vectors from sums (B, 2 E + 2) whose last column counts."""
    first, second = np.split(sums[:, :-2] / sums[:, -1:], 2, axis=1)
    return np.linalg.norm(first - second, axis=1)
