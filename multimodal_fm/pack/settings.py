"""The settings of a pack. A pack is resumed only with the settings that it began with."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field

from ..errors import UserError

DEDUP = ("none", "exact", "near")
SPLITS = ("train", "validation", "test")
CODES = re.compile(r"(?:[a-z0-9_]{1,14}\.)?codes\.npy")  # the endings of members that hold codes


@dataclass(frozen=True)
class Settings:
    """What to pack and how. Raises UserError for a value that is out of range."""

    sources: list[str]
    image_column: str = ""
    text_column: str = ""
    audio_column: str = ""
    label_column: str = ""
    key_column: str = ""
    longest_side: int = 0  # pixels; 0 keeps images as they are
    rate: int = 0  # samples a second; 0 keeps audio as it is
    shard_size: int = 256_000_000  # bytes
    split: list[float] = field(default_factory=lambda: [1.0])  # shares of train, validation and test
    group: str = ""  # samples with an equal value in this field go to the same split
    dedup: str = "exact"
    piece_bytes: int = 2000  # longer text without media is cut into pieces of at most this size
    text_block: int = 0  # texts that follow each other are joined to blocks of so many bytes; 0: each is a sample
    allow_outside: bool = False  # tables may name files outside of their folder and hosts on private networks
    codes: str = ""  # a run whose codec makes codes of a modality; empty: none are made
    codes_member: str = "codes.npy"  # the ending of the members that they become

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
        if self.text_block and self.text_block < 16:
            raise UserError("--text-block is at least 16 bytes, or 0, where texts are not joined")
        if not CODES.fullmatch(self.codes_member):
            raise UserError("--codes-member is codes.npy, or a name before it, as in audio.codes.npy")

    @property
    def max_text(self) -> int:
        """The bytes of a longer text's pieces: as long as a block, so that hardly a block holds two of one document."""
        return self.text_block or self.piece_bytes

    @property
    def columns(self) -> dict[str, str]:
        """The columns that the user named, by their role: image, text, audio, label, key."""
        roles = [f.name.removesuffix("_column") for f in dataclasses.fields(self) if f.name.endswith("_column")]
        return {role: name for role in roles if (name := getattr(self, f"{role}_column"))}


def parse_split(text: str) -> list[float]:
    """Parse `0.9,0.05,0.05`. Raises UserError."""
    try:
        return [float(share) for share in text.split(",")]
    except ValueError:
        raise UserError(f"--split is shares as in 0.9,0.05,0.05, not {text!r}") from None
