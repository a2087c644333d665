"""Pictures as patches on a grid of the picture's own aspect ratio (NaViT, Dehghani et al. 2023), not a square."""

from __future__ import annotations

import functools
import io
import math
import os
import re
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from ..errors import SampleError
from ..tokens import Tokens, make_sequence
from . import base

warnings.filterwarnings("ignore", module="PIL")  # once for all threads: what matters becomes a SampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # accepted whatever the file's ending says
MAX_SIDE = 65_535  # pixels
ORIENTATION = 0x0112  # the EXIF tag


@dataclass
class Config:
    patch: int = 16  # pixels a side
    max_tokens: int = 196  # patches a picture; a larger picture is scaled down to the largest grid that has no more
    enlarge: bool = False  # scale smaller pictures up to that grid too; otherwise they keep their own size
    square: bool = False  # squeeze every picture into as many rows as columns (ViT) instead of keeping its aspect ratio
    min_crop_scale: float = 1.0  # training: the smallest share of the area that a random crop keeps; 1: no crop
    hflip: float = 0.0  # training: the probability of a horizontal flip
    rotation_degrees: float = 0.0  # training: rotated by an angle from minus this to plus this
    color_jitter: float = 0.0  # training: brightness, contrast and saturation are scaled by 1 minus this to 1 plus this
    rand_augment: int = (
        0  # training: magnitude, up to 30, of two operations of RandAugment (Cubuk et al. 2020); 0: none
    )
    max_pixels: int = 50_000_000  # a picture whose header announces more is refused before it is decoded
    max_bytes: int = 50_000_000  # so is a longer file

    def __post_init__(self):
        if self.patch < 1 or self.max_tokens < 1:
            raise ValueError("patch and max_tokens are at least 1")
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError("min_crop_scale is a share above 0, at most 1")
        if not 0 <= self.hflip <= 1 or not 0 <= self.color_jitter <= 1 or not 0 <= self.rotation_degrees <= 180:
            raise ValueError("hflip and color_jitter are from 0 to 1, rotation_degrees from 0 to 180")
        if not 0 <= self.rand_augment <= 30:
            raise ValueError("rand_augment is from 0 to 30")


