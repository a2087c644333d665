"""The one rule of attention, and three implementations that agree.

A token reads the tokens of its own sequence whose `order` is not later than its own.

`attend_reference` writes the rule out and is the truth for the tests, `attend_sdpa` is fast on a CPU, `attend_flash` on
a GPU. Queries and keys are planned separately, so that generation with a cache of keys is the same function.

Q query rows, K key rows, H heads, E width of a head.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import FILLER, MIXED, NOTHING, RISING, Tokens, patterns, runs
from .transfer import move

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Group:
    """`count` neighboring sequences of one pattern with `num_queries` query rows and `num_keys` key rows each."""

    pattern: int
    count: int
    num_queries: int
    num_keys: int
    first_query: int  # the group's first row
    first_key: int


@dataclass(frozen=True)
class Plan:
    """How a layout of tokens is attended to: worked out once a batch, used by every layer."""

    query: tuple[Tensor, Tensor]  # sequence (Q,), order (Q,)
    key: tuple[Tensor, Tensor]  # sequence (K,), order (K,)
    groups: tuple[Group, ...]

    def to(self, device) -> Plan:
        return move(self, device)

    def with_filler(self, count: int) -> Plan:
        """The plan for so many more rows at the end, which read nothing and are not read."""
        rows = (len(self.query[0]), len(self.key[0]))
        return dataclasses.replace(self, groups=(*self.groups, Group(NOTHING, 1, count, count, *rows)))

    @functools.cached_property
    def half_calls(self) -> list[KernelCall]:
        """The kernel calls in half precision, for which there are flash kernels."""
        return _kernel_calls(self, flash=True)

    @functools.cached_property
    def float_calls(self) -> list[KernelCall]:
        return _kernel_calls(self, flash=False)


@dataclass(frozen=True)
class KernelCall:
    """Neighboring groups that one call of a kernel attends to, and the arguments that the kernel takes."""

    pattern: int
    num_queries: int
    num_keys: int
    max_queries: int  # of a sequence
    cu_seqlens: Tensor | None = None  # flash: the cumulative lengths of the sequences, from 0
    block_mask: object = None  # FlexAttention: its BlockMask


def plan_attention(query: Tokens, key: Tokens | None = None) -> Plan:
    """Plan the attention of `query` (Q rows) to `key` (K rows; the same tokens where None is given).

    Each sequence must lie in one run, and both sides must name the sequences in the same order; `tokens.layout`
    gives such an order, the one with the fewest groups. Raises ValueError otherwise.
    """
    key = query if key is None else key
    numbers, query_lengths, _ = runs(query.sequence)
    key_numbers, key_lengths, _ = runs(key.sequence)
    if numbers.tolist() != key_numbers.tolist() or len(numbers.unique()) != len(numbers):
        raise ValueError("every sequence must lie in one run, in the same order on both sides of attention")
    pattern, _, _ = patterns(query.sequence, query.order)
    if key is not query:  # a cache: the queries are the last rows of their sequence, so that only the order decides
        pattern = torch.where(pattern == NOTHING, NOTHING, MIXED)
    groups, first_query, first_key = [], 0, 0
    alike = itertools.groupby(zip(pattern.tolist(), query_lengths.tolist(), key_lengths.tolist(), strict=True))
    for (of_pattern, num_queries, num_keys), members in alike:
        count = sum(1 for _ in members)
        groups.append(Group(of_pattern, count, num_queries, num_keys, first_query, first_key))
        first_query, first_key = first_query + count * num_queries, first_key + count * num_keys
    return Plan((query.sequence, query.order), (key.sequence, key.order), tuple(groups))


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Attention by the implementation that suits the device: q (Q, H, E), k and v (K, H, E) -> (Q, H, E).

    In float32 and without gradients a GPU too calls SDPA: flash kernels are for half precision only, and compiling
    FlexAttention does not pay for a few forward passes. It does not for the few queries of a cache either, and neither
    takes heads whose width E is less than 16 or no multiple of 8.
    """
    fits = q.shape[-1] >= 16 and q.shape[-1] % 8 == 0
    flash = q.is_cuda and fits and q.shape[0] == k.shape[0] and (q.dtype in HALF or torch.is_grad_enabled())
    return (attend_flash if flash else attend_sdpa)(q, k, v, plan)


