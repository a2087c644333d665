"""What an objective makes of one sample (`Example`), and what a microbatch of them looks like (`Batch`).

N tokens, M targets tokens, S sequences.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .tokens import WHOLE, Tokens, patterns_of


@dataclass(frozen=True)
class Sample:
    """What a shard holds under one key: one sequence a part, and which samples mean the same."""

    parts: dict[str, Tokens]  # by modality, in the task's order
    group: int = 0  # samples of an equal group are not each other's negatives


@dataclass(frozen=True)
class Example:
    """seen: what the backbone reads; targets: the raw tokens to be guessed, with their own position, sequence and modality.

    Both are lists of pieces of one modality; the sequence numbers are the sample's own, and one in all of a seen piece.
    hidden: for each seen piece, the tokens (N,) whose content the model must not see. at: for each targets piece the row,
    among all seen pieces laid end to end, whose output answers the token; -1 where the objective's own decoder answers.
    """

    seen: list[Tokens]
    hidden: list[Tensor | None]
    targets: list[Tokens] = field(default_factory=list)
    at: list[Tensor] = field(default_factory=list)
    group: int = 0


@dataclass(frozen=True)
class Targets:
    """One task's share of a microbatch: its targets tokens by modality and a table with a row a sequence."""

    tokens: dict[str, Tokens]  # raw tokens to be guessed
    at: dict[str, Tensor]  # rows (M,) of the batch's tokens; -1 where the objective's decoder answers
    counts: dict[str, int]  # targets tokens by modality in the whole step, over all its microbatches
    sequence: Tensor  # (S,) the numbers of the task's sequences
    modality: Tensor  # (S,) of their first token
    sample: Tensor  # (S,) numbered over the whole step
    group: Tensor  # (S,)

    def to(self, device) -> Targets:
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("sequence", "modality", "sample", "group"):
            moved[name] = moved[name].to(device)
        for name in ("tokens", "at"):
            moved[name] = {modality: value.to(device) for modality, value in moved[name].items()}
        return Targets(**moved)

    def table(self) -> list[list[int]]:
        """Sequence, modality, sample and group of its sequences, as plain numbers."""
        return [getattr(self, name).tolist() for name in ("sequence", "modality", "sample", "group")]


def table_of(tables: list[list], device) -> Targets:
    """The tables of several microbatches (see `Targets.table`) as one, without their targets tokens."""
    columns = (torch.tensor([row for table in tables for row in table[c]], device=device) for c in range(4))
    return Targets({}, {}, {}, *columns)


@dataclass(frozen=True)
class Batch:
    """A microbatch: raw content by modality, where each token goes, and the tasks' questions."""

    content: dict[str, Tensor]  # by modality, all raw tokens that are seen
    hidden: dict[str, Tensor]  # by modality (N,): 1.0 where the content must not be seen
    tokens: Tokens  # in layout; its content (N,) is the row among all modalities' vectors laid end to end
    sequences: int
    tasks: dict[str, Targets]

    def to(self, device) -> Batch:
        return Batch(
            {modality: value.to(device, non_blocking=True) for modality, value in self.content.items()},
            {modality: value.to(device, non_blocking=True) for modality, value in self.hidden.items()},
            self.tokens.to(device),
            self.sequences,
            {name: targets.to(device) for name, targets in self.tasks.items()},
        )


def with_counts(batch: Batch, counts: dict[str, dict[str, int]]) -> Batch:
    """The batch with the step's counts of targets tokens, by task and modality, over all ranks."""
    tasks = {name: dataclasses.replace(targets, counts=counts[name]) for name, targets in batch.tasks.items()}
    return dataclasses.replace(batch, tasks=tasks)


def count_targets(arranged: list[Example], modalities: list[str]) -> dict[str, int]:
    """How many tokens of each modality are targets."""
    counts: dict[str, int] = {}
    for one in arranged:
        for piece in one.targets:
            if len(piece):
                modality = modalities[int(piece.modality[0])]
                counts[modality] = counts.get(modality, 0) + len(piece)
    return counts


