"""The one rule of attention: all paths agree, in value and gradient, for every row of the table of orders."""

import pytest
import torch

from multimodal_fm.attention import allowed, by_kernels, by_runs, plain, plan
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


def one(order: list[int]) -> Tokens:
    n = len(order)
    zeros = torch.zeros(n, dtype=torch.long)
    return Tokens(torch.arange(n), torch.zeros(n, 3), zeros, torch.tensor(order), zeros)


def mixture(names, lengths=(1, 2, 5, 5, 7, 12), filler=3) -> Tokens:
    tokens = join(
        [one(ORDERS[name](max(3, n)) if "block" in name else ORDERS[name](n)) for name in names for n in lengths]
    )
    if filler:
        rest = one([0] * filler)
        tokens = join([tokens, rest.replace(sequence=torch.full((filler,), -1))])
    tokens = tokens.select(torch.randperm(len(tokens)))  # the layout must bring the sequences together again
    return tokens.select(layout(tokens.sequence, tokens.order))


def vectors(n: int, dtype) -> list[torch.Tensor]:
    return [torch.randn(n, HEADS, WIDTH, dtype=dtype, requires_grad=True) for _ in range(3)]


def results(path, qkv, plan_):
    out = path(*qkv, plan_)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weight).sum(), qkv)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "names", [[name] for name in ORDERS] + [list(ORDERS)], ids=lambda n: n[0] if len(n) == 1 else "all"
)
def test_runs_agree_with_plain(names, dtype, tolerance):
    torch.manual_seed(0)
    tokens = mixture(names)
    plan_, qkv = plan(tokens), vectors(len(tokens), dtype)
    for a, b in zip(
        *(torch.utils._pytree.tree_leaves(results(path, qkv, plan_)) for path in (plain, by_runs)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "names", [[name] for name in ORDERS] + [list(ORDERS)], ids=lambda n: n[0] if len(n) == 1 else "all"
)
def test_kernels_agree_with_plain(names):
    """FlexAttention has no backward on a CPU: values here, gradients in the gpu test."""
    torch.manual_seed(0)
    tokens = mixture(names)
    plan_, qkv = plan(tokens), [t.detach() for t in vectors(len(tokens), torch.float32)]
    with torch.no_grad():
        torch.testing.assert_close(plain(*qkv, plan_), by_kernels(*qkv, plan_), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 3e-2)])
def test_kernels_agree_with_plain_on_a_gpu(dtype, tolerance):
    torch.manual_seed(0)
    tokens = mixture(list(ORDERS), lengths=(1, 7, 64, 64, 200))
    device_tokens = tokens.to("cuda")
    qkv = [t.detach().to("cuda", dtype).requires_grad_() for t in vectors(len(tokens), torch.float64)]
    exact = [t.detach().double().requires_grad_() for t in qkv]
    truth = torch.utils._pytree.tree_leaves(results(plain, exact, plan(device_tokens)))
    found = torch.utils._pytree.tree_leaves(results(by_kernels, qkv, plan(device_tokens)))
    for a, b in zip(truth, found, strict=True):
        torch.testing.assert_close(a, b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ORDERS)
def test_packed_equals_alone(name):
    torch.manual_seed(0)
    tokens = mixture(list(ORDERS), filler=0)
    qkv = vectors(len(tokens), torch.float64)
    packed, gradients = results(by_runs, qkv, plan(tokens))
    weight = torch.linspace(-1, 1, packed.numel(), dtype=packed.dtype).view_as(packed)
    for number, alone in zip(tokens.sequence.unique(), split(tokens), strict=True):
        rows = (tokens.sequence == number).nonzero()[:, 0]
        own = [t.detach()[rows].requires_grad_() for t in qkv]
        out = plain(*own, plan(alone))
        torch.testing.assert_close(out, packed[rows], rtol=0, atol=1e-12)
        for a, b in zip(torch.autograd.grad((out * weight[rows]).sum(), own), gradients, strict=True):
            torch.testing.assert_close(a, b[rows], rtol=0, atol=1e-12)


def test_the_rule_by_hand():
    """Two sequences and a filler, written out: the table that an off-by-one in `order` would change."""
    tokens = join([one([0, 0, 1, 2]), one([0, 1])])
    tokens = join([tokens, one([0]).replace(sequence=torch.tensor([-1]))])
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
    """The comparison above would notice: one order moved by one changes what `by_runs` gives."""
    torch.manual_seed(0)
    tokens = one(ORDERS[name](9))
    qkv = vectors(9, torch.float64)
    moved = tokens.order.clone()
    moved[-2] += 1  # now later than, or as late as, its neighbour
    truth, wrong = plain(*qkv, plan(tokens)), by_runs(*qkv, plan(tokens.replace(order=moved)))
    assert (truth - wrong).abs().max() > 1e-3


def test_a_cache_is_the_same_function():
    """Asking with the last rows alone gives the last rows of asking with all."""
    torch.manual_seed(0)
    tokens = mixture(["gpt", "t5, bart, prefix"], lengths=(5, 7, 7), filler=0)
    q, k, v = vectors(len(tokens), torch.float64)
    numbers = tokens.sequence.tolist()
    last = torch.tensor([i for i, n in enumerate(numbers) if i + 1 == len(numbers) or numbers[i + 1] != n])
    whole = plain(q, k, v, plan(tokens))
    for path in (plain, by_runs):
        part = path(q[last], k, v, plan(tokens.select(last), tokens))
        torch.testing.assert_close(part, whole[last], rtol=0, atol=1e-12)


def test_sequences_in_pieces_are_refused():
    tokens = one([0] * 4).replace(sequence=torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="one run"):
        plan(tokens)


def test_join_and_split_are_inverse():
    parts = [one([0] * 3), one([0, 1]), one([0, 0, 1])]
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
