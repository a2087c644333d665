"""How scores differ between parts of a corpus: by the values of a field, such as a language, a speaker or a place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from . import base
from .embed_corpus import EmbeddedCorpus, Scores
from .metrics import SEED, bootstrap, estimate

SMALLEST = 20  # inputs that a value needs
SHUFFLES = 200  # of the values among the inputs, for what the largest difference is by chance
LEFT_OUT = ("/r@1", "/r@5")  # of the recalls one is enough


@dataclass
class Config:
    subgroups: list[str] = field(default_factory=list)  # the fields


class Evaluator(base.Evaluator):
    Config = Config
    after_others = True

    def run(self, embedded: EmbeddedCorpus, config: Config, model=None, objectives=None) -> dict[str, dict]:
        """`subgroups/FIELD/VALUE/FIGURE` for each figure that is a mean over inputs, and
        `subgroups/FIELD/largest_difference/FIGURE`: the best value's less the worst one's.

        Chance is, for a value, what a guess gets on its inputs; for the difference, the mean of the largest difference
        where the values are shuffled among the inputs: what would be found although there is no difference.
        """
        figures = {}
        for name in config.subgroups:
            values = [embedded.field(sample, name) for sample in range(len(embedded.metadata))]
            for figure, scores in embedded.scores.items():
                if figure.endswith(LEFT_OUT):
                    continue
                own = [values[sample] for sample in scores.samples]
                counts = Counter(value for value in own if value is not None)
                large = sorted(value for value, count in counts.items() if count >= SMALLEST)
                if small := len(counts) - len(large):
                    embedded.note(
                        f"{name}: {small} of {len(counts)} values have fewer than {SMALLEST} inputs: left out"
                    )
                number = {value: place for place, value in enumerate(large)}
                part = np.array([number.get(value, -1) for value in own])
                for value, place in number.items():
                    rows = part == place
                    key = f"subgroups/{name}/{value.replace('/', ' ')}/{figure}"
                    chance = float(scores.chances[rows].mean())
                    figures[key] = estimate(scores.values[rows], scores.clusters[rows], chance)
                if len(large) > 1:
                    figures[f"subgroups/{name}/largest_difference/{figure}"] = largest_difference(
                        scores, part, len(large)
                    )
        return figures


def largest_difference(scores: Scores, part: np.ndarray, parts: int) -> dict:
    """The best part's mean less the worst one's, for parts (Q,) from 0 on (-1: of none), as a figure.

    The interval is that of the difference between these two parts. Whole clusters are shuffled where each lies in one
    part, so that inputs that belong together do not make a difference by themselves.
    """
    kept = part >= 0
    values, part, clusters = scores.values[kept], part[kept], np.unique(scores.clusters[kept], return_inverse=True)[1]

    def means(part: np.ndarray) -> np.ndarray:
        counts = np.bincount(part, minlength=parts)
        return np.bincount(part, weights=values, minlength=parts)[counts > 0] / counts[counts > 0]

    best, worst = means(part).argmax(), means(part).argmin()
    in_best, in_worst = (part == best).astype(float), (part == worst).astype(float)
    columns = np.stack([in_best * values, in_best, in_worst * values, in_worst], 1)
    draw, found = np.random.default_rng(SEED), []
    first = np.zeros(clusters.max() + 1, dtype=int)
    first[clusters] = part
    whole = (first[clusters] == part).all()
    for _ in range(SHUFFLES):
        shuffled = means(draw.permutation(first)[clusters] if whole else draw.permutation(part))
        found.append(shuffled.max() - shuffled.min())

    def difference(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]

    return bootstrap(columns, difference, clusters, float(np.mean(found)))
