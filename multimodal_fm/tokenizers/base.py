"""What a file of this folder offers: `Tokenizer`, all that is special about one modality."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import nn

from ..tokens import Tokens


@runtime_checkable
class Tokenizer(Protocol):
    """Turns what one modality has of a sample into tokens, and tokens into vectors and losses.

    A subclass sets `Config`, a dataclass of its settings, and `extensions`, the member endings that it reads, and
    defines `read`, `embedder` and `predictor`. The other methods are hooks with a default.
    """

    Config: Any
    extensions: tuple[str, ...]

    def __init__(self, config: Any = None):
        self.config = self.Config() if config is None else config

    @property
    def name(self) -> str:
        """What a configuration calls it: the file of this folder, or the import path of a file elsewhere."""
        return type(self).__module__.removeprefix(f"{__package__}.")

    def __eq__(self, other) -> bool:
        return type(self) is type(other) and self.config == other.config

    def replace(self, **settings) -> Tokenizer:
        """The tokenizer with some settings changed."""
        return type(self)(dataclasses.replace(self.config, **settings))

    def read(self, raw, generator: Random | None = None) -> list[Tokens]:
        """The sequences of one input; with a generator the one random view that training reads.

        `raw` maps the endings of a sample's members to bytes, or is what a user passed. Raises SampleError.
        """
        raise NotImplementedError

    def embedder(self, width: int) -> nn.Module:
        """A module from raw content (N, ...) to vectors (N, width)."""
        raise NotImplementedError

    def predictor(self, width: int) -> nn.Module:
        """A module that scores vectors (M, width) against raw content (M, ...): one loss a token (M,)."""
        raise NotImplementedError

    @property
    def learns(self) -> bool:
        """Whether `fit` has to be called before the first step."""
        return False

    def fit(self, raws, stem) -> Tokenizer:
        """The tokenizer after it has learned from the members `raws` of samples; it keeps what it learned in one file,
        `stem` and an ending."""
        return self

    @property
    def file(self) -> str:
        """The file that holds what was learned; empty where there is none."""
        return ""

    def check(self) -> None:
        """Raises UserError where what was learned is missing or does not fit the settings."""

    def split_inputs(self, raw: dict) -> list:
        """The inputs that a sample's members hold and that evaluation embeds one by one. Raises SampleError."""
        return [raw] if raw else []

    def measure(self, data: bytes, length: int) -> tuple[int, int]:
        """Two numbers that say how large a member is, read from its header, for the index of a shard.

        `data` is the first megabytes of the member, `length` its bytes.
        """
        return 0, 0

    def count_tokens(self, length: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
        """At most how many tokens (N,) a training view has of members of these bytes and measures; None: not known."""
        return None

    def describe(self, raw: dict) -> Any:
        """What the members are, in plain data, after all of them was read as strictly as in training; None where there
        are none. Raises SampleError."""
        views = self.read(raw)
        return {"tokens": sum(map(len, views))} if views else None

    def toy(self) -> Tokenizer:
        """A cheaper one, for a run at toy size."""
        return self
