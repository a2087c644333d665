"""Splits labeled samples into parts: by hash, stratified over classes, what is equal in one part."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from ..errors import UserError
from ..pack import dedup

LARGEST = 0.2  # of the samples, that one cluster may be before weak ties are dropped


def cluster(strong: Sequence[Sequence[str]], weak: Sequence[Sequence[str]]) -> tuple[np.ndarray, bool]:
    """The cluster (N,) of each sample: those that share a digest are one; and whether the weak digests were used.

    They are not where they would tie together more than `LARGEST` of all samples that the strong ones do not.
    """
    alone = _clusters(strong)
    tied = _clusters([[*own, *other] for own, other in zip(strong, weak, strict=True)])
    largest = [int(np.bincount(one).max(initial=0)) for one in (alone, tied)]
    use = largest[1] <= max(largest[0], LARGEST * len(strong), 2)
    return (tied if use else alone), use


def _clusters(digests: Sequence[Sequence[str]]) -> np.ndarray:
    first: dict[str, int] = {}
    edges = [(first.setdefault(one, number), number) for number, own in enumerate(digests) for one in own]
    return dedup.clusters(len(digests), np.array(edges, np.int64).reshape(-1, 2))


def split(
    clusters: np.ndarray,
    digests: Sequence[str],
    classes: Sequence[Sequence[Hashable]],
    shares: dict[str, float],
    seed: int,
    what: str,
) -> list[str]:
    """The part of each sample: `train`, or one of `shares`, the fraction of samples that each of these parts gets.

    Args:
        clusters: (N,) samples of an equal one stay together.
        digests: N, of what the samples are; the order of the samples does not matter.
        classes: N, the classes of each sample; every class keeps a sample to train on.
        what: the data, for the message.

    Raises UserError where there is too little for every part to have something.
    """
    count = len(digests)
    frequency = Counter(one for own in classes for one in set(own))
    members: dict[int, list[int]] = defaultdict(list)
    for number, one in enumerate(clusters.tolist()):
        members[one].append(number)
    order = {
        one: dedup.digest(str(seed).encode(), min(digests[n] for n in own).encode()) for one, own in members.items()
    }
    rarest = {
        one: min((c for n in own for c in classes[n]), key=lambda c: (frequency[c], str(c)), default=None)
        for one, own in members.items()
    }
    strata: dict[Hashable, list[int]] = defaultdict(list)
    for one in sorted(members, key=lambda one: order[one]):
        strata[rarest[one]].append(one)
    part = dict.fromkeys(members, "train")
    owed = dict.fromkeys(shares, 0.0)
    for label in sorted(strata, key=lambda label: (-len(strata[label]), str(label))):
        left = list(strata[label])
        size = sum(len(members[one]) for one in left)
        for name, share in shares.items():
            owed[name] += share * size
            kept = []
            for place, one in enumerate(left):
                stays = not kept and place == len(left) - 1  # one stays to train on
                if stays or len(members[one]) > 2 * owed[name]:
                    kept.append(one)
                else:
                    part[one] = name
                    owed[name] -= len(members[one])
            left = kept
    _fill_empty(part, strata, members, shares)
    _keep_classes(part, members, classes, order)
    missing = [name for name in ("train", *shares) if name not in part.values()]
    if missing:
        raise UserError(
            f"{what}: {count} sample{'s' * (count != 1)} ({len(members)} different) are too few to split into "
            f"training, {' and '.join(shares)} with each class in training: give more, or other data with "
            f"{' and '.join(f'--{name}' for name in shares)}"
        )
    parts = [""] * count
    for one, own in members.items():
        for number in own:
            parts[number] = part[one]
    return parts


def _fill_empty(part: dict[int, str], strata: dict, members: dict, shares: dict[str, float]) -> None:
    """Where a part got nothing, the smallest cluster of the class with the most of them to train on."""
    for name in shares:
        if name not in part.values():
            left = {label: [one for one in own if part[one] == "train"] for label, own in strata.items()}
            label = max(left, key=lambda label: (len(left[label]), str(label)))
            if len(left[label]) > 1:
                part[min(left[label], key=lambda one: len(members[one]))] = name


def _keep_classes(part: dict[int, str], members: dict, classes: Sequence, order: dict) -> None:
    """A class that is in no training sample gets its first cluster back: a sample may have several classes."""
    trained = {c for one, own in members.items() if part[one] == "train" for n in own for c in classes[n]}
    for one in sorted(members, key=lambda one: order[one]):
        own = {c for n in members[one] for c in classes[n]}
        if not own <= trained:
            part[one] = "train"
            trained |= own
