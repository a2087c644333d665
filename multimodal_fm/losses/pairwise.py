"""InfoNCE and the sigmoid loss over all pairs of two sets of vectors, in memory that is linear in their number.

The table of cosines (A, B) is made tile by tile, twice: once for each row's and column's logarithm of a sum of
exponentials, and once more for the gradients (as FlashAttention does it, Dao et al. 2022; for InfoNCE Cheng et al.
2024, "Breaking the memory barrier"). The gradients are those of the plain formula.

A left vectors, B right vectors, E their length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = {"cpu": (512, 2048), "cuda": (4096, 8192)}  # rows and columns of a tile: 4 MB in float32, what a CPU caches


@dataclass(frozen=True)
class Matches:
    """Which of A left and B right vectors belong together.

    groups: (A,) and (B,); vectors of an equal group are never each other's negatives, and matches are of one group.
    columns: (A,) the right vector that matches each left one and (B,) the reverse; -1 where there is none.
    own: the left and the right vectors whose terms of the loss are worked out.
    """

    groups: tuple[Tensor, Tensor]
    columns: tuple[Tensor, Tensor]
    own: tuple[range, range]


def info_nce(
    left: Tensor, right: Tensor, log_scale: Tensor, matches: Matches, hard_negatives: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """InfoNCE (CLIP, Radford et al. 2021) of left (A, E) and right (B, E), in the mean of both directions.

    hard_negatives: negatives weigh exp(this times their cosine), in mean 1 (Robinson et al. 2021). Returns the loss of
    `matches.own`, the share of all matched left vectors that are its own and nearest to their match, and the largest
    logit that was met. Losses and shares add up over parts of the vectors to those of all.
    """
    with exact_products(left.device):
        return _InfoNCE.apply(left, right, log_scale, matches, hard_negatives)  # pyright: ignore[reportReturnType]


def sigmoid(
    left: Tensor, right: Tensor, log_scale: Tensor, bias: Tensor, matches: Matches
) -> tuple[Tensor, Tensor, Tensor]:
    """The sigmoid loss (SigLIP, Zhai et al. 2023), summed over all pairs of left (A, E) and right (B, E) and divided by
    the number of matches; returns what `info_nce` does."""
    with exact_products(left.device):
        return _Sigmoid.apply(left, right, log_scale, bias, matches)  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products in the type of what is multiplied, whatever autocast and TF32 say: their ten bits or fewer would round
    cosines times 100 away."""
    before = torch.get_float32_matmul_precision()
    cast = torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else None
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("highest")
        with cast or contextlib.nullcontext():
            yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class _Tile:
    rows: slice
    columns: slice
    of_rows: bool  # whether the terms of its rows are wanted
    of_columns: bool


def _tiles(matches: Matches, device: torch.device, both: bool = True) -> Iterator[_Tile]:
    """The tiles in which a row is wanted or, with `both`, a column."""
    height, width = TILE.get(device.type, TILE["cuda"])
    own_rows, own_columns = matches.own
    for rows, of_rows in _cut(own_rows, len(matches.groups[0]), height):
        for columns, of_columns in _cut(own_columns, len(matches.groups[1]), width):
            if of_rows or (both and of_columns):
                yield _Tile(rows, columns, of_rows, both and of_columns)


def _cut(own: range, count: int, size: int) -> list[tuple[slice, bool]]:
    """range(count) in slices of at most `size`, each inside or outside of `own`."""
    bounds = ((0, own.start, False), (own.start, own.stop, True), (own.stop, count, False))
    return [
        (slice(first, min(first + size, stop)), is_own)
        for start, stop, is_own in bounds
        for first in range(start, stop, size)
    ]


def _matched(left: Tensor, right: Tensor, columns: Tensor) -> Tensor:
    """The cosine of each left vector and its match (A,); of those without one, any number."""
    return torch.linalg.vecdot(left, right.index_select(0, columns.clamp(min=0)))


def _weights(columns: Tensor, own: range, share: float, like: Tensor) -> Tensor:
    """What the term of each vector weighs: `share` of the mean over all that have a match; 0 outside of `own`."""
    has_match = columns >= 0
    weights = has_match.to(like.dtype)
    weights *= share / weights.sum()
    weights[: own.start] = 0
    weights[own.stop :] = 0
    return weights


