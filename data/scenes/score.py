"""How much of an asked scene another one has: attribute by attribute, kinds matched as well as can be."""

from dataclasses import astuple, dataclass, fields

import numpy as np
from scipy.optimize import linear_sum_assignment

from data.scenes.scene import HELD_OUT, Kind, Scene

ATTRIBUTES = tuple(field.name for field in fields(Kind))


@dataclass(frozen=True)
class Score:
    """What of one asked scene is right."""

    kinds: np.ndarray  # (K, 5): for each asked kind each of ATTRIBUTES, from 0 to 1
    unseen: np.ndarray  # (K,) of bool: whether the pair of color and shape is one that no training scene has
    background: bool
    number: bool  # as many kinds as were asked for
    whole: bool  # all of it, and nothing else


def score(asked: Scene, given: Scene) -> Score:
    """Each asked kind is matched with one given kind or none, so that the most attributes are right in all.

    Where more kinds are given than asked for, what is right counts asked / given, which is about what would be right if
    only as many were kept, drawn at random: whoever fills a picture with shapes does not score by that.
    """
    equal = np.zeros((len(asked.kinds), len(given.kinds), len(ATTRIBUTES)), bool)
    for i, wanted in enumerate(asked.kinds):
        for j, kind in enumerate(given.kinds):
            equal[i, j] = [a == b for a, b in zip(astuple(wanted), astuple(kind), strict=True)]
    kinds = np.zeros((len(asked.kinds), len(ATTRIBUTES)))
    rows, columns = linear_sum_assignment(-equal.sum(2))
    kinds[rows] = equal[rows, columns] * min(1, len(asked.kinds) / max(len(given.kinds), 1))
    unseen = np.array([(kind.colour, kind.shape) in HELD_OUT for kind in asked.kinds])
    background, number = asked.background == given.background, len(asked.kinds) == len(given.kinds)
    return Score(kinds, unseen, background, number, bool(background and number and (kinds == 1).all()))
