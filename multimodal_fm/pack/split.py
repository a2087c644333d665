"""Which samples go to train, validation and test: whole clusters of samples that share something, by a hash."""

from __future__ import annotations

import numpy as np

from . import dedup

SHARED = 20  # where so many samples of a source share a text on average, its texts are labels, and tie nothing


def label_sources(source: np.ndarray, text_source: np.ndarray, keys: np.ndarray, media: np.ndarray) -> np.ndarray:
    """The sources whose texts are labels rather than captions ("dog", a hundred times).

    source (N,) of each sample, text_source (T,) and keys (T,) of each text, media (N,): the sample is more than text.
    """
    made = []
    for one in np.unique(text_source):
        of_it = source == one
        distinct = len(np.unique(keys[text_source == one]))
        if media[of_it].all() and of_it.sum() >= SHARED * distinct:
            made.append(one)
    return np.array(made, np.int64)


def choose(cluster: np.ndarray, group: np.ndarray, shares: list[float]) -> np.ndarray:
    """The split (N,) of each sample: a cluster (N,) goes where the smallest of its members' group hashes (N,) says."""
    least = np.full(len(cluster), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, cluster, group)
    where = (dedup.mixed(least[cluster] + np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)) / 2.0**53
    return np.searchsorted(np.cumsum(shares)[:-1], where, side="right")
