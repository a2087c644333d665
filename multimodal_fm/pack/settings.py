"""What a pack is asked for; what must be equal for a pack to go on where another one stopped."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field

from ..errors import UserError

DEDUP = ("none", "exact", "near")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Settings:
    """Raises UserError where something cannot be."""

    sources: list[str]
    image_column: str = ""
    text_column: str = ""
    audio_column: str = ""
    label_column: str = ""
    key_column: str = ""
    longest_side: int = 0  # pixels; 0: pictures keep their bytes
    rate: int = 0  # samples a second; 0: sounds keep their bytes
    shard_size: int = 256_000_000  # bytes
    split: list[float] = field(default_factory=lambda: [1.0])  # train, validation, test
    group: str = ""  # the field whose equal values stay on one side of the split
    dedup: str = "exact"
    piece_bytes: int = 2000

    def __post_init__(self):
        if not self.sources:
            raise UserError("give at least one SOURCE to pack")
        if self.dedup not in DEDUP:
            raise UserError(f"--dedup is one of {', '.join(DEDUP)}, not {self.dedup!r}")
        if not 1 <= len(self.split) <= 3 or min(self.split) <= 0 or not math.isclose(sum(self.split), 1, abs_tol=1e-6):
            raise UserError("--split is up to three shares above 0 that add up to 1, as in 0.9,0.05,0.05")
        if self.longest_side and not 16 <= self.longest_side <= 65_535:
            raise UserError("--longest-side is from 16 to 65535 pixels")
        if self.rate and not 1000 <= self.rate <= 384_000:
            raise UserError("--rate is from 1000 to 384000 samples a second")
        if self.shard_size < 10_240:
            raise UserError("--shard-size is at least 10KB, as in 256MB")
        if self.piece_bytes < 16:
            raise UserError("--piece-bytes is at least 16")

    @property
    def columns(self) -> dict[str, str]:
        """The columns that were named, by what they hold."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name.endswith("_column")}
        return {name.removesuffix("_column"): value for name, value in found.items() if value}


def parse_split(text: str) -> list[float]:
    """[0.9, 0.05, 0.05] of `0.9,0.05,0.05`. Raises UserError."""
    try:
        return [float(share) for share in text.split(",")]
    except ValueError:
        raise UserError(f"--split is shares as in 0.9,0.05,0.05, not {text!r}") from None


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str) -> int:
    """Bytes of `256MB`, `1.5GiB` or `1000000`. Raises UserError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?|)b?\s*", text.lower())
    if not found:
        raise UserError(f"--shard-size is bytes as in 256MB or 1GiB, not {text!r}")
    return int(float(found[1]) * UNITS[found[2]])
