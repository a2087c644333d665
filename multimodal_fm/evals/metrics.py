"""What the evaluations share: estimates with intervals, nearest neighbors, and labeled features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .embed_corpus import EmbeddedCorpus, Scores

MAX_SCORES = 1 << 20  # numbers held at a time (8 MiB): memory does not grow with queries times gallery
DRAWS = 1000  # of the bootstrap
PAIRED_DRAWS = 10_000  # of that of a difference
SEED = 0  # of its draws, and of whatever else is random in an evaluation
TIE = 1e-9  # scores nearer to each other than this are equal: far below the resolution of float32 vectors


def estimate(values, clusters, chance: float | None, median: bool = False, weights=None) -> dict:
    """A figure: the mean (or median) of `values` (Q,) as {"value", "low", "high", "chance", "n"}.

    `low` and `high` are the 95 % interval of 1,000 bootstrap draws of whole clusters (Q,); `chance` is what a guess
    would get, None where there is no such thing; `n` is Q. With `weights` (Q,) the value is the sum of the values over
    the sum of the weights. (Efron and Tibshirani 1993; cluster bootstrap: Field and Welsh 2007.)
    """
    if not median:
        weights = np.ones(len(values)) if weights is None else weights
        return bootstrap(np.stack([values, weights], 1), lambda sums: sums[:, 0] / sums[:, 1], clusters, chance)
    order = np.argsort(values, kind="stable")

    def middle(times: np.ndarray) -> np.ndarray:
        weight = np.cumsum(times[:, order], axis=1)
        return values[order][(weight < weight[:, -1:] / 2).sum(1)]

    return bootstrap_rows(middle, clusters, chance) | {"value": float(np.median(values))}


def bootstrap(
    columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], clusters, chance, biased: bool = False
) -> dict:
    """A figure that is a function of the sums of `columns` (Q, K) over the rows, with an interval as of `estimate`.

    `statistic` takes sums (B, K) of B draws to B values. A draw costs one row of a product of matrices, whatever Q is.
    biased: whether draws lie to one side of the value, as a calibration error's do, which each draw makes larger; their
    mean is moved to the value then (Efron and Tibshirani 1993, chapter 10), and the interval stays within 0 and 1.
    """
    cluster = np.unique(clusters, return_inverse=True)[1]
    sums = np.stack([np.bincount(cluster, weights=column) for column in columns.T], 1)
    values = [statistic(draws @ sums) for draws in _draw(len(sums), sums.size)]
    value = statistic(columns.sum(0, keepdims=True))
    if biased:
        drawn = np.concatenate(values)
        values = [np.clip(drawn - (np.nanmean(drawn) - value[0]), 0, 1)]
    return _figure(value, values, chance, len(columns))


def bootstrap_rows(statistic: Callable[[np.ndarray], np.ndarray], clusters, chance) -> dict:
    """A figure that depends on the rows in another way than by sums, with an interval as of `estimate`.

    `statistic` takes how often each row is drawn (B, Q) in B draws to B values.
    """
    cluster = np.unique(clusters, return_inverse=True)[1]
    values = [statistic(draws[:, cluster]) for draws in _draw(cluster.max() + 1, len(cluster))]
    return _figure(statistic(np.ones((1, len(cluster)))), values, chance, len(cluster))


def _draw(number: int, numbers_a_draw: int) -> Iterator[np.ndarray]:
    """How often each of `number` clusters is drawn (B, number), in blocks that make up `DRAWS` draws."""
    generator, size = np.random.default_rng(SEED), max(1, MAX_SCORES // numbers_a_draw)
    for start in range(0, DRAWS, size):
        yield generator.multinomial(number, np.full(number, 1 / number), size=min(size, DRAWS - start)).astype(float)


def _figure(value: np.ndarray, draws: list[np.ndarray], chance: float | None, n: int) -> dict:
    """Draws for which there is no such figure, as for the F1 of a class that was not drawn, are left out."""
    drawn = np.concatenate(draws)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    chance = None if chance is None else float(chance)
    return {"value": float(value[0]), "low": float(low), "high": float(high), "chance": chance, "n": n}


def jackknife(statistic: Callable[[np.ndarray], float], count: int, parts: int = 20) -> dict:
    """A figure for which rows drawn twice would be wrong, such as a rank: value ± 1.96 standard errors.

    `statistic` takes the numbers of some of `count` rows; each of the parts is left out once (Efron and Tibshirani
    1993, chapter 11).
    """
    part = np.random.default_rng(SEED).permutation(count) % min(parts, count)
    values = np.array([statistic(np.flatnonzero(part != left_out)) for left_out in range(part.max() + 1)])
    error = np.sqrt((len(values) - 1) * values.var())
    value = statistic(np.arange(count))
    return {
        "value": value,
        "low": float(value - 1.96 * error),
        "high": float(value + 1.96 * error),
        "chance": None,
        "n": count,
    }


def record(embedded: EmbeddedCorpus, name: str, scores: Scores) -> dict[str, dict]:
    """The figure `name`, the mean of the scores; they are kept for evaluators that look at parts of the corpus."""
    embedded.scores[name] = scores
    return {name: estimate(scores.values, scores.clusters, float(scores.chances.mean()))}


def estimate_difference(before, after, clusters=None, weights=None) -> dict:
    """The mean of `after` - `before`, two scores (Q,) each of the same Q samples, by a paired bootstrap.

    {"value", "low", "high", "p", "detectable", "n"}: the 95 % interval of 10,000 draws of whole clusters (Q,), without
    them of single samples; the two-sided p-value, twice the share of draws on the other side of 0 and at least 1 in
    10,000; and the smallest difference that such a comparison finds in four of five cases (1.96 + 0.84 standard
    errors). With `weights` (Q,) the value is the sum of the differences over that of the weights. (Efron and Tibshirani
    1993.)
    """
    difference = np.asarray(after, float) - np.asarray(before, float)
    clusters = np.arange(len(difference)) if clusters is None else clusters
    cluster = np.unique(clusters, return_inverse=True)[1].ravel()
    weights = np.ones(len(difference)) if weights is None else np.asarray(weights, float)
    rows = np.stack([np.bincount(cluster, weights=difference), np.bincount(cluster, weights=weights)], 1)
    rows, counts = np.unique(rows, axis=0, return_counts=True)  # equal clusters are drawn as one: far fewer numbers
    generator, total, means = np.random.default_rng(SEED), counts.sum(), []
    size = max(1, MAX_SCORES // len(rows))
    for start in range(0, PAIRED_DRAWS, size):
        drawn = generator.multinomial(total, counts / total, size=min(size, PAIRED_DRAWS - start)) @ rows
        means.append(drawn[:, 0] / drawn[:, 1])
    means = np.concatenate(means)
    low, high = np.percentile(means, [2.5, 97.5])
    p = 2 * min(float((means <= 0).mean()), float((means >= 0).mean()))
    # Where no sample differs, the rule of three: of that many samples at most 3 / total differ, with 95 %.
    detectable = 2.8 * float(means.std()) or 3 / float(total)
    return {
        "value": float(difference.sum() / weights.sum()),
        "low": float(low),
        "high": float(high),
        "p": min(1.0, max(p, 1 / PAIRED_DRAWS)),
        "detectable": detectable,
        "n": len(difference),
    }


def is_about(name: str, modality: str, objectives: dict[str, Any] | None = None) -> bool:
    """Whether a figure, `WHAT/OF/MEASURE`, is about the modality, alone or as one of a pair.

    `HEAD/MEASURE` is about the modalities that the head was trained on, by one of the `objectives`.
    """
    parts = name.split("/")
    if any(modality in part.replace("+", "_to_").split("_to_") for part in parts):
        return True
    heads = [o.modalities for o in (objectives or {}).values() if getattr(o.config, "head", None) == parts[0]]
    return len(parts) == 2 and any(modality in own for own in heads)


def enumerate_values(values: list) -> np.ndarray:
    """Each value's number (N,) in the order of the distinct values."""
    numbers = {value: number for number, value in enumerate(sorted(set(values)))}
    return np.array([numbers[value] for value in values])


