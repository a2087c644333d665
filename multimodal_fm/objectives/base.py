"""What a file of this folder offers: `Objective`, which arranges a sample and scores the answer; and the light decoder
that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..backbone import Config as BackboneConfig
from ..batch import Batch, Example, Pairs, Reading, Sample, Targets, plan_reading
from ..config import Plugin
from ..model import full
from ..tokenizers.base import Tokenizer
from ..tokens import Tokens, concatenate, constant
from ..transfer import move


@dataclass
class Config:
    """What every objective's settings begin with."""

    weight: float = 1.0  # of its loss, times the task's weight

    def __post_init__(self):
        if not 0 <= self.weight < float("inf"):
            raise ValueError("weight is a number from 0 up")


@dataclass(frozen=True)
class Prefix:
    """What is read before the first token of a modality is written."""

    inputs: list[Tokens]  # the pieces of one sequence, whose last row answers the first token
    order: int  # of the first token of the modality; the next ones rise one by one
    time: float  # what is added to the time of its tokens
    hidden: list[Tensor | None] = field(default_factory=list)  # of each piece, as in `Example`; empty: nothing

    @staticmethod
    def before(inputs: list[Tokens], hidden: Sequence[Tensor | None] = ()) -> Prefix:
        """The prefix of these pieces, after all of which order and time go on."""
        return Prefix(inputs, next_order(inputs), next_time(inputs[-1]) if inputs else 0.0, list(hidden))


@torch.no_grad()
def measure_spread(features: Tensor) -> dict[str, Tensor]:
    """Figures that tell a collapse of features (S, E): both fall where all come to be the same.

    `feature_std` is the root of their mean squared distance from their mean, 1 for unit vectors that are spread over
    the sphere, 0 for equal ones. `effective_rank` is the participation ratio of their covariance's eigenvalues, from 1
    to E, the effective rank of order 2 (Roy and Vetterli 2007), which needs no decomposition.
    """
    centered = features.float() - features.float().mean(0)
    covariance = centered.T @ centered / max(len(centered), 1)
    total = covariance.trace()
    return {"feature_std": total.sqrt(), "effective_rank": total.square() / covariance.square().sum().clamp(min=1e-30)}


