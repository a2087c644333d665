"""The parts of a sample: read in full as training would, measured, and made smaller where that is asked for."""

from __future__ import annotations

import functools
import io
import math

import numpy as np
import soundfile
import torch
import torchaudio
from PIL import Image

from ..corpus.fields import parse
from ..errors import SampleError
from ..tokenizers import audio, image, text
from . import dedup
from .samples import AUDIO_FILES, IMAGE_FILES, TABLE_TEXT, all_texts
from .settings import Settings

BLOCK = 1 << 18  # samples decoded at a time
LOUDEST = 1e15  # of a float sound: beyond it the spectrum overflows
IMAGE, AUDIO, TEXT = image.Config(), audio.Config(), text.Config()


def check(settings: Settings, members: dict[str, bytes]) -> tuple[dict, dict, list[tuple[str, SampleError]]]:
    """What of a sample's members is whole, what it measures, and which parts are left out.

    Facts: `image` [width, height, patches], `audio` [seconds, rate, channels], `text` bytes, `phash`, `colors`.
    """
    kept, facts, failed = {}, {}, []
    for ending, data in members.items():
        try:
            if ending in IMAGE_FILES:
                ending, data = picture(settings, ending, data, facts)
            elif ending in AUDIO_FILES:
                ending, data = sound(settings, ending, data, facts)
            elif ending == "txt":
                utf8(data)
            elif ending == "json":
                parse(data)
            kept[ending] = data
        except SampleError as error:
            failed.append((part_of(ending), error))
    if "json" in kept and "txt" not in kept:
        try:
            text.Tokenizer(TEXT).split_inputs({"json": kept["json"]})
        except SampleError as error:  # a caption that is blank
            failed.append(("text", error))
    return kept, facts, failed


def part_of(ending: str) -> str:
    """The ledger's name of what a member holds."""
    if ending in IMAGE_FILES:
        return "image"
    return "audio" if ending in AUDIO_FILES else {"txt": "text", "json": "text"}.get(ending, ending)


def is_something(settings: Settings, members: dict[str, bytes]) -> bool:
    """Whether there is anything to learn from: a picture, a sound, or text."""
    if any(ending in IMAGE_FILES or ending in AUDIO_FILES for ending in members):
        return True
    return bool(all_texts(members, settings.text_column or TABLE_TEXT[0]))


def utf8(data: bytes) -> str:
    """Raises SampleError."""
    try:
        found = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("text-decode", f"not UTF-8 at byte {error.start}") from None
    if not found.strip():
        raise SampleError("empty", "no text in it")
    return found


def picture(settings: Settings, ending: str, data: bytes, facts: dict) -> tuple[str, bytes]:
    """The picture's ending and bytes. Formats that training does not read become PNG. Raises SampleError."""
    if not data:
        raise SampleError("empty", "no bytes")
    jpeg = image._jpeg(IMAGE, data)  # as training reads it: what Pillow lets pass may be refused
    found = (
        Image.fromarray(jpeg.decode(IMAGE, jpeg.height, jpeg.width, fast=False)) if jpeg else image.decode(IMAGE, data)
    )
    most = settings.longest_side
    if most and max(found.size) > most:
        scale = most / max(found.size)
        found = found.resize([max(1, round(n * scale)) for n in found.size], Image.Resampling.LANCZOS)
        ending, data = "jpg", _saved(found, "JPEG", quality=95)
    elif ending not in image.EXTENSIONS:
        ending, data = "png", _saved(found, "PNG")
    width, height = found.size
    facts.setdefault("image", []).append([width, height, math.ceil(width / 16) * math.ceil(height / 16)])
    if settings.dedup == "near" and min(width, height) >= dedup.SMALLEST:
        facts.setdefault("phash", []).append(dedup.picture_hash(found))
        facts.setdefault("colors", []).append(dedup.colors(found))
    return ending, data


