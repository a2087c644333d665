"""The one rule of attention, and three paths that compute it and agree.

A token reads the tokens of its own sequence whose `order` is not later than its own.

`plain` is the truth for the tests, `by_runs` is fast on a CPU, `by_kernels` on a GPU. The rows that ask and the
rows that are read come separately, so that generation with a cache is the same function.

A asking rows, N read rows, H heads, E width of a head.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import FILLER, MIXED, NOTHING, RISING, Tokens, patterns, runs


@dataclass(frozen=True)
class Group:
    """`count` neighbouring sequences that all have `asks` asking rows, `reads` read rows and one pattern."""

    pattern: int
    count: int
    asks: int
    reads: int
    first_asks: int  # rows before the group
    first_reads: int


@dataclass(frozen=True)
class Plan:
    """How a layout of tokens is attended to, worked out once a batch and used by every layer."""

    asking: tuple[Tensor, Tensor]  # sequence (A,), order (A,)
    read: tuple[Tensor, Tensor]  # sequence (N,), order (N,)
    groups: tuple[Group, ...]

    @functools.cached_property
    def flash_spans(self) -> list[Span]:
        """What each kernel call attends to, where flash kernels may be used."""
        return _spans(self, flash=True)

    @functools.cached_property
    def flex_spans(self) -> list[Span]:
        return _spans(self, flash=False)


@dataclass(frozen=True)
class Span:
    """Neighbouring groups that one kernel call attends to, with what the kernel wants to know."""

    pattern: int
    asks: int
    reads: int
    longest: int  # asking rows of a sequence
    ends: Tensor | None = None  # flash: where the sequences end
    mask: object = None  # flex: the BlockMask


def plan(asking: Tokens, read: Tokens | None = None) -> Plan:
    """Plan the attention of `asking` (A rows) to `read` (N rows; the same tokens where None is given).

    Each sequence must lie in one run, and both sides must name the sequences in the same order; `tokens.layout`
    gives such an order, the one with the fewest groups. Raises ValueError otherwise.
    """
    read = asking if read is None else read
    numbers, asks, _ = runs(asking.sequence)
    read_numbers, reads, _ = runs(read.sequence)
    if numbers.tolist() != read_numbers.tolist() or len(numbers.unique()) != len(numbers):
        raise ValueError("every sequence must lie in one run, in the same order on both sides of attention")
    pattern, _, _ = patterns(asking.sequence, asking.order)
    if read is not asking:  # a cache: the rows that ask come last, so only the order decides
        pattern = torch.where(pattern == NOTHING, NOTHING, MIXED)
    groups, first_asks, first_reads = [], 0, 0
    alike = itertools.groupby(zip(pattern.tolist(), asks.tolist(), reads.tolist(), strict=True))
    for (modality, a, n), members in alike:
        count = sum(1 for _ in members)
        groups.append(Group(modality, count, a, n, first_asks, first_reads))
        first_asks, first_reads = first_asks + count * a, first_reads + count * n
    return Plan((asking.sequence, asking.order), (read.sequence, read.order), tuple(groups))


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Attention by the fastest path for the device: q (A, H, E), k and v (N, H, E) -> (A, H, E)."""
    return (by_kernels if q.is_cuda else by_runs)(q, k, v, plan)


def allowed(asking: tuple[Tensor, Tensor], read: tuple[Tensor, Tensor]) -> Tensor:
    """The rule itself: a table (A, N), True where the row's token reads the column's. Filler reads nothing."""
    (sequence, order), (read_sequence, read_order) = asking, read
    same = (sequence[:, None] == read_sequence) & (sequence != FILLER)[:, None]
    return same & (read_order <= order[:, None])