def allowed(query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """The rule itself: a table (Q, K), True where the row's token reads the column's. Filler reads nothing.

    query, key: the sequence and the order of each row.
    """
    (sequence, order), (key_sequence, key_order) = query, key
    same = (sequence[:, None] == key_sequence) & (sequence != FILLER)[:, None]
    return same & (key_order <= order[:, None])


class Cache:
    """The keys and values of tokens that were read, to which each sequence's next tokens are appended (generation).

    Each sequence has one run of rows, longer than what it holds. The rows ahead already bear the orders of the tokens
    to come, later than all that is there, so that the rule itself hides them: a step writes one row for each sequence
    and moves nothing. `plan` says how the newest tokens, the queries, read the rows; `rows` (Q,) is where they go.
    """

    def __init__(self, tokens: Tokens, device: torch.device | str = "cpu"):
        """tokens, on the CPU: what is read first, each sequence in one run. On `device` lie keys and values."""
        self.device, self.keys, self.values = device, [], []  # a tensor (K, H, E) for each block
        _, self._lengths, run = runs(tokens.sequence)
        last = self._lengths.cumsum(0) - 1
        self._last_order = tokens.order[last]
        self._lay_out()
        rows = torch.arange(len(tokens)) + (self._starts - (last + 1 - self._lengths))[run]
        self._key_order[rows] = tokens.order
        self._set_plan(run, tokens.order, rows)

    def __len__(self) -> int:
        return len(self._lengths)

    def _lay_out(self) -> None:
        """Rows for all that is there and for at least `SPARE` or a quarter more; few different lengths, few groups."""
        room = self._lengths + max(SPARE, int(self._lengths.max()) // 4) if len(self) else self._lengths
        capacity = (room + SPARE - 1) // SPARE * SPARE
        self._starts = capacity.cumsum(0) - capacity
        self._free = int((capacity - self._lengths).min()) if len(self) else 0
        self._key_sequence = torch.repeat_interleave(torch.arange(len(self)), capacity)
        ahead = torch.arange(int(capacity.sum())) - (self._starts + self._lengths)[self._key_sequence]
        self._key_order = ahead + 1 + self._last_order[self._key_sequence]  # what is there: not later than its last

    def _set_plan(self, sequence: Tensor, order: Tensor, rows: Tensor) -> None:
        key_sequence, key_order = self._key_sequence, self._key_order
        query = Tokens(order, order, sequence, order, order)  # only sequence and order are looked at
        key = Tokens(key_order, key_order, key_sequence, key_order, key_order)
        self.plan, self.rows = plan_attention(query, key).to(self.device), rows.to(self.device)
        self._stepping = False

    def append(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a block's keys and values (Q, H, E) of the queries; all of its keys and values (K, H, E)."""
        for stored, new in ((self.keys, k), (self.values, v)):
            if block == len(stored):
                stored.append(new.new_zeros(len(self._key_order), *new.shape[1:]))
            stored[block].index_copy_(0, self.rows, new)
        return self.keys[block], self.values[block]

    def step(self) -> None:
        """One more token for each sequence, in the order of the sequences: `plan` and `rows` are for them."""
        if not self._free:
            self.keep(list(range(len(self))))
        if self._stepping:
            self.plan = dataclasses.replace(self.plan, query=(self.plan.query[0], self.plan.query[1] + 1))
            self.rows = self.rows + 1
        else:
            self._set_plan(torch.arange(len(self)), self._last_order + 1, self._starts + self._lengths)
        self._stepping = True
        self._lengths, self._last_order, self._free = self._lengths + 1, self._last_order + 1, self._free - 1

    def keep(self, which: list[int]) -> None:
        """Go on with these sequences, in this order; one that is named twice becomes two."""
        chosen = torch.tensor(which, dtype=torch.long)
        starts = self._starts
        self._lengths, self._last_order = self._lengths[chosen], self._last_order[chosen]
        self._lay_out()
        owner = torch.repeat_interleave(torch.arange(len(which)), self._lengths)
        within = torch.arange(len(owner)) - (self._lengths.cumsum(0) - self._lengths)[owner]
        source, goal = within + starts[chosen][owner], within + self._starts[owner]
        source, goal, count = source.to(self.device), goal.to(self.device), len(self._key_order)
        for stored in (self.keys, self.values):
            for block, old in enumerate(stored):
                new = old.new_zeros(count, *old.shape[1:])
                stored[block] = new.index_copy_(0, goal, old.index_select(0, source))
        self._stepping = False


SPARE = 64  # rows that a cache sets aside at a time


def attend_reference(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Every row against every row. Slow, and easy to check."""
    table = allowed(plan.query, plan.key)  # (Q, K)
    scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~table, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khe->qhe", weights.nan_to_num(0.0), v)  # zeros for a row that reads nothing


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """One call of scaled_dot_product_attention for each group, on a view: no padding and no gathering.

    `torch.split`, because the backward of a slice fills a zero gradient of full size. On a CPU in float32, since the
    kernel takes ten times as long in bfloat16 (benchmarks/LOG.md).
    """
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return attend_sdpa(q.float(), k.float(), v.float(), plan)
    query_rows = [g.count * g.num_queries for g in plan.groups]
    key_rows = [g.count * g.num_keys for g in plan.groups]
    return _in_parts(functools.partial(_attend_group, plan), plan.groups, q, k, v, query_rows, key_rows)


def _in_parts(attend: Callable, parts: Sequence, q: Tensor, k: Tensor, v: Tensor, query_rows, key_rows) -> Tensor:
    """`attend(part, q, k, v)` of each part's rows, laid end to end (Q, H, E).

    One part takes the rows as they are: a split and a join of one would copy them and their gradients.
    """
    if len(parts) == 1:
        return attend(parts[0], q, k, v)
    rows = zip(parts, q.split(query_rows), k.split(key_rows), v.split(key_rows), strict=True)
    outs = [attend(*one) for one in rows]
    return torch.cat(outs) if outs else q


def _attend_group(plan: Plan, group: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention among the rows of one group alone: q (Q, H, E), k and v (K, H, E) -> (Q, H, E)."""
    if group.pattern == NOTHING:
        return torch.zeros_like(q)
    q, k, v = (rows.unflatten(0, (group.count, -1)).transpose(1, 2) for rows in (q, k, v))  # (B, H, L, E)
    if group.pattern == RISING:
        out = _rising(q, k, v)
    else:
        mask = _mask(plan, group) if group.pattern == MIXED else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1)


def _rising(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention (B, H, L, E), on a CPU some rows at a time with the keys up to their last.

    There the kernel's blocks are of 512 keys, so that it works out what a shorter sequence must not read.
    """
    length = q.shape[2]
    parts = min(length // PART, MAX_PARTS)
    if q.device.type != "cpu" or parts < 2:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    outs, end = [], 0
    for rows in q.tensor_split(parts, 2):
        count, end = rows.shape[2], end + rows.shape[2]
        keys, values = (k, v) if end == length else (k.narrow(2, 0, end), v.narrow(2, 0, end))
        outs.append(F.scaled_dot_product_attention(rows, keys, values, attn_mask=_lower_right(count, end)))
    return torch.cat(outs, 2)


PART, MAX_PARTS = 128, 4  # rows of a call of `_rising`, and calls


def _lower_right(count: int, end: int) -> Tensor:
    """Which of the keys before `end` the last `count` rows before it read (count, end). Small ones are kept: do not
    write to them."""
    make = _kept_lower_right if count * end <= KEPT else _kept_lower_right.__wrapped__
    return make(count, end)


KEPT = 1 << 18  # cells of a mask that is kept


@functools.lru_cache(maxsize=64)
def _kept_lower_right(count: int, end: int) -> Tensor:
    return torch.ones(count, end, dtype=torch.bool).tril(end - count)


def _mask(plan: Plan, group: Group) -> Tensor:
    """The rule within each sequence of one group: (B, 1, num_queries, num_keys)."""
    order = plan.query[1].narrow(0, group.first_query, group.count * group.num_queries).view(group.count, 1, -1, 1)
    key_order = plan.key[1].narrow(0, group.first_key, group.count * group.num_keys).view(group.count, 1, 1, -1)
    return key_order <= order


def attend_flash(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Variable-length flash attention where orders are all equal or rising, FlexAttention for the rest.

    Flash kernels exist for half precision only, so that float32 takes FlexAttention throughout.
    """
    calls = plan.half_calls if q.dtype in HALF else plan.float_calls
    query_rows, key_rows = [call.num_queries for call in calls], [call.num_keys for call in calls]
    return _in_parts(_call_kernel, calls, q, k, v, query_rows, key_rows)


def _call_kernel(call: KernelCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if call.pattern == NOTHING:
        return torch.zeros_like(q)
    return (_flex if call.pattern == MIXED else _varlen)(q, k, v, call)


def _kernel_calls(plan: Plan, flash: bool) -> list[KernelCall]:
    """One call for neighboring groups of one pattern. Reads no value from the plan's tensors: a GPU may hold them."""
    calls, first_query, first_key = [], 0, 0
    for pattern, members in itertools.groupby(
        plan.groups, lambda g: g.pattern if flash or g.pattern == NOTHING else MIXED
    ):
        groups = list(members)
        query_lengths = [g.num_queries for g in groups for _ in range(g.count)]
        key_lengths = [g.num_keys for g in groups for _ in range(g.count)]
        num_queries, num_keys = sum(query_lengths), sum(key_lengths)
        cu_seqlens = block_mask = None
        if pattern == MIXED:
            query = [t.narrow(0, first_query, num_queries) for t in plan.query]
            key = [t.narrow(0, first_key, num_keys) for t in plan.key]
            block_mask = _block_mask(query, query_lengths, key, key_lengths)
        elif pattern != NOTHING:
            cu_seqlens = torch.tensor([0, *itertools.accumulate(query_lengths)], dtype=torch.int32)
            cu_seqlens = cu_seqlens.to(plan.query[0].device, non_blocking=True)
        calls.append(KernelCall(pattern, num_queries, num_keys, max(query_lengths), cu_seqlens, block_mask))
        first_query, first_key = first_query + num_queries, first_key + num_keys
    return calls


def _varlen(q: Tensor, k: Tensor, v: Tensor, call: KernelCall) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # How far a token reads before and after itself. Not (-1, -1), for which torch 2.14 lets cuDNN build a graph anew
    # at every call, which takes tens of milliseconds.
    longest = call.max_queries
    window = (-1, 0) if call.pattern == RISING else (longest, longest)
    lengths: Any = call.cu_seqlens
    out: Any = varlen_attn(q, k, v, lengths, lengths, longest, longest, window_size=window)
    return out


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, call: KernelCall) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    flex: Any = _compiled_flex() if q.is_cuda else flex_attention
    out = flex(*(t.transpose(0, 1)[None] for t in (q, k, v)), block_mask=call.block_mask)
    return out[0].transpose(0, 1)


BLOCK = 128  # rows and columns of a block of FlexAttention


def _block_mask(query: list[Tensor], query_lengths: list[int], key: list[Tensor], key_lengths: list[int]):
    """The blocks that FlexAttention must look into, and those that are allowed throughout.

    Found from each block's first and last sequence and its extreme orders, (Q / 128, K / 128) numbers:
    `create_block_mask` would write out the whole table (Q, K).
    """
    from torch.nn.attention.flex_attention import BlockMask

    (sequence, order), (key_sequence, key_order) = query, key

    def rule(batch, head, query_row, key_row):
        return (sequence[query_row] == key_sequence[key_row]) & (key_order[key_row] <= order[query_row])

    first, last = _sequences_of_blocks(query_lengths)
    key_first, key_last = _sequences_of_blocks(key_lengths)
    touching = (first[:, None] <= key_last) & (key_first <= last[:, None])
    one_sequence = touching & (first == last)[:, None] & (key_first == key_last)
    touching, one_sequence = (t.to(order.device, non_blocking=True) for t in (touching, one_sequence))
    whole = one_sequence & (_blocks(key_order, 1).amax(1) <= _blocks(order, -1).amin(1)[:, None])
    return BlockMask.from_kv_blocks(
        *_listed(touching & ~whole), *_listed(whole), BLOCK, rule, (len(sequence), len(key_sequence))
    )


def _sequences_of_blocks(lengths: list[int]) -> Iterator[Tensor]:
    """The indices of each block's first and last sequence (blocks,), for sequences of these lengths end to end."""
    ends = torch.tensor(lengths).cumsum(0)
    first_rows = torch.arange(0, int(ends[-1]), BLOCK)
    last_rows = (first_rows + BLOCK - 1).clamp(max=int(ends[-1]) - 1)
    return (torch.searchsorted(ends, rows, right=True) for rows in (first_rows, last_rows))


def _blocks(order: Tensor, sign: int) -> Tensor:
    """The orders (blocks, 128); the filling of the last block is such that it never counts as allowed throughout."""
    return F.pad(order, (0, -len(order) % BLOCK), value=sign * (1 << 40)).view(-1, BLOCK)


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns each row of the table (R, C) marks, and their indices: first of those, then of the rest."""
    columns = torch.argsort(table.int(), dim=1, descending=True, stable=True).int()
    return table.sum(1, dtype=torch.int32)[None, None], columns[None, None]
