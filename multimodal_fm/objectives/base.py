"""What a file of this folder offers: `Objective`, which arranges a sample and scores the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch, Example, Pairs, Sample, Targets
from ..config import Plugin
from ..tokenizers.base import Tokenizer
from ..tokens import Tokens


@dataclass
class Config:
    """What every objective's settings begin with."""

    weight: float = 1.0  # of its loss, times the task's weight

    def __post_init__(self):
        if not 0 <= self.weight < float("inf"):
            raise ValueError("weight is a number from 0 up")


class Objective(nn.Module):
    """A subclass sets `Config` and defines `arrange` and `loss`; the rest are hooks with a default.

    It owns what only training needs (predictors, decoders, temperatures); the model knows nothing of it. `modalities`
    are those that the objective's task reads.
    """

    Config: Any = Config
    whole_step = False  # compares the sequences of a whole step: defines `features` and `compare` in place of `loss`
    uses_groups = False  # whether it asks which samples mean the same

    def __init__(self, config: Any, model, modalities: list[str]):
        super().__init__()
        self.config, self.modalities = config, list(modalities)

    @staticmethod
    def arrange(config: Any, sample: Sample, generator: torch.Generator | None = None) -> Example:
        """What the model reads of a sample and what it must predict: a pure function, called in the loader.

        `config` is what `bind` returned.
        """
        raise NotImplementedError

    @staticmethod
    def bind(config: Any, heads: dict[str, Plugin]) -> Any:
        """What `arrange` and `read_label` get as their `config`: the settings, and what they must know of the heads."""
        return config

    label_extensions: tuple[str, ...] = ()  # members of a sample that `read_label` reads

    @staticmethod
    def read_label(
        config: Any, raw: dict[str, bytes], tokens: dict[str, Tokens], tokenizers: dict[str, Tokenizer]
    ) -> Any:
        """The label of a sample, from its members and what was read of its modalities. Raises SampleError.

        `config` is what `bind` returned. It becomes `Sample.label`.
        """
        return None

    @staticmethod
    def min_modalities(config: Any, modalities: list[str]) -> int:
        """A sample with fewer of the task's modalities teaches it nothing."""
        return 1

    @staticmethod
    def draws_views(config: Any, modality: str) -> bool:
        """Whether training reads a random view of this modality, such as one window of a long text; else the first."""
        return True

    def loss(self, output, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar that adds up over the microbatches of a step, and figures for the metrics that add up likewise."""
        raise NotImplementedError

    def features(self, output, targets: Targets) -> Tensor:
        """`whole_step`: what is compared, a row a sequence of the task (S, E)."""
        raise NotImplementedError

    def compare(self, features: Tensor, pairs: dict[str, Pairs]) -> tuple[Tensor, dict[str, Tensor]]:
        """`whole_step`: the loss of the features (S, E) of all sequences of the step, and figures for the metrics."""
        raise NotImplementedError

    def has_likelihood(self, modality: str) -> bool:
        """Whether `score` gives the likelihood of a sequence of this modality, token by token."""
        return False

    def score(self, output, targets: Targets, modality: str) -> Tensor:
        """The negative log-likelihood in nats of each target token of a modality (M,)."""
        raise NotImplementedError

    @staticmethod
    def plan(config: Any, batch: Batch, targets: Targets) -> Any:
        """What `loss` needs to know of a microbatch and is better worked out on the CPU, in the loader.

        Anything with a method `to(device)`, or None. It travels as `targets.plan`.
        """
        return None

    @staticmethod
    def one_sequence_per_modality(config: Any) -> bool:
        """Whether `arrange` keeps each modality of a sample in a sequence of its own."""
        return True

    @staticmethod
    def problems(config: Any, modalities: list[str]):
        """What is wrong with the settings in a task over these modalities: pairs of a key and a sentence."""
        return ()

    @torch.no_grad()
    def after_update(self) -> None:
        """Called after each update of the weights, to keep parameters in bounds."""
