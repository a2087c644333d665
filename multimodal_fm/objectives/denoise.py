"""Restore a sequence, or what was taken out of it, from a noisy version of it: BART, T5 and UL2, by the noise.

The noisy source and the target are one sequence with the weights of both sides shared: the source's tokens read each
other, the target is opened by a start token and written token by token (`base.shift_right`). A noise is one of

    infilling  spans of Poisson(3) tokens are each replaced by one mask token, spans of no token insert one, and the
               target is the whole original (BART; Lewis et al. 2019, section 2.2), with `permute_sentences` too
    spans      spans are each replaced by a sentinel, and the target is sentinel 0, span 0, sentinel 1, span 1, ..., a
               last sentinel (T5; Raffel et al. 2020, section 3.1.4)
    prefix     the source is cut off at random, and the target is the rest (the S-denoiser of UL2; Tay et al. 2022)

and several of them, by weight, a mixture of denoisers: one is drawn for each sample (UL2, section 3.1.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..batch import Example, Sample
from ..config import Plugin
from ..errors import UserError
from ..tokenizers.base import Generation, Tokenizer
from ..tokens import Tokens, constant
from . import base

MASK, SENTINEL = -1, -2  # in place of a token's row: the mask token; sentinel k is SENTINEL - k


@dataclass
class Noise:
    """One way to make a source and a target of a sequence."""

    kind: Literal["infilling", "spans", "prefix"] = "spans"  # BART's, T5's, or the rest of a sequence from its start
    mask_ratio: float = 0.15  # of the tokens, those that are taken out; prefix: the mean share that is the target
    mean_span: float = 3.0  # tokens of a span in the mean
    permute_sentences: bool = False  # infilling: the source's sentences stand in a random order
    prefix: str = ""  # text that opens the source: a mode token of UL2, such as [R], or the name of a task
    weight: float = 1.0  # of the samples, relative to the other noises' weights

    def __post_init__(self):
        if not 0 <= self.mask_ratio <= 1 or not 1 <= self.mean_span < math.inf or not 0 <= self.weight < math.inf:
            raise ValueError("mask_ratio is from 0 to 1, mean_span a number from 1 up, weight one from 0 up")
        if self.permute_sentences and self.kind != "infilling":
            raise ValueError("permute_sentences goes with kind: infilling, whose target is the whole original")


@dataclass
class Config(base.Config):
    noises: dict[str, Noise] = field(default_factory=lambda: {"spans": Noise()})
    """By a name of yours; one is drawn for each sample. Without them T5's."""

    def __post_init__(self):
        super().__post_init__()
        if not sum(noise.weight for noise in self.noises.values()) > 0:
            raise ValueError("noises are at least one with a weight above 0")


@dataclass
class Bound:
    """The settings, and the tokenizers by modality."""

    config: Config
    tokenizers: dict[str, Tokenizer]


