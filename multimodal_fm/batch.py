"""What an objective makes of one item (`Arranged`), and what a microbatch of them looks like (`Batch`).

N tokens, M asked tokens, S sequences.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .tokens import Tokens, layout


@dataclass(frozen=True)
class Item:
    """What a shard holds under one key: one sequence a part, and which items mean the same."""

    parts: dict[str, Tokens]  # by kind, in the section's order
    group: int = 0  # items of an equal group are not each other's negatives


@dataclass(frozen=True)
class Arranged:
    """seen: what the backbone reads; asked: the raw tokens to be guessed, with their own position, sequence and kind.

    Both are lists of pieces of one kind; the pieces' sequence numbers are the item's own. hidden: for each seen piece,
    the tokens (N,) whose content the model must not see. at: for each asked piece the row, among all seen pieces laid
    end to end, whose output answers the token; -1 where the objective's own decoder answers.
    """

    seen: list[Tokens]
    hidden: list[Tensor | None]
    asked: list[Tokens] = field(default_factory=list)
    at: list[Tensor] = field(default_factory=list)
    group: int = 0


@dataclass(frozen=True)
class Asked:
    """One section's share of a microbatch: its asked tokens by kind and a table with a row a sequence."""

    tokens: dict[str, Tokens]  # raw tokens to be guessed
    at: dict[str, Tensor]  # rows (M,) of the batch's tokens; -1 where the objective's decoder answers
    counts: dict[str, int]  # asked tokens by kind in the whole step, over all its microbatches
    sequence: Tensor  # (S,) the numbers of the section's sequences
    kind: Tensor  # (S,) of their first token
    item: Tensor  # (S,) numbered over the whole step
    group: Tensor  # (S,)

    def to(self, device) -> Asked:
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("sequence", "kind", "item", "group"):
            moved[name] = moved[name].to(device)
        for name in ("tokens", "at"):
            moved[name] = {kind: value.to(device) for kind, value in moved[name].items()}
        return Asked(**moved)

    def table(self) -> list[list[int]]:
        """Sequence, kind, item and group of its sequences, as plain numbers."""
        return [getattr(self, name).tolist() for name in ("sequence", "kind", "item", "group")]


def table_of(tables: list[list], device) -> Asked:
    """The tables of several microbatches (see `Asked.table`) as one, without their asked tokens."""
    columns = (torch.tensor([row for table in tables for row in table[c]], device=device) for c in range(4))
    return Asked({}, {}, {}, *columns)


@dataclass(frozen=True)
class Batch:
    """A microbatch: raw content by kind, where each token goes, and the sections' questions."""

    content: dict[str, Tensor]  # by kind, all raw tokens that are seen
    hidden: dict[str, Tensor]  # by kind (N,): 1.0 where the content must not be seen
    tokens: Tokens  # in layout; its content (N,) is the row among all kinds' vectors laid end to end
    sequences: int
    sections: dict[str, Asked]

    def to(self, device) -> Batch:
        return Batch(
            {kind: value.to(device, non_blocking=True) for kind, value in self.content.items()},
            {kind: value.to(device, non_blocking=True) for kind, value in self.hidden.items()},
            self.tokens.to(device),
            self.sequences,
            {name: asked.to(device) for name, asked in self.sections.items()},
        )


def with_counts(batch: Batch, counts: dict[str, dict[str, int]]) -> Batch:
    """The batch with the step's counts of asked tokens, by section and kind, over all ranks."""
    sections = {name: dataclasses.replace(asked, counts=counts[name]) for name, asked in batch.sections.items()}
    return dataclasses.replace(batch, sections=sections)


def count_asked(arranged: list[Arranged], kinds: list[str]) -> dict[str, int]:
    """How many tokens of each kind are asked."""
    counts: dict[str, int] = {}
    for one in arranged:
        for piece in one.asked:
            if len(piece):
                kind = kinds[int(piece.kind[0])]
                counts[kind] = counts.get(kind, 0) + len(piece)
    return counts


