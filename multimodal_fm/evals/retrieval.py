"""Retrieval between any two modalities that the data has, in both directions.

A gallery holds each distinct thing once. A right answer is a thing of a sample of the query's group. The rank of a query
is that of its first right answer; ties count against it. Chance is exact: it counts the right answers of each query.
R@k is over the queries that can miss, those with k wrong answers or more to choose from: the rest, as in a language of
nine voices, would count as found whatever the model says. Where no query can miss it is over all of them, and is 1.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from .embed_corpus import Encoded, figure

AT = (1, 5, 10)


@dataclass
class Config:
    group: str = ""  # the field that says which samples are right answers for each other; empty: an equal text
    within: str = ""  # the field that query and gallery share; empty: the gallery is all there is


def run(encoded: Encoded, config: Config, model=None) -> dict[str, dict]:
    """`retrieval/A_to_B/{r@1,r@5,r@10,median_rank,mrr}` for every ordered pair of modalities."""
    figures = {}
    for query, answer in itertools.permutations(encoded.things, 2):
        ranks, sizes, rights, clusters = [], [], [], []
        for samples in shares(encoded, config.within):
            for found in _search(encoded, config, query, answer, samples):
                for into, value in zip((ranks, sizes, rights, clusters), found, strict=True):
                    into.append(value)
        if ranks:
            name = f"retrieval/{query}_to_{answer}"
            figures |= _figures(name, np.array(ranks), np.array(sizes), np.array(rights), np.array(clusters))
    return figures


def shares(encoded: Encoded, within: str) -> list[list[int]]:
    """The samples, in the shares that a query's gallery is kept to."""
    if not within:
        return [list(range(len(encoded.held)))]
    shares = defaultdict(list)
    for sample in range(len(encoded.held)):
        value = encoded.value(sample, within)
        if value is not None:
            shares[value].append(sample)
    return list(shares.values())


def _search(encoded: Encoded, config: Config, query: str, answer: str, samples: list[int]):
    """For each query among `samples`: the rank, the size of its gallery, its right answers, its group."""
    asks, answers = grouped(encoded, config.group, query, samples), grouped(encoded, config.group, answer, samples)
    by_group = defaultdict(list)
    for column, groups in enumerate(answers.values()):
        for group in groups:
            by_group[group].append(column)
    gallery = encoded.things[answer].vectors[list(answers)].double()
    for thing, groups in asks.items():
        right = sorted({column for group in groups for column in by_group[group]})
        if right:
            scores = gallery @ encoded.things[query].vectors[thing].double()
            wrong = torch.ones(len(scores), dtype=torch.bool)
            wrong[right] = False
            rank = 1 + int((~(scores[wrong] < scores[right].max())).sum())  # what is not a number counts against it
            yield rank, len(scores), len(right), min(groups)


def grouped(encoded: Encoded, name: str, modality: str, samples: list[int]) -> dict[int, set[str]]:
    """The things of one modality that the samples hold, each with the groups of its samples."""
    things = defaultdict(set)
    for sample in samples:
        for thing in encoded.held[sample].get(modality, []):
            things[thing] |= encoded.groups(sample, name)
    return things


def _figures(name: str, ranks, sizes, rights, clusters) -> dict[str, dict]:
    guesses = [_guess(int(size), int(right)) for size, right in zip(sizes, rights, strict=True)]
    longest = max(len(g) for g in guesses)
    late = np.array([np.pad(g, (0, longest - len(g))) for g in guesses])  # P(a guess's rank > k), k = 0, 1, ...
    mrr = float(np.mean([_reciprocal(int(size), int(right)) for size, right in zip(sizes, rights, strict=True)]))
    figures = {}
    for k in AT:
        telling = sizes - rights >= k
        telling = telling if telling.any() else ~telling
        found = (ranks[telling] <= k).astype(float)
        figures[f"{name}/r@{k}"] = figure(found, clusters[telling], _at(late[telling].mean(0), k))
    late = late.mean(0)
    figures[f"{name}/median_rank"] = figure(ranks.astype(float), clusters, float((late > 0.5).sum()), median=True)
    figures[f"{name}/mrr"] = figure(1 / ranks, clusters, mrr)
    return figures


def _at(late: np.ndarray, k: int) -> float:
    return 1 - float(late[k]) if k < len(late) else 1.0


@cache
def _guess(size: int, right: int) -> np.ndarray:
    """P(the first of `right` answers, placed at random among `size`, ranks after k) for k = 0, 1, ..., size - right."""
    k = np.arange(size - right)
    return np.concatenate([[1.0], np.cumprod((size - right - k) / (size - k))])


@cache
def _reciprocal(size: int, right: int) -> float:
    """The mean reciprocal rank of a guess."""
    late = np.concatenate([_guess(size, right), [0.0]])
    return float(((late[:-1] - late[1:]) / np.arange(1, len(late))).sum())
