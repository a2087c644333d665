"""What an objective makes of one sample (`Example`), and a microbatch of them (`Batch`).

N tokens, M target tokens, S sequences.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .attention import Plan, plan_attention
from .tokens import WHOLE, Tokens, classify_orders, concatenate, constant, layout
from .transfer import move, rebuild

NOT_ASKED = -1  # the `match` of a sample that no objective asks whether its parts belong together


@dataclass(frozen=True)
class Sample:
    """What a shard holds under one key: a sequence for each modality, and which samples mean the same."""

    tokens: dict[str, Tokens]  # by modality, in the task's order
    group: int = 0  # samples of an equal group are never each other's negatives
    label: Any = None  # what the objective's `read_label` made of the sample's members
    views: tuple[dict[str, Tokens], ...] = ()  # further random readings of the same modalities (`Objective.views`)
    other: Sample | None = None  # another sample of the same source and of another group (`Objective.reads_other`)
    match: int = NOT_ASKED  # 1: its parts belong together; 0: one of them was taken from `other`


@dataclass(frozen=True)
class Example:
    """What an objective makes of a sample.

    inputs, targets: what the backbone reads, and the raw tokens to be predicted; lists of pieces, each of one modality.
    Sequence numbers count within the sample, and a piece of `inputs` belongs to one sequence.
    hidden: for each piece of `inputs` the tokens (N,) whose content the model must not see, or None.
    rows: for each piece of `targets` the row, among all `inputs` laid end to end, whose output answers each token; -1
    where a decoder of the objective's own answers.
    teacher, teacher_rows: pieces of the whole sequences that the averaged model reads, and for each piece of `targets`
    the rows, among all of `teacher` laid end to end, whose states are to be predicted (data2vec, Baevski et al. 2022).
    """

    inputs: list[Tokens]
    hidden: list[Tensor | None]
    targets: list[Tokens] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    group: int = 0
    teacher: list[Tokens] = field(default_factory=list)
    teacher_rows: list[Tensor] = field(default_factory=list)
    match: int = NOT_ASKED  # the sample's


@dataclass(frozen=True)
class SequenceTable:
    """A row for each sequence of a task. It stays on the CPU: pairs are worked out from it there."""

    modality: Tensor  # (S,) of the sequence's first token behind the learned ones (`Tokenizer.prompt`)
    sample: Tensor  # (S,) numbered over the whole step
    group: Tensor  # (S,)
    stays_on_cpu: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.sample)

    def clone(self) -> SequenceTable:
        """The table in memory of its own: a view that is pickled takes all of the buffer along that it lies in."""
        return SequenceTable(self.modality.clone(), self.sample.clone(), self.group.clone())

    @staticmethod
    def concatenate(tables: list[SequenceTable]) -> SequenceTable:
        columns = zip(*((table.modality, table.sample, table.group) for table in tables), strict=True)
        return SequenceTable(*(torch.cat(column) for column in columns))


@dataclass(frozen=True)
class Pairs:
    """Which sequences of two modalities belong together, over a whole step: A of the one, B of the other.

    It names them and holds no table of A times B. Sequences of one sample are of one group.
    """

    rows: tuple[Tensor, Tensor]  # (A,) and (B,): rows of the table, rising
    groups: tuple[Tensor, Tensor]  # (A,) and (B,): sequences of an equal group are never each other's negatives
    columns: tuple[Tensor, Tensor]
    """(A,) which of the B each one's positive is, the sequence of the same sample, and (B,) the reverse; -1: none."""
    places: tuple[np.ndarray, np.ndarray]  # `rows`, on the CPU whatever the device

    def to(self, device) -> Pairs:
        rows, groups, columns = move((self.rows, self.groups, self.columns), device)
        return Pairs(rows, groups, columns, self.places)

    def own(self, rows: range | None) -> tuple[range, range]:
        """Which of A and of B stand in these `rows` of the table; None: all."""
        if rows is None:
            return range(len(self.places[0])), range(len(self.places[1]))
        bounds = (rows.start, max(rows.start, rows.stop))
        first, second = (range(*np.searchsorted(places, bounds).tolist()) for places in self.places)
        return first, second


