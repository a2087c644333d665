"""Pictures: patches on a grid of the picture's own aspect ratio (NaViT, Dehghani et al. 2023), no forced square."""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
import zlib
from dataclasses import dataclass
from random import Random

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from ..errors import SampleError
from ..tokens import Tokens, sequence_of
from . import base

warnings.filterwarnings("ignore", module="PIL")  # once for all threads: what matters becomes SampleError

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # whatever the ending says
LONGEST = 65_535  # pixels a side


@dataclass
class Config:
    patch: int = 16  # pixels a side
    max_tokens: int = 196  # tokens a picture: the grid is the largest of the picture's shape that has no more
    min_crop_scale: float = 1.0  # training: the smallest share of the picture that a random crop keeps; 1 is no crop
    hflip: float = 0.0  # training: the probability of a mirror image
    rotation_degrees: float = 0.0  # training: at most so many degrees either way
    color_jitter: float = 0.0  # training: brightness, contrast and saturation change by at most this share
    max_pixels: int = 50_000_000  # a header that announces more is refused before anything is decoded
    max_bytes: int = 50_000_000  # so is a longer member

    def __post_init__(self):
        if self.patch < 1 or self.max_tokens < 1:
            raise ValueError("patch and max_tokens are at least 1")
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError("min_crop_scale is a share above 0, at most 1")


def _patches(config: Config, pixels: np.ndarray) -> tuple[Tensor, int, int]:
    """(rows * patch, columns * patch, 3) uint8 as (N, patch * patch * 3), rows and columns.

    A patch's row of pixels is moved as one thing, which takes half the time.
    """
    side = config.patch
    strips = np.ascontiguousarray(pixels).reshape(len(pixels), -1).view(f"V{3 * side}")
    rows, columns = len(strips) // side, strips.shape[1]
    patches = np.ascontiguousarray(strips.reshape(rows, side, columns).transpose(0, 2, 1))
    return torch.from_numpy(patches.view(np.uint8).reshape(rows * columns, -1)), rows, columns


def view(config: Config, raw, generator: Random | None = None) -> np.ndarray:
    """The pixels (rows * patch, columns * patch, 3) uint8 of a random part of a picture, without a generator of all.

    The part is drawn first, then a JPEG is decoded at the least scale that this part needs. Raises SampleError.
    """
    jpeg = _jpeg(config, raw)
    if jpeg is None:
        whole = np.asarray(
            decode(config, raw, config.patch * math.sqrt(config.max_tokens / config.min_crop_scale) * 1.5)
        )
        height, width = whole.shape[:2]
    else:
        height, width = jpeg.height, jpeg.width
    draws = None if generator is None else [generator.random() for _ in range(8)]
    part = (0.0, 0.0, height, width) if draws is None else _crop(config, height, width, draws)
    rows, columns = grid(config, *part[2:])
    size = (rows * config.patch, columns * config.patch)
    top, left, high, wide = _covering(part, size)
    if jpeg is not None:
        whole = jpeg.decode(config, size[0] * height / high, size[1] * width / wide, fast=draws is not None)
    down, across = whole.shape[0] / height, whole.shape[1] / width
    upper, lower = _edges(top * down, high * down, whole.shape[0])
    first, last = _edges(left * across, wide * across, whole.shape[1])
    pixels = _resize(whole[upper:lower, first:last], size)
    return pixels if draws is None else _vary(config, pixels, draws)


@functools.lru_cache(maxsize=4096)
def _positions(rows: int, columns: int) -> Tensor:
    """(rows * columns, 3); shared, so that nobody may write to it."""
    position = torch.zeros(rows, columns, 3)
    position[..., 1] = torch.arange(rows)[:, None]
    position[..., 2] = torch.arange(columns)
    return position.flatten(0, 1)


