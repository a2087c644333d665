"""The arithmetic of the backbone: RMSNorm, rotary embedding and experts."""

import pytest
import torch

from multimodal_fm.attention import plan_attention
from multimodal_fm.backbone import Backbone, Config, RMSNorm, apply_rotary, rotary_embedding
from multimodal_fm.batch import route
from multimodal_fm.tokens import make_sequence


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
    x, norm = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), RMSNorm(6, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, x), (x, norm.weight)
    )


def test_pairs_are_rotated_by_their_angle():
    x, position = torch.randn(9, 2, 12), torch.rand(9, 3) * 20
    rotary = rotary_embedding(position, 12)
    assert rotary.shape == (9, 1, 6, 2)
    expected = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.view_as_complex(rotary)
    torch.testing.assert_close(apply_rotary(x, rotary), torch.view_as_real(expected).flatten(-2))


def test_rotary_products_depend_on_distances_alone():
    q, k = torch.randn(2, 1, 1, 24)
    positions = torch.tensor([[[5.0, 2, 7]], [[3.0, 1, 4]]])
    products = []
    for shift in ([0, 0, 0], [10, 3, 2]):
        a, b = (
            apply_rotary(v, rotary_embedding(p + torch.tensor([shift]), 24))
            for v, p in ((q, positions[0]), (k, positions[1]))
        )
        products.append((a * b).sum())
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)
    for axis in range(3):  # and each of the three axes counts
        moved = positions[0].clone()
        moved[0, axis] += 3
        a, b = apply_rotary(q, rotary_embedding(moved, 24)), apply_rotary(k, rotary_embedding(positions[1], 24))
        assert ((a * b).sum() - products[0]).abs() > 1e-4


def test_each_expert_serves_its_own_modality():
    torch.manual_seed(0)
    net = Backbone(Config(width=48, depth=2, num_heads=2, experts=True), ["text", "image"])
    content, position = torch.randn(6, 48), torch.zeros(6, 3)
    modalities = torch.tensor([0, 1, 0, 1, 1, 0])
    tokens = make_sequence(content, position).replace(modality=modalities)
    plan, routing = plan_attention(tokens), route(modalities, 2)
    base = net(tokens, plan, routing).content
    for weight in net.blocks[-1].feed_forward["image"].parameters():
        torch.nn.init.zeros_(weight)
    changed = (net(tokens, plan, routing).content - base).abs().amax(1) > 1e-6
    assert changed.tolist() == (modalities == 1).tolist()
