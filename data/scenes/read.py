"""Reads a scene off a picture's pixels, by connected components and drawn templates: no network, nothing learned.

It is to judge what a model draws, so it knows what the words mean (the colors, the shapes, how large a small one is)
and nothing of where a scene puts its shapes but the five places. Pictures may be blurred, as a codec's are. All of it
works at a side of 64 pixels.
"""

import functools
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from data.scenes.picture import BACKGROUNDS, COLOURS, FINER, RADIUS, SIDE, draw_shape
from data.scenes.scene import PLACES, SHAPES, SIZES, Kind, Scene

READ_SIDE = 64  # pixels
SCALE = SIDE // READ_SIDE  # a picture is drawn this many times larger
WINDOW = 17  # pixels a side around a shape: the largest, and some of what is around it
WIDEST = 15.0  # pixels: no shape is wider or higher
LEAST_AREA = 5  # pixels: less is noise
CONTRAST = 32.0  # of 255: a smaller distance from the background is noise
LEVELS = (0.3, 0.45, 0.6, 0.75)  # of a component's contrast: where it is cut in two if it is too wide for one shape
BRIDGE = 2.5  # pixels between two pieces of one shape
ANGLES = (-0.12, 0.0, 0.12)  # radians
GROWTH = (0.94, 1.02)  # of the radius
BLURS = (0.0, 0.6, 1.0)  # pixels: standard deviations
FORM_MARGIN = 0.04  # how much better another form must fit one of the shapes of a place to be told from the others
COLOUR_MARGIN = 40.0  # how much nearer another color must be, of 255
CLASSES = tuple((shape, size) for shape in SHAPES for size in SIZES)


@dataclass(frozen=True)
class Found:
    """One shape of a picture."""

    x: float  # pixels of a picture of 128
    y: float
    fit: np.ndarray  # (16,): the cosine with the best template of each of CLASSES
    distance: np.ndarray  # (8,): of its color from each of COLOURS


def read_picture(picture) -> Scene:
    """The scene that a Pillow picture or an array (H, W, 3) of uint8 shows, however it came to be.

    Kinds are ordered by place, the language is English. Shapes of one color in one place are one kind, unless one of
    them clearly has another form.
    """
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(np.asarray(picture))
    pixels = np.asarray(picture.convert("RGB").resize((READ_SIDE, READ_SIDE), Image.Resampling.BOX), np.float32)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    found = [find_shape(pixels - ground, ground, labels) for labels in segment(pixels - ground)]
    return Scene(tuple(sort_into_kinds(found)), nearest(ground, BACKGROUNDS), "en")


def nearest(colour: np.ndarray, named: dict) -> str:
    """The name of the nearest color."""
    return min(named, key=lambda name: float(np.square(colour - np.array(named[name])).sum()))


def segment(difference: np.ndarray) -> list[np.ndarray]:
    """Masks (64, 64) of single shapes, by the difference (64, 64, 3) from the background.

    Components that are too wide for one shape are cut at a higher contrast, pieces that are near enough to be one
    shape are put together.
    """
    contrast = np.sqrt(np.square(difference).sum(2))
    labels, count = ndimage.label(contrast > CONTRAST, np.ones((3, 3)))
    masks = []
    for number in range(1, count + 1):
        mask = labels == number
        masks += divide(contrast, mask, 0) if mask.sum() >= LEAST_AREA else []
    return join_pieces(masks, difference)


def divide(contrast: np.ndarray, mask: np.ndarray, level: int) -> list[np.ndarray]:
    """The parts of a component, each narrow enough for one shape."""
    if max(extent(mask)) <= WIDEST:
        return [mask]
    if level == len(LEVELS):
        return cut_evenly(mask)
    top = np.quantile(contrast[mask], 0.9)
    labels, count = ndimage.label(mask & (contrast > LEVELS[level] * top))
    seeds = [labels == n for n in range(1, count + 1) if (labels == n).sum() >= LEAST_AREA]
    if len(seeds) < 2:
        return divide(contrast, mask, level + 1)
    owner = np.argmin([ndimage.distance_transform_edt(~seed) for seed in seeds], axis=0)
    return [part for n in range(len(seeds)) for part in divide(contrast, mask & (owner == n), level + 1)]


def cut_evenly(mask: np.ndarray) -> list[np.ndarray]:
    """Equal parts of a component that nothing else divides, along its longer side."""
    axis = int(np.argmax(extent(mask)))
    along = np.argwhere(mask)[:, axis]
    parts = int(np.ceil(extent(mask)[axis] / (SIDE / SCALE * 0.21)))  # shapes of one kind lie 13 pixels apart
    edges = np.linspace(along.min(), along.max() + 1, parts + 1)
    rows = np.arange(READ_SIDE)[:, None] if axis == 0 else np.arange(READ_SIDE)[None, :]
    return [part for a, b in zip(edges, edges[1:]) if (part := mask & (rows >= a) & (rows < b)).sum() >= LEAST_AREA]


def extent(mask: np.ndarray) -> tuple[int, int]:
    """Height and width of what a mask covers."""
    return tuple(int(np.ptp(np.nonzero(mask.any(axis))[0])) + 1 for axis in (1, 0))


def join_pieces(masks: list[np.ndarray], difference: np.ndarray) -> list[np.ndarray]:
    """The masks, of which two become one where they are near, of like color, and together no larger than one shape."""
    masks = list(masks)
    for _ in range(len(masks)):
        pairs = [(a, b) for a in range(len(masks)) for b in range(a) if are_pieces(masks[a], masks[b], difference)]
        if not pairs:
            break
        a, b = pairs[0]
        masks[b] = masks[b] | masks.pop(a)
    return masks


