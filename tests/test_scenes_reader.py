"""The readers of scenes, which judge what a model draws and says, and the score: true scenes and planted errors."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data.scenes.captions import canonical, describe
from data.scenes.parse import parse_caption
from data.scenes.picture import draw_picture
from data.scenes.read import read_picture
from data.scenes.scene import COLOURS, HELD_OUT, SHAPES, Kind, Scene, draw_scene, generator
from data.scenes.score import ATTRIBUTES, score


def scene_of(*kinds, background="white") -> Scene:
    return Scene(tuple(Kind(*kind) for kind in kinds), background, "en")


def drawn(scene: Scene, index: int = 0) -> Image.Image:
    return draw_picture(scene, generator(3, "validation", index, "picture"))


def share_right(pairs) -> dict[str, float]:
    """The share of kinds of which each attribute is right."""
    right = np.concatenate([score(asked, given).kinds for asked, given in pairs])
    return dict(zip(ATTRIBUTES, right.mean(0)))


def test_what_is_drawn_is_read_whatever_its_size():
    scenes = [draw_scene(3, "validation", index) for index in range(24)]
    for side in (128, 64):
        pictures = [drawn(scene, i).resize((side, side), Image.Resampling.BILINEAR) for i, scene in enumerate(scenes)]
        read = [read_picture(picture) for picture in pictures]
        assert [set(one.kinds) for one in read] == [set(scene.kinds) for scene in scenes]
        assert [one.background for one in read] == [scene.background for scene in scenes]


def test_blurred_and_noisy_pictures_are_read():
    """As a codec of few bits leaves them."""
    rng, pairs = np.random.default_rng(0), []
    for index in range(24):
        scene = draw_scene(4, "validation", index)
        picture = drawn(scene, index).resize((64, 64), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(0.8))
        noisy = np.asarray(picture) + rng.normal(0, 6, (64, 64, 3))
        pairs.append((scene, read_picture(np.clip(noisy, 0, 255).astype(np.uint8))))
    assert min(share_right(pairs).values()) >= 0.9, share_right(pairs)


def test_every_pair_of_color_and_shape_is_told_from_the_others():
    for number, shape in enumerate(SHAPES):
        for other, colour in enumerate(COLOURS):
            size, background = ("small", "large")[other % 2], ("white", "grey", "black", "sky")[(number + other) % 4]
            scene = scene_of((shape, colour, 1, size, "middle"), background=background)
            assert read_picture(drawn(scene, 8 * number + other)) == scene


def test_a_planted_error_in_a_picture_is_found():
    """The reader reads the picture that it is given, not what would be likely."""
    asked = scene_of(("star", "red", 2, "small", "top"), ("ring", "blue", 3, "large", "left"))
    changes = {"shape": "heart", "colour": "green", "count": 1, "size": "large", "place": "bottom"}
    for attribute, value in changes.items():
        wrong = dataclasses.replace(
            asked, kinds=(dataclasses.replace(asked.kinds[0], **{attribute: value}), asked.kinds[1])
        )
        found = score(asked, read_picture(drawn(wrong)))
        expected = np.ones((2, len(ATTRIBUTES)))
        expected[0, ATTRIBUTES.index(attribute)] = 0
        assert (found.kinds == expected).all() and not found.whole, attribute


def test_another_shape_among_equal_ones_is_a_kind_of_its_own():
    picture = drawn(scene_of(("circle", "red", 3, "large", "top")))
    other = drawn(scene_of(("star", "red", 3, "large", "top")))
    picture.paste(other.crop((0, 0, 51, 40)), (0, 0))
    assert set(read_picture(picture).kinds) == {
        Kind("star", "red", 1, "large", "top"),
        Kind("circle", "red", 2, "large", "top"),
    }


def test_an_empty_or_noisy_picture_has_no_shapes():
    assert read_picture(Image.new("RGB", (64, 64), (15, 15, 15))) == Scene((), "black", "en")
    noise = np.random.default_rng(0).normal(150, 8, (64, 64, 3)).astype(np.uint8)
    assert read_picture(noise) == Scene((), "grey", "en")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_caption_is_parsed_exactly(split):
    for index in range(300):
        scene = draw_scene(5, split, index)
        for text in (canonical(scene), describe(scene, generator(5, split, index, "words"))["en"]):
            said = parse_caption(text)
            assert (said.kinds, said.background) == (scene.kinds, scene.background), text


def test_garbage_says_nothing_and_half_a_caption_what_it_says():
    for text in ("", "starry \x00 redden |", "deux petits cercles rouges en haut", "on a background"):
        assert parse_caption(text) == Scene((), None, "en"), text
    half = parse_caption("two red stars at the and a large at the top, on a black background on a white background")
    assert half == Scene((Kind("star", "red", 2, None, None),), "black", "en")
    assert parse_caption("red circle blue square").kinds == (
        Kind("circle", "red", None, None, None),
        Kind("square", "blue", None, None, None),
    )


def test_a_score_matches_kinds_as_well_as_can_be():
    pair = HELD_OUT[0]
    asked = scene_of((pair[1], pair[0], 2, "small", "top"), ("star", "red", 1, "large", "left"))
    swapped = dataclasses.replace(asked, kinds=asked.kinds[::-1])
    assert score(asked, swapped).whole and score(asked, swapped).kinds.all()
    assert score(asked, asked).unseen.tolist() == [True, False]
    # A kind too few: it has nothing right. One too many: all are right, the number is not.
    one = score(asked, dataclasses.replace(asked, kinds=asked.kinds[:1]))
    assert one.kinds.sum(1).tolist() == [5, 0] and not one.number and not one.whole
    more = score(asked, dataclasses.replace(asked, kinds=(*asked.kinds, Kind("ring", "blue", 1, "small", "right"))))
    assert (more.kinds == 2 / 3).all() and not more.number and not more.whole  # of three kinds two are right
    # The greedy pairing of the first kind with what has most in common would leave less for the second.
    first, second = Kind("star", "red", 1, "small", "top"), Kind("star", "red", 2, "large", "left")
    given = [Kind("star", "red", 2, "small", "left"), Kind("heart", "blue", 1, "small", "top")]
    found = score(Scene((first, second), "white", "en"), Scene(tuple(given), "grey", "en"))
    assert found.kinds.sum() == 7 and not found.background
    assert not score(asked, Scene((), None, "en")).kinds.any()
