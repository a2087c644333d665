"""The one rule of attention: all implementations agree, in values and gradients, for every system's orders."""

from types import SimpleNamespace

import pytest
import torch

from multimodal_fm import attention
from multimodal_fm.attention import Plan, allowed, attend, attend_flash, attend_reference, attend_sdpa, plan_attention
from multimodal_fm.tokens import Tokens, join, layout, split

HEADS, WIDTH = 2, 16
ORDERS = {
    "bert, mae, clip": lambda n: [0] * n,
    "gpt": lambda n: list(range(n)),
    "t5, bart, prefix": lambda n: [0] * (n // 2) + list(range(1, n - n // 2 + 1)),
    "dall-e": lambda n: list(range(n)),  # text 0 ... n-1, then image codes n, n+1, ...
    "image block in causal text": lambda n: (
        list(range(n // 3)) + [n // 3] * (n // 3) + list(range(n // 3 + 1, n - n // 3 + 1))
    ),
    "any": lambda n: torch.randint(0, n, (n,)).tolist(),
}


def sequence(order: list[int]) -> Tokens:
    n = len(order)
    zeros = torch.zeros(n, dtype=torch.long)
    return Tokens(torch.arange(n), torch.zeros(n, 3), zeros, torch.tensor(order), zeros)


def mixture(names, lengths=(1, 2, 5, 5, 7, 12), filler=3) -> Tokens:
    tokens = join(
        [sequence(ORDERS[name](max(3, n)) if "block" in name else ORDERS[name](n)) for name in names for n in lengths]
    )
    if filler:
        rest = sequence([0] * filler)
        tokens = join([tokens, rest.replace(sequence=torch.full((filler,), -1))])
    tokens = tokens.select(torch.randperm(len(tokens)))  # the layout must bring the sequences together again
    return tokens.select(layout(tokens.sequence, tokens.order))


def vectors(n: int, dtype) -> list[torch.Tensor]:
    return [torch.randn(n, HEADS, WIDTH, dtype=dtype, requires_grad=True) for _ in range(3)]


def outputs(function, qkv, plan_) -> list[torch.Tensor]:
    """The values, and the gradients of q, k and v."""
    out = function(*qkv, plan_)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), qkv)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "names", [[name] for name in ORDERS] + [list(ORDERS)], ids=lambda n: n[0] if len(n) == 1 else "all"
)
def test_sdpa_agrees_with_the_reference(names, dtype, tolerance):
    torch.manual_seed(0)
    tokens = mixture(names)
    plan_, qkv = plan_attention(tokens), vectors(len(tokens), dtype)
    for a, b in zip(*(outputs(f, qkv, plan_) for f in (attend_reference, attend_sdpa)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "names", [[name] for name in ORDERS] + [list(ORDERS)], ids=lambda n: n[0] if len(n) == 1 else "all"
)
def test_flex_agrees_with_the_reference(names):
    """FlexAttention has no backward on a CPU: values here, gradients in the gpu test."""
    torch.manual_seed(0)
    tokens = mixture(names)
    plan_, qkv = plan_attention(tokens), [t.detach() for t in vectors(len(tokens), torch.float32)]
    with torch.no_grad():
        torch.testing.assert_close(attend_reference(*qkv, plan_), attend_flash(*qkv, plan_), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 3e-2)])
def test_flash_agrees_with_the_reference_on_a_gpu(dtype, tolerance):
    torch.manual_seed(0)
    tokens = mixture(list(ORDERS), lengths=(1, 7, 64, 64, 200))
    device_tokens = tokens.to("cuda")
    qkv = [t.detach().to("cuda", dtype).requires_grad_() for t in vectors(len(tokens), torch.float64)]
    exact = [t.detach().double().requires_grad_() for t in qkv]
    expected = outputs(attend_reference, exact, plan_attention(device_tokens))
    for a, b in zip(expected, outputs(attend_flash, qkv, plan_attention(device_tokens)), strict=True):
        torch.testing.assert_close(a, b.double(), rtol=tolerance, atol=tolerance)


