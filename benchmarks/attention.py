"""Is attention right on this device, and what does it cost? `attend_flash` and `attend_sdpa` against the reference in
float64, and against padded SDPA at realistic lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import alternate, device, first_line, save, seconds
from torch import Tensor

from multimodal_fm.attention import Plan, attend_flash, attend_reference, attend_sdpa, plan_attention
from multimodal_fm.tokens import FILLER, Tokens, layout

ORDERS: dict[str, Callable[[int], list[int]]] = {
    "whole": lambda n: [0] * n,
    "rising": lambda n: list(range(n)),
    "prefix": lambda n: [0] * (n // 2) + list(range(1, n - n // 2 + 1)),
    "block in causal text": lambda n: [*range(n // 3), *[n // 3] * (n // 3), *range(n // 3 + 1, n - n // 3 + 1)],
    "any": lambda n: torch.randint(0, n, (n,)).tolist(),
}
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2}  # of 1 + the size of the true value


def run(out: Path, small: bool) -> bool:
    """All checks and timings; False where a check fails."""
    torch.manual_seed(0)
    checks = [row for case, tokens in cases(small).items() for row in check(case, tokens)] + check_cache(small)
    speeds = {name: compare(sequences, small) for name, sequences in loads(small).items()}
    new_lengths = first_calls() if device().type == "cuda" else {}
    paths = ("attend_flash", "attend_sdpa", "padded SDPA")
    errors = [
        [r["case"], r["function"], r["type"], number(r["value"]), number(r["gradient"]), r["allowed"], r["verdict"]]
        for r in checks
    ]
    times = [
        [case, f"{s['tokens']:,}", f"{s['share']:.2f}", *(milliseconds(s["seconds"][p]) for p in paths), s["ratio"]]
        for case, s in speeds.items()
    ]
    tables = {
        f"Attention against the rule in float64, torch {torch.__version__}": [
            ["case", "function", "type", "largest error: values", "gradients", "allowed", "verdict"],
            *errors,
        ],
        "Attention forward and backward, ms (median of alternating calls)": [
            ["case", "tokens", "of the padded", *paths, "padded / attend_flash"],
            *times,
        ],
    }
    if new_lengths:
        tables["FlexAttention at lengths not met before, seconds (a recompilation takes seconds)"] = [
            ["tokens", "first call", "second call"],
            *([n, *(f"{s:.3f}" for s in pair)] for n, pair in new_lengths["calls"].items()),
        ]
    save(out, "attention", {"checks": checks, "speeds": speeds, "new lengths": new_lengths}, tables)
    return all(row["verdict"] == "right" for row in checks)


def tokens_of(orders: list[list[int]], filler: int = 0) -> Tokens:
    """Sequences of the given orders, in layout, with filler at the end."""
    lengths = torch.tensor([len(order) for order in orders] + [filler])
    numbers = torch.cat([torch.arange(len(orders)), torch.tensor([FILLER])]).repeat_interleave(lengths)
    order = torch.tensor([n for order in orders for n in order] + [0] * filler)
    nothing = torch.zeros(len(order), dtype=torch.long)
    tokens = Tokens(nothing, torch.zeros(len(order), 3), numbers, order, nothing)
    return tokens.select(layout(numbers, order))


def cases(small: bool) -> dict[str, Tokens]:
    lengths = (3, 7, 12, 12, 30) if small else (3, 7, 64, 64, 65, 200, 333)
    layouts = {name: tokens_of([order(n) for n in lengths]) for name, order in ORDERS.items()}
    mixed = [order(n) for order in ORDERS.values() for n in lengths[:-1]]
    layouts |= {"single tokens": tokens_of([[0]] * 5), "mixed": tokens_of(mixed), "mixed, filler": tokens_of(mixed, 37)}
    return layouts


def check(case: str, tokens: Tokens, heads: int = 4, width: int = 64) -> list[dict]:
    """The largest errors of each implementation and dtype in values and gradients."""
    tokens, rows = tokens.to(device()), []
    for dtype in TOLERANCE:
        inputs = [torch.randn(len(tokens), heads, width, device=device()).to(dtype) for _ in range(3)]
        expected = gradients(attend_reference, [t.double() for t in inputs], plan_attention(tokens))
        for function in (attend_flash, attend_sdpa):
            flex_on_cpu = function is attend_flash and device().type == "cpu"  # no backward, and no flash for bfloat16
            if not (flex_on_cpu and dtype == torch.bfloat16):
                rows.append(
                    judge(
                        case,
                        function,
                        dtype,
                        expected,
                        lambda p=function, i=inputs, f=flex_on_cpu: (
                            [p(*i, plan_attention(tokens))] if f else gradients(p, i, plan_attention(tokens))
                        ),
                    )
                )
    return rows


def check_cache(small: bool) -> list[dict]:
    """The last row of each sequence is the query, all are keys: generation with a cache."""
    tokens = cases(small)["mixed"].to(device())
    last = torch.cat([tokens.sequence[1:] != tokens.sequence[:-1], torch.ones(1, dtype=torch.bool, device=device())])
    last = last.nonzero()[:, 0]
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(len(tokens), 4, 64, device=device()).to(dtype) for _ in range(3))
        expected = [attend_reference(q.double(), k.double(), v.double(), plan_attention(tokens)).index_select(0, last)]
        given = (q.index_select(0, last), k, v, plan_attention(tokens.select(last), tokens))
        for function in (attend_flash, attend_sdpa):
            rows.append(judge("cache", function, dtype, expected, lambda p=function, g=given: [p(*g)]))
    return rows


def gradients(function, inputs: list[Tensor], plan_: Plan) -> list[Tensor]:
    """The values and the gradients of q, k and v."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs, plan_)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).bfloat16().to(out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def judge(case: str, function, dtype, expected: list[Tensor], call: Callable[[], list[Tensor]]) -> dict:
    row = {
        "case": case,
        "function": function.__name__,
        "type": str(dtype).removeprefix("torch."),
        "allowed": TOLERANCE[dtype],
    }
    try:
        actual = call()
    except Exception as error:
        return row | {"value": None, "gradient": None, "verdict": first_line(error)}
    errors = [float(((a - b.double()).abs() / (1 + a.abs())).max()) for a, b in zip(expected, actual, strict=False)]
    right = all(error <= TOLERANCE[dtype] for error in errors)  # NaN is not
    return row | {
        "value": errors[0],
        "gradient": max(errors[1:]) if errors[1:] else None,
        "verdict": "right" if right else "WRONG",
    }