def collate(
    tasks: dict[str, list[tuple[int, Example]]],
    modalities: list[str],
    counts: dict[str, dict[str, int]],
    round_to: int = 1,
    empty=torch.empty,
) -> Batch:
    """Lay a microbatch's arranged samples end to end. tasks: by name, pairs of a sample's number and what it became.

    `round_to`: the number of tokens is rounded up to a multiple of it with filler (of the first modality, and never read),
    where a GPU wants round sizes. `empty`, called like `torch.empty`, makes the tensors of the raw content.
    """
    samples = [(name, number, one) for name, own in tasks.items() for number, one in own]
    pieces = [(i, *both) for i, (_, _, one) in enumerate(samples) for both in zip(one.seen, one.hidden, strict=True)]
    owner, size = np.array([i for i, _, _ in pieces]), np.array([len(piece) for _, piece, _ in pieces])
    begin = np.cumsum(size) - size  # each piece's first row, sample by sample
    modality, own = (_of_each([getattr(piece, name) for _, piece, _ in pieces], begin, size) for name in _OF_A_PIECE)
    length, count = np.zeros(len(samples), np.int64), np.zeros(len(samples), np.int64)
    np.add.at(length, owner, size)
    np.maximum.at(count, owner, own + 1)
    start, first = np.cumsum(length) - length, np.cumsum(count) - count  # each sample's first row and sequence
    sequence = own + first[owner]

    tokens, place = _laid_out([piece for _, piece, _ in pieces], size, modality, sequence)
    final = _rows(size, place - begin)  # row sample by sample -> row in the layout

    numbers, which = np.unique(sequence, return_index=True)  # and each sequence's first piece
    holder = owner[which]
    sample, group = np.array([number for _, number, _ in samples]), np.array([one.group for _, _, one in samples])
    columns = numbers, modality[which], sample[holder], group[holder]
    names = np.array([name for name, _, _ in samples])[holder]
    by_modality = {modalities[k]: [pieces[p] for p in np.flatnonzero(modality == k)] for k in np.unique(modality)}
    return Batch(
        {name: _joined([piece.content for _, piece, _ in own], empty) for name, own in by_modality.items()},
        {name: _hidden([(len(piece), hide) for _, piece, hide in own]) for name, own in by_modality.items()},
        _fill(tokens, round_to),
        int(count.sum()),
        {
            name: Targets(
                *_targets(
                    [(i, one) for i, (task, _, one) in enumerate(samples) if task == name],
                    modalities,
                    start,
                    first,
                    final,
                ),
                counts[name],
                *(torch.from_numpy(column[names == name]) for column in columns),
            )
            for name in tasks
        },
    )


def _joined(contents: list[Tensor], empty) -> Tensor:
    dtype = functools.reduce(torch.promote_types, {content.dtype for content in contents})
    return torch.cat(contents, out=empty(sum(map(len, contents)), *contents[0].shape[1:], dtype=dtype))


