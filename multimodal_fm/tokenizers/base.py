"""What a file of this folder offers: `Tokenizer`, all that is special about one modality."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
from torch import Tensor, nn

from ..errors import UserError
from ..losses.cross_entropy import linear_cross_entropy
from ..tokens import Tokens, constant


@dataclasses.dataclass(frozen=True)
class Generation:
    """How a sequence of a modality is written token by token."""

    first: tuple[int, ...]  # ids that every sequence begins with
    end: int | None  # the id that ends a sequence; None: it has `length` tokens
    length: int  # tokens of a sequence: the most, or with `end` None exactly so many
    positions: Tensor  # (length, 3): time, row and column of each token


class Reconstructor(nn.Module):
    """The last layer of an autoencoder: from vectors (M, width) to values (M, V), which stand for raw content.

    A subclass defines `forward`, `target` and `content`.
    """

    quality = "snr"  # the name of what `decibels` returns

    def target(self, content: Tensor) -> Tensor:
        """The values (M, V) that stand for raw content (M, ...), in the tokenizer's own scale."""
        raise NotImplementedError

    def content(self, values: Tensor) -> Tensor:
        """The raw content (M, ...) that values (M, V) stand for: the inverse of `target`."""
        raise NotImplementedError

    def decibels(self, error: Tensor, energy: Tensor) -> Tensor:
        """The quality of sequences (S,) by the mean squares (S,) of their error and of their values.

        A sequence without any error has 100 dB.
        """
        return 10 * (energy.clamp(min=1e-10) / error.clamp(min=1e-10 * energy.clamp(min=1e-10))).log10()


