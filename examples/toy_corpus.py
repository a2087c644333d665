"""A corpus in a second, for the examples: colored squares, captions, and tones, of which each color has its own."""

import io
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from multimodal_fm.corpus import shards

COLORS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 60, 220), "yellow": (230, 210, 40)}


def image(color: str, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 20, (32, 32, 3))
    return Image.fromarray(np.clip(COLORS[color] + noise, 0, 255).astype(np.uint8))


def write(folder: Path, name: str, count: int, seed: int = 0) -> Path:
    """One webdataset shard of `count` samples: key.jpg, key.txt, key.flac and key.json with the field `color`."""
    draw, samples = np.random.default_rng(seed), []
    for number in range(count):
        color = list(COLORS)[number % 4]
        jpg, flac = io.BytesIO(), io.BytesIO()
        image(color, seed=1000 * seed + number).save(jpg, "JPEG")
        wave = 0.3 * np.sin(2 * np.pi * 220 * (1 + number % 4) * np.arange(8000) / 16_000)
        soundfile.write(flac, wave + draw.normal(0, 0.02, 8000), 16_000, format="FLAC")
        first, second = draw.permutation(["small", "bright", "plain", "shiny"])[:2]
        samples.append(
            {
                "__key__": f"{number:05d}",
                "jpg": jpg.getvalue(),
                "flac": flac.getvalue(),
                "txt": f"a {first} {second} {color} square",
                "json": {"color": color},
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    shards.write(folder / name, samples)
    return folder / name