def find_pairs(table: SequenceTable, modalities: list[str]) -> dict[str, Pairs]:
    """The pairs of modalities, named as in `text_image`, that meet in at least one sample of a step.

    A modality that samples have in several views, a sequence each, is a pair with itself, as in `image_image`: a view's
    positive is the next view of its sample, its negatives all views of the others (NT-Xent, Chen et al. 2020). Two
    modalities meet view by view; other views of a sample are neither its positives nor its negatives.
    """
    pairs, (view, views) = {}, _view_numbers(table)
    most = int(views.max()) if len(table) else 0
    for a, b in itertools.combinations_with_replacement(range(len(modalities)), 2):
        left, right = ((table.modality == number).nonzero()[:, 0] for number in (a, b))
        if min(len(left), len(right)) < 2 or (a == b and not view[left].any()):
            continue
        wanted = view[left]
        if a == b:  # in a ring, so that each view has one positive, however many views there are
            wanted = torch.where(views[left] > 1, (wanted + 1) % views[left], -1)
        columns = _find(
            torch.where(wanted < 0, -1, table.sample[left] * most + wanted), table.sample[right] * most + view[right]
        )
        if not (columns >= 0).any():
            continue
        back = torch.full_like(right, -1)
        back[columns[columns >= 0]] = (columns >= 0).nonzero()[:, 0]
        groups = (table.group[left], table.group[right])
        places = (left.numpy(), right.numpy())
        pairs[f"{modalities[a]}_{modalities[b]}"] = Pairs((left, right), groups, (columns, back), places)
    return pairs


def _view_numbers(table: SequenceTable) -> tuple[Tensor, Tensor]:
    """How many sequences of the same sample and modality stand before each in the table (S,), and how many there are of
    them in all (S,)."""
    keys = torch.stack([table.sample, table.modality], 1)
    _, owner, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    rank = torch.empty_like(owner)
    rank[torch.argsort(owner, stable=True)] = torch.arange(len(owner))
    return rank - (counts.cumsum(0) - counts)[owner], counts[owner]


def _find(wanted: Tensor, keys: Tensor) -> Tensor:
    """Where each wanted number (A,) stands among `keys` (B,), which differ from each other; -1 where it does not."""
    ordered, order = keys.sort()
    place = torch.searchsorted(ordered, wanted).clamp(max=len(keys) - 1)
    return torch.where(ordered[place] == wanted, order[place], -1)


@dataclass(frozen=True)
class Targets:
    """One task's share of a microbatch: the tokens to be predicted, and its sequences."""

    tokens: dict[str, Tokens]  # by modality, raw
    rows: dict[str, Tensor]  # by modality (M,): rows of the batch's tokens; -1 where the objective's decoder answers
    counts: dict[str, int]  # target tokens by modality in the whole step, over all microbatches and ranks
    sequence: Tensor  # (S,) the numbers of the task's sequences in the batch
    modality: Tensor  # (S,) as in the table
    table: SequenceTable
    plan: Any = None  # what the `plan` of the objective that arranged the samples returned
    match: Tensor | None = None  # (S,) of each sequence's sample, see `Sample`; None where no objective asks
    num_matches: int = 0  # samples that are asked whether their parts belong together, in the whole step
    teacher_rows: dict[str, Tensor] = field(default_factory=dict)
    """By modality (M,): the rows of `Batch.teacher` whose states are to be predicted; empty where none are."""

    def to(self, device) -> Targets:
        return move(self, device)

    def clone(self) -> Targets:
        return dataclasses.replace(rebuild(self, Tensor.clone, None), table=self.table.clone())