def _covering(part: tuple, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The middle of a part (top, left, height, width) that has the shape of `size`."""
    top, left, height, width = part
    scale = max(size[0] / height, size[1] / width)
    high, wide = size[0] / scale, size[1] / scale
    return top + (height - high) / 2, left + (width - wide) / 2, high, wide


def _edges(start: float, length: float, whole: int) -> tuple[int, int]:
    """The nearest pixels to a span, at least one."""
    first = min(max(round(start), 0), whole - 1)
    return first, max(min(round(start + length), whole), first + 1)


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 to (*size, 3), smoothed where it shrinks."""
    if not pixels.flags.writeable or min(pixels.strides) < 0:  # PyTorch takes neither
        pixels = pixels.copy()
    batch = pixels.reshape(1, *pixels.shape).transpose(0, 3, 1, 2)  # in this order it knows the layout: twice as fast
    found = F.interpolate(torch.from_numpy(batch), size=size, mode="bilinear", antialias=True)
    return found.numpy()[0].transpose(1, 2, 0)


def grid(config: Config, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches for a picture of that shape: as near to its aspect ratio as the limit lets them."""
    rows = min(max(1, math.floor(math.sqrt(config.max_tokens * height / width))), config.max_tokens)
    columns = min(max(1, math.floor(math.sqrt(config.max_tokens * width / height))), config.max_tokens // rows)
    # rounding down both ways wastes up to a row or a column: take one back where it fits and is nearer to the shape
    options = [(r, c) for r in (rows, rows + 1) for c in (columns, columns + 1) if r * c <= config.max_tokens]
    return min(options, key=lambda o: abs(math.log(o[0] / o[1] * width / height)) - 0.5 * math.log(o[0] * o[1]))


@dataclass(frozen=True)
class _Jpeg:
    """The header of a JPEG that the fast decoder reads: the upright picture's size, and what brings it upright."""

    data: bytes
    height: int
    width: int
    turn: int  # the EXIF orientation

    def decode(self, config: Config, height: float, width: float, fast: bool) -> np.ndarray:
        """(H, W, 3) uint8, upright: the whole at 1/1, 1/2, 1/4 or 1/8, the least that gives that size or more.

        Other eighths are slower than the next of these. `fast` errs by a level or two of 255. Raises SampleError.
        """
        part = next((n for n in (8, 4, 2) if self.height >= n * height and self.width >= n * width), 1)
        size = -(-self.height // part), -(-self.width // part)
        least = dict(zip(("min_width", "min_height") if self.turn >= 5 else ("min_height", "min_width"), size))
        try:
            pixels = simplejpeg.decode_jpeg(self.data, fastdct=fast, fastupsample=fast, **least)
        except ValueError as error:  # warnings too: without them a cut file has grey rows
            if re.search(DAMAGE, str(error)):
                raise SampleError("decode", str(error)[:100]) from None
            return np.asarray(decode(config, self.data))
        return UPRIGHT[self.turn](pixels)


DAMAGE = r"remature end|Huffman|instead of RST|data: \d\d+ extraneous bytes before marker 0xd9"
"""What libjpeg says where pixels are missing or wrong. A few spare bytes before the end harm nothing."""


def _jpeg(config: Config, raw) -> _Jpeg | None:
    """The header of a plain JPEG in memory; None for all else, which `decode` reads or refuses. Raises SampleError."""
    if not isinstance(raw, bytes) or raw[:3] != b"\xff\xd8\xff" or len(raw) > config.max_bytes:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(raw)
    except ValueError:
        return None
    if space not in ("YCbCr", "Gray", "RGB"):
        return None
    _check_size(config, width, height)
    turn = _turn(raw)
    return _Jpeg(raw, width, height, turn) if turn >= 5 else _Jpeg(raw, height, width, turn)


def _turn(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 where it has none. Only notes before the pixels are looked at."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] not in (b"\xda", b"\xe1"):
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    if data[place : place + 2] != b"\xff\xe1":
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
            turn = picture.getexif().get(0x0112)
    except Exception:  # a damaged note beside the pixels, which may be fine
        return 1
    return turn if turn in UPRIGHT else 1


UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels.transpose(1, 0, 2)[:, ::-1],
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}
"""What brings an array (H, W, 3) upright, by the EXIF orientation."""


def _check_size(config: Config, width: int, height: int) -> None:
    if width * height > config.max_pixels or max(width, height) > LONGEST:
        raise SampleError("pixel-limit", f"{width} x {height}, the limit is {config.max_pixels}")


def decode(config: Config, raw, side: float = math.inf) -> Image.Image:
    """An upright RGB picture: EXIF orientation applied, transparency over white, 16 bits scaled to 8.

    A JPEG much larger than `side` pixels is decoded at a reduced scale. Raises SampleError.
    """
    if isinstance(raw, Image.Image):
        return _rgb(raw)
    if isinstance(raw, Tensor):
        return _from_tensor(raw)
    try:
        if isinstance(raw, (bytes, bytearray, memoryview)):
            if len(raw) > config.max_bytes:
                raise SampleError("byte-limit", f"{len(raw)} bytes, the limit is {config.max_bytes}")
            _check_png(bytes(raw))
            raw = io.BytesIO(raw)
        with Image.open(raw, formats=FORMATS) as picture:
            _check_size(config, *picture.size)
            if side < math.inf:
                picture.draft("RGB", (math.ceil(side), math.ceil(side)))
            picture.load()
            return _rgb(picture)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        raise SampleError("decode", "no known picture format") from None
    except Image.DecompressionBombError as error:
        raise SampleError("pixel-limit", str(error)[:100]) from None
    except SampleError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on damaged bytes
        raise SampleError("decode", f"{type(error).__name__}: {error}"[:100]) from None


def _check_png(data: bytes) -> None:
    """Raises SampleError where a chunk of pixels does not fit its checksum, which Pillow does not look at."""
    place = 8 if data[:8] == b"\x89PNG\r\n\x1a\n" else len(data)
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4])
        modality = data[place + 4 : place + 8]
        if modality in (b"IHDR", b"PLTE", b"IDAT") and zlib.crc32(data[place + 4 : end]) != int.from_bytes(
            data[end : end + 4]
        ):
            raise SampleError("decode", f"the checksum of a chunk {modality.decode()} is wrong")
        place = end + 4


def _from_tensor(pixels: Tensor) -> Image.Image:
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise SampleError("decode", f"a picture is a tensor (3, H, W), got {tuple(pixels.shape)}")
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
    picture = picture.convert("RGB")
    picture.info.pop("exif", None)  # it is upright now, whoever looks again
    return picture


def _crop(config: Config, height: int, width: int, draws: list[float]) -> tuple[float, float, float, float]:
    """A random part (top, left, height, width) of the picture, of its shape, that keeps at least `min_crop_scale` of it."""
    share = math.sqrt(_between(draws[0], config.min_crop_scale, 1.0))
    high, wide = height * share, width * share
    return draws[1] * (height - high), draws[2] * (width - wide), high, wide


def _between(draw: float, low: float, high: float) -> float:
    return low + (high - low) * draw


def _vary(config: Config, pixels: np.ndarray, draws: list[float]) -> np.ndarray:
    """A random mirror image, turn and change of color of (H, W, 3) pixels, as the config allows them."""
    if draws[3] < config.hflip:
        pixels = pixels[:, ::-1]
    if not config.rotation_degrees and not config.color_jitter:
        return pixels
    from torchvision.transforms.v2 import functional as T

    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if config.rotation_degrees:
        angle = _between(draws[4], -config.rotation_degrees, config.rotation_degrees)
        picture = T.rotate(picture, angle, interpolation=T.InterpolationMode.BILINEAR, fill=[255.0] * 3)
    if config.color_jitter:
        for change, draw in zip((T.adjust_brightness, T.adjust_contrast, T.adjust_saturation), draws[5:], strict=True):
            picture = change(picture, _between(draw, 1 - config.color_jitter, 1 + config.color_jitter))
    return np.asarray(picture)


def unit(content: Tensor) -> Tensor:
    """uint8 pixels as floats of about unit size."""
    return content.float().sub(127.5).div(64.0)


class Embed(nn.Module):
    """patches (N, patch * patch * 3) uint8 -> (N, D)"""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.project = nn.Linear(3 * config.patch**2, width)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, content: Tensor) -> Tensor:
        return self.project(unit(content))


