"""Sound of any rate, channel count and length as log-mel patches: mono, one rate, cut in time (and frequency)."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SampleError, UserError
from ..tokens import Tokens, make_sequence
from . import base

MAY_BE_ZERO = ("spec_augment", "speed_jitter", "stride_frames", "stride_mels")


@dataclass
class Config:
    sample_rate: int = 16_000  # Hz; all sound is resampled to it
    n_mels: int = 64  # mel bands
    hop_length: int = 160  # samples from a frame to the next
    win_length: int = 400  # samples that a frame's spectrum is computed of
    patch_frames: int = 16  # frames a patch
    patch_mels: int = 64  # mel bands a patch; equal to `n_mels`, a patch has them all
    features: Literal["log_mel", "fbank"] = "log_mel"
    """log_mel: decibels, normalized over the window, in as many columns as the sound is long. fbank: Kaldi's log-mel
    filter bank as AST reads it (Gong et al. 2021), not normalized, with zeros up to `max_tokens` patches; a patch lies
    at (band, time) of a grid, as that of a picture."""
    stride_frames: int = 0  # fbank: frames from a patch to the next; 0: `patch_frames`, so that they do not overlap
    stride_mels: int = 0  # fbank: mel bands from a patch to the next; 0: `patch_mels`
    max_tokens: int = 128  # patches a sequence; longer sound is cropped in training and cut into windows in evaluation
    spec_augment: float = 0.0  # training: the most of the mel bands, and of the frames, that is blanked, as a share
    speed_jitter: float = 0.0  # training: played faster or slower by at most this share
    max_windows: int = 64  # evaluation: windows of one sound; what follows them is not read
    max_seconds: float = 3600.0  # a longer sound is refused by its header
    max_bytes: int = 200_000_000  # so is a longer file

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, int) and name not in MAY_BE_ZERO and value < 1:
                raise ValueError(f"{name} is at least 1")
        if not self.max_seconds > 0:
            raise ValueError("max_seconds is above 0")
        if not 0 <= self.spec_augment <= 1 or not 0 <= self.speed_jitter < 1:
            raise ValueError("spec_augment and speed_jitter are shares from 0 to 1")
        strides = self.stride_frames, self.stride_mels
        if min(strides) < 0 or (self.features == "log_mel" and max(strides)):
            raise ValueError("stride_frames and stride_mels are settings of features: fbank, from 1 up")
        if self.features == "fbank" and not self.patch_mels <= self.n_mels:
            raise ValueError(f"patch_mels ({self.patch_mels}) is at most n_mels ({self.n_mels})")
        if self.features == "fbank" and self.max_tokens % self.rows:
            raise ValueError(f"max_tokens ({self.max_tokens}) must fill whole columns of {self.rows} patches")
        if self.features == "log_mel" and self.n_mels % self.patch_mels:
            raise ValueError(f"n_mels ({self.n_mels}) must be a multiple of patch_mels ({self.patch_mels})")
        if self.max_tokens < self.rows:
            raise ValueError(f"max_tokens ({self.max_tokens}) must hold one column of patches ({self.rows})")

    @property
    def rows(self) -> int:
        """Patches in frequency."""
        return (self.n_mels - self.patch_mels) // (self.stride_mels or self.patch_mels) + 1

    @property
    def patch_samples(self) -> int:
        """Samples from a patch to the next in time."""
        return (self.stride_frames or self.patch_frames) * self.hop_length

    @property
    def fbank_frames(self) -> int:
        """Frames that `max_tokens` patches cover with features: fbank."""
        return (self.max_tokens // self.rows - 1) * (self.stride_frames or self.patch_frames) + self.patch_frames

    @property
    def window_samples(self) -> int:
        """Samples that `max_tokens` patches cover."""
        if self.features == "fbank":
            return (self.fbank_frames - 1) * self.hop_length + self.win_length
        return self.max_tokens // self.rows * self.patch_samples


@dataclass(frozen=True)
class _Sound:
    """An open sound: samples a second, how many there are, and a reader of `count` mono samples from `start` on."""

    rate: int
    length: int
    read: Callable[[int, int], np.ndarray]


class Tokenizer(base.Tokenizer):
    """Sound <-> log-mel patches."""

    Config, extensions = Config, ("flac", "wav", "ogg", "mp3")
    augmentations = ("spec_augment", "speed_jitter")
    half_precision = True  # normalized levels of some units, of which float16 keeps three digits

    def read(self, raw, generator: Random | None = None) -> list[Tokens]:
        """Log-mel patches, column by column: content (N, patch_frames * patch_mels) float32, position (time, band, 0).

        `raw` is the sample's members by ending, a path, bytes, or (waveform (T,) or (C, T), sample rate). With a
        generator one random window, otherwise the windows that cover the sound. Raises SampleError.
        """
        raw = self._own_member(raw) if isinstance(raw, dict) else raw
        if raw is None:
            return []
        config, sound, window = self.config, self._open(raw), self.config.window_samples
        if generator is not None:
            speed, where = generator.random(), generator.random()
            rate = round(sound.rate * (1 + config.speed_jitter * (2 * speed - 1)))
            start = int(where * max(self._resampled_length(sound, rate) - window, 0))
            return [self._patchify(self._read_window(sound, start, window, rate), generator)]
        length = min(self._resampled_length(sound), config.max_windows * window)
        waves = [self._read_window(sound, start, window) for start in range(0, length, window)]
        if len(waves) > 1 and len(waves[-1]) < config.patch_samples:
            waves.pop()  # the rest is shorter than a patch
        return [self._patchify(wave) for wave in waves]

    def _own_member(self, raw: dict):
        return next((raw[ending] for ending in self.extensions if ending in raw), None)

    def _open(self, raw) -> _Sound:
        """Raises SampleError; nothing is decoded before the header has been checked, and then only what is read."""
        if isinstance(raw, tuple):
            wave, rate = torch.as_tensor(raw[0], dtype=torch.float32).numpy(), int(raw[1])
            wave = wave.mean(0) if wave.ndim == 2 else wave
            self.check_header(rate, len(wave))
            return _Sound(rate, len(wave), lambda start, count: wave[start : start + count])
        import soundfile

        if isinstance(raw, (bytes, bytearray, memoryview)):
            if len(raw) > self.config.max_bytes:
                raise SampleError("byte-limit", f"{len(raw)} bytes, the limit is {self.config.max_bytes}")
            raw = io.BytesIO(raw)
        try:
            file = soundfile.SoundFile(raw)
        except (soundfile.LibsndfileError, TypeError, ValueError) as error:
            raise SampleError("decode", str(error)[:100]) from None

        def read(start: int, count: int) -> np.ndarray:
            try:
                file.seek(start)
                data = file.read(count, dtype="float32", always_2d=True)  # (T, C)
            except (soundfile.LibsndfileError, ValueError, RuntimeError) as error:
                raise SampleError("decode", str(error)[:100]) from None
            return data[:, 0] if file.channels == 1 else data @ np.full(file.channels, 1 / file.channels, np.float32)

        self.check_header(file.samplerate, file.frames)
        return _Sound(file.samplerate, file.frames, read)

    def check_header(self, rate: int, length: int) -> None:
        """Raises SampleError where a sound of `length` samples, `rate` a second, may not be decoded."""
        if not 100 <= rate <= 1_000_000:
            raise SampleError("decode", f"{rate} samples a second")
        if length <= 0:
            raise SampleError("empty", "no samples")
        if length > self.config.max_seconds * rate:
            raise SampleError(
                "duration-limit", f"{length / rate:.0f} seconds, the limit is {self.config.max_seconds:g}"
            )

    def _resampled_length(self, sound: _Sound, rate: int = 0) -> int:
        return -(-sound.length * self.config.sample_rate // (rate or sound.rate))

    def _read_window(self, sound: _Sound, start: int, count: int, rate: int = 0) -> Tensor:
        """At most `count` samples from `start` on, both counted at the config's sample rate.

        With `rate` the sound is taken to have that many samples a second.
        """
        rate, sample_rate = rate or sound.rate, self.config.sample_rate
        wave = sound.read(start * rate // sample_rate, -(-count * rate // sample_rate))
        if not len(wave):
            raise SampleError("decode", "the header announces samples that are not there")
        wave = torch.from_numpy(np.ascontiguousarray(wave))
        if not math.isfinite(float(wave.sum())):  # fifty times faster than to look at each
            raise SampleError("not-finite", "NaN or infinity among the samples")
        return resample(wave, rate, sample_rate)[:count]

    def _patchify(self, wave: Tensor, generator: Random | None = None) -> Tokens:
        """log-mel of a window (T,), at most `max_tokens` patches, normalized over the window."""
        config = self.config
        if config.features == "fbank":
            return self._patchify_fbank(wave, generator)
        columns = max(1, min(round(len(wave) / config.patch_samples), config.max_tokens // config.rows))
        length = columns * config.patch_samples
        wave = F.pad(wave[:length], (0, max(0, length - len(wave))))
        spectrogram, mel_scale = _transforms(config.sample_rate, config.win_length, config.hop_length, config.n_mels)
        bins = spectrogram(wave).numpy()  # NumPy's arithmetic on complex numbers is the faster one
        with np.errstate(over="ignore"):
            power = torch.from_numpy(bins.real**2 + bins.imag**2)
        mel = mel_scale(power)[:, : columns * config.patch_frames]
        mel = mel.clamp(min=1e-8).log10()
        mel = mel.clamp(min=mel.max() - 8)  # a range of 80 dB
        mel = (mel - mel.mean()) / (mel.std() + 1e-3)
        if not torch.isfinite(mel).all():
            raise SampleError("not-finite", "too loud: its spectrum overflows")
        if generator is not None and config.spec_augment:
            mel = _spec_augment(mel, config.spec_augment, generator)
        content = mel.unflatten(0, (config.rows, config.patch_mels)).unflatten(2, (columns, config.patch_frames))
        content = content.permute(2, 0, 1, 3).flatten(2).flatten(0, 1)  # (columns * rows, patch_mels * patch_frames)
        return make_sequence(content.contiguous(), _positions(columns, config.rows))

    def _patchify_fbank(self, wave: Tensor, generator: Random | None) -> Tokens:
        """Kaldi's log-mel filter bank of a window (T,) in patches, band by band: position (0, band, time)."""
        config = self.config
        wave = F.pad(wave, (0, max(0, config.win_length - len(wave))))
        milliseconds = 1000 / config.sample_rate
        fbank = _torchaudio().compliance.kaldi.fbank
        mel = fbank(
            wave[None],
            sample_frequency=config.sample_rate,
            window_type="hanning",
            num_mel_bins=config.n_mels,
            frame_length=config.win_length * milliseconds,
            frame_shift=config.hop_length * milliseconds,
        ).T[:, : config.fbank_frames]
        if not torch.isfinite(mel).all():
            raise SampleError("not-finite", "too loud: its spectrum overflows")
        if generator is not None and config.spec_augment:
            mel = _spec_augment(mel, config.spec_augment, generator)
        mel = F.pad(mel, (0, config.fbank_frames - mel.shape[1]))
        patches = mel.unfold(0, config.patch_mels, config.stride_mels or config.patch_mels)
        patches = patches.unfold(1, config.patch_frames, config.stride_frames or config.patch_frames)
        return make_sequence(patches.flatten(2).flatten(0, 1).contiguous(), _cells(*patches.shape[:2]))

    def measure(self, data: bytes, length: int) -> tuple[int, int]:
        """Milliseconds and samples a second, from the header."""
        import soundfile

        info = soundfile.info(io.BytesIO(data))
        return round(1000 * info.frames / info.samplerate), info.samplerate

    def count_tokens(self, length, milliseconds, rate) -> np.ndarray:
        """Patches (N,) of training windows of sounds of these lengths; `max_tokens` where a length is not known."""
        config = self.config
        columns = np.maximum(milliseconds * config.sample_rate // (1000 * config.patch_samples), 1)
        most = config.max_tokens // config.rows * config.rows
        if config.features == "fbank":
            return np.full(len(length), most)
        return np.where(rate > 0, np.minimum(columns * config.rows, most), most)

    def extent(self) -> tuple[int, int, int]:
        times, bands = self.config.max_tokens // self.config.rows, self.config.rows
        return (1, bands, times) if self.config.features == "fbank" else (times, bands, 1)

    def describe(self, raw: dict) -> dict | None:
        """Channels, seconds and sample rate, after all of the sound has been decoded. Raises SampleError."""
        import soundfile

        data = self._own_member(raw)
        if data is None:
            return None
        sound, window, patch = self._open(data), self.config.window_samples, self.config.patch_samples
        length = self._resampled_length(sound)
        for start in range(0, max(length - patch, 1), window):
            rest = length - start
            self._patchify(self._read_window(sound, start, rest if rest <= window + patch else window))
        channels = soundfile.info(io.BytesIO(data)).channels
        return {"channels": channels, "seconds": round(sound.length / sound.rate, 3), "rate": sound.rate}

    def toy(self) -> Tokenizer:
        if self.config.features == "fbank":
            return self
        return self.replace(max_tokens=max(min(self.config.max_tokens, 32), self.config.rows))

    def embedder(self, width: int) -> nn.Module:
        return Embed(self.config.patch_frames * self.config.patch_mels, width)

    def predictor(self, width: int) -> nn.Module:
        return Predict(self.config.patch_frames * self.config.patch_mels, width)

    def reconstructor(self, width: int) -> base.Reconstructor:
        return Reconstruct(self.config.patch_frames * self.config.patch_mels, width)

    def render(self, content: Tensor, position: Tensor, vocoder: Vocoder | None = None) -> Any:
        """(waveform (T,), sample rate) of log-mel patches that fill a grid, in any order; its peak is `PEAK`. None of
        the overlapping patches of `features: fbank`.

        vocoder: from the power in mel bands (n_mels, frames) and the sample rate to a waveform; else `griffin_lim`.
        Loudness and contrast are not in the patches, which are normalized: usual ones are taken.
        """
        config = self.config
        if config.features == "fbank":
            return None
        column, row = position[:, :2].long().unbind(1)
        grid = torch.zeros(int(column.max()) + 1, config.rows, config.patch_mels, config.patch_frames)
        grid[column, row] = content.detach().cpu().float().unflatten(1, (config.patch_mels, config.patch_frames))
        mel = grid.permute(1, 2, 0, 3).flatten(2).flatten(0, 1) * DECADES
        power = 10 ** (mel - mel.max() + LOUDEST)
        wave = vocoder(power, config.sample_rate) if vocoder else griffin_lim(power, config)
        return wave * (PEAK / wave.abs().max().clamp(min=1e-9)), config.sample_rate


Vocoder = Callable[[Tensor, int], Tensor]
DECADES, LOUDEST = 1.5, 3.0  # the usual standard deviation and maximum of a window's log-mel (music, speech, effects)
PEAK = 0.5  # of a rendered waveform


def griffin_lim(power: Tensor, config: Config) -> Tensor:
    """The waveform (frames * hop_length,) of the power in mel bands (n_mels, frames) (Griffin and Lim 1984)."""
    torchaudio = _torchaudio()
    n_fft = 1 << (config.win_length - 1).bit_length()
    bins = n_fft // 2 + 1
    inverse = torchaudio.transforms.InverseMelScale(bins, config.n_mels, config.sample_rate, 20.0, driver="gelsd")
    phase = torchaudio.transforms.GriffinLim(n_fft, 64, config.win_length, config.hop_length, rand_init=False)
    wave = phase(inverse(torch.cat([power, power[:, -1:]], 1)))  # it ends in the middle of the last frame
    return wave[: power.shape[1] * config.hop_length]


def round_rate(rate: int, to: int) -> int:
    """The sample rate, rounded to hundreds where the filter that resamples it to `to` would be very large."""
    return max(100, round(rate, -2)) if rate // math.gcd(rate, to) > 450 else rate


def resample(wave: Tensor, rate: int, to: int) -> Tensor:
    """A wave (T,) of `rate` samples a second (see `round_rate`) as one of `to`.

    The same as `torchaudio.transforms.Resample` gives, in a third of the time.
    """
    rate = round_rate(rate, to)
    if rate == to:
        return wave
    before, step, blocks = _filter(rate, to)
    count = -(-len(wave) * to // rate)
    rows = -(-len(wave) // step)
    longest = max(first + len(weights) for first, weights in blocks)
    wave = F.pad(wave, (before, rows * step + longest - len(wave)))
    parts = [wave.as_strided((rows, len(weights)), (step, 1), first) @ weights for first, weights in blocks]
    return torch.cat(parts, 1).flatten()[:count]


BLOCK = 32  # samples that one matrix product gives


@functools.cache
def _torchaudio() -> Any:
    """The library, imported where the first sound is read. Raises UserError where its release does not fit torch's."""
    try:
        import torchaudio
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"torchaudio does not work beside torch {torch.__version__}: {str(error).splitlines()[0]}; "
            "install releases that fit each other, such as torch 2.14.1 and torchaudio 2.11.1, or 2.11.0 and 2.11.0"
        ) from error
    return torchaudio


@functools.lru_cache(maxsize=64)
def _filter(rate: int, to: int) -> tuple[int, int, list[tuple[int, Tensor]]]:
    """The filter of torchaudio without its zeros, a fifth of the work.

    Returns the zeros to be put before the wave, the samples that a row of outputs moves on by, and for each block of
    a row's outputs the first sample that it needs and the weights (samples in, samples out).
    """
    transform = _torchaudio().transforms.Resample(rate, to)
    weights: Any = transform.kernel
    kernel, width = weights[:, 0], transform.width  # (out, samples in)
    step, out = (n // math.gcd(rate, to) for n in (rate, to))
    length = kernel.shape[1]
    repeats = max(-(-BLOCK // out), -(-(BLOCK * step // out + length - step) // step))  # so that rows do not overlap
    row = torch.zeros(repeats * out, length + (repeats - 1) * step)
    for repeat in range(repeats):
        row[repeat * out : (repeat + 1) * out, repeat * step : repeat * step + length] = kernel
    blocks = []
    for block in row.split(BLOCK):
        used = block.any(0).nonzero()[:, 0]
        first, last = int(used[0]), int(used[-1]) + 1
        blocks.append((first, block[:, first:last].T.contiguous()))
    return width, repeats * step, blocks


@functools.lru_cache(maxsize=8)
def _transforms(rate: int, win_length: int, hop_length: int, n_mels: int):
    """From a wave to its complex spectrogram (bins, frames), and from power to mel bands."""
    torchaudio = _torchaudio()
    n_fft = 1 << (win_length - 1).bit_length()
    spectrogram = torchaudio.transforms.Spectrogram(n_fft, win_length, hop_length, power=None)
    return spectrogram, torchaudio.transforms.MelScale(n_mels, rate, 20.0, n_stft=n_fft // 2 + 1)


def _spec_augment(mel: Tensor, share: float, generator: Random) -> Tensor:
    """One run of mel bands and one of frames set to the mean, each at most `share` of them (Park et al. 2019)."""
    mel = mel.clone()
    for axis in (0, 1):
        length = generator.randrange(int(mel.shape[axis] * share) + 1)
        mel.narrow(axis, generator.randrange(mel.shape[axis] - length + 1), length).zero_()
    return mel


@functools.lru_cache(maxsize=4096)
def _positions(columns: int, rows: int) -> Tensor:
    """(columns * rows, 3). It is cached and shared: do not write to it."""
    position = torch.zeros(columns, rows, 3)
    position[..., 0] = torch.arange(columns)[:, None]
    position[..., 1] = torch.arange(rows)
    return position.flatten(0, 1)


@functools.lru_cache(maxsize=64)
def _cells(rows: int, columns: int) -> Tensor:
    """(rows * columns, 3). It is cached and shared: do not write to it."""
    position = torch.zeros(rows, columns, 3)
    position[..., 1] = torch.arange(rows)[:, None]
    position[..., 2] = torch.arange(columns)
    return position.flatten(0, 1)


class Embed(nn.Module):
    """Patches (N, values) -> (N, D)."""

    def __init__(self, values: int, width: int):
        super().__init__()
        self.project = nn.Linear(values, width)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, content: Tensor) -> Tensor:
        return self.project(content)


class Predict(nn.Module):
    """Mean squared error (M,) of each patch, normalized to zero mean and unit variance (MAE, He et al. 2022)."""

    def __init__(self, values: int, width: int):
        super().__init__()
        self.levels = nn.Linear(width, values)
        nn.init.normal_(self.levels.weight, std=0.02)
        nn.init.zeros_(self.levels.bias)

    def forward(self, vectors: Tensor, content: Tensor) -> Tensor:
        target = (content - content.mean(-1, keepdim=True)) / (content.var(-1, keepdim=True) + 1e-2).sqrt()
        return (self.levels(vectors).float() - target).square().mean(-1)


class Reconstruct(base.Reconstructor):
    """Vectors (M, D) -> log-mel values (M, patch_frames * patch_mels), normalized as the tokenizer reads them."""

    def __init__(self, values: int, width: int):
        super().__init__()
        self.levels = nn.Linear(width, values)
        nn.init.normal_(self.levels.weight, std=0.02)
        nn.init.zeros_(self.levels.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.levels(vectors).float()

    def target(self, content: Tensor) -> Tensor:
        return content.float()

    def content(self, values: Tensor) -> Tensor:
        return values