@dataclass(frozen=True)
class Batch:
    """A microbatch: raw content by modality, where each token goes, how they are attended to, and what is asked."""

    content: dict[str, Tensor]  # by modality: all raw tokens that the backbone reads
    hidden: dict[str, Tensor]  # by modality (N,): 1.0 where the content must not be seen
    tokens: Tokens  # as attention wants them; content (N,) is the row among all modalities' vectors laid end to end
    num_sequences: int
    attention: Plan
    by_modality: Routing
    tasks: dict[str, Targets]
    teacher: Batch | None = None  # what the averaged model reads, where an objective predicts its states
    first_pass: Batch | None = None
    """Only the sequences of the tasks whose objectives compare a whole step, for gradient caching; None: all."""

    halved: tuple[str, ...] = ()  # modalities whose content may go to a GPU in half precision
    num_filler: int = 0  # tokens that only round the batch up

    def to(self, device) -> Batch:
        """The batch on the device, in one copy; nothing waits for it."""
        return move(self, device, self._halved())

    def clone(self) -> Batch:
        """The same in memory of its own."""
        tasks = {name: one.clone() for name, one in self.tasks.items()}
        teacher, first_pass = (one and one.clone() for one in (self.teacher, self.first_pass))
        own = rebuild(dataclasses.replace(self, tasks={}, teacher=None, first_pass=None), Tensor.clone, None)
        return dataclasses.replace(own, tasks=tasks, teacher=teacher, first_pass=first_pass)

    def _halved(self) -> set[int]:
        own = {id(self.content[m]) for m in self.halved if m in self.content}
        for targets in self.tasks.values():
            own |= {id(targets.tokens[m].content) for m in self.halved if m in targets.tokens}
        others = (other for other in (self.teacher, self.first_pass) if other is not None)
        return own.union(*(other._halved() for other in others))


@dataclass(frozen=True)
class Routing:
    """The rows modality by modality, and the way back, for a layer that has an expert for each modality."""

    rows: Tensor  # (N,)
    counts: tuple[int, ...]  # rows of each modality
    inverse: Tensor  # (N,): where each row went

    def to(self, device) -> Routing:
        return move(self, device)

    def with_filler(self, count: int) -> Routing:
        """With so many more rows at the end, of the last modality."""
        more = torch.arange(len(self.rows), len(self.rows) + count, device=self.rows.device)
        counts = (*self.counts[:-1], self.counts[-1] + count)
        return Routing(torch.cat([self.rows, more]), counts, torch.cat([self.inverse, more]))


def route(modality: Tensor, count: int) -> Routing:
    """The rows of `modality` (N,) by each of the `count` modalities; on the CPU."""
    order = torch.argsort(modality, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return Routing(order, tuple(torch.bincount(modality, minlength=count).tolist()), inverse)


@dataclass(frozen=True)
class Reading:
    """Tokens (N,) as attention wants them, and what a backbone other than the model's needs to read them."""

    tokens: Tokens  # content (N,): the row that each token had before
    attention: Plan
    routing: Routing
    rows: Tensor  # (N,): where each row went

    def to(self, device) -> Reading:
        return move(self, device)


def plan_reading(tokens: Tokens, num_modalities: int) -> Reading:
    """The reading of these tokens (N,), whatever their content; on the CPU.

    Their sequences get numbers below N, of which a part of a microbatch may have others.
    """
    numbers = tokens.sequence.unique(return_inverse=True)[1]
    tokens = tokens.replace(sequence=numbers.to(tokens.sequence.dtype).where(tokens.sequence >= 0, tokens.sequence))
    order = layout(tokens.sequence, tokens.order)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order))
    laid = tokens.replace(content=torch.arange(len(tokens))).select(order)
    return Reading(laid, plan_attention(laid), route(laid.modality, num_modalities), rows)


def with_counts(batch: Batch, counts: dict[str, dict[str, int]]) -> Batch:
    """The batch with the counts of the whole step's target tokens, by task and modality, over all ranks."""
    tasks = {name: dataclasses.replace(targets, **_split_counts(counts[name])) for name, targets in batch.tasks.items()}
    return dataclasses.replace(batch, tasks=tasks)


ASKED = ""  # the key, beside the modalities', under which samples with a `match` are counted


def _split_counts(counts: dict[str, int]) -> dict[str, Any]:
    """What `Targets` says of a step's counts."""
    by_modality = {modality: count for modality, count in counts.items() if modality != ASKED}
    return {"counts": by_modality, "num_matches": counts.get(ASKED, 0)}


def count_targets(examples: list[Example], modalities: list[str]) -> dict[str, int]:
    """How many target tokens there are of each modality and, under `ASKED`, samples with a `match`, if any."""
    counts: dict[str, int] = {}
    if asked := sum(example.match != NOT_ASKED for example in examples):
        counts[ASKED] = asked
    for example in examples:
        for piece in example.targets:
            if len(piece):
                modality = modalities[int(piece.modality[0])]
                counts[modality] = counts.get(modality, 0) + len(piece)
    return counts


