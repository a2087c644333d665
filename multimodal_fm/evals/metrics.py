"""What the evaluations share: estimates with intervals, nearest neighbors, and labeled features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .embed_corpus import EmbeddedCorpus

MAX_SCORES = 1 << 20  # numbers held at a time (8 MiB): memory does not grow with queries times gallery
DRAWS = 1000  # of the bootstrap
TIE = 1e-9  # scores nearer to each other than this are equal: far below the resolution of float32 vectors


def estimate(values, clusters, chance: float | None, median: bool = False, weights=None) -> dict:
    """A figure: the mean (or median) of `values` (Q,) as {"value", "low", "high", "chance", "n"}.

    `low` and `high` are the 95 % interval of 1,000 bootstrap draws of whole clusters (Q,); `chance` is what a guess
    would get, None where there is no such thing; `n` is Q. With `weights` (Q,) the value is the sum of the values over
    the sum of the weights. (Efron and Tibshirani 1993; cluster bootstrap: Field and Welsh 2007.)
    """
    generator = np.random.default_rng(0)
    cluster = np.unique(clusters, return_inverse=True)[1]
    number = cluster.max() + 1
    order = np.argsort(values, kind="stable")
    weights = np.ones(len(values)) if weights is None else weights
    sums = np.bincount(cluster, weights=values, minlength=number)
    counts = np.bincount(cluster, weights=weights, minlength=number)
    estimates, size = [], max(1, MAX_SCORES // len(values))
    for start in range(0, DRAWS, size):  # how often each cluster is drawn
        draws = generator.multinomial(number, np.full(number, 1 / number), size=min(size, DRAWS - start))
        if median:
            weight = np.cumsum(draws[:, cluster[order]], axis=1)
            estimates.append(values[order][(weight < weight[:, -1:] / 2).sum(1)])
        else:
            estimates.append((draws @ sums) / (draws @ counts))
    value = float(np.median(values) if median else values.sum() / weights.sum())
    low, high = np.percentile(np.concatenate(estimates), [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high), "chance": chance, "n": len(values)}


def enumerate_values(values: list) -> np.ndarray:
    """Each value's number (N,) in the order of the distinct values."""
    numbers = {value: number for number, value in enumerate(sorted(set(values)))}
    return np.array([numbers[value] for value in values])


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
    """The inputs of one modality that have a label, N of them."""

    features: np.ndarray  # (N, D)
    labels: np.ndarray  # (N,) from 0 on
    groups: np.ndarray  # (N,) inputs of an equal group never vouch for each other
    scored: np.ndarray  # (N,) bool: the label is that of another group too, so that it can be learned from there
    chance: float  # the share of the commonest label among those that are scored


def labeled_modalities(embedded: EmbeddedCorpus, config: Any) -> Iterator[tuple[str, LabeledFeatures]]:
    """Each modality with labels to learn and to score, by the `labels` and `group` of an evaluator's settings."""
    for modality in embedded.inputs:
        if (data := labeled_features(embedded, modality, config.labels, config.group)) is not None:
            yield modality, data


def labeled_features(embedded: EmbeddedCorpus, modality: str, field: str, group: str) -> LabeledFeatures | None:
    """The labels in `field` and the groups in the field `group` (empty: each input is a group of its own).

    None where fewer than two labels, or too few inputs, could be learned and scored; where there are labels at all,
    `embedded.notes` then says why.
    """
    inputs = embedded.inputs[modality]
    rows = [(number, embedded.field(samples[0], field), samples[0]) for number, samples in enumerate(inputs.samples)]
    rows = [row for row in rows if row[1] is not None]
    if not rows:
        return None
    labels = enumerate_values([label for _, label, _ in rows])
    values = [embedded.field(sample, group) if group else None for _, _, sample in rows]
    groups = enumerate_values([(i, "") if value is None else (-1, value) for i, value in enumerate(values)])
    groups_per_label = np.bincount(np.unique(np.stack([labels, groups]), axis=1)[0])
    scored = groups_per_label[labels] > 1
    classes = labels.max() + 1
    if classes < 2 or len(rows) < 10:
        why = f"{modality}: no kNN and no probe: {len(rows)} labeled inputs of {classes} classes are too few"
    elif not scored.any():
        lies = f"lies in one group of {group!r}" if group else "has one input"
        why = f"no kNN and no probe: each of the {classes} classes {lies}, so there is nothing to learn it from"
    else:
        why = ""
    if why:
        embedded.note(why)
        return None
    features = inputs.features[[number for number, _, _ in rows]].double().numpy()
    chance = float(np.bincount(labels[scored]).max() / scored.sum())
    return LabeledFeatures(features, labels, groups, scored, chance)