def are_pieces(first: np.ndarray, second: np.ndarray, difference: np.ndarray) -> bool:
    both = first | second
    if max(extent(both)) > 13:
        return False
    if ndimage.distance_transform_edt(~first)[second].min() > BRIDGE:
        return False
    a, b = (difference[mask].mean(0) for mask in (first, second))
    return float(a @ b) > 0.9 * float(np.linalg.norm(a) * np.linalg.norm(b))


def find_shape(difference: np.ndarray, ground: np.ndarray, mask: np.ndarray) -> Found:
    """What a mask shows: for each template the share of the pixels' energy that it explains with its best color."""
    contrast = np.sqrt(np.square(difference).sum(2))
    own = ndimage.distance_transform_edt(~mask) <= 1.5  # with the soft edge around it
    y, x = ndimage.center_of_mass(np.where(mask, contrast, 0))
    half = WINDOW // 2
    padded = np.pad(np.where(own[..., None], difference, 0), ((half + 1, half + 1), (half + 1, half + 1), (0, 0)))
    drawn, lengths, which = templates()
    best, colours = np.zeros(len(CLASSES)), np.zeros((len(CLASSES), 3))
    for row in (round(y) - 1, round(y), round(y) + 1):
        for column in (round(x) - 1, round(x), round(x) + 1):
            if not (0 <= row <= READ_SIDE and 0 <= column <= READ_SIDE):
                continue
            window = padded[row + 1 : row + 1 + WINDOW, column + 1 : column + 1 + WINDOW]
            if window.shape[:2] != (WINDOW, WINDOW):
                continue
            window = window.reshape(-1, 3)
            answers = drawn @ window  # of templates of unit length
            explained = np.square(answers).sum(1) / max(float(np.square(window).sum()), 1e-6)
            for number in range(len(CLASSES)):
                rows = which[number]
                place = rows.start + int(np.argmax(explained[rows]))
                if explained[place] > best[number]:
                    best[number] = explained[place]
                    colours[number] = answers[place] / lengths[place]
    distance = color_distances(colours[int(np.argmax(best))], ground)
    return Found(SCALE * (x + 0.5), SCALE * (y + 0.5), np.sqrt(best), distance)


def color_distances(difference: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """How far (8,) a color, by its difference from the background, is from each of COLOURS."""
    return np.linalg.norm(ground + difference - np.array(list(COLOURS.values())), axis=1)


@functools.cache
def templates() -> tuple[np.ndarray, np.ndarray, list[slice]]:
    """Drawn shapes (T, WINDOW * WINDOW) of unit length, how long they were (T,), and the rows of each of CLASSES."""
    rows, which = [], []
    for shape, size in CLASSES:
        start = len(rows)
        for growth in GROWTH:
            for angle in (0.0,) if shape in ("circle", "ring") else ANGLES:
                for shift in ((0, 0), (0, 0.5), (0.5, 0), (0.5, 0.5)):
                    coverage = draw_template(shape, RADIUS[size] * growth, angle, shift)
                    rows += [ndimage.gaussian_filter(coverage, blur).ravel() for blur in BLURS]
        which.append(slice(start, len(rows)))
    drawn = np.stack(rows)
    lengths = np.linalg.norm(drawn, axis=1)
    return drawn / lengths[:, None], lengths, which


def draw_template(shape: str, radius: float, angle: float, shift: tuple[float, float]) -> np.ndarray:
    """How much of each pixel (WINDOW, WINDOW) a shape covers that is drawn at the middle, moved by (x, y) pixels."""
    side = WINDOW * SCALE
    image = Image.new("L", (side * FINER, side * FINER))
    x, y = (side / 2 + SCALE * by for by in shift)
    draw_shape(ImageDraw.Draw(image), shape, x, y, radius, angle, 255)
    return np.asarray(image.reduce(FINER * SCALE), np.float32) / 255


def place_of(x: float, y: float) -> str:
    """The place of a shape, by its center in a picture of 128 pixels."""
    right, down = x - SIDE / 2, y - SIDE / 2
    if max(abs(right), abs(down)) < 30:
        return "middle"
    return ("right" if right > 0 else "left") if abs(right) > abs(down) else ("bottom" if down > 0 else "top")


def sort_into_kinds(found: list[Found]) -> list[Kind]:
    """Kinds by place: of the form and color that fit all shapes there best, but for shapes that clearly differ."""
    kinds = []
    for place in PLACES:
        members = [one for one in found if place_of(one.x, one.y) == place]
        if not members:
            continue
        form = int(np.argmax(np.sum([one.fit for one in members], axis=0)))
        colour = int(np.argmin(np.sum([one.distance for one in members], axis=0)))
        counts = Counter((own_form(one, form), own_colour(one, colour)) for one in members)
        kinds += [
            Kind(CLASSES[f][0], list(COLOURS)[c], n, CLASSES[f][1], place) for (f, c), n in sorted(counts.items())
        ]
    return kinds


def own_form(one: Found, common: int) -> int:
    return common if one.fit.max() - one.fit[common] < FORM_MARGIN else int(one.fit.argmax())


def own_colour(one: Found, common: int) -> int:
    return common if one.distance[common] - one.distance.min() < COLOUR_MARGIN else int(one.distance.argmin())
