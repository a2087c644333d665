"""Sound: any rate, channel count and length -> mono, 16 kHz, log-mel, patches in time (and frequency)."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SampleError
from ..tokens import Tokens, sequence_of
from . import base

EXTENSIONS = ("flac", "wav", "ogg", "mp3")


@dataclass
class Config:
    sample_rate: int = 16_000  # samples a second
    n_mels: int = 64  # mel bands
    hop_length: int = 160  # samples a frame
    win_length: int = 400  # samples that a frame's spectrum sees
    patch_frames: int = 16  # frames a patch
    patch_mels: int = 64  # mel bands a patch; `n_mels` is one patch over all of them
    max_tokens: int = 128  # tokens a sequence: longer sound is cropped in training, cut into windows in inference
    spec_augment: float = 0.0  # training: at most this share of the bands, and of the frames, is blanked (SpecAugment)
    speed_jitter: float = 0.0  # training: the rate of play changes by at most this share
    max_windows: int = 64  # inference: at most so many windows of one sound
    max_seconds: float = 3600.0  # a longer sound is refused, by its header
    max_bytes: int = 200_000_000  # so is a longer member

    def __post_init__(self):
        counts = (
            "sample_rate",
            "n_mels",
            "hop_length",
            "win_length",
            "patch_frames",
            "patch_mels",
            "max_tokens",
            "max_windows",
        )
        if min(getattr(self, name) for name in counts) < 1:
            raise ValueError(f"{', '.join(counts)} are at least 1")
        if not self.max_seconds > 0:
            raise ValueError("max_seconds is above 0")
        if not 0 <= self.spec_augment <= 1 or not 0 <= self.speed_jitter < 1:
            raise ValueError("spec_augment and speed_jitter are shares from 0 to 1")
        if self.n_mels % self.patch_mels:
            raise ValueError(f"n_mels ({self.n_mels}) must be a multiple of patch_mels ({self.patch_mels})")
        if self.max_tokens < (rows := self.n_mels // self.patch_mels):
            raise ValueError(f"max_tokens ({self.max_tokens}) must hold one column of patches ({rows})")

    @property
    def window_samples(self) -> int:
        """Samples that `max_tokens` tokens cover."""
        return self.max_tokens // (self.n_mels // self.patch_mels) * self.patch_frames * self.hop_length


def _opened(config: Config, raw) -> tuple[int, int, Callable[[int, int], np.ndarray]]:
    """Samples a second, how many, and a reader of `n` mono samples from `first` on that decodes no others.

    Raises SampleError, where the header announces too much before anything is decoded.
    """
    if isinstance(raw, tuple):
        wave, rate = torch.as_tensor(raw[0], dtype=torch.float32).numpy(), int(raw[1])
        wave = wave.mean(0) if wave.ndim == 2 else wave
        total, take = len(wave), lambda first, n: wave[first : first + n]
    else:
        import soundfile

        if isinstance(raw, (bytes, bytearray, memoryview)):
            if len(raw) > config.max_bytes:
                raise SampleError("byte-limit", f"{len(raw)} bytes, the limit is {config.max_bytes}")
            raw = io.BytesIO(raw)
        try:
            file = soundfile.SoundFile(raw)
        except (soundfile.LibsndfileError, TypeError, ValueError) as error:
            raise SampleError("decode", str(error)[:100]) from None
        rate, total, channels = file.samplerate, file.frames, file.channels

        def take(first: int, n: int) -> np.ndarray:
            try:
                file.seek(first)
                data = file.read(n, dtype="float32", always_2d=True)  # (T, C)
            except (soundfile.LibsndfileError, ValueError, RuntimeError) as error:
                raise SampleError("decode", str(error)[:100]) from None
            return data[:, 0] if channels == 1 else data @ np.full(channels, 1 / channels, np.float32)

    check_header(config, rate, total)
    return rate, total, take


def check_header(config: Config, rate: int, total: int) -> None:
    """Raises SampleError where no sound of `total` samples, `rate` a second, may be decoded."""
    if not 100 <= rate <= 1_000_000:
        raise SampleError("decode", f"{rate} samples a second")
    if total <= 0:
        raise SampleError("empty", "no samples")
    if total > config.max_seconds * rate:
        raise SampleError("duration-limit", f"{total / rate:.0f} seconds, the limit is {config.max_seconds:g}")


def _wave(config: Config, rate: int, take: Callable, start: int, count: int) -> Tensor:
    """At most `count` samples at the config's rate from its sample `start` on; `take` gives those at `rate`."""
    wave = take(start * rate // config.sample_rate, -(-count * rate // config.sample_rate))
    if not len(wave):
        raise SampleError("decode", "the header announces samples that are not there")
    wave = torch.from_numpy(np.ascontiguousarray(wave))
    if not math.isfinite(float(wave.sum())):  # fifty times faster than to look at each
        raise SampleError("not-finite", "NaN or infinity among the samples")
    return _resample(wave, rate, config.sample_rate)[:count]


def _resample(wave: Tensor, rate: int, to: int) -> Tensor:
    """To `to` samples a second. Odd rates are rounded to a hundred, which keeps the filter small."""
    rate = rate if rate == to else max(100, round(rate, -2))
    if rate == to:
        return wave
    before, step, pieces = _resampler(rate, to)
    count = -(-len(wave) * to // rate)
    rows = -(-len(wave) // step)
    longest = max(first + len(weights) for first, weights in pieces)
    wave = F.pad(wave, (before, rows * step + longest - len(wave)))
    parts = [wave.as_strided((rows, len(weights)), (step, 1), first) @ weights for first, weights in pieces]
    return torch.cat(parts, 1).flatten()[:count]


BLOCK = 32  # samples out of one product of matrices


@functools.lru_cache(maxsize=64)
def _resampler(rate: int, to: int) -> tuple[int, int, list[tuple[int, Tensor]]]:
    """The filter of torchaudio without its zeros, about a fifth of the work: zeros put before the wave, its samples a
    row, and for each block of a row's samples out the first sample in and the weights (samples in, samples out)."""
    import torchaudio

    resample = torchaudio.transforms.Resample(rate, to)
    kernel, width = resample.kernel[:, 0], resample.width
    step, out = (n // math.gcd(rate, to) for n in (rate, to))
    times = max(-(-BLOCK // out), -(-(BLOCK * step // out + kernel.shape[1] - step) // step))  # rows do not overlap
    row = torch.zeros(times * out, kernel.shape[1] + (times - 1) * step)
    for turn in range(times):
        row[turn * out : (turn + 1) * out, turn * step : turn * step + kernel.shape[1]] = kernel
    pieces = []
    for block in row.split(BLOCK):
        used = block.any(0).nonzero()[:, 0]
        first, last = int(used[0]), int(used[-1]) + 1
        pieces.append((first, block[:, first:last].T.contiguous()))
    return width, times * step, pieces


@functools.lru_cache(maxsize=8)
def _transforms(rate: int, window: int, hop: int, bands: int):
    """Wave to complex spectrum (bins, frames), and power to mel bands."""
    import torchaudio

    size = 1 << (window - 1).bit_length()
    spectrum = torchaudio.transforms.Spectrogram(size, window, hop, power=None)
    return spectrum, torchaudio.transforms.MelScale(bands, rate, 20.0, n_stft=size // 2 + 1)


def _patches(config: Config, wave: Tensor, generator: Random | None = None) -> Tokens:
    """log-mel of one window (at most `max_tokens` patches), normalized over the window, cut into patches."""
    span = config.patch_frames * config.hop_length
    columns = max(1, min(round(len(wave) / span), config.window_samples // span))
    wave = F.pad(wave[: columns * span], (0, max(0, columns * span - len(wave))))
    spectrum, bands = _transforms(config.sample_rate, config.win_length, config.hop_length, config.n_mels)
    bins = spectrum(wave).numpy()  # whose arithmetic on complex numbers is the quicker
    with np.errstate(over="ignore"):
        power = torch.from_numpy(bins.real**2 + bins.imag**2)
    mel = bands(power)[:, : columns * config.patch_frames]
    mel = mel.clamp(min=1e-8).log10()
    mel = mel.clamp(min=mel.max() - 8)  # eighty decibels of range
    mel = (mel - mel.mean()) / (mel.std() + 1e-3)
    if not torch.isfinite(mel).all():
        raise SampleError("not-finite", "too loud: its spectrum overflows")
    if generator is not None and config.spec_augment:
        mel = _blank(config, mel, generator)
    rows = config.n_mels // config.patch_mels
    content = mel.unflatten(0, (rows, config.patch_mels)).unflatten(
        2, (columns, config.patch_frames)
    )  # (R, patch_mels, C, patch_frames)
    content = content.permute(2, 0, 1, 3).flatten(2).flatten(0, 1)  # column by column
    return sequence_of(content.contiguous(), _positions(columns, rows))


@functools.lru_cache(maxsize=4096)
def _positions(columns: int, rows: int) -> Tensor:
    """(columns * rows, 3); shared, so that nobody may write to it."""
    position = torch.zeros(columns, rows, 3)
    position[..., 0] = torch.arange(columns)[:, None]
    position[..., 1] = torch.arange(rows)
    return position.flatten(0, 1)


def _blank(config: Config, mel: Tensor, generator: Random) -> Tensor:
    """One run of bands and one of frames set to the mean (SpecAugment, Park et al. 2019)."""
    mel = mel.clone()
    for axis in (0, 1):
        most = int(mel.shape[axis] * config.spec_augment)
        width = generator.randrange(most + 1)
        start = generator.randrange(mel.shape[axis] - width + 1)
        mel.narrow(axis, start, width).zero_()
    return mel


class Embed(nn.Module):
    """patches (N, patch_frames * patch_mels) -> (N, D)"""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.project = nn.Linear(config.patch_frames * config.patch_mels, width)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, content: Tensor) -> Tensor:
        return self.project(content)


class Predict(nn.Module):
    """Mean squared error a patch, each patch normalized to zero mean and unit variance: (M,)."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.levels = nn.Linear(width, config.patch_frames * config.patch_mels)
        nn.init.normal_(self.levels.weight, std=0.02)
        nn.init.zeros_(self.levels.bias)

    def forward(self, vectors: Tensor, content: Tensor) -> Tensor:
        target = (content - content.mean(-1, keepdim=True)) / (content.var(-1, keepdim=True) + 1e-2).sqrt()
        return (self.levels(vectors).float() - target).square().mean(-1)


class Tokenizer(base.Tokenizer):
    Config, extensions = Config, EXTENSIONS

    def read(self, raw, generator: Random | None = None) -> list[Tokens]:
        """Sequences of log-mel patches, content (N, patch_frames * patch_mels) float32, position (time, band, 0).

        raw: the sample's members, a path, bytes, or (waveform (T,) or (C, T), rate). With a generator one random window, else
        the windows that cover the sound. Raises SampleError.
        """
        raw = next((raw[e] for e in EXTENSIONS if e in raw), None) if isinstance(raw, dict) else raw
        if raw is None:
            return []
        rate, total, take = _opened(self.config, raw)
        if generator is None:
            whole = -(-total * self.config.sample_rate // rate)
            starts = range(
                0, min(whole, self.config.max_windows * self.config.window_samples), self.config.window_samples
            )
            waves = [_wave(self.config, rate, take, start, self.config.window_samples) for start in starts]
            if len(waves) > 1 and len(waves[-1]) < self.config.patch_frames * self.config.hop_length:
                waves.pop()  # less than a patch is left over
            return [_patches(self.config, wave) for wave in waves]
        speed, where = generator.random(), generator.random()
        rate = round(rate * (1 + self.config.speed_jitter * (2 * speed - 1)))
        whole = -(-total * self.config.sample_rate // rate)
        wave = _wave(
            self.config, rate, take, int(where * max(whole - self.config.window_samples, 0)), self.config.window_samples
        )
        return [_patches(self.config, wave, generator)]

    def measure(self, data: bytes, length: int) -> tuple[int, int]:
        """Milliseconds and samples a second, from the header."""
        import soundfile

        found = soundfile.info(io.BytesIO(data))
        return round(1000 * found.frames / found.samplerate), found.samplerate

    def describe(self, raw: dict) -> dict | None:
        """Decodes all of the sound, a window at a time: its channels, seconds and rate. Raises SampleError."""
        import soundfile

        data = next((raw[e] for e in EXTENSIONS if e in raw), None)
        if data is None:
            return None
        rate, total, take = _opened(self.config, data)
        whole, patch = -(-total * self.config.sample_rate // rate), self.config.patch_frames * self.config.hop_length
        for start in range(0, max(whole - patch, 1), self.config.window_samples):
            left = whole - start
            _patches(
                self.config,
                _wave(
                    self.config,
                    rate,
                    take,
                    start,
                    left if left <= self.config.window_samples + patch else self.config.window_samples,
                ),
            )
        channels = soundfile.info(io.BytesIO(data)).channels
        return {"channels": channels, "seconds": round(total / rate, 3), "rate": rate}

    def count_tokens(self, length, milliseconds, rate) -> np.ndarray:
        """Patches (N,) of training windows of sounds of these lengths; `max_tokens` where a length is not known."""
        column = self.config.n_mels // self.config.patch_mels
        columns = np.maximum(
            milliseconds * self.config.sample_rate // (1000 * self.config.hop_length * self.config.patch_frames), 1
        )
        whole = self.config.max_tokens // column * column
        return np.where(rate > 0, np.minimum(columns * column, whole), whole)

    def toy(self) -> Tokenizer:
        return self.replace(max_tokens=min(self.config.max_tokens, 32))

    def embedder(self, width: int) -> nn.Module:
        return Embed(self.config, width)

    def predictor(self, width: int) -> nn.Module:
        return Predict(self.config, width)
