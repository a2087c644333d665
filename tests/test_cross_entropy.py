"""The cross-entropy that never holds all logits, against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from multimodal_fm.losses import cross_entropy
from multimodal_fm.losses.cross_entropy import linear_cross_entropy
from multimodal_fm.tokenizers.base import PredictIds


def example(rows=37, width=8, ids=50, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, width), (ids, width), (ids,)
    weights = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return *weights, torch.randint(0, ids, (rows,), generator=generator)


def plain(vectors, weight, bias, ids, ignored=-100):
    return F.cross_entropy(F.linear(vectors, weight, bias), ids, ignore_index=ignored, reduction="none")


def small_chunks(monkeypatch, rows: int, ids: int) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", rows * ids * 4)


@pytest.mark.parametrize("rows", [1, 5, 36, 37])
@pytest.mark.parametrize("ignored", [-100, 3, 50])
def test_losses_and_gradients_are_those_of_all_logits(rows, ignored, monkeypatch):
    """Summed up, and with a weight for each row; ignored ids cost nothing, also one that has no logit."""
    small_chunks(monkeypatch, rows, 50)
    vectors, weight, bias, ids = example()
    ids[[2, 30]] = ignored
    for factors in (torch.ones(1).double().expand(37), torch.rand(37).double()):
        found = []
        for function in (linear_cross_entropy, plain):
            losses = function(vectors, weight, bias, ids, ignored)
            total = losses.sum() / 7 if factors.stride(0) == 0 else (losses * factors).sum()
            found.append((losses, *torch.autograd.grad(total, (vectors, weight, bias))))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not losses[[2, 30]].any()


def test_frozen_weights_get_no_gradient_and_graphs_can_be_kept(monkeypatch):
    small_chunks(monkeypatch, 4, 50)
    vectors, weight, bias, ids = example()
    loss = linear_cross_entropy(vectors, weight.detach(), bias, ids).sum()
    once = torch.autograd.grad(loss, vectors, retain_graph=True)[0]
    again, of_bias = torch.autograd.grad(loss, (vectors, bias))
    assert torch.equal(once, again) and of_bias.shape == bias.shape
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(vectors, weight, bias, ids), plain(vectors, weight, bias, ids))


def test_autocast_rounds_products_and_no_sums(monkeypatch):
    """In bfloat16 the difference from float32 is no larger than that of torch's own; losses are float32."""
    vectors, weight, bias, ids = example(dtype=torch.float32)
    exact = plain(vectors, weight, bias, ids)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = F.cross_entropy(F.linear(vectors, weight, bias).float(), ids, reduction="none")
        small_chunks(monkeypatch, 6, 50)
        ours = linear_cross_entropy(vectors, weight, bias, ids)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max()
    for one, other in zip(*(torch.autograd.grad(x.sum(), (vectors, weight, bias)) for x in (ours, exact))):
        assert one.dtype == torch.float32 and (one - other).norm() < 0.02 * other.norm()


def test_the_logits_of_a_large_vocabulary_are_never_there(monkeypatch):
    """At 131,072 ids no operation of forward and backward asks for as much memory as a quarter of the logits."""
    small_chunks(monkeypatch, 32, 1 << 17)
    vectors, weight, bias, ids = example(256, 4, 1 << 17, torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        linear_cross_entropy(vectors, weight, bias, ids).sum().backward()
    largest = max(event.cpu_memory_usage for event in recorded.events())
    assert 0 < largest < 256 * (1 << 17) * 4 / 4


def test_a_predictor_without_rows_reaches_its_weights():
    predictor = PredictIds(40, 8)
    predictor(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)).sum().backward()
    assert not predictor.logits.weight.grad.any()