def _share_right(cosines: Tensor, nearest: Tensor, columns: Tensor, own: range) -> Tensor:
    """The share of all matched left vectors that are among `own` and nearer to their match than to any negative."""
    return (_weights(columns, own, 1.0, cosines) * (cosines > nearest)).sum()


def _add_matches(gradient: Tensor, other: Tensor, columns: Tensor, weights: Tensor) -> None:
    """Add to `gradient` (A, E) that of `weights` (A,) times the products with the matches among `other` (B, E)."""
    for first in range(0, len(gradient), 4096):  # the matches of all rows at once would be one more copy of `other`
        rows = slice(first, first + 4096)
        gradient[rows].addcmul_(other.index_select(0, columns[rows].clamp(min=0)), weights[rows, None])


class _InfoNCE(torch.autograd.Function):
    """See `info_nce`. A negative's logit in its row is (scale + hard) · cosine + log n - log Σ exp(hard · cosine)."""

    @staticmethod
    def forward(ctx: Any, left, right, log_scale, matches: Matches, hard: float):
        scale, device = log_scale.exp(), left.device
        sides = (left, right), (right, left)
        sums = [_Sums(vectors, hard) for vectors in (left, right)]
        largest = left.new_zeros(())
        for tile in _tiles(matches, device):
            cosines = left[tile.rows] @ right[tile.columns].T
            low, high = cosines.aminmax()
            largest = torch.maximum(largest, torch.maximum(-low, high))
            cosines.masked_fill_(_same_group(matches, tile), -torch.inf)
            if tile.of_rows:
                sums[0].add(tile.rows, cosines, scale)
            if tile.of_columns:
                sums[1].add(tile.columns, cosines.T, scale)
        cosines = [_matched(*vectors, columns) for vectors, columns in zip(sides, matches.columns, strict=True)]
        loss, shifts, of_match = left.new_zeros(()), [], []
        for side, match, columns, own in zip(sums, cosines, matches.columns, matches.own, strict=True):
            weights = _weights(columns, own, 0.5, match)
            negatives, correction = side.finish()
            margin = negatives - scale * match
            each = torch.logaddexp(margin, torch.zeros_like(margin))
            loss = loss + torch.where(weights > 0, weights * each, 0.0).sum()
            shifts.append(correction + scale * match + each - weights.log())
            of_match.append(-weights * margin.sigmoid())
        of_matches = of_match[0] + _sent(of_match[1], matches.columns[0])
        accuracy = _share_right(cosines[0], sums[0].nearest, *_first(matches))
        ctx.save_for_backward(left, right, log_scale, *shifts, of_matches)
        ctx.matches, ctx.hard = matches, hard
        largest = largest * scale
        ctx.mark_non_differentiable(accuracy, largest)
        return loss, accuracy, largest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient, *_):
        left, right, log_scale, row_shift, column_shift, of_matches = ctx.saved_tensors
        matches, scale = ctx.matches, log_scale.exp()
        of_left, of_right = torch.zeros_like(left), torch.zeros_like(right)
        with exact_products(left.device):
            for tile in _tiles(matches, left.device):
                logits = (left[tile.rows] @ right[tile.columns].T).mul_(scale + ctx.hard)
                parts = []
                if tile.of_rows:
                    parts.append((logits - row_shift[tile.rows, None]).exp_())
                if tile.of_columns:
                    parts.append(logits.sub_(column_shift[tile.columns]).exp_())
                table = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
                table.masked_fill_(_same_group(matches, tile), 0.0)
                of_left[tile.rows].addmm_(table, right[tile.columns])
                of_right[tile.columns].addmm_(table.T, left[tile.rows])
            _add_matches(of_left, right, matches.columns[0], of_matches)
            _add_matches(of_right, left, matches.columns[1], _sent(of_matches, matches.columns[1]))
        of_left.mul_(gradient * scale)
        of_right.mul_(gradient * scale)
        return of_left, of_right, torch.linalg.vecdot(left, of_left).sum(), None, None


def _first(matches: Matches) -> tuple[Tensor, range]:
    return matches.columns[0], matches.own[0]


def _sent(values: Tensor, columns: Tensor) -> Tensor:
    """For each vector the value of its match; 0 without one."""
    return torch.where(columns >= 0, values.index_select(0, columns.clamp(min=0)), 0.0)


