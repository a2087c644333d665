"""The backbone's own arithmetic against torch's."""

import pytest
import torch

from multimodal_fm.backbone import Backbone, Config, RMSNorm, rotate, rotation
from multimodal_fm.tokens import sequence_of


@pytest.mark.parametrize("shape", [(7, 16), (5, 3, 8)])
def test_rms_norm_is_torchs(shape):
    torch.manual_seed(0)
    ours = RMSNorm(shape[-1])
    torch.nn.init.normal_(ours.weight)
    theirs = torch.nn.RMSNorm(shape[-1])
    theirs.load_state_dict(ours.state_dict())
    results = []
    for norm in (ours, theirs):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = norm(x)
        results.append(
            (out, *torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(), [x, norm.weight]))
        )
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(ours(torch.zeros(shape))).all()


def test_rms_norm_has_the_right_gradient():
    x, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    from multimodal_fm.backbone import _RMSNorm

    assert torch.autograd.gradcheck(_RMSNorm.apply, (x.requires_grad_(), weight.requires_grad_()))


def test_both_ways_of_turning_agree():
    x, turn = torch.randn(9, 2, 12), rotation(torch.rand(9, 3) * 20, 12)
    torch.testing.assert_close(rotate(x, turn), rotate(x.double(), turn).float(), rtol=0, atol=1e-5)


def test_rotary_products_depend_on_distances_alone():
    q, k = torch.randn(2, 1, 1, 24)
    place = torch.tensor([[[5.0, 2, 7]], [[3.0, 1, 4]]])
    products = []
    for shift in ([0, 0, 0], [10, 3, 2]):
        a, b = (rotate(v, rotation(p + torch.tensor([shift]), 24)) for v, p in ((q, place[0]), (k, place[1])))
        products.append((a * b).sum())
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)
    for axis in range(3):  # and each of the three axes counts
        moved = place[0].clone()
        moved[0, axis] += 3
        a, b = rotate(q, rotation(moved, 24)), rotate(k, rotation(place[1], 24))
        assert ((a * b).sum() - products[0]).abs() > 1e-4


def test_experts_treat_each_kind_by_its_own():
    torch.manual_seed(0)
    net = Backbone(Config(width=48, depth=2, heads=2, experts=True), modalities=2)
    content, position = torch.randn(6, 48), torch.zeros(6, 3)
    modalities = torch.tensor([0, 1, 0, 1, 1, 0])
    tokens = sequence_of(content, position).replace(modality=modalities)
    base = net(tokens).content
    for weight in net.blocks[-1].feed_forward[1].parameters():
        torch.nn.init.zeros_(weight)
    changed = (net(tokens).content - base).abs().amax(1) > 1e-6
    assert changed.tolist() == (modalities == 1).tolist()