class Tokenizer(base.Tokenizer):
    """Pictures <-> uint8 patches."""

    Config, extensions = Config, ("jpg", "jpeg", "png", "webp")
    augmentations = ("min_crop_scale", "hflip", "rotation_degrees", "color_jitter", "rand_augment")

    def read(self, raw, generator: Random | None = None) -> list[Tokens]:
        """One sequence of patches, row by row: content (N, patch * patch * 3) uint8, position (0, row, column).

        `raw` is the sample's members by ending, a path, bytes, a PIL picture, a tensor (3, H, W) or a NumPy array
        (H, W, 3); tensors and arrays hold uint8 or floats in [0, 1]. Raises SampleError.
        """
        if isinstance(raw, dict):
            ending = next(filter(raw.__contains__, self.extensions), None)
            if ending is None:
                return []
            raw = raw[ending]
        content, rows, columns = _patchify(self.view(raw, generator), self.config.patch)
        return [make_sequence(content, _positions(rows, columns))]

    def view(self, raw, generator: Random | None = None) -> np.ndarray:
        """The pixels (rows * patch, columns * patch, 3) uint8 that are cut into patches.

        Without a generator the whole picture is squeezed into its grid; with one, a random crop of it, augmented. The
        crop is drawn first, so that a JPEG is decoded at the smallest scale that the crop needs. Raises SampleError.
        """
        config, raw = self.config, self._open(raw)
        jpeg = self._parse_jpeg(raw)
        if jpeg is None:
            side = 1.5 * config.patch * math.sqrt(config.max_tokens / config.min_crop_scale)
            whole = self._decode_with_pillow(raw, side)
            height, width = whole.shape[:2]
        else:
            height, width = jpeg.height, jpeg.width
        draws = None if generator is None else [generator.random() for _ in range(8)]
        scale = 1.0 if draws is None else math.sqrt(_between(draws[0], config.min_crop_scale, 1.0))
        crop_height, crop_width = height * scale, width * scale
        top, left = (
            (0.0, 0.0) if draws is None else (draws[1] * (height - crop_height), draws[2] * (width - crop_width))
        )
        rows, columns = self.grid(crop_height, crop_width)
        size = rows * config.patch, columns * config.patch
        if jpeg is not None:
            whole = self._decode_jpeg(jpeg, size[0] / scale, size[1] / scale, fast=draws is not None)
        vertical, horizontal = whole.shape[0] / height, whole.shape[1] / width  # of the reduced JPEG
        first_row, last_row = _pixel_span(top * vertical, crop_height * vertical, whole.shape[0])
        first_column, last_column = _pixel_span(left * horizontal, crop_width * horizontal, whole.shape[1])
        pixels = _resize(whole[first_row:last_row, first_column:last_column], size)
        if generator is None or draws is None:
            return pixels
        pixels = self._augment(pixels, draws[3:])
        return _rand_augment(pixels, config.rand_augment, generator.getrandbits(63)) if config.rand_augment else pixels

    def grid(self, height: float, width: float) -> tuple[int, int]:
        """Rows and columns of patches for a picture (or crop) of that many pixels.

        A picture of at most `max_tokens` patches keeps its size, rounded to whole patches (unless `enlarge`); a larger
        one gets the grid of at most `max_tokens` that is nearest to its aspect ratio. With `square` the grid has as
        many rows as columns.
        """
        limit, patch, ratio = self.config.max_tokens, self.config.patch, width / height
        if self.config.square:
            own = limit if self.config.enlarge else max(1, round(math.sqrt(width * height) / patch)) ** 2
            side = math.isqrt(min(limit, own))
            return side, side
        if not self.config.enlarge:
            rows, columns = max(1, round(height / patch)), max(1, round(width / patch))
            if rows * columns <= limit:
                return rows, columns
        rows = min(max(1, math.floor(math.sqrt(limit / ratio))), limit)
        columns = min(max(1, math.floor(math.sqrt(limit * ratio))), limit // rows)
        # Rounding both down wastes up to a row or a column: take one back where it fits and is nearer to the ratio.
        options = [(r, c) for r in (rows, rows + 1) for c in (columns, columns + 1) if r * c <= limit]
        return min(options, key=lambda o: abs(math.log(o[0] / o[1] * ratio)) - 0.5 * math.log(o[0] * o[1]))

    def decode_picture(self, raw) -> np.ndarray:
        """The whole picture, upright, (H, W, 3) uint8; it is refused wherever `read` would. Raises SampleError.

        EXIF orientation is applied, transparency becomes white, 16 bits become 8.
        """
        raw = self._open(raw)
        jpeg = self._parse_jpeg(raw)
        if jpeg is None:
            return self._decode_with_pillow(raw)
        return self._decode_jpeg(jpeg, jpeg.height, jpeg.width, fast=False)

    def _open(self, raw):
        """A file's bytes, so that a path is read as the same bytes of a shard are; anything else as it is."""
        if not isinstance(raw, (str, Path)):
            return raw
        if (size := os.path.getsize(raw)) > self.config.max_bytes:
            raise SampleError("byte-limit", f"{size} bytes, the limit is {self.config.max_bytes}")
        return Path(raw).read_bytes()

    def _parse_jpeg(self, raw) -> _Jpeg | None:
        """The header of a plain JPEG in memory; None for all else, which is left to Pillow. Raises SampleError."""
        if not isinstance(raw, bytes) or raw[:3] != b"\xff\xd8\xff" or len(raw) > self.config.max_bytes:
            return None
        try:
            height, width, color_space, _ = simplejpeg.decode_jpeg_header(raw)
        except ValueError:
            return None
        if color_space not in ("YCbCr", "Gray", "RGB"):
            return None
        height, width = int(height), int(width)
        self._check_size(width, height)
        orientation = _jpeg_orientation(raw)
        height, width = (width, height) if orientation >= 5 else (height, width)
        return _Jpeg(raw, height, width, orientation)

    def _decode_jpeg(self, jpeg: _Jpeg, height: float, width: float, fast: bool) -> np.ndarray:
        """(H, W, 3) uint8, upright, at 1/1, 1/2, 1/4 or 1/8 of its size: the smallest that is at least height x width.

        libjpeg scales by other eighths too, but slower than by the next of these. `fast` differs by a level or two of
        255. Raises SampleError.
        """
        divisor = next((n for n in (8, 4, 2) if jpeg.height >= n * height and jpeg.width >= n * width), 1)
        size = -(-jpeg.height // divisor), -(-jpeg.width // divisor)
        names = ("min_width", "min_height") if jpeg.orientation >= 5 else ("min_height", "min_width")
        try:
            pixels = simplejpeg.decode_jpeg(jpeg.data, fastdct=fast, fastupsample=fast, **dict(zip(names, size)))
        except ValueError as error:  # simplejpeg raises warnings too, which a truncated file's grey rows are
            if re.search(JPEG_DAMAGE, str(error)):
                raise SampleError("decode", str(error)[:100]) from None
            return self._decode_with_pillow(jpeg.data)
        return UPRIGHT[jpeg.orientation](pixels)

    def _decode_with_pillow(self, raw, side: float = math.inf) -> np.ndarray:
        """(H, W, 3) uint8, upright. A JPEG much larger than `side` pixels is decoded at a reduced scale.

        Raises SampleError.
        """
        if isinstance(raw, (Tensor, np.ndarray)):
            return _to_uint8(raw)
        try:
            if isinstance(raw, Image.Image):
                return _to_rgb(raw)
            if isinstance(raw, (bytes, bytearray, memoryview)):
                if len(raw) > self.config.max_bytes:
                    raise SampleError("byte-limit", f"{len(raw)} bytes, the limit is {self.config.max_bytes}")
                _check_png(bytes(raw))
                raw = io.BytesIO(raw)
            with Image.open(raw, formats=FORMATS) as picture:
                self._check_size(*picture.size)
                if side < math.inf:
                    picture.draft("RGB", (math.ceil(side), math.ceil(side)))
                picture.load()
                return _to_rgb(picture)
        except (FileNotFoundError, SampleError):
            raise
        except UnidentifiedImageError:
            raise SampleError("decode", "no known picture format") from None
        except Image.DecompressionBombError as error:
            raise SampleError("pixel-limit", str(error)[:100]) from None
        except Exception as error:  # Pillow's readers raise nearly anything on damaged bytes
            raise SampleError("decode", f"{type(error).__name__}: {error}"[:100]) from None

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.config.max_pixels or max(width, height) > MAX_SIDE:
            raise SampleError("pixel-limit", f"{width} x {height}, the limit is {self.config.max_pixels}")

    def _augment(self, pixels: np.ndarray, draws: list[float]) -> np.ndarray:
        """A random flip, rotation and change of color of (H, W, 3) pixels; `draws` are five numbers in [0, 1)."""
        config = self.config
        if draws[0] < config.hflip:
            pixels = pixels[:, ::-1]
        if not config.rotation_degrees and not config.color_jitter:
            return pixels
        from torchvision.transforms.v2 import functional as T

        picture: Any = Image.fromarray(np.ascontiguousarray(pixels))
        if config.rotation_degrees:
            angle = _between(draws[1], -config.rotation_degrees, config.rotation_degrees)
            picture = T.rotate(picture, angle, interpolation=T.InterpolationMode.BILINEAR, fill=[255.0] * 3)
        if config.color_jitter:
            for adjust, draw in zip((T.adjust_brightness, T.adjust_contrast, T.adjust_saturation), draws[2:]):
                picture = adjust(picture, _between(draw, 1 - config.color_jitter, 1 + config.color_jitter))
        return np.asarray(picture)

    def measure(self, data: bytes, length: int) -> tuple[int, int]:
        """Width and height in pixels, from the header."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                return picture.size

    def count_tokens(self, length, width, height) -> np.ndarray:
        """Patches (N,) of whole pictures of these sizes; `max_tokens` where a size is not known (0)."""
        sizes, which = np.unique(np.stack([height, width], 1), axis=0, return_inverse=True)
        patches = [math.prod(self.grid(h, w)) if h and w else self.config.max_tokens for h, w in sizes.tolist()]
        return np.array(patches, dtype=np.int64)[which.ravel()]

    def extent(self) -> tuple[int, int, int]:
        side = math.isqrt(self.config.max_tokens) if self.config.square else self.config.max_tokens
        return 1, side, side

    def describe(self, raw: dict) -> dict | None:
        """Upright width and height, and the file's mode, after all of it has been decoded. Raises SampleError."""
        data = next((raw[ending] for ending in self.extensions if ending in raw), None)
        if data is None:
            return None
        self.view(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size if _orientation(picture) < 5 else picture.size[::-1]
            return {"width": width, "height": height, "mode": picture.mode}

    def toy(self) -> Tokenizer:
        return self.replace(max_tokens=min(self.config.max_tokens, 32))

    def embedder(self, width: int) -> nn.Module:
        return Embed(self.config.patch, width)

    def predictor(self, width: int) -> nn.Module:
        return Predict(self.config.patch, width)

    def reconstructor(self, width: int) -> base.Reconstructor:
        return Reconstruct(self.config.patch, width)

    def render(self, content: Tensor, position: Tensor) -> Image.Image:
        """The picture of patches (N, patch * patch * 3) uint8 that fill a grid, in any order."""
        patch, (rows, columns) = self.config.patch, (position[:, 1:].max(0).values.long() + 1).tolist()
        grid = torch.zeros(rows, columns, patch, patch, 3, dtype=torch.uint8)
        row, column = position[:, 1:].long().unbind(1)
        grid[row, column] = content.cpu().unflatten(1, (patch, patch, 3))
        return Image.fromarray(grid.transpose(1, 2).reshape(rows * patch, columns * patch, 3).numpy())


@dataclass(frozen=True)
class _Jpeg:
    """A JPEG that simplejpeg decodes: its bytes, the size of the upright picture, and the EXIF orientation."""

    data: bytes
    height: int
    width: int
    orientation: int


JPEG_DAMAGE = r"remature end|Huffman|instead of RST|data: \d\d+ extraneous bytes before marker 0xd9"
"""What libjpeg says where pixels are missing or wrong. A few spare bytes before the end harm nothing."""

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
"""Turns an array (H, W, 3) upright, by EXIF orientation."""


def _jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG. Pillow is asked only where there is an EXIF segment before the pixels."""
    offset = 2
    while data[offset : offset + 1] == b"\xff" and data[offset + 1 : offset + 2] not in (b"\xda", b"\xe1"):
        fill = data[offset + 1 : offset + 2] == b"\xff"  # any number of which may come before a marker
        offset += 1 if fill else 2 + int.from_bytes(data[offset + 2 : offset + 4])
    if data[offset : offset + 2] != b"\xff\xe1":
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
            return _orientation(picture)
    except Exception:  # a damaged segment beside the pixels, which may be whole
        return 1


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, from 1 to 8; 1 where there is none or its segment is damaged."""
    try:
        orientation = picture.getexif().get(ORIENTATION)
    except Exception:
        return 1
    return orientation if orientation in UPRIGHT else 1


def _check_png(data: bytes) -> None:
    """Raises SampleError where a chunk does not fit its checksum, which Pillow does not verify."""
    offset = 8 if data[:8] == b"\x89PNG\r\n\x1a\n" else len(data)
    while offset + 12 <= len(data):
        end = offset + 8 + int.from_bytes(data[offset : offset + 4])
        chunk = data[offset + 4 : offset + 8]
        checksum = int.from_bytes(data[end : end + 4])
        if chunk in (b"IHDR", b"PLTE", b"IDAT") and zlib.crc32(data[offset + 4 : end]) != checksum:
            raise SampleError("decode", f"the checksum of a chunk {chunk.decode()} is wrong")
        offset = end + 4


def _to_uint8(given: Tensor | np.ndarray) -> np.ndarray:
    """A tensor (3, H, W) or an array (H, W, 3) of uint8, or of floats in [0, 1], as (H, W, 3) uint8."""
    shape, layout = tuple(given.shape), "(3, H, W)" if isinstance(given, Tensor) else "(H, W, 3)"
    pixels: Any = given
    if isinstance(given, Tensor) and given.ndim == 3:
        pixels = given.detach().cpu().permute(1, 2, 0).numpy()
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise SampleError("decode", f"a picture is a {layout} tensor or array, got {shape}")
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating):
        raise SampleError("decode", f"a picture's values are uint8 or floats in [0, 1], not {pixels.dtype}")
    if not np.isfinite(pixels).all():
        raise SampleError("not-finite", "NaN or infinity among the pixels")
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def _to_rgb(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, upright, over white where it is transparent."""
    orientation = _orientation(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        top = 65535.0 if picture.mode.startswith("I") else max(values.max(initial=0), 1e-9)
        picture = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return UPRIGHT[orientation](np.asarray(picture.convert("RGB")))


def _between(draw: float, low: float, high: float) -> float:
    return low + (high - low) * draw


def _pixel_span(start: float, length: float, size: int) -> tuple[int, int]:
    """The first pixel and the one behind the last, of `size`, that are nearest to a span; at least one pixel."""
    first = min(max(round(start), 0), size - 1)
    return first, max(min(round(start + length), size), first + 1)


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 to (*size, 3), bilinear, antialiased."""
    if not pixels.flags.writeable or min(pixels.strides) < 0:  # PyTorch takes neither
        pixels = pixels.copy()
    batch = pixels.reshape(1, *pixels.shape).transpose(0, 3, 1, 2)  # recognized as channels-last: twice as fast
    resized = F.interpolate(torch.from_numpy(batch), size=size, mode="bilinear", antialias=True)
    return resized.numpy()[0].transpose(1, 2, 0)


def _patchify(pixels: np.ndarray, patch: int) -> tuple[Tensor, int, int]:
    """(rows * patch, columns * patch, 3) uint8 as (N, patch * patch * 3), with rows and columns.

    One row of a patch's pixels is moved as one element, which takes half the time.
    """
    strips = np.ascontiguousarray(pixels).reshape(len(pixels), -1).view(f"V{3 * patch}")
    rows, columns = len(strips) // patch, strips.shape[1]
    patches = np.ascontiguousarray(strips.reshape(rows, patch, columns).transpose(0, 2, 1))
    return torch.from_numpy(patches.view(np.uint8).reshape(rows * columns, -1)), rows, columns


def _rand_augment(pixels: np.ndarray, magnitude: int, seed: int) -> np.ndarray:
    """(H, W, 3) pixels after two operations that the seed chooses; torch's own random state is left as it was."""
    from torchvision.transforms.v2 import RandAugment

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        augment = RandAugment(num_ops=2, magnitude=magnitude, fill=255)
        return augment(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)).permute(1, 2, 0).numpy()


@functools.lru_cache(maxsize=4096)
def _positions(rows: int, columns: int) -> Tensor:
    """(rows * columns, 3). It is cached and shared: do not write to it."""
    position = torch.zeros(rows, columns, 3)
    position[..., 1] = torch.arange(rows)[:, None]
    position[..., 2] = torch.arange(columns)
    return position.flatten(0, 1)


def _normalize(content: Tensor) -> Tensor:
    """uint8 pixels as floats from -2 to 2."""
    return content.float().sub(127.5).div(64.0)


class Embed(nn.Module):
    """Patches (N, patch * patch * 3) uint8 -> (N, D)."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.project = nn.Linear(3 * patch**2, width)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, content: Tensor) -> Tensor:
        return self.project(_normalize(content))


class Predict(nn.Module):
    """Mean squared error (M,) of each patch, normalized to zero mean and unit variance (MAE, He et al. 2022)."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.pixels = nn.Linear(width, 3 * patch**2)
        nn.init.normal_(self.pixels.weight, std=0.02)
        nn.init.zeros_(self.pixels.bias)

    def forward(self, vectors: Tensor, content: Tensor) -> Tensor:
        target = _normalize(content)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-2).sqrt()
        return (self.pixels(vectors).float() - target).square().mean(-1)


class Reconstruct(base.Reconstructor):
    """Vectors (M, D) -> pixels (M, patch * patch * 3), as floats from -2 to 2."""

    quality = "psnr"

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.pixels = nn.Linear(width, 3 * patch**2)
        nn.init.normal_(self.pixels.weight, std=0.02)
        nn.init.zeros_(self.pixels.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.pixels(vectors).float()

    def target(self, content: Tensor) -> Tensor:
        return _normalize(content)

    def content(self, values: Tensor) -> Tensor:
        return values.mul(64.0).add(127.5).round().clamp(0, 255).to(torch.uint8)

    def decibels(self, error: Tensor, energy: Tensor) -> Tensor:
        """The peak signal-to-noise ratio: the peak is the whole range of a pixel."""
        return super().decibels(error, torch.full_like(error, (255 / 64) ** 2))