class Objective(base.TokenObjective):
    Config = Config

    def __init__(self, config: Config, model, modalities: list[str]):
        super().__init__(config, model, modalities)
        for modality in modalities:
            check_noises(config, modality, model.tokenizers[modality])
        self.tokenizers: dict[str, Tokenizer] = {m: model.tokenizers[m] for m in modalities}
        self.predictors = nn.ModuleDict({m: model.predictor(m, model.width) for m in modalities})

    @staticmethod
    def problems(config: Config, modalities: list[str]):
        if any(noise.prefix for noise in config.noises.values()) and modalities != ["text"]:
            yield "noises", "with a `prefix` are for tasks over text alone"

    @staticmethod
    def bind(config: Config, heads: dict[str, Plugin], tokenizers: dict[str, Tokenizer] | None = None) -> Bound:
        return Bound(config, tokenizers or {})

    @staticmethod
    def arrange(config: Bound, sample: Sample, generator: torch.Generator | None = None) -> Example:
        """Each modality is a sequence: the noisy source with order 0, then the target with orders 1, 2, ..."""
        noises = list(config.config.noises.values())
        weights = torch.tensor([float(noise.weight) for noise in noises])
        drawn = torch.multinomial(weights, 1, generator=generator)
        noise, num_rows = noises[int(drawn)], 0
        inputs, hidden, targets, answers = [], [], [], []
        separate = base.separate(sample.tokens.values())
        for modality, tokens in zip(sample.tokens, separate, strict=True):
            pieces, target, start = noisy_pair(noise, tokens, config.tokenizers[modality], generator)
            num_rows += sum(len(piece) for piece, _ in pieces)
            read, predicted, rows = base.shift_right(target, [piece for piece, _ in pieces], num_rows)
            pieces.append((read, start[:-1]))
            num_rows += len(read)
            inputs += [piece for piece, _ in pieces]
            hidden += [hide if hide.any() else None for _, hide in pieces]
            targets.append(predicted)
            answers.append(rows)
        return Example(inputs, hidden, targets, answers, sample.group)

    def writes(self) -> dict[str, list[str]]:
        """A sequence that goes on after, or restores, one of its own modality; what spans held alone is no sequence."""
        able = any(noise.kind != "spans" for noise in self.config.noises.values())
        return {modality: [modality] for modality in self.modalities} if able else {}

    def restores(self) -> list[str]:
        return self.modalities if any(n.kind == "infilling" for n in self.config.noises.values()) else []

    def arrange_prefix(self, prefix: dict[str, Tokens], target: str, holes: Tensor | None = None) -> base.Prefix:
        """The source, opened as that noise opens it which cuts off (or, for holes and where there is none, infills)."""
        if target not in prefix:
            return base.Prefix([], 1, 0.0)
        kinds = {noise.kind: noise for noise in reversed(self.config.noises.values())}
        noise = kinds["infilling"] if holes is not None or "prefix" not in kinds else kinds["prefix"]
        tokens, tokenizer = prefix[target], self.tokenizers[target]
        written = tokenizer.generation()
        assert written is not None
        rows = torch.arange(len(tokens)) if holes is None else torch.where(holes, MASK, torch.arange(len(tokens)))
        first = len(written.first)
        core = rows[first : first + _core_length(written, len(tokens))]
        pieces, time = render_source(noise, tokens, core, tokenizer)
        if not first:  # the mask token that opens the target is read too
            start, hide = render(tokens, torch.tensor([MASK]), (), time)
            pieces.append((start.replace(order=constant(base.next_order(p for p, _ in pieces), 1)), hide))
            time += is_rising(tokens)
        inputs, hidden = [piece for piece, _ in pieces], [hide if hide.any() else None for _, hide in pieces]
        return base.Prefix(inputs, base.next_order(inputs), time, hidden)


def check_noises(config: Config, modality: str, tokenizer: Tokenizer) -> None:
    """Raises ValueError where a modality does not allow the noises, UserError where it needs another setting."""
    written = tokenizer.generation()
    if written is None:
        raise ValueError(f"denoise: {modality} is raw patches, which have no ids to write one by one; see `masked`")
    for name, noise in config.noises.items():
        if noise.permute_sentences and tokenizer.sentence_ends(torch.zeros(0, dtype=torch.long)) is None:
            raise ValueError(f"denoise: noises.{name}.permute_sentences: {modality} has no sentences")
        needed = count_spans(noise, _core_length(written, written.length))[1] + 1
        if noise.kind == "spans" and len(tokenizer.sentinels) < needed:
            raise UserError(
                f"denoise: noises.{name} needs {needed} sentinels, {modality} has {len(tokenizer.sentinels)}: set "
                f"model.tokenizers.{modality}.sentinels={needed}"
            )