@runtime_checkable
class Tokenizer(Protocol):
    """Turns what a sample has of one modality into tokens, and tokens into vectors and losses.

    A subclass sets `Config`, a dataclass of its settings, and `extensions`, the endings of the members that it reads,
    and defines `read`, `embedder` and `predictor`. The other methods are hooks with a default.
    """

    Config: ClassVar[Any]
    config: Any
    extensions: tuple[str, ...]
    augmentations: ClassVar[tuple[str, ...]] = ()  # settings that only change how `read` varies a training view
    half_precision: ClassVar[bool] = False  # whether raw content may go to a GPU in float16

    def __init__(self, config: Any = None):
        self.config = self.Config() if config is None else config

    @property
    def name(self) -> str:
        """The name in a configuration: the file of this folder, or the import path of a file elsewhere."""
        return type(self).__module__.removeprefix(f"{__package__}.")

    def __eq__(self, other) -> bool:
        return type(self) is type(other) and self.config == other.config

    def replace(self, **settings) -> Self:
        """The tokenizer with some settings changed."""
        return type(self)(dataclasses.replace(self.config, **settings))

    def read(self, raw, generator: Random | None = None) -> list[Tokens]:
        """The sequences of one input: without a generator those that cover it, with one a random training view.

        `raw` maps the endings of a sample's members to bytes, or is what a user passed to `embed`. An empty list says
        that the sample has nothing of this modality. Raises SampleError.
        """
        raise NotImplementedError

    def embedder(self, width: int) -> nn.Module:
        """A module from raw content (N, ...) to vectors (N, width)."""
        raise NotImplementedError

    def predictor(self, width: int) -> nn.Module:
        """A module that scores vectors (M, width) against raw content (M, ...): one loss a token, (M,)."""
        raise NotImplementedError

    def generation(self) -> Generation | None:
        """How sequences of this modality are generated; None where they cannot be (raw patches)."""
        return None

    def decode(self, ids: list[int]) -> Any:
        """What the ids of one sequence stand for: a string, a picture, a sound."""
        raise TypeError(f"{self.name}: its content is no ids to decode")

    @property
    def sentinels(self) -> Sequence[int]:
        """Ids that stand in no input, in order: each marks a span that was taken out of one (Raffel et al. 2020)."""
        return ()

    def sentence_ends(self, ids: Tensor) -> Tensor | None:
        """Which of the ids (N,) end a sentence, as bool (N,); None where this modality has no sentences."""
        return None

    def reconstructor(self, width: int) -> Reconstructor | None:
        """What an autoencoder ends with that makes raw content; None where raw content is ids."""
        return None

    def render(self, content: Tensor, position: Tensor) -> Any:
        """What raw content (N, ...) at these positions (N, 3) shows, the inverse of `read`: a picture, a sound. None
        where it shows nothing."""
        return None

    def prompt(self) -> Tokens | None:
        """Learned tokens that stand before each sequence, whatever it is of; None where there are none."""
        return None

    @property
    def learns(self) -> bool:
        """Whether `fit` has to be called before the first step."""
        return False

    def fit(self, raws, stem) -> Tokenizer:
        """The tokenizer after it has learned from `raws`, members of samples.

        What it learned is kept in one file, `stem` and an ending.
        """
        return self

    @property
    def file(self) -> str:
        """The file that holds what was learned; empty where there is none."""
        return ""

    def check(self) -> None:
        """Raises UserError where what was learned is missing or does not fit the settings."""

    def split_inputs(self, raw: dict) -> list:
        """The inputs among a sample's members, which evaluation embeds one by one. Raises SampleError."""
        return [raw] if raw else []

    def measure(self, data: bytes, length: int) -> tuple[int, int]:
        """Two numbers that say how large a member is, read from its header, for the index of a shard.

        `data` is the first megabytes of the member, `length` its size in bytes.
        """
        return 0, 0

    def count_tokens(self, length: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
        """Tokens (N,) of a training view of members of these sizes in bytes and measures; None: not known."""
        return None

    def extent(self) -> tuple[int, int, int] | None:
        """How many times, rows and columns the positions of a sequence can have; None: not known."""
        return None

    def describe(self, raw: dict) -> Any:
        """What the members are, in plain data, after reading all of them as strictly as training does; None where there
        are none. Raises SampleError."""
        sequences = self.read(raw)
        return {"tokens": sum(map(len, sequences))} if sequences else None

    def toy(self) -> Tokenizer:
        """A cheaper one, for a run at toy size."""
        return self


def find_prompt(tokenizers: dict[str, Tokenizer]) -> Tokens | None:
    """The learned tokens that stand before each sequence of a model, with their modality; None where there are none."""
    for number, tokenizer in enumerate(tokenizers.values()):
        if (prompt := tokenizer.prompt()) is not None:
            return prompt.replace(modality=constant(number, len(prompt)))
    return None


def override_augmentation(tokenizers: dict[str, Tokenizer], augment: dict[str, dict], source: str) -> dict:
    """The tokenizers by modality with a source's own augmentation settings, `augment`. Raises UserError."""
    changed = dict(tokenizers)
    for modality, settings in augment.items():
        here = f"sources.{source}.augment.{modality}"
        if modality not in tokenizers:
            raise UserError(f"{here}: there is no tokenizer {modality!r} (there are: {', '.join(tokenizers)})")
        known = tokenizers[modality].augmentations
        if unknown := [name for name in settings if name not in known]:
            raise UserError(f"{here}.{unknown[0]}: no augmentation of {modality} ({', '.join(known) or 'it has none'})")
        try:
            changed[modality] = tokenizers[modality].replace(**settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"{here}: {error}") from None
    return changed


class EmbedIds(nn.Embedding):
    """Ids (N,) -> (N, D)."""

    def __init__(self, num_ids: int, width: int):
        super().__init__(num_ids, width)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, content: Tensor) -> Tensor:
        return self.weight.index_select(0, content)


class PredictIds(nn.Module):
    """Cross-entropy (M,), in nats, of ids (M,) under vectors (M, D).

    ignored: an id without a logit, which costs nothing, such as one that opens each sequence for sure.
    """

    def __init__(self, num_ids: int, width: int, ignored: int = -100):
        super().__init__()
        self.ignored, self.logits = ignored, nn.Linear(width, num_ids)
        nn.init.normal_(self.logits.weight, std=0.02)
        nn.init.zeros_(self.logits.bias)

    def forward(self, vectors: Tensor, content: Tensor) -> Tensor:
        return linear_cross_entropy(vectors, self.logits.weight, self.logits.bias, content, self.ignored)