def _same_group(matches: Matches, tile: _Tile) -> Tensor:
    """(rows, columns) of a tile: True where a pair is no negative."""
    left, right = matches.groups
    return left[tile.rows, None] == right[tile.columns]


class _Sums:
    """Over the negatives of each vector (A,): the largest cosine, and logarithms of sums of exponentials."""

    def __init__(self, vectors: Tensor, hard: float):
        nothing = vectors.new_full((len(vectors),), -torch.inf)
        self.hard, self.nearest, self.logits = hard, nothing, nothing.clone()
        self.strength, self.count = nothing.clone(), torch.zeros_like(nothing)

    def add(self, rows: slice, cosines: Tensor, scale: Tensor) -> None:
        """cosines (rows, columns): -inf where there is no negative."""
        nearest = cosines.amax(1)
        self.nearest[rows] = torch.maximum(self.nearest[rows], nearest)
        shifted = cosines - torch.where(torch.isfinite(nearest), nearest, 0.0)[:, None]  # exp of at most 0
        if self.hard:
            strength = (shifted * self.hard).exp_().sum(1).log_() + self.hard * nearest
            self.strength[rows] = torch.logaddexp(self.strength[rows], strength)
            self.count[rows] += torch.isfinite(cosines).sum(1)
        strength = scale + self.hard
        logits = shifted.mul_(strength).exp_().sum(1).log_() + strength * nearest
        self.logits[rows] = torch.logaddexp(self.logits[rows], logits)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The logarithm of the sum of the negatives' exponentials (A,), and what was subtracted from their logits."""
        if not self.hard:
            return self.logits, torch.zeros_like(self.logits)
        correction = torch.where(self.count > 0, self.strength - self.count.log(), 0.0)
        return self.logits - correction, correction


class _Sigmoid(torch.autograd.Function):
    """See `sigmoid`. Each pair is scored once, where its left vector is wanted."""

    @staticmethod
    def forward(ctx: Any, left, right, log_scale, bias, matches: Matches):
        scale, columns = log_scale.exp(), matches.columns[0]
        total, largest = left.new_zeros(len(left)), left.new_zeros(())
        nearest = left.new_full((len(left),), -torch.inf)
        for tile in _tiles(matches, left.device, both=False):
            cosines = left[tile.rows] @ right[tile.columns].T
            low, high = cosines.aminmax()
            largest = torch.maximum(largest, torch.maximum(-low, high))
            cosines.masked_fill_(_same_group(matches, tile), -torch.inf)
            nearest[tile.rows] = torch.maximum(nearest[tile.rows], cosines.amax(1))
            total[tile.rows] -= F.logsigmoid(cosines.mul_(-scale).sub_(bias)).sum(1)
        match = _matched(left, right, columns)
        weights = _weights(columns, matches.own[0], 1.0, match)
        share = 1.0 / (columns >= 0).sum().to(left.dtype)
        logits = scale * match + bias
        loss = total.sum() * share - (weights * F.logsigmoid(logits)).sum()
        accuracy, largest = _share_right(match, nearest, *_first(matches)), largest * scale
        ctx.save_for_backward(left, right, log_scale, bias, share, -weights * (-logits).sigmoid())
        ctx.matches = matches
        ctx.mark_non_differentiable(accuracy, largest)
        return loss, accuracy, largest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient, *_):
        left, right, log_scale, bias, share, of_match = ctx.saved_tensors
        matches, scale = ctx.matches, log_scale.exp()
        of_left, of_right, of_bias = torch.zeros_like(left), torch.zeros_like(right), of_match.sum()
        with exact_products(left.device):
            for tile in _tiles(matches, left.device, both=False):
                table = (left[tile.rows] @ right[tile.columns].T).mul_(scale).add_(bias).sigmoid_().mul_(share)
                table.masked_fill_(_same_group(matches, tile), 0.0)
                of_bias = of_bias + table.sum()
                of_left[tile.rows].addmm_(table, right[tile.columns])
                of_right[tile.columns].addmm_(table.T, left[tile.rows])
            _add_matches(of_left, right, matches.columns[0], of_match)
            _add_matches(of_right, left, matches.columns[1], _sent(of_match, matches.columns[1]))
        of_left.mul_(gradient * scale)
        of_right.mul_(gradient * scale)
        return of_left, of_right, torch.linalg.vecdot(left, of_left).sum(), gradient * of_bias, None