def noisy_pair(noise: Noise, tokens: Tokens, tokenizer: Tokenizer, generator: torch.Generator | None):
    """What a noise makes of a sequence (N,): the source, pairs of a piece and what of it is hidden; the target, which
    begins with the token that opens it; and what of the target is hidden."""
    written = tokenizer.generation()
    assert written is not None
    first, length = len(written.first), _core_length(written, len(tokens))
    if noise.kind == "infilling":
        source, target = infill(noise, length, generator), torch.arange(length)
        if noise.permute_sentences:
            ends = tokenizer.sentence_ends(tokens.content[first : first + length])
            assert ends is not None
            source = torch.where(source < 0, source, permute_sentences(ends, generator)[source.clamp(min=0)])
    elif noise.kind == "spans":
        source, target = take_spans(mask_spans(noise, length, generator))
    else:
        source, target = cut_off(noise, length, generator)
    source, target = (torch.where(rows < 0, rows, rows + first) for rows in (source, target))
    start = torch.tensor([first - 1 if first else MASK])  # a modality without a first id starts with the mask token
    pieces, time = render_source(noise, tokens, source, tokenizer)
    closing = torch.arange(first + length, len(tokens))
    target, hidden = render(tokens, torch.cat([start, target, closing]), tokenizer.sentinels, time)
    return pieces, target, hidden


def render_source(noise: Noise, tokens: Tokens, rows: Tensor, tokenizer: Tokenizer):
    """The source of which these rows (M,) of a sequence stand between its first ids, or the noise's prefix, and its
    end: pairs of a piece and what of it is hidden, and the time at which the target begins."""
    written = tokenizer.generation()
    assert written is not None
    first, pieces, time = len(written.first), [], 0.0
    opening, closing = torch.arange(first), torch.arange(first + _core_length(written, len(tokens)), len(tokens))
    if noise.prefix:
        prefix = tokenizer.read(noise.prefix)[0]
        prefix = prefix.select(torch.arange(first + _core_length(written, len(prefix))))
        same = {name: constant(int(getattr(tokens, name)[0]), len(prefix)) for name in ("modality", "sequence")}
        prefix = prefix.replace(**same)
        pieces.append((prefix, torch.zeros(len(prefix), dtype=torch.bool)))
        opening, time = opening[:0], base.next_time(prefix)
    rows = torch.cat([opening, rows, closing if noise.kind != "prefix" else closing[:0]])  # cut off: it has no end
    if len(rows):
        pieces.append(render(tokens, rows, tokenizer.sentinels, time))
        time = base.next_time(pieces[-1][0])
    return pieces, time


def _core_length(written: Generation, length: int) -> int:
    """How many of a sequence's tokens stand between its first ids and its end."""
    return length - len(written.first) - (written.end is not None)


def count_spans(noise: Noise, length: int) -> tuple[int, int]:
    """How many of `length` tokens T5 takes out, and in how many spans.

    Of two tokens or more at least one stays and one goes, and between two spans at least one token stays.
    """
    length = max(length, 2)
    count = min(max(round(length * noise.mask_ratio), 1), length - 1)
    return count, min(max(round(count / noise.mean_span), 1), length - count)


def mask_spans(noise: Noise, length: int, generator: torch.Generator | None) -> Tensor:
    """Which tokens (length,) are taken out: T5's `random_spans_noise_mask`. Kept and taken spans alternate, a kept one
    first; the lengths of each are all ways to cut their sum equally likely."""
    count, spans = count_spans(noise, length)
    taken = _cut_randomly(count, spans, generator)
    kept = _cut_randomly(max(length, 2) - count, spans, generator)
    lengths = torch.stack([kept, taken], 1).flatten()
    return (torch.arange(2 * spans) % 2 == 1).repeat_interleave(lengths)[:length]


def _cut_randomly(total: int, parts: int, generator: torch.Generator | None) -> Tensor:
    """Lengths (parts,) above 0 that add up to `total`, each such cut equally likely."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    return torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([total]))


def take_spans(taken: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a source with sentinels in place of the spans `taken` (N,), and of the target that names them."""
    starts = taken & ~torch.cat([torch.zeros(1, dtype=torch.bool), taken[:-1]])
    rows, spans = torch.arange(len(taken)), int(starts.sum())
    source = torch.where(starts, SENTINEL + 1 - starts.cumsum(0), rows)[~taken | starts]
    opens = starts[taken]
    place = torch.arange(len(opens)) + opens.cumsum(0)  # of each taken token in the target
    target = torch.empty(len(opens) + spans + 1, dtype=torch.long)
    target[place], target[place[opens] - 1] = rows[taken], SENTINEL - torch.arange(spans)
    target[-1] = SENTINEL - spans
    return source, target