def plain(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """The rule, written out: every row against every row. Slow, and easy to check."""
    table = allowed(plan.asking, plan.read)  # (A, N)
    scores = torch.einsum("ahe,nhe->han", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~table, -torch.inf).softmax(-1)
    return torch.einsum("han,nhe->ahe", weights.nan_to_num(0.0), v)  # a row that reads nothing gets zeros


def by_runs(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Each group of alike sequences is one SDPA call on a view: no padding and no gathering.

    `torch.split`, because the backward of a slice fills a full-size zero gradient.
    """
    asks = [g.count * g.asks for g in plan.groups]
    reads = [g.count * g.reads for g in plan.groups]
    outs = []
    for group, qs, ks, vs in zip(plan.groups, q.split(asks), k.split(reads), v.split(reads), strict=True):
        if group.pattern == NOTHING:
            outs.append(torch.zeros_like(qs))
            continue
        qs, ks, vs = (t.unflatten(0, (group.count, -1)).transpose(1, 2) for t in (qs, ks, vs))  # (B, H, L, E)
        table = _table(plan, group) if group.pattern == MIXED else None
        out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=table, is_causal=group.pattern == RISING)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs) if outs else q


def _table(plan: Plan, group: Group) -> Tensor:
    """The rule within each sequence of one group: (B, 1, asks, reads)."""
    order = plan.asking[1].narrow(0, group.first_asks, group.count * group.asks).view(group.count, 1, -1, 1)
    read = plan.read[1].narrow(0, group.first_reads, group.count * group.reads).view(group.count, 1, 1, -1)
    return read <= order


def by_kernels(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Variable-length flash attention where orders are all equal or rising, FlexAttention for the rest.

    Flash kernels exist for half precision only, so float32 takes FlexAttention throughout.
    """
    spans = plan.flash_spans if q.dtype in (torch.float16, torch.bfloat16) else plan.flex_spans
    asks, reads = [span.asks for span in spans], [span.reads for span in spans]
    outs = []
    for span, qs, ks, vs in zip(spans, q.split(asks), k.split(reads), v.split(reads), strict=True):
        if span.pattern == NOTHING:
            outs.append(torch.zeros_like(qs))
        else:
            outs.append((_flex if span.pattern == MIXED else _flash)(qs, ks, vs, span))
    return torch.cat(outs) if outs else q


def _spans(plan: Plan, flash: bool) -> list[Span]:
    spans, first_asks, first_reads = [], 0, 0
    for pattern, members in itertools.groupby(
        plan.groups, lambda g: g.pattern if flash or g.pattern == NOTHING else MIXED
    ):
        groups = list(members)
        asks, reads = sum(g.count * g.asks for g in groups), sum(g.count * g.reads for g in groups)
        ends = mask = None
        if pattern == MIXED:
            asking = (t.narrow(0, first_asks, asks) for t in plan.asking)
            mask = _block_mask(*asking, *(t.narrow(0, first_reads, reads) for t in plan.read))
        elif pattern != NOTHING:
            lengths = [g.asks for g in groups for _ in range(g.count)]
            ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(plan.asking[0].device)
        spans.append(Span(pattern, asks, reads, max(g.asks for g in groups), ends, mask))
        first_asks, first_reads = first_asks + asks, first_reads + reads
    return spans


def _flash(q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # How far a token reads before and after itself. Not (-1, -1), which torch 2.14 hands to cuDNN, to build
    # a graph anew at every call, which takes tens of milliseconds.
    window = (-1, 0) if span.pattern == RISING else (span.longest, span.longest)
    return varlen_attn(q, k, v, span.ends, span.ends, span.longest, span.longest, window_size=window)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    call = _compiled_flex() if q.is_cuda else flex_attention
    out = call(*(t.transpose(0, 1)[None] for t in (q, k, v)), block_mask=span.mask)
    return out[0].transpose(0, 1)


BLOCK = 128  # rows and columns of a block of FlexAttention's


def _block_mask(sequence: Tensor, order: Tensor, read_sequence: Tensor, read_order: Tensor):
    """The blocks that FlexAttention must look into, and those that are allowed throughout.

    Found from each block's first and last sequence and its extreme orders, (A / 128, N / 128) numbers:
    `create_block_mask` would write out the whole table (A, N).
    """
    from torch.nn.attention.flex_attention import BlockMask

    def rule(batch, head, asking, read):
        return (sequence[asking] == read_sequence[read]) & (read_order[read] <= order[asking])

    first, last = _block_ends(sequence)
    read_first, read_last = _block_ends(read_sequence)
    touching = (first[:, None] <= read_last) & (read_first <= last[:, None])
    one = (first == last)[:, None] & (read_first == read_last)
    whole = touching & one & (_block_values(read_order, 1).amax(1) <= _block_values(order, -1).amin(1)[:, None])
    return BlockMask.from_kv_blocks(
        *_listed(touching & ~whole), *_listed(whole), BLOCK, rule, (len(sequence), len(read_sequence))
    )


def _block_ends(sequence: Tensor) -> tuple[Tensor, Tensor]:
    """The place, among the sequences, of each block's first and last one."""
    _, _, rows = runs(sequence)
    return rows[::BLOCK], torch.cat([rows[BLOCK - 1 :: BLOCK], rows[-1:]])[: -(-len(rows) // BLOCK)]


def _block_values(order: Tensor, sign: int) -> Tensor:
    """The orders (blocks, 128); a last block that is not full never counts as allowed throughout."""
    return torch.nn.functional.pad(order, (0, -len(order) % BLOCK), value=sign * (1 << 40)).view(-1, BLOCK)


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns each row of the table (R, C) names, and which: first those, then the rest."""
    columns = torch.argsort(table.int(), dim=1, descending=True, stable=True).int()
    return table.sum(1, dtype=torch.int32)[None, None], columns[None, None]
