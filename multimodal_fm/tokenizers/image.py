"""Pictures: patches on a grid of the picture's own aspect ratio (NaViT, Dehghani et al. 2023), no forced square."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from ..errors import Lost
from ..tokens import Tokens, sequence_of

extensions = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # whatever the ending says
LONGEST = 65_535  # pixels a side


@dataclass
class Config:
    patch: int = 16  # pixels a side
    limit: int = 196  # tokens a picture: the grid is the largest of the picture's shape that has no more
    area: float = 1.0  # training: the smallest share of the picture that a random crop keeps; 1 is no crop
    flip: float = 0.0  # training: the probability of a mirror image
    rotate: float = 0.0  # training: at most so many degrees either way
    colour: float = 0.0  # training: brightness, contrast and saturation change by at most this share
    pixels: int = 50_000_000  # a header that announces more is refused before anything is decoded
    bytes: int = 50_000_000  # so is a longer member

    def __post_init__(self):
        if self.patch < 1 or self.limit < 1:
            raise ValueError("patch and limit are at least 1")
        if not 0 < self.area <= 1:
            raise ValueError("area is a share above 0, at most 1")


def read(config: Config, raw, generator: torch.Generator | None = None) -> list[Tokens]:
    """One sequence of patches in rows, content (N, 3 * patch * patch) uint8, position (0, row, column).

    raw: the item's members, a path, bytes, a PIL picture, or a tensor (3, H, W) of uint8 or of floats in [0, 1].
    Raises Lost.
    """
    from torchvision.transforms.v2 import functional as T

    raw = next((raw[e] for e in extensions if e in raw), None) if isinstance(raw, dict) else raw
    if raw is None:
        return []
    side = config.patch * math.sqrt(config.limit)
    picture = decode(config, raw, side / math.sqrt(config.area) * 1.5)
    if generator is not None and config.area < 1:
        picture = _crop(config, picture, generator)
    rows, columns = grid(config, picture.height, picture.width)
    height, width = rows * config.patch, columns * config.patch
    scale = max(height / picture.height, width / picture.width)  # cover the grid, then cut what hangs over
    size = [max(height, round(picture.height * scale)), max(width, round(picture.width * scale))]
    picture = T.center_crop(T.resize(picture, size), [height, width])
    if generator is not None:
        picture = _vary(config, picture, generator)
    pixels = torch.from_numpy(np.array(picture))  # (height, width, 3)
    patches = pixels.unflatten(0, (rows, config.patch)).unflatten(2, (columns, config.patch))
    content = patches.permute(0, 2, 4, 1, 3).flatten(2).flatten(0, 1)  # (rows * columns, 3 * patch * patch)
    position = torch.zeros(rows * columns, 3)
    position[:, 1] = torch.arange(rows).repeat_interleave(columns)
    position[:, 2] = torch.arange(columns).repeat(rows)
    return [sequence_of(content.contiguous(), position)]


def grid(config: Config, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches for a picture of that shape: as near to its aspect ratio as the limit lets them."""
    rows = min(max(1, math.floor(math.sqrt(config.limit * height / width))), config.limit)
    columns = min(max(1, math.floor(math.sqrt(config.limit * width / height))), config.limit // rows)
    # rounding down both ways wastes up to a row or a column: take one back where it fits and is nearer to the shape
    options = [(r, c) for r in (rows, rows + 1) for c in (columns, columns + 1) if r * c <= config.limit]
    return min(options, key=lambda o: abs(math.log(o[0] / o[1] * width / height)) - 0.5 * math.log(o[0] * o[1]))


def decode(config: Config, raw, side: float = math.inf) -> Image.Image:
    """An upright RGB picture: EXIF orientation applied, transparency over white, 16 bits scaled to 8.

    A JPEG much larger than `side` pixels is decoded at a reduced scale. Raises Lost.
    """
    if isinstance(raw, Image.Image):
        return _rgb(raw)
    if isinstance(raw, Tensor):
        return _from_tensor(raw)
    try:
        if isinstance(raw, (bytes, bytearray, memoryview)):
            if len(raw) > config.bytes:
                raise Lost("byte-limit", f"{len(raw)} bytes, the limit is {config.bytes}")
            raw = io.BytesIO(raw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(raw, formats=FORMATS) as picture:
                if picture.width * picture.height > config.pixels or max(picture.size) > LONGEST:
                    raise Lost("pixel-limit", f"{picture.width} x {picture.height}, the limit is {config.pixels}")
                if side < math.inf:
                    picture.draft("RGB", (math.ceil(side), math.ceil(side)))
                picture.load()
                return _rgb(picture)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        raise Lost("decode", "no known picture format") from None
    except Image.DecompressionBombError as error:
        raise Lost("pixel-limit", str(error)[:100]) from None
    except Lost:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on damaged bytes
        raise Lost("decode", f"{type(error).__name__}: {error}"[:100]) from None


def _from_tensor(pixels: Tensor) -> Image.Image:
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise Lost("decode", f"a picture is a tensor (3, H, W), got {tuple(pixels.shape)}")
    if pixels.is_floating_point():
        pixels = pixels.clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


Turn = Image.Transpose
TURNS = {
    2: Turn.FLIP_LEFT_RIGHT,
    3: Turn.ROTATE_180,
    4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE,
    6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE,
    8: Turn.ROTATE_90,
}
"""What brings a picture upright, by the EXIF orientation."""


def _rgb(picture: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(picture.getexif().get(0x0112))
    except Exception:  # a damaged note beside the pixels, which may be fine
        turn = None
    picture = picture if turn is None else picture.transpose(turn)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        top = 65535.0 if picture.mode.startswith("I") else max(values.max(initial=0), 1e-9)
        picture = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _draw(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _crop(config: Config, picture: Image.Image, generator: torch.Generator) -> Image.Image:
    """A random part of the picture, of its shape, that keeps at least `area` of it."""
    share = math.sqrt(_draw(generator, config.area, 1.0))
    width, height = (max(1, round(n * share)) for n in picture.size)
    left = round(_draw(generator, 0, picture.width - width))
    top = round(_draw(generator, 0, picture.height - height))
    return picture.crop((left, top, left + width, top + height))


def _vary(config: Config, picture: Image.Image, generator: torch.Generator) -> Image.Image:
    """A random mirror image, turn and change of colour, as the config allows them."""
    from torchvision.transforms.v2 import functional as T

    if config.flip and _draw(generator, 0, 1) < config.flip:
        picture = T.horizontal_flip(picture)
    if config.rotate:
        angle = _draw(generator, -config.rotate, config.rotate)
        picture = T.rotate(picture, angle, interpolation=T.InterpolationMode.BILINEAR, fill=[255.0] * 3)
    if config.colour:
        for change in (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation):
            picture = change(picture, _draw(generator, 1 - config.colour, 1 + config.colour))
    return picture


def unit(content: Tensor) -> Tensor:
    """uint8 pixels as floats of about unit size."""
    return content.float().sub(127.5).div(64.0)


class Embed(nn.Module):
    """patches (N, 3 * patch * patch) uint8 -> (N, D)"""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.project = nn.Linear(3 * config.patch**2, width)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, content: Tensor) -> Tensor:
        return self.project(unit(content))


class Predict(nn.Module):
    """Mean squared error a patch, each patch normalised to zero mean and unit variance (MAE, He et al. 2022): (M,)."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.pixels = nn.Linear(width, 3 * config.patch**2)
        nn.init.normal_(self.pixels.weight, std=0.02)
        nn.init.zeros_(self.pixels.bias)

    def forward(self, vectors: Tensor, content: Tensor) -> Tensor:
        target = unit(content)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-2).sqrt()
        return (self.pixels(vectors).float() - target).square().mean(-1)


def measure(data: bytes, length: int) -> tuple[int, int]:
    """Width and height in pixels, from the header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return picture.size


def count(config: Config, length, width, height) -> np.ndarray:
    """Patches (N,) of pictures of these sizes; `limit` where a size is not known."""
    sizes, which = np.unique(np.stack([height, width], 1), axis=0, return_inverse=True)
    patches = [math.prod(grid(config, int(h), int(w))) if h and w else config.limit for h, w in sizes]
    return np.array(patches, dtype=np.int64)[which.ravel()]