def loads(small: bool) -> dict[str, list[list[int]]]:
    """Orders of each sequence, at the lengths that captions and pictures have."""
    captions = caption_lengths(64 if small else 4096)
    pictures = [[0] * 196] * (8 if small else 512)
    return {
        "captions": [[0] * n for n in captions],
        "captions, causal": [list(range(n)) for n in captions],
        "pictures": pictures,
        "captions and pictures": [[0] * n for n in captions] + pictures,
        "captioning": [[0] * 196 + list(range(1, n + 1)) for n in captions[: 4 if small else 128]],
    }


def caption_lengths(count: int) -> list[int]:
    return torch.randn(count).mul(4).add(14).round().clamp(4, 40).int().tolist()


def compare(orders: list[list[int]], small: bool) -> dict:
    """Seconds, forward and backward, of both packed paths and of SDPA on a padded batch with its mask."""
    heads, width = (2, 16) if small else (12, 64)
    dtype = torch.float32 if device().type == "cpu" else torch.bfloat16
    tokens = tokens_of(orders).to(device())
    plan_, longest = plan_attention(tokens), max(map(len, orders))

    def inputs(*shape) -> list[Tensor]:
        return [torch.randn(*shape, device=device(), dtype=dtype, requires_grad=True) for _ in range(3)]

    packed, padded = inputs(len(tokens), heads, width), inputs(len(orders), heads, longest, width)
    causal = all(order == list(range(len(order))) for order in orders)
    mask = None if causal else padding_mask(orders, longest)

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    def both_ways(call, given):
        out = call(*given)
        torch.autograd.grad(out, given, torch.ones_like(out))

    calls = {"attend_sdpa": lambda: both_ways(functools.partial(attend_sdpa, plan=plan_), packed)}
    if device().type == "cuda":
        calls["attend_flash"] = lambda: both_ways(functools.partial(attend_flash, plan=plan_), packed)
    calls["padded SDPA"] = lambda: both_ways(sdpa, padded)
    times = {"attend_flash": {"error": "no backward on a CPU"}} | alternate(calls, 3 if small else 20)
    ours, theirs = (times[name].get("median") for name in ("attend_flash", "padded SDPA"))
    return {
        "tokens": len(tokens),
        "share": len(tokens) / (len(orders) * longest),
        "seconds": times,
        "ratio": f"{theirs / ours:.2f}" if ours and theirs else "",
    }


def padding_mask(orders: list[list[int]], longest: int) -> Tensor:
    """(B, 1, 1 or L, L): True where the row's token reads the column's."""
    order = torch.full((len(orders), longest), 1 << 30)
    for row, own in zip(order, orders, strict=True):
        row[: len(own)] = torch.tensor(own)
    order = order.to(device())
    if all(max(own) == 0 for own in orders):
        return (order == 0)[:, None, None, :]
    return (order[:, None, None, :] <= order[:, None, :, None]) & (order < 1 << 30)[:, None, None, :]


def first_calls() -> dict:
    """Seconds of the first and the second call at total lengths that FlexAttention has not met."""
    calls = {}
    for repeat in range(10):
        tokens = tokens_of([ORDERS["prefix"](n) for n in torch.randint(20, 260, (24 + repeat,)).tolist()]).to(device())
        plan_ = plan_attention(tokens)
        qkv = [torch.randn(len(tokens), 12, 64, device=device(), dtype=torch.bfloat16) for _ in range(3)]
        calls[len(tokens)] = [seconds(lambda q=qkv, p=plan_: gradients(attend_flash, q, p)) for _ in range(2)]
    return {"calls": calls, "graphs": torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)}


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def milliseconds(times: dict) -> str:
    return f"{times['median'] * 1e3:.2f}" if "median" in times else times["error"]
