"""Turns the stamps' pictures and sounds into small JPEG and FLAC files, once, in the cache."""

import io
from math import gcd

import numpy as np
import soundfile
from PIL import Image

from data.writing import (
    NO_SOURCE,
    SAMPLE_RATE,
    RecipeError,
    flac_bytes,
    jpeg_bytes,
    parallel,
    write_file,
)

VERSION = 1  # raise it when a conversion changes, so that no older file is reused
LONGEST_SIDE = 160
EFFECT_SECONDS = 10
SHORTEST_SECONDS = 0.05
SILENCE = 1e-3  # a sound whose peak is below is silent
SUFFIXES = {"picture": ".jpg", "spoken": ".flac", "effect": ".flac"}


class Unusable(Exception):
    """A file that gives no picture or sound; the text is the reason, as counted."""


def convert_all(sources, cache, workers):
    """Convert every (role, path, digest); return {(role, digest): file}, a `.bad` file where unusable.

    Files are named by the source's digest, so another seed, or a run after an interrupted one, finds them.
    """
    folder = cache / f"converted-{VERSION}"
    targets = {}
    jobs = []
    for role, path, key in sources:
        if (role, key) not in targets:
            targets[role, key] = target = folder / key[:2] / f"{key}-{role}{SUFFIXES[role]}"
            if not target.exists() and not target.with_suffix(".bad").exists():
                jobs.append((role, path, target))
    if jobs:
        if any(path.suffix.lower() == ".svg" for _, path, _ in jobs):
            need_resvg()
        for _ in parallel(convert, jobs, workers, "converting pictures and sounds"):
            pass
    return {name: path if path.exists() else path.with_suffix(".bad") for name, path in targets.items()}


def need_resvg():
    """Raise RecipeError where vector pictures can't be drawn."""
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        message = f"vector stamps need resvg_py ({error}); pip install resvg-py"
        raise RecipeError(message, NO_SOURCE) from None


def convert(job):
    """Write one converted file, or a `.bad` file with the reason."""
    role, path, target = job
    try:
        content = jpeg_bytes(picture(path)) if role == "picture" else flac_bytes(sound(path, role))
    except Unusable as reason:
        write_file(target.with_suffix(".bad"), str(reason).encode())
    else:
        write_file(target, content)


def picture(path):
    """A PNG or SVG on white, its longest side LONGEST_SIDE."""
    try:
        image = draw_svg(path) if path.suffix.lower() == ".svg" else Image.open(path)
        image = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise Unusable("unreadable picture") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    scale = LONGEST_SIDE / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.LANCZOS)


def draw_svg(path):
    """An SVG drawn at twice the size needed or more; no system fonts, which differ between machines."""
    import resvg_py

    drawn = resvg_py.svg_to_bytes(svg_path=str(path), width=2 * LONGEST_SIDE, dpi=96, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(drawn)))


def sound(path, role):
    """A sound file as mono samples at SAMPLE_RATE, effects cut to EFFECT_SECONDS."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError):
        raise Unusable("unreadable sound") from None
    samples = samples.mean(axis=1)
    if role == "effect":
        samples = samples[: EFFECT_SECONDS * rate]
    if len(samples) < SHORTEST_SECONDS * rate or np.abs(samples).max() < SILENCE:
        raise Unusable("silent or empty sound")
    from scipy.signal import resample_poly  # slow to import, and needed only here

    shared = gcd(rate, SAMPLE_RATE)
    return resample_poly(samples, SAMPLE_RATE // shared, rate // shared)
