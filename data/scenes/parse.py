"""Reads a scene off an English caption, by the words of the grammar that writes them; anything else says nothing."""

import re

from data.scenes.captions import ENGLISH
from data.scenes.scene import Kind, Scene

PARTS = ("count", "size", "colour", "shape", "place")


def spell(part: str, words: list[str]) -> list[str]:
    """The ways to write the words; nouns in the plural too."""
    if part != "shape":
        return words
    return [*words, *(word + ("es" if word.endswith(("s", "x")) else "s") for word in words)]


# What each spelling means, the longest first, so that "a pair of" is not read as "a".
MEANINGS = sorted(
    ((spelling, part, meaning) for part in PARTS for meaning, words in ENGLISH[part].items()
     for spelling in spell(part, words)),
    key=lambda entry: -len(entry[0]),
)  # fmt: skip
KNOWN = re.compile("|".join(rf"\b(?P<m{i}>{re.escape(spelling)})\b" for i, (spelling, _, _) in enumerate(MEANINGS)))
BACKGROUNDS = {word: meaning for meaning, words in ENGLISH["background"].items() for word in words}
GROUND = re.compile(rf"\bon an? ({'|'.join(BACKGROUNDS)}) background\b")


def parse_caption(text: str) -> Scene:
    """The scene that a caption names, in the order of its words; what it does not say is None.

    A kind begins with its count, or with a word for what the kind before it has already. One of which neither shape nor
    color is said is left out.
    """
    text = " ".join(text.lower().split())
    ground = GROUND.search(text)
    said: list[dict] = []
    for found in KNOWN.finditer(GROUND.sub("|", text)):
        assert found.lastgroup is not None
        _, part, meaning = MEANINGS[int(found.lastgroup[1:])]
        if not said or part == "count" or part in said[-1]:
            said.append({})
        said[-1][part] = meaning
    kinds = [Kind(**{part: one.get(part) for part in PARTS}) for one in said if "shape" in one or "colour" in one]
    return Scene(tuple(kinds), BACKGROUNDS[ground[1]] if ground else None, "en")