def _of_each(fields: list[Tensor], begin: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The number (P,) that is in all rows of each piece's field. Raises ValueError where there are two."""
    rows = torch.cat(fields).numpy()
    found = rows[begin]
    if not np.array_equal(rows, np.repeat(found, size)):
        raise ValueError("a piece that is seen is of one modality and one sequence: split it")
    return found


def _laid_out(
    pieces: list[Tokens], size: np.ndarray, modality: np.ndarray, sequence: np.ndarray
) -> tuple[Tokens, np.ndarray]:
    """The tokens of all pieces in layout (content: a row among the contents modality by modality), and each piece's first row.

    size, modality, sequence: each piece's (P,).
    """
    turn = _turns(sequence, size, [piece.order for piece in pieces])
    place, content = _laid(size, turn), _laid(size, np.argsort(modality, kind="stable"))
    tokens = Tokens(
        _rows(size[turn], (content - place)[turn]),
        torch.cat([pieces[p].position for p in turn]),
        torch.from_numpy(np.repeat(sequence[turn], size[turn])),
        torch.cat([pieces[p].order for p in turn]),
        torch.from_numpy(np.repeat(modality[turn], size[turn])),
    )
    return tokens, place


def _rows(size: np.ndarray, shift: np.ndarray) -> Tensor:
    """0, 1, 2, ... over the tokens of all pieces, each piece's moved by its shift."""
    return torch.from_numpy(np.arange(size.sum()) + np.repeat(shift, size))


def _turns(sequence: np.ndarray, size: np.ndarray, orders: list[Tensor]) -> np.ndarray:
    """The pieces, each of one sequence, in the order that `tokens.layout` would bring their tokens into."""
    together = np.argsort(sequence, kind="stable")
    heads = np.flatnonzero(np.diff(sequence[together], prepend=-1))  # each sequence's first piece among them
    lengths = np.add.reduceat(size[together], heads)
    if len(heads) == len(size) and all(order.stride(0) == 0 for order in orders):  # pieces of `constant` order: alike
        pattern = np.full_like(lengths, WHOLE)
    else:
        pattern = patterns_of(torch.from_numpy(lengths), torch.cat([orders[p] for p in together])).numpy()
    rank = np.empty_like(heads)
    rank[np.lexsort((lengths, pattern))] = np.arange(len(heads))
    pieces = np.diff(heads, append=len(together))
    return together[np.argsort(np.repeat(rank, pieces), kind="stable")]


def _laid(size: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Each piece's first row where the pieces lie in the order `turn`."""
    found = np.empty_like(size)
    found[turn] = np.cumsum(size[turn]) - size[turn]
    return found


def _hidden(pieces: list[tuple[int, Tensor | None]]) -> Tensor:
    """1.0 where a piece hides a token: pieces as pairs of a length and the hidden tokens, end to end."""
    hidden, end = torch.zeros(sum(length for length, _ in pieces)), 0
    for length, hide in pieces:
        end += length
        if hide is not None:
            hidden[end - length : end] = hide
    return hidden


def _targets(
    samples: list[tuple[int, Example]], modalities: list[str], start, first, final: Tensor
) -> tuple[dict, dict]:
    """The targets tokens of a task's samples by modality, and the rows that answer them.

    start, first: each sample's first row, sample by sample, and its first sequence; final: where those rows went.
    """
    found: dict[str, list] = {}
    for i, one in samples:
        for piece, at in zip(one.targets, one.at, strict=True):
            if len(piece):
                found.setdefault(modalities[int(piece.modality[0])], []).append((i, piece, at))
    tokens, rows = {}, {}
    for modality in sorted(found, key=modalities.index):
        owners = np.repeat([i for i, _, _ in found[modality]], [len(piece) for _, piece, _ in found[modality]])
        targets = _cat([piece for _, piece, _ in found[modality]])
        tokens[modality] = targets.replace(sequence=targets.sequence + torch.from_numpy(first[owners]))
        at = torch.cat([at for _, _, at in found[modality]])
        row = final.index_select(0, at.clamp(min=0) + torch.from_numpy(start[owners]))
        rows[modality] = torch.where(at >= 0, row, -1)
    return tokens, rows


_OF_A_PIECE = ("modality", "sequence")  # what all tokens of a piece share


def _cat(pieces: list[Tokens]) -> Tokens:
    return Tokens(*(torch.cat([getattr(p, f.name) for p in pieces]) for f in dataclasses.fields(Tokens)))


def _fill(tokens: Tokens, round_to: int) -> Tokens:
    missing = -len(tokens) % round_to
    if not missing:
        return tokens
    rows = torch.zeros(missing, dtype=torch.long)
    filler = tokens.select(rows)
    return _cat([tokens, filler.replace(sequence=torch.full_like(filler.sequence, -1))])