def _saved(found: Image.Image, modality: str, **options) -> bytes:
    data = io.BytesIO()
    found.save(data, modality, **options)
    return data.getvalue()


def sound(settings: Settings, ending: str, data: bytes, facts: dict) -> tuple[str, bytes]:
    """The sound's ending and bytes; all of it is decoded, a block at a time. Raises SampleError."""
    if not data:
        raise SampleError("empty", "no bytes")
    if len(data) > AUDIO.max_bytes:
        raise SampleError("byte-limit", f"{len(data)} bytes, the limit is {AUDIO.max_bytes}")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, channels, frames = file.samplerate, file.channels, file.frames
            audio.check_header(AUDIO, rate, frames)
            same = (file.format, file.subtype, rate, channels) == ("FLAC", "PCM_16", settings.rate, 1)
            change = settings.rate and not same
            if change or ending not in audio.EXTENSIONS:
                ending, data = "flac", _converted(file, settings.rate or rate, mono=bool(settings.rate))
            else:
                for _ in _blocks(file, frames):
                    pass
    except (soundfile.LibsndfileError, TypeError, ValueError, RuntimeError) as error:
        raise SampleError("decode", str(error)[:100]) from None
    if change:
        rate, channels = settings.rate, 1
    facts.setdefault("audio", []).append([round(frames / file.samplerate, 3), rate, channels])
    return ending, data


def _blocks(file: soundfile.SoundFile, frames: int, size: int = BLOCK):
    """Blocks (T, C) of float32 until the end. Raises SampleError for NaN, infinity, fewer samples than announced."""
    read = 0
    while True:
        block = file.read(size, dtype="float32", always_2d=True)
        if not len(block):
            break
        if not np.abs(block).max() <= LOUDEST:
            raise SampleError("not-finite", "NaN, infinity or a number near it among the samples")
        read += len(block)
        yield block
    if read < 0.99 * frames - 5000:  # an MP3's header may be a few frames off
        raise SampleError("decode", f"the header announces {frames} samples, {read} are there")


def _converted(file: soundfile.SoundFile, rate: int, mono: bool) -> bytes:
    """FLAC of 16 bits at `rate`; with `mono` the mean of the channels. In blocks, whatever the length."""
    data = io.BytesIO()
    channels = 1 if mono else min(file.channels, 8)
    blocks = (b.mean(1, keepdims=True) if mono else b[:, :channels] for b in _blocks(file, file.frames))
    with soundfile.SoundFile(data, "w", rate, channels, "PCM_16", format="FLAC") as sink:
        for block in _resampled(blocks, file.samplerate, rate):
            sink.write(np.clip(block, -1, 1))
    return data.getvalue()


@functools.lru_cache(maxsize=16)
def _resampler(rate: int, to: int):
    return torchaudio.transforms.Resample(rate, to)


def _resampled(blocks, rate: int, to: int):
    """Blocks (T, C) at `to` samples a second, as of the whole at once: each is resampled with what is around it."""
    if rate == to:
        yield from blocks
        return
    if rate // math.gcd(rate, to) > 2000:  # the filter would grow without bound: as in the tokenizer
        rate = max(100, round(rate, -2))
    step, out = rate // math.gcd(rate, to), to // math.gcd(rate, to)
    around = -(-(16 * max(rate // to, 1) + 16) // step) * step  # more than the filter's half width, in whole steps
    change, held, begun = _resampler(rate, to), np.zeros((0, 0), np.float32), False

    def resample(wave: np.ndarray) -> np.ndarray:
        return change(torch.from_numpy(np.ascontiguousarray(wave.T))).numpy().T

    for block in blocks:
        held = block if not held.size else np.concatenate([held, block])
        usable = (len(held) - around) // step * step
        if usable <= around:
            continue
        wave = resample(held[: usable + around])
        first = around // step * out if begun else 0
        yield wave[first : usable // step * out]
        held, begun = held[usable - around :], True
    if held.size:
        yield resample(held)[around // step * out if begun else 0 :]