def gather(
    sections: dict[str, list[tuple[int, Arranged]]],
    kinds: list[str],
    counts: dict[str, dict[str, int]],
    round_to: int = 1,
) -> Batch:
    """Lay a microbatch's arranged items end to end. sections: by name, pairs of an item's number and what it became.

    `round_to`: the number of tokens is rounded up to a multiple of it with filler (of the first kind, and never read),
    where a GPU wants round sizes.
    """
    seen: dict[str, list[Tokens]] = {kind: [] for kind in kinds}
    hidden: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    asked = {name: {kind: [] for kind in kinds} for name in sections}
    placed: list[tuple[str, str, Tensor, list[tuple[str, int, int]]]] = []  # questions, waiting for the final rows
    tables = {name: [] for name in sections}
    filled = dict.fromkeys(kinds, 0)
    first = 0
    for name, items in sections.items():
        for number, one in items:
            spans, last = [], 0
            for piece, hide in zip(one.seen, one.hidden, strict=True):
                kind = kinds[int(piece.kind[0])]
                seen[kind].append(piece.replace(sequence=piece.sequence + first))
                hidden[kind].append(torch.zeros(len(piece)) if hide is None else hide.float())
                spans.append((kind, filled[kind], len(piece)))
                filled[kind] += len(piece)
                for own in piece.sequence.unique().tolist():
                    if own >= last:
                        tables[name].append((first + own, int(piece.kind[0]), number, one.group))
                        last = own + 1
            for piece, at in zip(one.asked, one.at, strict=True):
                if len(piece):
                    kind = kinds[int(piece.kind[0])]
                    asked[name][kind].append(piece.replace(sequence=piece.sequence + first))
                    placed.append((name, kind, at, spans))
            first += last
    present = [kind for kind in kinds if seen[kind]]
    starts, start = {}, 0
    for kind in present:
        starts[kind], start = start, start + filled[kind]
    flat = {f: torch.cat([getattr(t, f) for k in present for t in seen[k]]) for f in _LABELS}
    order = layout(flat["sequence"], flat["order"])
    tokens = Tokens(order, *(flat[f].index_select(0, order) for f in _LABELS))
    final = torch.empty_like(order)
    final[order] = torch.arange(len(order))  # row among the kinds' vectors -> row in the layout
    at = {name: {kind: [] for kind in kinds} for name in sections}
    for name, kind, rows, spans in placed:
        global_rows = torch.cat([torch.arange(n) + starts[k] + offset for k, offset, n in spans])
        known = rows >= 0
        at[name][kind].append(torch.where(known, final[global_rows[rows.clamp(min=0)]], -1))
    tokens = _fill(tokens, round_to)
    return Batch(
        {kind: torch.cat([t.content for t in seen[kind]]) for kind in present},
        {kind: torch.cat(hidden[kind]) for kind in present},
        tokens,
        first,
        {
            name: Asked(
                {kind: _cat(pieces) for kind, pieces in asked[name].items() if pieces},
                {kind: torch.cat(rows) for kind, rows in at[name].items() if rows},
                counts[name],
                *torch.tensor(tables[name], dtype=torch.long).view(-1, 4).unbind(1),
            )
            for name in sections
        },
    )


_LABELS = ("position", "sequence", "order", "kind")


def _cat(pieces: list[Tokens]) -> Tokens:
    return Tokens(*(torch.cat([getattr(p, f.name) for p in pieces]) for f in dataclasses.fields(Tokens)))


def _fill(tokens: Tokens, round_to: int) -> Tokens:
    missing = -len(tokens) % round_to
    if not missing:
        return tokens
    rows = torch.zeros(missing, dtype=torch.long)
    filler = tokens.select(rows)
    return _cat([tokens, filler.replace(sequence=torch.full_like(filler.sequence, -1))])
