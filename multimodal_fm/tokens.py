"""`Tokens`, the one type that flows: sequences of any length and modality, end to end, never padded.

N tokens, S sequences, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

FILLER = -1  # the `sequence` of a token that only rounds a batch up


@dataclass(frozen=True)
class Tokens:
    """A flat run of tokens. A room of the package returns a new one with other `content`.

    content   (N, ...)  ids or raw patch values; after embedding (N, D) vectors
    position  (N, 3)    time, row, column, counted in tokens or patches (rotary embedding reads it)
    sequence  (N,)      which sequence a token belongs to; -1 is filler
    order     (N,)      a token reads those of its own sequence whose order is not later than its own
    modality      (N,)      which tokenizer made it
    """

    content: Tensor
    position: Tensor
    sequence: Tensor
    order: Tensor
    modality: Tensor

    def __len__(self) -> int:
        return self.sequence.shape[0]

    def replace(self, **fields) -> Tokens:
        new = object.__new__(Tokens)  # a frozen dataclass takes three times as long to set its fields one by one
        vars(new).update(vars(self) | fields)
        return new

    def select(self, rows: Tensor) -> Tokens:
        """The tokens at `rows` (M,), in that order."""
        return self._map(lambda field: field.index_select(0, rows))

    def to(self, device) -> Tokens:
        return self._map(lambda field: field.to(device, non_blocking=True))

    def _map(self, change) -> Tokens:
        return Tokens(*(change(getattr(self, f.name)) for f in dataclasses.fields(self)))


def make_sequence(content: Tensor, position: Tensor, modality: int = 0) -> Tokens:
    """One sequence whose tokens all read each other (order 0): what a tokenizer's `read` returns."""
    zeros = constant(0, len(content))
    return Tokens(content, position, zeros, zeros, constant(modality, len(content)))


@functools.lru_cache(maxsize=16_384)
def constant(value: int, count: int) -> Tensor:
    """(count,) of one whole number, which is stored once; shared, so that nobody may write to it."""
    return torch.full((1,), value, dtype=torch.long).expand(count)


def concatenate(parts: list[Tokens]) -> Tokens:
    """Lay `parts` (of equal content shape) end to end as they are, with their own sequence numbers."""
    return Tokens(*(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Tokens)))


def join(parts: list[Tokens]) -> Tokens:
    """Lay `parts` (of equal content shape) end to end; sequences of different parts stay apart."""
    moved, start = [], 0
    for part in parts:
        filler = part.sequence == FILLER
        moved.append(part.sequence.add(start).masked_fill(filler, FILLER))
        start += int(part.sequence.max()) + 1 if len(part) else 0
    return concatenate(parts).replace(sequence=torch.cat(moved))


def split(tokens: Tokens) -> list[Tokens]:
    """The inverse of `join`: one `Tokens` a sequence, in the order of their numbers, filler left out."""
    numbers = tokens.sequence.unique()
    parts = [tokens.select((tokens.sequence == s).nonzero()[:, 0]) for s in numbers if s != FILLER]
    return [part.replace(sequence=torch.zeros_like(part.sequence)) for part in parts]


def runs(sequence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The runs of equal numbers in `sequence` (N,): their numbers (R,), lengths (R,) and each row's run (N,)."""
    numbers, rows, lengths = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)
    return numbers, lengths, rows


WHOLE, RISING, MIXED, NOTHING = range(4)  # the patterns of a sequence's orders, see `patterns`


def patterns(sequence: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What kind of attention each run of `sequence` (N,) needs: pattern (R,), length (R,), each row's run (N,).

    WHOLE: all orders equal. RISING: each later than the one before. MIXED: anything else. NOTHING: filler.
    """
    numbers, lengths, rows = runs(sequence)
    return classify_orders(lengths, order).masked_fill(numbers == FILLER, NOTHING), lengths, rows


def classify_orders(lengths: Tensor, order: Tensor) -> Tensor:
    """The pattern (R,) of each run, where runs of these `lengths` lie end to end with `order` (N,)."""
    pattern = torch.full_like(lengths, MIXED)
    if len(lengths):
        last = lengths.cumsum(0) - 1
        first, step = last - lengths + 1, order[1:] - order[:-1]
        for meaning, fits in ((RISING, step > 0), (WHOLE, step == 0)):
            count = torch.nn.functional.pad(fits.cumsum(0), (1, 0))  # of the steps that lead up to each token
            pattern[count[last] - count[first] == lengths - 1] = meaning
    return pattern


def layout(sequence: Tensor, order: Tensor) -> Tensor:
    """The rows (N,) in the order that attention likes: each sequence in one run, alike runs side by side.

    Sequences are sorted by pattern, then by length; rows of one sequence keep their order; filler comes last.
    """
    numbers, lengths, _ = runs(sequence)
    together = spans(lengths, torch.argsort(numbers, stable=True))
    pattern, lengths, _ = patterns(sequence.index_select(0, together), order.index_select(0, together))
    key = pattern * (len(sequence) + 1) + lengths
    return together.index_select(0, spans(lengths, torch.argsort(key, stable=True)))


def spans(lengths: Tensor, which: Tensor) -> Tensor:
    """The rows of the spans `which`, one span after the other, where spans of these `lengths` lie end to end."""
    taken = lengths[which]
    shift = (lengths.cumsum(0) - lengths)[which] - (taken.cumsum(0) - taken)
    found = torch.repeat_interleave(shift, taken)
    return found.add_(torch.arange(len(found), device=found.device))