def number_groups(values: list[str | None]) -> np.ndarray:
    """Each value's number (N,); every None is a group of its own."""
    return enumerate_values([(i, "") if value is None else (-1, value) for i, value in enumerate(values)])


def score_blocks(queries: Tensor, gallery: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Dot products (B, T) in float64 of successive blocks of queries (Q, E) with a gallery (T, E), with their rows.

    All comparison of queries with a gallery goes through here, so that one constant bounds its memory.
    """
    gallery = gallery.double()
    size = max(1, MAX_SCORES // max(1, len(gallery)))
    for start in range(0, len(queries), size):
        rows = slice(start, min(start + size, len(queries)))
        yield rows, queries[rows].double() @ gallery.T


def find_nearest(
    queries: Tensor, gallery: Tensor, k: int, excluded: Callable[[slice], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The scores and the numbers (Q, k) of each query's k nearest of the gallery, the nearest first.

    `excluded(rows)` gives a mask (B, T) of what may not be an answer to these queries; where fewer than k are left,
    scores are -inf. So are those that are not a number.
    """
    k = min(k, len(gallery))
    scores, numbers = torch.empty(len(queries), k, dtype=torch.double), torch.empty(len(queries), k, dtype=torch.long)
    for rows, block in score_blocks(queries, gallery):
        block = block.nan_to_num(nan=-torch.inf)
        if excluded is not None:
            block.masked_fill_(excluded(rows), -torch.inf)
        scores[rows], numbers[rows] = block.topk(k, dim=1)
    return scores, numbers


def rank_first(queries: Tensor, gallery: Tensor, right: Callable[[slice], Tensor]) -> tuple[Tensor, Tensor]:
    """The rank (Q,) of each query's first right answer, from 1 on, and how many right answers (Q,) it has.

    `right(rows)` gives the mask (B, T) of these queries' right answers, at least one each. A tie counts against the
    query, and so does a score that is not a number.
    """
    ranks, counts = torch.empty(2, len(queries), dtype=torch.int32)
    for rows, scores in score_blocks(queries, gallery):
        mask = right(rows)
        best = torch.where(mask, scores, -torch.inf).amax(1, keepdim=True)
        ranks[rows] = 1 + (~mask & ~(scores < best - TIE)).sum(1, dtype=torch.int32)
        counts[rows] = mask.sum(1, dtype=torch.int32)
    return ranks, counts


@dataclass
class LabeledFeatures:
    """The inputs of one modality that have a label, N of them: those of the corpus, then those of its `train`."""

    features: np.ndarray  # (N, D)
    labels: np.ndarray  # (N,) from 0 on
    groups: np.ndarray  # (N,) inputs of an equal group never vouch for each other
    scored: np.ndarray  # (N,) bool: of the corpus, and its label can be learned from another group, or from `train`
    fitted: np.ndarray | None  # (N,) bool: those of `train`; None: there is none, and all are fitted on, in folds
    samples: np.ndarray  # (N,) a sample that holds each
    commonest: int  # label among those that are scored

    def scores(self, right: np.ndarray) -> Scores:
        """Of those that are scored, where `right` (N,) says which of all were told rightly."""
        rows, guess = self.scored, self.labels[self.scored] == self.commonest
        return Scores(right[rows].astype(float), self.samples[rows], self.groups[rows], guess.astype(float))


def labeled_modalities(embedded: EmbeddedCorpus, config: Any) -> Iterator[tuple[str, LabeledFeatures]]:
    """Each modality with labels to learn and to score, by the `labels` and `group` of an evaluator's settings."""
    for modality in embedded.inputs:
        if (data := labeled_features(embedded, modality, config.labels, config.group)) is not None:
            yield modality, data


def labeled_rows(embedded: EmbeddedCorpus, modality: str, field: str) -> list[tuple[int, str, int]]:
    """The inputs of one modality that have a label: each one's number, label and first sample."""
    found = [(n, embedded.field(own[0], field), own[0]) for n, own in enumerate(embedded.inputs[modality].samples)]
    return [(number, label, sample) for number, label, sample in found if label is not None]


def labeled_features(embedded: EmbeddedCorpus, modality: str, field: str, group: str) -> LabeledFeatures | None:
    """The labels in `field` and the groups in the field `group` (empty: each input is a group of its own).

    Inputs of `embedded.train` whose group the corpus has too are left out. None where fewer than two labels, or too few
    inputs, could be learned and scored; where there are labels at all, `embedded.notes` then says why.
    """
    rows, train = labeled_rows(embedded, modality, field), embedded.train
    if not rows:
        return None
    values = [embedded.field(sample, group) if group else None for _, _, sample in rows]
    features = [embedded.inputs[modality].features[[number for number, _, _ in rows]]]
    count = len(rows)
    if train is not None:
        own = labeled_rows(train, modality, field) if modality in train.inputs else []
        of_train = [train.field(sample, group) if group else None for _, _, sample in own]
        kept = [i for i, value in enumerate(of_train) if value is None or value not in values]
        rows, values = rows + [own[i] for i in kept], values + [of_train[i] for i in kept]
        if kept:
            features.append(train.inputs[modality].features[[own[i][0] for i in kept]])
    labels = enumerate_values([label for _, label, _ in rows])
    groups = number_groups(values)
    fitted = None if train is None else np.arange(len(rows)) >= count
    if fitted is None:
        scored = np.bincount(np.unique(np.stack([labels, groups]), axis=1)[0])[labels] > 1
    else:
        scored = np.isin(labels, labels[fitted]) & ~fitted
    classes, fits = len(np.unique(labels if fitted is None else labels[fitted])), len(rows) - count or count
    if classes < 2 or fits < 10:
        where = "" if train is None else " to learn from"
        why = f"{modality}: no kNN and no probe: {fits} labeled inputs of {classes} classes{where} are too few"
        if train is not None and len(rows) == count:
            why = f"{modality}: no kNN and no probe: `train` has no inputs with a label that `on` does not hold too"
    elif not scored.any():
        lies = f"lies in one group of {group!r}" if group else "has one input"
        why = f"no kNN and no probe: each of the {classes} classes {lies}, so there is nothing to learn it from"
        if fitted is not None:
            why = f"{modality}: no kNN and no probe: `train` has none of the classes of `on`"
    else:
        why = ""
    if why:
        embedded.note(why)
        return None
    if fitted is not None and (new := int((~fitted & ~scored).sum())):
        embedded.note(f"{modality}: kNN and probe leave out {new} of {count} inputs, of classes that `train` has not")
    commonest = int(np.bincount(labels[scored]).argmax())
    samples = np.array([sample for _, _, sample in rows])
    return LabeledFeatures(torch.cat(features).double().numpy(), labels, groups, scored, fitted, samples, commonest)