def add_prompt(example: Example, prompt: Tokens) -> Example:
    """The example with learned tokens before each of its sequences (`Tokenizer.prompt`).

    They are read with the whole of a sequence of one order, and before the first token of any other.
    """
    count, orders = len(prompt), {}
    for piece in example.inputs:
        orders.setdefault(int(piece.sequence[0]), []).append(piece.order)
    inputs, hidden, moved, total = [], [], [], 0
    for piece, hide in zip(example.inputs, example.hidden, strict=True):
        number = int(piece.sequence[0])
        if number in orders:
            order = torch.cat(orders.pop(number))
            earlier = order[:1] if bool((order == order[0]).all()) else torch.arange(-count, 0) + order.min()
            inputs.append(prompt.replace(order=earlier.expand(count), sequence=constant(number, count)))
            hidden.append(None)
            total += count
        inputs.append(piece)
        hidden.append(hide)
        moved.append(constant(total, len(piece)))
    shift = torch.cat(moved)
    rows = [torch.where(rows < 0, rows, rows + shift[rows.clamp(min=0)]) for rows in example.rows]
    return dataclasses.replace(example, inputs=inputs, hidden=hidden, rows=rows)


Planner = Callable[[Batch, Targets], Any]


def collate(
    tasks: dict[str, list[tuple[int, Example]]],
    modalities: list[str],
    counts: dict[str, dict[str, int]],
    planners: dict[str, Planner] | None = None,
    round_to: int = 1,
    empty=torch.empty,
    prompt: Tokens | None = None,
    first_pass: Collection[str] = (),
    halved: tuple[str, ...] = (),
) -> Batch:
    """Lay the examples of a microbatch end to end.

    tasks: for each task pairs of a sample's number in the step and its example. planners: by task, the `plan` of the
    objective that arranges. round_to: filler rounds the number of tokens up to a multiple. empty: called like
    `torch.empty`, makes the tensors of raw content. prompt: learned tokens that stand before each sequence.
    first_pass: the tasks whose sequences alone `Batch.first_pass` is to hold; none: there is none. halved: see `Batch`.
    """
    teacher = _collate_teacher(tasks, modalities, round_to, empty, prompt, halved)
    if prompt is not None:
        tasks = {name: [(number, add_prompt(e, prompt)) for number, e in own] for name, own in tasks.items()}
    examples = [(name, number, example) for name, own in tasks.items() for number, example in own]
    pieces = [(i, *both) for i, (_, _, e) in enumerate(examples) for both in zip(e.inputs, e.hidden, strict=True)]
    owner, size = np.array([i for i, _, _ in pieces]), np.array([len(piece) for _, piece, _ in pieces])
    begin = np.cumsum(size) - size  # each piece's first row, example by example
    modality, own = (_value_of_each([getattr(p, name) for _, p, _ in pieces], begin, size) for name in _SHARED)
    length, count = np.zeros(len(examples), np.int64), np.zeros(len(examples), np.int64)
    np.add.at(length, owner, size)
    np.maximum.at(count, owner, own + 1)
    first_row, first_sequence = np.cumsum(length) - length, np.cumsum(count) - count  # of each example
    sequence = own + first_sequence[owner]
    tokens, moved_to = _lay_out([piece for _, piece, _ in pieces], size, modality, sequence)
    row_in_layout = _shifted_rows(size, moved_to - begin)  # (N,) for each row, example by example
    numbers, which = np.unique(sequence, return_index=True)  # and each sequence's first piece
    first_read = modality[which + (prompt is not None)]  # which is that behind the learned tokens
    facts = zip(*((name, number, e.group, e.match) for name, number, e in examples), strict=True)
    names, *facts = (np.array(column)[owner[which]] for column in facts)
    by_modality = {modalities[k]: [pieces[p] for p in np.flatnonzero(modality == k)] for k in np.unique(modality)}
    tokens = _fill(tokens, round_to)
    batch = Batch(
        {name: _concatenate_content([p.content for _, p, _ in own], empty) for name, own in by_modality.items()},
        {name: _hidden([(len(piece), hide) for _, piece, hide in own]) for name, own in by_modality.items()},
        tokens,
        int(count.sum()),
        plan_attention(tokens),
        route(tokens.modality, len(modalities)),
        {},
        teacher,
        halved=halved,
        num_filler=len(tokens) - int(size.sum()),
    )
    for name in tasks:
        mine = [(i, example) for i, (task, _, example) in enumerate(examples) if task == name]
        columns = (torch.from_numpy(column[names == name]) for column in (numbers, first_read, *facts))
        ids, of_modality, sample, group, match = columns
        targets = Targets(
            *_targets(mine, modalities, first_row, first_sequence, row_in_layout),
            sequence=ids, modality=of_modality, table=SequenceTable(of_modality, sample, group),
            **_split_counts(counts[name]), match=match if ASKED in counts[name] else None,
            teacher_rows=teacher.tasks[name].rows if teacher and name in teacher.tasks else {},
        )  # fmt: skip
        if planner := (planners or {}).get(name):
            targets = dataclasses.replace(targets, plan=planner(batch, targets))
        batch.tasks[name] = targets
    if first_pass and not batch.tasks.keys() <= set(first_pass):
        return dataclasses.replace(batch, first_pass=_select_tasks(batch, first_pass, round_to, empty))
    return batch