class Predict(nn.Module):
    """Mean squared error a patch, each patch normalized to zero mean and unit variance (MAE, He et al. 2022): (M,)."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.pixels = nn.Linear(width, 3 * config.patch**2)
        nn.init.normal_(self.pixels.weight, std=0.02)
        nn.init.zeros_(self.pixels.bias)

    def forward(self, vectors: Tensor, content: Tensor) -> Tensor:
        target = unit(content)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-2).sqrt()
        return (self.pixels(vectors).float() - target).square().mean(-1)


class Tokenizer(base.Tokenizer):
    Config, extensions = Config, EXTENSIONS

    def read(self, raw, generator: Random | None = None) -> list[Tokens]:
        """One sequence of patches in rows, content (N, patch * patch * 3) uint8, position (0, row, column).

        raw: the sample's members, a path, bytes, a PIL picture, or a tensor (3, H, W) of uint8 or of floats in [0, 1].
        Raises SampleError.
        """
        if isinstance(raw, dict):
            ending = next(filter(raw.__contains__, EXTENSIONS), None)
            if ending is None:
                return []
            raw = raw[ending]
        content, rows, columns = _patches(self.config, view(self.config, raw, generator))
        return [sequence_of(content, _positions(rows, columns))]

    def measure(self, data: bytes, length: int) -> tuple[int, int]:
        """Width and height in pixels, from the header."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                return picture.size

    def describe(self, raw: dict) -> dict | None:
        """Decodes the whole picture: its upright width and height, and its mode in the file. Raises SampleError."""
        data = next((raw[e] for e in EXTENSIONS if e in raw), None)
        if data is None:
            return None
        view(self.config, data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            try:
                turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            except Exception:  # a damaged note beside the pixels, which are fine
                turned = False
            width, height = picture.size[::-1] if turned else picture.size
            return {"width": width, "height": height, "mode": picture.mode}

    def count_tokens(self, length, width, height) -> np.ndarray:
        """Patches (N,) of pictures of these sizes; `max_tokens` where a size is not known."""
        sizes, which = np.unique(np.stack([height, width], 1), axis=0, return_inverse=True)
        patches = [
            math.prod(grid(self.config, int(h), int(w))) if h and w else self.config.max_tokens for h, w in sizes
        ]
        return np.array(patches, dtype=np.int64)[which.ravel()]

    def toy(self) -> Tokenizer:
        return self.replace(max_tokens=min(self.config.max_tokens, 32))

    def embedder(self, width: int) -> nn.Module:
        return Embed(self.config, width)

    def predictor(self, width: int) -> nn.Module:
        return Predict(self.config, width)
