"""Learned codes of pictures or sounds, which `mmfm pack --codes RUN` wrote into the shards: `key.codes.npy`.

An array of whole numbers, (rows, columns) of a picture or (frames,) of a sound, each the number of a code in the
codec's codebook. A model that learns to predict them makes pictures and sounds, which the codec decodes. A sequence
opens with a begin token, whose id follows those of the codes, so that a model can write one after nothing at all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..corpus import arrays
from ..errors import SampleError, UserError
from ..tokens import Tokens, make_sequence
from . import base


@dataclass
class Config:
    codebook_size: int = 1000  # codes; as the codec's
    rows: int = 8  # of codes of a picture that is generated; one that is read has at most rows times columns codes
    columns: int = 8
    """Of codes of a picture that is generated."""
    length: int = 0  # frames of codes: of sounds, of which training draws a window that long; 0: of pictures
    member: str = "codes.npy"
    """The ending of the members to read, where a sample has codes of several modalities: `audio.codes.npy`."""
    codec: str = ""  # the run, or the checkpoint's folder, that decodes the codes; training keeps a copy as `file`
    file: str = ""  # the codec in one file, as a checkpoint keeps it
    max_bytes: int = 10_000_000  # a longer member is refused

    def __post_init__(self):
        if self.codebook_size < 2 or min(self.rows, self.columns) < 1 or self.length < 0:
            raise ValueError("codebook_size is at least 2, rows and columns at least 1, length from 0 up")
        if not self.member.endswith("codes.npy") or self.member.startswith(".") or self.member.lower() != self.member:
            raise ValueError("member is codes.npy, or a name before it in small letters, as in image.codes.npy")


class Tokenizer(base.Tokenizer):
    """Arrays of codes <-> ids.

    vocoder: set it to a function from the power in mel bands (n_mels, frames) and a sample rate to a waveform (T,), and
    sounds are decoded by it; else by Griffin-Lim.
    """

    Config = Config

    def __init__(self, config: Config | None = None):
        super().__init__(config)
        self.extensions = (self.config.member,)
        self.vocoder: Any = None

    @property
    def begin(self) -> int:
        """The id that opens a sequence."""
        return self.config.codebook_size

    @property
    def max_codes(self) -> int:
        return self.config.length or self.config.rows * self.config.columns

    def read(self, raw, generator: Random | None = None) -> list[Tokens]:
        """Ids BEGIN codes (N + 1,) int64, position (1, row, column) of a picture's codes, (1 + frame, 0, 0) of others.

        `raw` is the sample's members by ending, the bytes of one, or an array. A picture is one sequence. Of a sound a
        generator draws a window; without one, windows cover it. Raises SampleError.
        """
        if isinstance(raw, dict):
            if self.config.member not in raw:
                return []
            raw = raw[self.config.member]
        codes = self._parse(bytes(raw)) if isinstance(raw, (bytes, bytearray, memoryview)) else np.asarray(raw)
        self._check(codes)
        ids = torch.from_numpy(codes.astype(np.int64).ravel())
        if codes.ndim == 2:
            return [self._sequence(ids, _grid(*codes.shape))]
        length = self.config.length
        if generator is not None:
            start = generator.randrange(max(len(ids) - length, 0) + 1)
            ids = ids[start : start + length]
        return [self._sequence(part, _line(len(part))) for part in ids.split(length)]

    def _sequence(self, ids: Tensor, position: Tensor) -> Tokens:
        return make_sequence(F.pad(ids, (1, 0), value=self.begin), _after_begin(position))

    def _parse(self, data: bytes) -> np.ndarray:
        """Raises SampleError."""
        if len(data) > self.config.max_bytes:
            raise SampleError("byte-limit", f"{len(data)} bytes, the limit is {self.config.max_bytes}")
        return arrays.parse(data)

    def _check(self, codes: np.ndarray) -> None:
        """Raises SampleError where an array is not one of codes such as the settings name."""
        dimensions, what = (1, "(frames,)") if self.config.length else (2, "(rows, columns)")
        if codes.ndim != dimensions or codes.dtype.kind not in "iu":
            raise SampleError("decode", f"codes are whole numbers {what}, not {codes.shape} of {codes.dtype}")
        if not codes.size:
            raise SampleError("empty", "no codes")
        if dimensions == 2 and codes.size > self.max_codes:
            raise SampleError("decode", f"{codes.shape} codes are more than {self.config.rows} x {self.config.columns}")
        if int(codes.min()) < 0 or int(codes.max()) >= self.config.codebook_size:
            wrong = int(codes.min()) if int(codes.min()) < 0 else int(codes.max())
            raise SampleError("decode", f"code {wrong} of a codebook of {self.config.codebook_size}")

    def measure(self, data: bytes, length: int) -> tuple[int, int]:
        """Rows and columns, or frames and 1."""
        shape = arrays.parse_header(data)[0]
        return shape[0], shape[1] if len(shape) == 2 else 1

    def count_tokens(self, length, a, b) -> np.ndarray:
        """Tokens (N,) of training views of members of these shapes."""
        return np.minimum(np.where(a > 0, a.astype(np.int64) * b, self.max_codes), self.max_codes) + 1

    def describe(self, raw: dict) -> dict | None:
        sequences = self.read(raw)
        return {"codes": sum(len(one) - 1 for one in sequences)} if sequences else None

    @property
    def learns(self) -> bool:
        """The codec is copied from its run before the first step."""
        return bool(self.config.codec) and not self.config.file

    @property
    def file(self) -> str:
        return self.config.file

    def fit(self, raws, stem: Path) -> Tokenizer:
        """The tokenizer with a copy of its codec, `STEM.safetensors`. Raises UserError."""
        from ..run_dir import codec

        codec.export(self.config.codec, f"{stem}.safetensors")
        return self.replace(file=f"{stem}.safetensors")

    def check(self) -> None:
        """Raises UserError where the codec has another codebook."""
        if self.config.file and (size := self._codec().codebook_size) != self.config.codebook_size:
            raise UserError(f"{self.config.codec or self.config.file} has {size} codes: set codebook_size to that")

    def _codec(self) -> Any:
        """The codec: from `file`, or from the user's own run. Raises UserError."""
        from ..run_dir import codec

        if self.config.file:
            return codec.load(self.config.file)
        if not self.config.codec:
            raise UserError("codes cannot be decoded without a codec: set `codec` of their tokenizer to its run")
        return codec.load_own(self.config.codec)

    def generation(self) -> base.Generation:
        positions = _line(self.config.length) if self.config.length else _grid(self.config.rows, self.config.columns)
        return base.Generation((self.begin,), None, self.max_codes + 1, _after_begin(positions))

    def decode(self, ids: list[int]) -> Any:
        """A PIL picture of rows x columns codes, or (waveform (T,), sample rate); the begin token may be among the ids.

        Raises UserError without a codec.
        """
        codec = self._codec()
        codes = torch.tensor([i for i in ids if i != self.begin], dtype=torch.long)
        if not len(codes) or int(codes.min()) < 0 or int(codes.max()) >= codec.codebook_size:
            raise ValueError(f"codes are at least one number from 0 to {codec.codebook_size - 1}")
        if not self.config.length:
            if len(codes) != self.max_codes:
                raise ValueError(f"{len(codes)} codes are no picture of {self.config.rows} x {self.config.columns}")
            position = _grid(self.config.rows, self.config.columns)
            return codec.tokenizer.render(codec.decode(codes, [position]), position)
        windows = [_line(len(part)) for part in codes.split(codec.tokenizer.config.max_tokens)]
        content = codec.decode(codes, windows)
        return codec.tokenizer.render(content, _line(len(codes)), self.vocoder)

    def embedder(self, width: int) -> nn.Module:
        return base.EmbedIds(self.config.codebook_size + 1, width)

    def predictor(self, width: int) -> nn.Module:
        return base.PredictIds(self.config.codebook_size, width, ignored=self.begin)


@functools.lru_cache(maxsize=1024)
def _grid(rows: int, columns: int) -> Tensor:
    """(rows * columns, 3). It is cached and shared: do not write to it."""
    position = torch.zeros(rows, columns, 3)
    position[..., 1] = torch.arange(rows)[:, None]
    position[..., 2] = torch.arange(columns)
    return position.flatten(0, 1)


@functools.lru_cache(maxsize=1024)
def _line(length: int) -> Tensor:
    """(length, 3). It is cached and shared: do not write to it."""
    return F.pad(torch.arange(length, dtype=torch.float32)[:, None], (0, 2))


def _after_begin(position: Tensor) -> Tensor:
    """(N + 1, 3): the begin token's position, then these (N, 3) one step of time later."""
    return torch.cat([torch.zeros(1, 3), position + torch.tensor([1.0, 0.0, 0.0])])