def _select_tasks(batch: Batch, names: Collection[str], round_to: int, empty) -> Batch:
    """What the batch holds of these tasks' sequences, which keep their numbers; nothing of it is to be predicted.

    Where it holds none of them, its first sequence and no task, so that a rank that must keep step has what to read.
    """
    tasks = {
        name: dataclasses.replace(targets, tokens={}, rows={}, plan=None, teacher_rows={})
        for name, targets in batch.tasks.items()
        if name in names
    }
    wanted = [targets.sequence for targets in tasks.values()] or [batch.tokens.sequence[:1]]
    kept = batch.tokens.select(torch.isin(batch.tokens.sequence, torch.cat(wanted)).nonzero()[:, 0])
    rows, order = kept.content.sort()  # rows among all modalities' contents end to end
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    content, hidden, start = {}, {}, 0
    for modality, whole in batch.content.items():
        first, last = torch.searchsorted(rows, torch.tensor([start, start + len(whole)])).tolist()
        if first < last:
            own = rows[first:last] - start
            out = empty(len(own), *whole.shape[1:], dtype=whole.dtype)
            content[modality] = torch.index_select(whole, 0, own, out=out)
            hidden[modality] = batch.hidden[modality].index_select(0, own)
        start += len(whole)
    tokens = _fill(kept.replace(content=place), round_to)
    routing = route(tokens.modality, len(batch.by_modality.counts))
    plan = plan_attention(tokens)
    return Batch(content, hidden, tokens, batch.num_sequences, plan, routing, tasks, halved=batch.halved)


def _collate_teacher(tasks, modalities: list[str], round_to: int, empty, prompt: Tokens | None, halved) -> Batch | None:
    """What the averaged model reads of these examples; None where it reads nothing. Its targets are the examples' own,
    in the same order, so that its rows are the `teacher_rows` of theirs."""
    whole = {
        name: [
            (number, Example(e.teacher, [None] * len(e.teacher), e.targets, e.teacher_rows))
            for number, e in own
            if e.teacher
        ]
        for name, own in tasks.items()
    }
    whole = {name: own for name, own in whole.items() if own}
    counts = {name: {} for name in whole}
    return collate(whole, modalities, counts, None, round_to, empty, prompt, halved=halved) if whole else None


_SHARED = ("modality", "sequence")  # what all tokens of a piece have in common


def _concatenate_content(contents: list[Tensor], empty) -> Tensor:
    dtype = functools.reduce(torch.promote_types, {content.dtype for content in contents})
    return torch.cat(contents, out=empty(sum(map(len, contents)), *contents[0].shape[1:], dtype=dtype))