def test_attention_is_in_float32_on_a_cpu_whatever_products_are_in():
    """The kernel's backward takes ten times as long in bfloat16."""
    torch.manual_seed(0)
    tokens = mixture(list(ORDERS))
    plan_, qkv = plan_attention(tokens), [t.detach().bfloat16() for t in vectors(len(tokens), torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*qkv, plan_)
    assert torch.equal(found, attend(*(t.float() for t in qkv), plan_))


@pytest.mark.parametrize("length", [256, 300, 515])
def test_long_causal_sequences_are_read_in_parts_and_agree_with_the_reference(length):
    torch.manual_seed(0)
    tokens = join([sequence(list(range(length))) for _ in range(2)])
    plan_, qkv = plan_attention(tokens), vectors(len(tokens), torch.float64)
    for a, b in zip(*(outputs(f, qkv, plan_) for f in (attend_reference, attend_sdpa)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_large_masks_are_not_kept():
    attention._kept_lower_right.cache_clear()
    for count, end in ((64, 100), (512, 2048)):
        table = attention._lower_right(count, end)
        assert table[-1].all() and int(table[0].sum()) == end - count + 1
    assert attention._kept_lower_right.cache_info().currsize == 1


@pytest.mark.parametrize("name", ORDERS)
def test_packed_equals_alone(name):
    torch.manual_seed(0)
    tokens = mixture(list(ORDERS), filler=0)
    qkv = vectors(len(tokens), torch.float64)
    packed, *gradients = outputs(attend_sdpa, qkv, plan_attention(tokens))
    weight = torch.linspace(-1, 1, packed.numel(), dtype=packed.dtype).view_as(packed)
    for number, alone in zip(tokens.sequence.unique(), split(tokens), strict=True):
        rows = (tokens.sequence == number).nonzero()[:, 0]
        own = [t.detach()[rows].requires_grad_() for t in qkv]
        out = attend_reference(*own, plan_attention(alone))
        torch.testing.assert_close(out, packed[rows], rtol=0, atol=1e-12)
        for a, b in zip(torch.autograd.grad((out * weight[rows]).sum(), own), gradients, strict=True):
            torch.testing.assert_close(a, b[rows], rtol=0, atol=1e-12)


def test_the_rule_by_hand():
    """Two sequences and a filler, written out: the table that an off-by-one in `order` would change."""
    tokens = join([sequence([0, 0, 1, 2]), sequence([0, 1])])
    tokens = join([tokens, sequence([0]).replace(sequence=torch.tensor([-1]))])
    table = allowed((tokens.sequence, tokens.order), (tokens.sequence, tokens.order))
    expected = [
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    assert table.int().tolist() == expected


@pytest.mark.parametrize("name", ["gpt", "t5, bart, prefix", "image block in causal text"])
def test_an_order_that_is_off_by_one_is_seen(name):
    """The comparison above would notice: one order moved by one changes what `attend_sdpa` gives."""
    torch.manual_seed(0)
    tokens = sequence(ORDERS[name](9))
    qkv = vectors(9, torch.float64)
    moved = tokens.order.clone()
    moved[-2] += 1  # now later than, or as late as, its neighbour
    right, wrong = (
        attend_reference(*qkv, plan_attention(tokens)),
        attend_sdpa(*qkv, plan_attention(tokens.replace(order=moved))),
    )
    assert (right - wrong).abs().max() > 1e-3


def test_a_cache_is_the_same_function():
    """The last row of each sequence as the only query gives what it gives among all queries."""
    torch.manual_seed(0)
    tokens = mixture(["gpt", "t5, bart, prefix"], lengths=(5, 7, 7), filler=0)
    q, k, v = vectors(len(tokens), torch.float64)
    numbers = tokens.sequence.tolist()
    last = torch.tensor([i for i, n in enumerate(numbers) if i + 1 == len(numbers) or numbers[i + 1] != n])
    whole = attend_reference(q, k, v, plan_attention(tokens))
    for function in (attend_reference, attend_sdpa):
        part = function(q[last], k, v, plan_attention(tokens.select(last), tokens))
        torch.testing.assert_close(part, whole[last], rtol=0, atol=1e-12)


def test_block_masks_are_the_rule():
    """The blocks that FlexAttention skips hold nothing, and those that it takes for whole hold no row without a key."""
    torch.manual_seed(0)
    tokens = mixture(["bert, mae, clip", "gpt", "t5, bart, prefix"], lengths=(1, 100, 128, 300, 513), filler=0)
    (call,) = plan_attention(tokens).float_calls
    mask, table = call.block_mask, allowed(*[(tokens.sequence, tokens.order)] * 2)
    table = torch.nn.functional.pad(table, [0, -len(table) % 128] * 2)
    blocks = table.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2).flatten(2)
    whole, part = torch.zeros(2, *blocks.shape[:2], dtype=torch.bool)
    for listed, numbers, indices in (
        (part, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row, count, columns in zip(listed, numbers[0, 0], indices[0, 0], strict=True):
            row[columns[:count].long()] = True
    assert whole.any() and not (whole & part).any()
    assert not (blocks.any(2) & ~(whole | part)).any()  # nothing that is allowed is skipped,
    assert blocks[whole].all()
    assert part.float().mean() < 0.5  # and not everything is looked into


def test_kernel_calls_read_no_value_back_from_the_device():
    tokens = mixture(list(ORDERS))
    on_cpu = plan_attention(tokens)
    on_meta = Plan(*([t.to("meta") for t in side] for side in (on_cpu.query, on_cpu.key)), on_cpu.groups)
    for one, other in ((on_cpu.half_calls, on_meta.half_calls), (on_cpu.float_calls, on_meta.float_calls)):
        assert [(c.pattern, c.num_queries, c.num_keys, c.max_queries) for c in one] == [
            (c.pattern, c.num_queries, c.num_keys, c.max_queries) for c in other
        ]


@pytest.mark.parametrize(
    "device, dtype, gradients, keys, width, expected",
    [
        ("cpu", torch.float32, True, 8, 16, "sdpa"),
        ("cuda", torch.float32, True, 8, 16, "flash"),
        ("cuda", torch.float32, False, 8, 16, "sdpa"),
        ("cuda", torch.bfloat16, False, 8, 64, "flash"),
        ("cuda", torch.bfloat16, False, 64, 64, "sdpa"),
        ("cuda", torch.bfloat16, True, 8, 8, "sdpa"),  # the kernels have no such heads
        ("cuda", torch.bfloat16, True, 8, 20, "sdpa"),
    ],
)
def test_the_implementation_suits_the_device(monkeypatch, device, dtype, gradients, keys, width, expected):
    for name in ("sdpa", "flash"):
        monkeypatch.setattr(attention, f"attend_{name}", lambda *_, name=name: name)
    with torch.set_grad_enabled(gradients):
        q, k = (SimpleNamespace(is_cuda=device == "cuda", dtype=dtype, shape=(rows, 2, width)) for rows in (8, keys))
        assert attend(q, k, None, None) == expected


def test_sequences_in_pieces_are_refused():
    tokens = sequence([0] * 4).replace(sequence=torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="one run"):
        plan_attention(tokens)


def test_join_and_split_are_inverse():
    parts = [sequence([0] * 3), sequence([0, 1]), sequence([0, 0, 1])]
    for part, again in zip(parts, split(join(parts)), strict=True):
        for field in ("content", "position", "sequence", "order", "modality"):
            assert torch.equal(getattr(part, field), getattr(again, field))


def test_the_layout_is_what_sorting_row_by_row_gives():
    torch.manual_seed(0)
    for scattered in [True, False] * 20:
        sequence = torch.randint(-1, 6, (int(torch.randint(0, 40, ())),))
        sequence = sequence if scattered else sequence.sort().values
        order = torch.randint(0, 2, sequence.shape)
        own = {s: order[sequence == s].tolist() for s in sequence.tolist()}

        def key(row, sequence=sequence, own=own):
            s = int(sequence[row])
            steps = {b - a for a, b in zip(own[s], own[s][1:])}
            pattern = 3 if s == -1 else 0 if steps <= {0} else 1 if min(steps) > 0 else 2
            return pattern, len(own[s]), s, row

        assert layout(sequence, order).tolist() == sorted(range(len(sequence)), key=key)
