"""What a scene is, and how one is drawn at random: a pure function of (seed, split, index)."""

from dataclasses import asdict, dataclass

import numpy as np

from data.writing import SPLITS

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
SIZES = ("small", "large")
PLACES = ("top", "bottom", "left", "right", "middle")
BACKGROUNDS = ("white", "grey", "black", "sky")
LANGUAGES = ("en", "fr", "es")
MOST_KINDS, MOST_COPIES = 3, 3

# Pairs of colour and shape that no training scene has and every validation scene has: each shape lacks
# one colour and each colour one shape, so both are trained on, but never together.
HELD_OUT = tuple((COLOURS[(3 * i + 5) % len(COLOURS)], shape) for i, shape in enumerate(SHAPES))
SEEN = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT)


@dataclass(frozen=True)
class Kind:
    """One to three equal shapes in one place."""

    shape: str
    colour: str
    count: int
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """Kinds in the order in which they are named and played, and the language that plays them."""

    kinds: tuple
    background: str
    language: str

    def as_json(self):
        return {"kinds": [asdict(kind) for kind in self.kinds], "background": self.background}


def generator(seed, split, index, use):
    """The random numbers of one use ("scene", "picture", ...) of one scene."""
    return np.random.default_rng([seed, SPLITS.index(split), index, *use.encode()])


def draw_scene(seed, split, index):
    """Scene `index` of a split: shapes and places differ between its kinds."""
    rng = generator(seed, split, index, "scene")
    pairs = draw_pairs(rng, split)
    places = rng.permutation(PLACES)
    kinds = tuple(
        Kind(shape, colour, int(rng.integers(1, MOST_COPIES + 1)), str(rng.choice(SIZES)), str(place))
        for (colour, shape), place in zip(pairs, places, strict=False)
    )
    return Scene(kinds, str(rng.choice(BACKGROUNDS)), str(rng.choice(LANGUAGES)))


def draw_pairs(rng, split):
    """One to three pairs of colour and shape, no shape twice; in validation one of them is held out."""
    wanted = rng.integers(1, MOST_KINDS + 1)
    pairs = [HELD_OUT[rng.integers(len(HELD_OUT))]] if split == "validation" else []
    while len(pairs) < wanted:
        pair = SEEN[rng.integers(len(SEEN))]
        if pair[1] not in [shape for _, shape in pairs]:
            pairs.append(pair)
    return [pairs[place] for place in rng.permutation(len(pairs))]
