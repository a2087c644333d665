"""Draws a scene with Pillow."""

import math

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128
FINER = 4  # drawn so many times larger, then averaged: smooth edges
RADIUS = {"small": 6.0, "large": 11.5}
COLOURS = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 30),
    "green": (40, 160, 60),
    "blue": (35, 70, 220),
    "purple": (130, 40, 160),
    "pink": (255, 135, 190),
    "brown": (125, 75, 35),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "grey": (150, 150, 150),
    "black": (15, 15, 15),
    "sky": (190, 225, 250),
}
ROW = {1: [0], 2: [-13, 13], 3: [-26, 0, 26]}
CLUSTER = {1: [(0, 0)], 2: [(-13, 0), (13, 0)], 3: [(-13, -9), (13, -9), (0, 13)]}


def draw_picture(scene, rng):
    """A Pillow image, SIDE x SIDE; `rng` shifts, turns and tints a little."""
    image = Image.new("RGB", (SIDE * FINER, SIDE * FINER), tint(BACKGROUNDS[scene.background], rng))
    draw = ImageDraw.Draw(image)
    for kind in scene.kinds:
        for x, y in positions(kind):
            x, y = x + rng.uniform(-1, 1), y + rng.uniform(-1, 1)
            radius = RADIUS[kind.size] * rng.uniform(0.92, 1.04)
            angle, colour = rng.uniform(-0.15, 0.15), tint(COLOURS[kind.colour], rng)
            draw_shape(draw, kind.shape, x, y, radius, angle, colour)
    return image.reduce(FINER)


def positions(kind):
    """Centres of a kind's shapes: a row along the edge that its place names, or a cluster in the middle."""
    edge, middle = 18, SIDE / 2
    row = [middle + shift for shift in ROW[kind.count]]
    return {
        "top": [(x, edge) for x in row],
        "bottom": [(x, SIDE - edge) for x in row],
        "left": [(edge, y) for y in row],
        "right": [(SIDE - edge, y) for y in row],
        "middle": [(middle + x, middle + y) for x, y in CLUSTER[kind.count]],
    }[kind.place]


def tint(colour, rng):
    """A colour near the given one."""
    return tuple(np.clip(np.array(colour) + rng.integers(-8, 9, 3), 0, 255).tolist())


def draw_shape(draw, shape, x, y, radius, angle, colour):
    """Draw one shape around (x, y), turned by `angle` radians."""
    x, y, radius = x * FINER, y * FINER, radius * FINER
    if shape in ("circle", "ring"):
        width = {} if shape == "circle" else {"width": round(radius * 0.38)}
        fill = {"fill": colour} if shape == "circle" else {"outline": colour}
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), **fill, **width)
        return
    cos, sin = math.cos(angle), math.sin(angle)
    draw.polygon(
        [(x + radius * (u * cos - v * sin), y + radius * (u * sin + v * cos)) for u, v in OUTLINES[shape]],
        fill=colour,
    )


def polar(*radii):
    """Points around the centre, the first on top, with these distances."""
    angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def heart():
    """A heart's outline: a well-known curve of sines and cosines, scaled to the unit circle."""
    points = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(y + 2.5) / 16))
    return points


ARM = 0.34
OUTLINES = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": polar(1.05, 1.05, 1.05),
    "star": polar(*[1.05, 0.42] * 5),
    "heart": heart(),
    "cross": [
        (-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
        (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM),
    ],
    "diamond": polar(1.1, 0.62, 1.1, 0.62),
}  # fmt: skip
