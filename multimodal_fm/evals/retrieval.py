"""Retrieval between any two modalities of the corpus, in both directions.

A gallery holds each distinct input once. A right answer is an input of a sample of the query's group. The rank of a
query is that of its first right answer; ties count against it. Chance is exact: it counts the right answers of each
query. R@k is over the queries that can miss, those with k wrong answers or more in their gallery: the rest, as in a
language of nine voices, would be hits whatever the model says. Where no query can miss, it is over all and is 1.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import base
from .embed_corpus import EmbeddedCorpus, Scores
from .metrics import enumerate_values, estimate, rank_first

CUTOFFS = (1, 5, 10)


@dataclass
class Config:
    group: str = ""  # the field that says which samples are right answers for each other; empty: an equal text
    within: str = ""  # the field that query and gallery share; empty: the gallery is the whole corpus


class Evaluator(base.Evaluator):
    Config = Config
    needs_vectors = True

    def run(self, embedded: EmbeddedCorpus, config: Config, model=None, objectives=None) -> dict[str, dict]:
        """`retrieval/A_to_B/{r@1,r@5,r@10,median_rank,mrr}` for every ordered pair of modalities."""
        figures = {}
        for query, answer in itertools.permutations(embedded.inputs, 2):
            tasks = list(search_tasks(embedded, config.group, config.within, query, answer))
            if tasks:
                ranks, rights = (np.concatenate(columns) for columns in zip(*(t.rank(embedded) for t in tasks)))
                sizes = np.concatenate([np.full(len(task.queries), len(task.gallery)) for task in tasks])
                clusters = [min(groups) for task in tasks for groups in task.queries.values()]
                clusters = enumerate_values(clusters)
                samples = np.array([sample for task in tasks for sample in task.holders(embedded)])
                name = f"retrieval/{query}_to_{answer}"
                figures |= _figures(name, ranks, sizes, rights, clusters, samples, embedded.scores)
        return figures


@dataclass
class SearchTask:
    """The queries that share a gallery: inputs of two modalities by number, each with the groups of its samples."""

    query: str  # the modality
    answer: str
    samples: list[int]  # that queries and gallery come from
    queries: dict[int, set[str]]  # those with a right answer
    gallery: dict[int, set[str]]

    def holders(self, embedded: EmbeddedCorpus) -> list[int]:
        """A sample that holds each query, of those that the task is about."""
        samples = set(self.samples)
        return [next(s for s in embedded.inputs[self.query].samples[number] if s in samples) for number in self.queries]

    def rank(self, embedded: EmbeddedCorpus) -> tuple[np.ndarray, np.ndarray]:
        """The rank of each query's first right answer, and how many right answers it has."""
        columns = defaultdict(list)
        for column, groups in enumerate(self.gallery.values()):
            for group in groups:
                columns[group].append(column)
        columns = {group: torch.tensor(own) for group, own in columns.items()}
        groups_of_query = list(self.queries.values())

        def right(rows: slice) -> Tensor:
            mask = torch.zeros(rows.stop - rows.start, len(self.gallery), dtype=torch.bool)
            for row, groups in zip(mask, groups_of_query[rows], strict=True):
                for group in groups & columns.keys():
                    row[columns[group]] = True
            return mask

        queries = embedded.inputs[self.query].vectors[list(self.queries)]
        ranks, counts = rank_first(queries, embedded.inputs[self.answer].vectors[list(self.gallery)], right)
        return ranks.numpy(), counts.numpy()


def search_tasks(embedded: EmbeddedCorpus, group: str, within: str, query: str, answer: str) -> Iterator[SearchTask]:
    """The queries of one modality that have a right answer of another, by gallery."""
    for samples in split_samples(embedded, within):
        queries, gallery = (_inputs_with_groups(embedded, group, modality, samples) for modality in (query, answer))
        known = set().union(*gallery.values())
        queries = {number: groups for number, groups in queries.items() if groups & known}
        if queries:
            yield SearchTask(query, answer, samples, queries, gallery)


def split_samples(embedded: EmbeddedCorpus, within: str) -> list[list[int]]:
    """The samples by their value of the field `within`, without those that have none; all together without a field."""
    if not within:
        return [list(range(len(embedded.sample_inputs)))]
    parts = defaultdict(list)
    for sample in range(len(embedded.sample_inputs)):
        value = embedded.field(sample, within)
        if value is not None:
            parts[value].append(sample)
    return list(parts.values())


def _inputs_with_groups(embedded: EmbeddedCorpus, group: str, modality: str, samples: list[int]) -> dict[int, set[str]]:
    """The inputs of one modality that the samples hold, each with the groups of its samples."""
    inputs = defaultdict(set)
    for sample in samples:
        for number in embedded.sample_inputs[sample].get(modality, []):
            inputs[number] |= embedded.groups(sample, group)
    return dict(inputs)


def _figures(name: str, ranks, sizes, rights, clusters, samples=None, scores: dict | None = None) -> dict[str, dict]:
    """The figures of one direction; of recall, what each is the mean of goes into `scores`."""
    shapes, shape, counts = np.unique(np.stack([sizes, rights], 1), axis=0, return_inverse=True, return_counts=True)
    late = np.zeros((len(shapes), max(CUTOFFS) + 1))  # P(a guess's rank > k) by shape
    later = np.zeros(sizes.max() + 1)  # the share of all guesses whose rank is > k
    mrr = 0.0
    for row, ((size, right), count) in enumerate(zip(shapes.tolist(), counts / len(ranks), strict=True)):
        curve = np.append(guess_curve(size, right), 0.0)
        late[row, : len(curve)] = curve[: max(CUTOFFS) + 1]
        later[: len(curve)] += curve * count
        mrr += float(((curve[:-1] - curve[1:]) / np.arange(1, len(curve))).sum()) * count
    figures = {}
    for k in CUTOFFS:
        can_miss = sizes - rights >= k
        can_miss = can_miss if can_miss.any() else ~can_miss
        hits, chances = (ranks[can_miss] <= k).astype(float), 1 - late[shape.ravel()[can_miss], k]
        figures[f"{name}/r@{k}"] = estimate(hits, clusters[can_miss], float(chances.mean()))
        if scores is not None and samples is not None:
            scores[f"{name}/r@{k}"] = Scores(hits, samples[can_miss], clusters[can_miss], chances)
    median = float((later > 0.5).sum())
    figures[f"{name}/median_rank"] = estimate(ranks.astype(float), clusters, median, median=True)
    figures[f"{name}/mrr"] = estimate(1 / ranks, clusters, mrr)
    return figures


def guess_curve(size: int, right: int) -> np.ndarray:
    """P(the first of `right` answers, placed at random among `size`, ranks after k) for k = 0, 1, ..., size - right."""
    k = np.arange(size - right)
    return np.concatenate([[1.0], np.cumprod((size - right - k) / (size - k))])