class Objective(nn.Module):
    """A subclass sets `Config` and defines `arrange` and `loss`; the rest are hooks with a default.

    It owns what only training needs (predictors, decoders, temperatures); the model knows nothing of it. `modalities`
    are those that the objective's task reads.
    """

    Config: Any = Config
    predictors: nn.ModuleDict  # by modality, where it predicts tokens: `Tokenizer.predictor`
    whole_step = False  # compares the sequences of a whole step: defines `features` and `compare` in place of `loss`
    maxima: tuple[str, ...] = ()  # the figures of `compare` that are the largest of something, and do not add up
    uses_groups = False  # whether it asks which samples mean the same
    may_follow = False  # whether it may score what another objective arranged, as one with `whole_step` may
    teacher_layers = 0  # how many of the averaged model's last blocks it wants to see in `loss`, as `output.teacher`

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
    def bind(config: Any, heads: dict[str, Plugin], tokenizers: dict[str, Tokenizer] | None = None) -> Any:
        """What `arrange` and `read_label` get as their `config`: the settings, and what they must know of the heads and
        of the tokenizers by modality."""
        return config

    @staticmethod
    def prepare(config: Any, sample: Sample, generator: torch.Generator | None = None) -> Sample:
        """The sample as the first objective is to arrange it; the loader calls that of each objective in turn."""
        return sample

    @staticmethod
    def views(config: Any) -> int:
        """How many random readings of each modality of a sample it compares: further ones become `Sample.views`."""
        return 1

    @staticmethod
    def reads_other(config: Any, modalities: list[str]) -> list[str]:
        """The modalities that are read of a second sample of the same source and another group, `Sample.other`."""
        return []

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

    def compare(
        self, features: Tensor, pairs: dict[str, Pairs], rows: range | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`whole_step`: the loss of the features (S, E) of all sequences of the step, and figures for the metrics.

        rows: the features whose terms of the loss are worked out (None: all). Over ranges that cover all features the
        losses, the gradients and the figures, but for `maxima`, add up to those of all.
        """
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

    @staticmethod
    def misfit(config: Any, one_sequence_per_modality: bool) -> str:
        """Why it cannot score a reading of this kind, a sentence about it; empty where it can."""
        return "" if one_sequence_per_modality else "needs a sequence for each modality"

    def writes(self) -> dict[str, list[str]]:
        """The modalities that it can write token by token, each with those that may be read before."""
        return {}

    def restores(self) -> list[str]:
        """The modalities, among those it writes after themselves, of whose tokens holes may take the place."""
        return []

    def arrange_prefix(self, prefix: dict[str, Tokens], target: str, holes: Tensor | None = None) -> Prefix:
        """What is read before tokens of `target` are written: `prefix`, of modalities that `writes` names for it.

        Each token's row answers the next one, as in the objective's training. holes (N,): the tokens of
        `prefix[target]` that each stand for any number of tokens (`restores`); what stands there is not looked at.
        """
        raise NotImplementedError

    def fills(self) -> dict[str, list[str]]:
        """The modalities whose hidden tokens it can predict all at once, each with those that may be read with it."""
        return {}

    def arrange_holes(self, prefix: dict[str, Tokens], target: str, tokens: Tokens, hidden: Tensor) -> Example:
        """What is read so that the `hidden` (N,) among the `tokens` of a modality are predicted, beside a prefix.

        The targets are the hidden tokens; what stands in their place is not looked at.
        """
        raise NotImplementedError

    @torch.no_grad()
    def after_update(self) -> None:
        """Called after each update of the weights, to keep parameters in bounds."""

    @torch.no_grad()
    def update_statistics(self, skipped: Tensor, gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Called after each update, for what learns by counting rather than by a gradient, such as a codebook.

        skipped: 1 where the update was left out. gather: every rank's rows (n, ...), in the ranks' order, of a tensor
        that all ranks give. What is drawn from PyTorch's own generator is the same on all ranks.
        """


def by_modality(setting: Any, modality: str, default: Any) -> Any:
    """A setting that is one value for all modalities, or a map that names some of them; the others get `default`."""
    return setting.get(modality, default) if isinstance(setting, dict) else setting


def all_values(setting: Any) -> list:
    """The values of such a setting."""
    return list(setting.values()) if isinstance(setting, dict) else [setting]


def check_modalities(key: str, setting: Any, modalities: list[str]) -> Iterator[tuple[str, str]]:
    """What is wrong with such a setting in a task over these modalities, as `Objective.problems` says it."""
    if unknown := [name for name in (setting if isinstance(setting, dict) else ()) if name not in modalities]:
        yield key, f"names no modality of the task: {', '.join(unknown)} (there are: {', '.join(modalities)})"


def fuse(tokens: Iterable[Tokens]) -> list[Tokens]:
    """The pieces of one sequence, whose time goes on from each to the next."""
    pieces, time = [], 0.0
    for piece in tokens:
        pieces.append(delay(piece, time) if time else piece)
        time = next_time(pieces[-1])
    return pieces


def separate(tokens: Iterable[Tokens]) -> list[Tokens]:
    """The same, each a sequence of its own."""
    return [piece.replace(sequence=constant(number, len(piece))) for number, piece in enumerate(tokens)]


def delay(tokens: Tokens, time: float) -> Tokens:
    return tokens.replace(position=tokens.position + torch.tensor([time, 0.0, 0.0]))


def next_time(tokens: Tokens) -> float:
    return float(tokens.position[:, 0].max()) + 1


def next_order(pieces: Iterable[Tokens]) -> int:
    """The order of what may read all of these, and which none of them reads."""
    return max((int(piece.order.max()) for piece in pieces), default=-1) + 1


class DecodingObjective(Objective):
    """An objective that may leave tokens out of the backbone and predict them by a light Transformer, which reads what
    the backbone made of the others and a mask token for each target (MAE, He et al. 2022)."""

    def add_decoder(self, config: BackboneConfig, model, predicted: list[str]) -> None:
        """predicted: the modalities that are left out."""
        self.decoder_embed = nn.Linear(model.width, config.width, bias=False)
        self.mask_tokens = nn.ParameterDict({m: nn.Parameter(torch.randn(config.width) * 0.02) for m in predicted})
        self.decoder = Backbone(config, model.modalities)

    def decode(self, output, targets: Targets) -> dict[str, Tensor]:
        """The decoder's vectors (M, width) for the targets, by modality. `targets.plan` is what `plan_decoder` made."""
        if not targets.tokens:
            return {}
        plan: DecoderPlan = targets.plan
        reading = plan.reading
        visible = full(self.decoder_embed(output.tokens.content.index_select(0, plan.visible)))
        masks = [self.mask_tokens[m].to(visible.dtype).expand(len(t), -1) for m, t in targets.tokens.items()]
        vectors = torch.cat([visible, *masks]).index_select(0, reading.tokens.content)
        decoded = self.decoder(reading.tokens.replace(content=vectors), reading.attention, reading.routing).content
        rows = reading.rows[len(visible) :]
        answers = decoded.index_select(0, rows).split([len(tokens) for tokens in targets.tokens.values()])
        return dict(zip(targets.tokens, answers, strict=True))


@dataclass(frozen=True)
class DecoderPlan:
    """What the decoder reads: V visible tokens and M mask tokens, end to end."""

    visible: Tensor  # (V,): rows of the backbone's output
    reading: Reading

    def to(self, device) -> DecoderPlan:
        return move(self, device)


def plan_decoder(batch: Batch, targets: Targets) -> DecoderPlan:
    masks = concatenate([tokens.replace(content=tokens.sequence) for tokens in targets.tokens.values()])
    visible = torch.isin(batch.tokens.sequence, masks.sequence).nonzero()[:, 0]
    both = concatenate([batch.tokens.select(visible), masks])
    return DecoderPlan(visible, plan_reading(both, len(batch.by_modality.counts)))


class TokenObjective(Objective):
    """An objective whose targets are answered one by one by `predictors`, from rows of the backbone."""

    def loss(self, output, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over modalities of the mean over the step's target tokens; the figures are each modality's."""
        loss, figures = output.zero(), {}
        for modality in targets.tokens:
            mean = self.score(output, targets, modality).sum() / targets.counts[modality]
            loss = loss + mean / len(targets.counts)
            figures[modality] = mean.detach()
        return loss, figures

    def score(self, output, targets: Targets, modality: str) -> Tensor:
        vectors = output.tokens.content.index_select(0, targets.rows[modality])
        return self.predictors[modality](vectors, targets.tokens[modality].content)


def shift_right(target: Tokens, source: Sequence[Tokens], first_row: int) -> tuple[Tokens, Tokens, Tensor]:
    """How a target is read and predicted after a source: a prefix language model, which is sequence to sequence with
    the weights of both sides shared (Dong et al. 2019; Raffel et al. 2020, section 3.2.3).

    target: a sequence (L + 1,) that begins with the token that opens it. Returns what is read of it, all but its last
    token, with orders after those of the source, 1 ... L where these are all 0; what is predicted, all but its first
    token; and the rows (L,) that answer, where the target's first token is the row `first_row` of the example.
    """
    steps = torch.arange(len(target) - 1)
    read = target.select(steps).replace(order=steps + next_order(source))
    return read, target.select(steps + 1), steps + first_row