def _value_of_each(fields: list[Tensor], begin: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The number (P,) that stands in all rows of each piece's field. Raises ValueError where there are two."""
    rows = torch.cat(fields).numpy()
    values = rows[begin]
    if not np.array_equal(rows, np.repeat(values, size)):
        raise ValueError("a piece of the inputs is of one modality and one sequence: split it")
    return values


def _lay_out(
    pieces: list[Tokens], size: np.ndarray, modality: np.ndarray, sequence: np.ndarray
) -> tuple[Tokens, np.ndarray]:
    """The tokens of all pieces in `tokens.layout` (content: a row among the contents, modality by modality), and each
    piece's first row there. size, modality, sequence: each piece's (P,).
    """
    order = _piece_order(sequence, size, [piece.order for piece in pieces])
    row, content = _first_rows(size, order), _first_rows(size, np.argsort(modality, kind="stable"))
    tokens = Tokens(
        _shifted_rows(size[order], (content - row)[order]),
        torch.cat([pieces[p].position for p in order]),
        torch.from_numpy(np.repeat(sequence[order], size[order])),
        torch.cat([pieces[p].order for p in order]),
        torch.from_numpy(np.repeat(modality[order], size[order])),
    )
    return tokens, row


def _shifted_rows(size: np.ndarray, shift: np.ndarray) -> Tensor:
    """0, 1, 2, ... over the tokens of all pieces, each piece's numbers shifted by its own amount."""
    return torch.from_numpy(np.arange(size.sum()) + np.repeat(shift, size))


def _piece_order(sequence: np.ndarray, size: np.ndarray, orders: list[Tensor]) -> np.ndarray:
    """The pieces, each of one sequence, in the order into which `tokens.layout` would bring their tokens."""
    together = np.argsort(sequence, kind="stable")
    heads = np.flatnonzero(np.diff(sequence[together], prepend=-1))  # each sequence's first piece among them
    lengths = np.add.reduceat(size[together], heads)
    if len(heads) == len(size) and all(order.stride(0) == 0 for order in orders):  # each piece has one order throughout
        pattern = np.full_like(lengths, WHOLE)
    else:
        pattern = classify_orders(torch.from_numpy(lengths), torch.cat([orders[p] for p in together])).numpy()
    rank = np.empty_like(heads)
    rank[np.lexsort((lengths, pattern))] = np.arange(len(heads))
    pieces = np.diff(heads, append=len(together))
    return together[np.argsort(np.repeat(rank, pieces), kind="stable")]


def _first_rows(size: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Each piece's first row where the pieces lie in this order."""
    first = np.empty_like(size)
    first[order] = np.cumsum(size[order]) - size[order]
    return first


def _hidden(pieces: list[tuple[int, Tensor | None]]) -> Tensor:
    """1.0 where a token is hidden; pieces: pairs of a length and the hidden tokens."""
    hidden, end = torch.zeros(sum(length for length, _ in pieces)), 0
    for length, hide in pieces:
        end += length
        if hide is not None:
            hidden[end - length : end] = hide
    return hidden


def _targets(
    examples: list[tuple[int, Example]], modalities: list[str], first_row, first_sequence, row_in_layout: Tensor
) -> tuple[dict[str, Tokens], dict[str, Tensor]]:
    """The target tokens of a task's examples by modality, and the rows that answer them."""
    pieces: dict[str, list] = {}
    for i, example in examples:
        for piece, rows in zip(example.targets, example.rows, strict=True):
            if len(piece):
                pieces.setdefault(modalities[int(piece.modality[0])], []).append((i, piece, rows))
    tokens, answers = {}, {}
    for modality in sorted(pieces, key=modalities.index):
        owners = np.repeat([i for i, _, _ in pieces[modality]], [len(piece) for _, piece, _ in pieces[modality]])
        targets = concatenate([piece for _, piece, _ in pieces[modality]])
        tokens[modality] = targets.replace(sequence=targets.sequence + torch.from_numpy(first_sequence[owners]))
        rows = torch.cat([rows for _, _, rows in pieces[modality]])
        row = row_in_layout.index_select(0, rows.clamp(min=0) + torch.from_numpy(first_row[owners]))
        answers[modality] = torch.where(rows >= 0, row, -1)
    return tokens, answers


MAX_TOKENS = 16_384  # read by the backbone at a time, where nothing is trained


def batch_by_tokens(sequences: Iterable[tuple[int, Tokens]], max_tokens: int = MAX_TOKENS):
    """Lists of successive (owner, sequence) pairs of at most so many tokens together, of at least one pair each."""
    batch, count = [], 0
    for owner, sequence in sequences:
        if batch and count + len(sequence) > max_tokens:
            yield batch
            batch, count = [], 0
        batch.append((owner, sequence))
        count += len(sequence)
    if batch:
        yield batch


def _fill(tokens: Tokens, round_to: int) -> Tokens:
    missing = -len(tokens) % round_to
    if not missing:
        return tokens
    filler = tokens.select(torch.zeros(missing, dtype=torch.long))
    return concatenate([tokens, filler.replace(sequence=torch.full_like(filler.sequence, -1))])