def infill(noise: Noise, length: int, generator: torch.Generator | None) -> Tensor:
    """The rows of a source in which spans are each one mask token: lengths are drawn from Poisson(mean_span) until
    they cover `mask_ratio` of the tokens, the last one cut to fit; one of length 0 inserts a mask token."""
    count, drawn = round(length * noise.mask_ratio), torch.zeros(0, dtype=torch.long)
    while drawn.sum() < count:
        more = torch.poisson(torch.full((count,), float(noise.mean_span)), generator=generator).long()
        drawn = torch.cat([drawn, more])
    drawn = drawn[: int((drawn.cumsum(0) < count).sum()) + 1] if count else drawn
    spans, inserted = drawn[drawn > 0], int((drawn == 0).sum())
    if count:
        spans[-1] -= spans.sum() - count
        slots = length - count + 1  # before, between and after the tokens that stay: no two spans touch
        spans = torch.cat([spans[: slots - 1], spans[slots - 1 :].sum()[None]]) if len(spans) > slots else spans
        before = torch.randperm(slots, generator=generator)[: len(spans)].sort().values
        starts = before + spans.cumsum(0) - spans
        rows = torch.arange(length)
        change = torch.zeros(length + 1, dtype=torch.long)
        change[starts] += 1
        change[starts + spans] -= 1
        taken = change.cumsum(0)[:-1] > 0
        opens = torch.isin(rows, starts)
        source = torch.where(opens, MASK, rows)[~taken | opens]
    else:
        source = torch.arange(length)
    at = torch.randint(len(source) + 1, (inserted,), generator=generator)
    keys = torch.cat([torch.arange(len(source)) + 0.5, at.float()])
    return torch.cat([source, torch.full((inserted,), MASK)])[torch.argsort(keys, stable=True)]


def permute_sentences(ends: Tensor, generator: torch.Generator | None) -> Tensor:
    """The tokens (N,) with their sentences, which close where `ends` (N,) says so, in a random order."""
    sentence = ends.long().cumsum(0) - ends.long()
    place = torch.randperm(int(sentence[-1]) + 1, generator=generator)  # of each sentence
    return torch.argsort(place[sentence], stable=True)


def cut_off(noise: Noise, length: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The rows of a source and of the target that goes on after it, whose share is uniform around the ratio, as far as
    0 or 1; of two tokens or more each side gets at least one."""
    reach = min(noise.mask_ratio, 1 - noise.mask_ratio)
    share = noise.mask_ratio + reach * (2 * float(torch.rand((), generator=generator)) - 1)
    count = min(max(round(share * length), 1), max(length - 1, 1))
    return torch.arange(length - count), torch.arange(length - count, length)


def render(tokens: Tokens, rows: Tensor, sentinels, time: float) -> tuple[Tokens, Tensor]:
    """The tokens at `rows` (M,) of a sequence, with masks and sentinels among them, and which are masks (M,).

    Time begins at `time`. Where it rises token by token it is counted anew, so that places say nothing about how many
    tokens were taken out or go where; the rows and columns of a grid stay. A mask or sentinel stands where the token
    after the last one would.
    """
    known, numbers = rows >= 0, torch.arange(len(rows))
    last = torch.where(known, numbers, -1).cummax(0).values
    after = torch.where(last < 0, 0, rows[last.clamp(min=0)] + 1).clamp(max=len(tokens) - 1)
    piece = tokens.select(torch.where(known, rows, after))
    marks = rows <= SENTINEL
    if marks.any():
        piece.content[marks] = torch.tensor(list(sentinels))[SENTINEL - rows[marks]].to(piece.content.dtype)
    times = numbers.float() if is_rising(tokens) else piece.position[:, 0]
    return piece.replace(position=torch.cat([(times + time)[:, None], piece.position[:, 1:]], 1)), rows == MASK


def is_rising(tokens: Tokens) -> bool:
    """Whether time rises token by token, as in text; else the tokens are a grid."""
    return bool((tokens.position[:, 0].diff() > 0).all())
