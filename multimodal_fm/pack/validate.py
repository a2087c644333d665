"""Checks that a sample's members can be read as training would read them, and converts images and audio where asked."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from ..corpus.fields import parse
from ..errors import SampleError
from ..tokenizers import audio, image, text
from . import dedup
from .samples import modality_of
from .settings import Settings

BLOCK = 1 << 18  # audio samples decoded at a time
MAX_LEVEL = 1e15  # of audio stored as floats: beyond it the spectrum overflows
IMAGE, AUDIO, TEXT = image.Tokenizer(), audio.Tokenizer(), text.Tokenizer()


def check_sample(settings: Settings, members: dict[str, bytes]) -> tuple[dict[str, bytes], dict]:
    """The members that are whole, converted where asked, and what was found: `failed`, pairs of a modality and an
    error, and with near dedup the `phash` and `colors` of each image that is large enough."""
    kept, record = {}, {"failed": []}
    for extension, data in members.items():
        modality = modality_of(extension)
        try:
            if modality == "image":
                extension, data = convert_image(settings, extension, data, record)
            elif modality == "audio":
                extension, data = convert_audio(settings, extension, data)
            elif extension == "txt":
                _check_text(data)
            elif extension == "json":
                parse(data)
            kept[extension] = data
        except SampleError as error:
            record["failed"].append((modality, error))
    if "json" in kept and "txt" not in kept:
        try:
            TEXT.split_inputs({"json": kept["json"]})
        except SampleError as error:  # a caption that is blank
            record["failed"].append(("text", error))
    return kept, record


def _check_text(data: bytes) -> None:
    try:
        if not data.decode("utf-8-sig").strip():
            raise SampleError("empty", "no text in it")
    except UnicodeDecodeError as error:
        raise SampleError("text-decode", f"not UTF-8 at byte {error.start}") from None


def convert_image(settings: Settings, extension: str, data: bytes, record: dict) -> tuple[str, bytes]:
    """The image's extension and bytes. Formats that training does not read become PNG. Raises SampleError."""
    if not data:
        raise SampleError("empty", "no bytes")
    size: Any = IMAGE.describe({"jpg": data})  # the tokenizer goes by the bytes, not by the extension
    width, height, limit = size["width"], size["height"], settings.longest_side
    hashed = settings.dedup == "near" and min(width, height) >= dedup.MIN_SIDE
    if (limit and max(width, height) > limit) or extension not in IMAGE.extensions or hashed:
        pixels = Image.fromarray(IMAGE.decode_picture(data))
        if limit and max(pixels.size) > limit:
            scale = limit / max(pixels.size)
            pixels = pixels.resize([max(1, round(n * scale)) for n in pixels.size], Image.Resampling.LANCZOS)
            extension, data = "jpg", _encode(pixels, "JPEG", quality=95)
        elif extension not in IMAGE.extensions:
            extension, data = "png", _encode(pixels, "PNG")
        if hashed and min(pixels.size) >= dedup.MIN_SIDE:
            record.setdefault("phash", []).append(dedup.perceptual_hash(pixels))
            record.setdefault("colors", []).append(dedup.mean_colors(pixels))
    return extension, data


def _encode(pixels: Image.Image, file_format: str, **options) -> bytes:
    data = io.BytesIO()
    pixels.save(data, file_format, **options)
    return data.getvalue()


def convert_audio(settings: Settings, extension: str, data: bytes) -> tuple[str, bytes]:
    """The audio's extension and bytes; all of it is decoded, a block at a time. Raises SampleError."""
    if not data:
        raise SampleError("empty", "no bytes")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            AUDIO.check_header(file.samplerate, file.frames)
            same = (file.format, file.subtype, file.samplerate, file.channels) == ("FLAC", "PCM_16", settings.rate, 1)
            if (settings.rate and not same) or extension not in AUDIO.extensions:
                return "flac", _encode_flac(file, settings.rate or file.samplerate, mono=bool(settings.rate))
            for _ in _blocks(file):
                pass
    except (soundfile.LibsndfileError, TypeError, ValueError, RuntimeError) as error:
        raise SampleError("decode", str(error)[:100]) from None
    return extension, data


def _blocks(file: soundfile.SoundFile):
    """Blocks (T, C) of float32 until the end. Raises SampleError for NaN, infinity, fewer samples than announced."""
    read = 0
    while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
        if not np.abs(block).max() <= MAX_LEVEL:
            raise SampleError("not-finite", "NaN, infinity or a number near it among the samples")
        read += len(block)
        yield block
    if read < 0.99 * file.frames - 5000:  # the header of an MP3 may be a few frames off
        raise SampleError("decode", f"the header announces {file.frames} samples, {read} are there")


def _encode_flac(file: soundfile.SoundFile, rate: int, mono: bool) -> bytes:
    """FLAC of 16 bits at `rate`; with `mono` the mean of the channels. Works in blocks, whatever the length."""
    data = io.BytesIO()
    channels = 1 if mono else min(file.channels, 8)
    blocks = (b.mean(1, keepdims=True) if mono else b[:, :channels] for b in _blocks(file))
    with soundfile.SoundFile(data, "w", rate, channels, "PCM_16", format="FLAC") as output:
        for block in resample_blocks(blocks, file.samplerate, rate):
            output.write(np.clip(block, -1, 1))
    return data.getvalue()


def resample_blocks(blocks: Iterable[np.ndarray], rate: int, to: int) -> Iterator[np.ndarray]:
    """Resample blocks (T, C) as if they were one: each is resampled together with what surrounds it."""
    if rate == to:
        yield from blocks
        return
    rate = audio.round_rate(rate, to)
    step, out = rate // math.gcd(rate, to), to // math.gcd(rate, to)
    margin = -(-(16 * max(rate // to, 1) + 16) // step) * step  # more than half of the filter, in whole steps
    held, skip = np.zeros((0, 0), np.float32), 0

    def resample(wave: np.ndarray) -> np.ndarray:
        channels = torch.from_numpy(np.ascontiguousarray(wave.T))
        return np.stack([audio.resample(channel, rate, to).numpy() for channel in channels], 1)

    for block in blocks:
        held = block if not held.size else np.concatenate([held, block])
        usable = (len(held) - margin) // step * step
        if usable > margin:
            yield resample(held[: usable + margin])[skip : usable // step * out]
            held, skip = held[usable - margin :], margin // step * out
    if held.size:
        yield resample(held)[skip:]
