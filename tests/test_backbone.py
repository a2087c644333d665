"""The arithmetic of the backbone: RMSNorm, rotary embedding, experts, and what the classic block has in their place."""

import pytest
import torch
import torch.nn.functional as F
from conftest import losses

from multimodal_fm import lora
from multimodal_fm.attention import plan_attention
from multimodal_fm.backbone import (
    Attention,
    Backbone,
    Config,
    FeedForward,
    Positions,
    RMSNorm,
    apply_rotary,
    rotary_embedding,
)
from multimodal_fm.batch import route
from multimodal_fm.errors import UserError
from multimodal_fm.model import load
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.tokens import make_sequence
from multimodal_fm.train import config as train_config
from multimodal_fm.train import loop, optim


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


CLASSIC = {"width": 48, "depth": 2, "num_heads": 2, "block": "classic", "max_positions": 30, "grid": [6, 6]}


@pytest.mark.parametrize("width", [6, 64])
def test_queries_and_keys_are_normed_and_rotated_in_one(width):
    """What a CPU does in one function is what `RMSNorm` and `apply_rotary` do after each other, gradients included."""
    torch.manual_seed(0)
    attention = Attention(Config(width=2 * width, num_heads=2))
    with torch.no_grad():
        for weight in attention.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    x, rotary = torch.randn(7, 2 * width, requires_grad=True), rotary_embedding(torch.rand(7, 3) * 20, width)
    found = attention(x, rotary)
    q, k, v = attention.project_in(x).unflatten(-1, (-1, width)).split(2, 1)
    expected = apply_rotary(attention.norm_q(q), rotary), apply_rotary(attention.norm_k(k), rotary), v
    weights = [torch.randn_like(one) for one in expected]
    learned = [x, *(p for name, p in attention.named_parameters() if "project_out" not in name)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    gradients = [
        torch.autograd.grad([(o * w).sum() for o, w in zip(outputs, weights, strict=True)], learned, retain_graph=True)
        for outputs in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_swiglu_has_the_right_gradient():
    torch.manual_seed(0)
    layer = FeedForward(Config(width=12, num_heads=2)).double()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    gate, value = layer.project_in(x).chunk(2, -1)
    torch.testing.assert_close(layer(x), layer.project_out(F.silu(gate) * value))
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("block", [{"block": "modern"}, CLASSIC])
def test_each_expert_serves_its_own_modality(block):
    torch.manual_seed(0)
    net = Backbone(Config(**{"width": 48, "depth": 2, "num_heads": 2, **block}, experts=True), ["text", "image"])
    content, position = torch.randn(6, 48), torch.zeros(6, 3)
    modalities = torch.tensor([0, 1, 0, 1, 1, 0])
    tokens = make_sequence(content, position).replace(modality=modalities)
    plan, routing = plan_attention(tokens), route(modalities, 2)
    base = net(tokens, plan, routing).content
    for weight in net.blocks[-1].feed_forward["image"].parameters():
        torch.nn.init.zeros_(weight)
    changed = (net(tokens, plan, routing).content - base).abs().amax(1) > 1e-6
    assert changed.tolist() == (modalities == 1).tolist()


# The classic block; that it is BERT's, GPT-2's and ViT's to rounding stands in test_interop.py


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_classic_block_is_torchs(norm):
    torch.manual_seed(0)
    net = Backbone(Config(**CLASSIC, norm=norm, norm_in=True, norm_eps=1e-4, mlp_ratio=1.7, activation="relu"))
    theirs = torch.nn.TransformerEncoderLayer(
        48, 2, 82, 0.0, "relu", layer_norm_eps=1e-4, batch_first=True, norm_first=norm == "pre"
    )
    position = torch.tensor([[0.0, 0, 0], [7, 0, 0], [0, 2, 3], [-1, 0, 0]])
    tokens = make_sequence(torch.randn(4, 48), position)
    time, cell = net.positions.time.weight, net.positions.cell.weight
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
        x = tokens.content + torch.stack(
            [time[0] + cell[0], time[7] + cell[0], time[0] + cell[2 * 6 + 3], torch.zeros(48)]
        )
        x = F.layer_norm(x, (48,), net.norm_in.weight, net.norm_in.bias, 1e-4)
        for block in net.blocks:
            names = {
                "self_attn.in_proj_": block.attention.project_in,
                "self_attn.out_proj.": block.attention.project_out,
                "linear1.": block.feed_forward.project_in,
                "linear2.": block.feed_forward.project_out,
                "norm1.": block.norm_1,
                "norm2.": block.norm_2,
            }
            theirs.load_state_dict({n + k: w for n, layer in names.items() for k, w in layer.state_dict().items()})
            x = theirs(x[None])[0]
        if norm == "pre":
            x = F.layer_norm(x, (48,), net.norm_out.weight, net.norm_out.bias, 1e-4)
        torch.testing.assert_close(net(tokens, plan_attention(tokens)).content, x, rtol=1e-5, atol=1e-5)


def test_a_position_without_a_vector_is_an_error():
    positions = Positions(Config(**CLASSIC))
    assert positions(torch.tensor([[29.0, 5, 5]])).shape == (1, 48)
    for place in ([30.0, 0, 0], [0.0, 6, 0], [0.0, 0, 6]):
        with pytest.raises(UserError, match="the backbone learns 30 x 6 x 6: set backbone.max_positions"):
            positions(torch.tensor([place]))
    times = Positions(Config(**{**CLASSIC, "grid": []}))
    torch.testing.assert_close(times(torch.tensor([[3.0, 99, 99]])), times.time.weight[3:4])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"norm": "post"}, "norm is a setting of block: classic"),
        ({"grid": [4, 4]}, "grid is a setting of block: classic"),
        ({"block": "classic"}, "set max_positions for sequences, grid for pictures"),
        ({"block": "classic", "grid": [4]}, "two whole numbers"),
        ({"block": "classic", "max_positions": 4, "num_heads": 5}, "a multiple of num_heads"),
        ({"block": "classic", "max_positions": 4, "norm_eps": 0.0}, "norm_eps is a small number"),
    ],
)
def test_wrong_settings_of_the_block(settings, said):
    with pytest.raises(ValueError, match=said):
        Config(**settings)
    assert Config(**{**CLASSIC, "num_heads": 12}).width == 48  # heads of any width: nothing is rotated


def test_drop_path_in_a_classic_block_skips_branches():
    torch.manual_seed(0)
    net = Backbone(Config(**CLASSIC, norm="post", drop_path=0.99)).train()
    tokens = make_sequence(torch.randn(5, 48), torch.zeros(5, 3))
    plan, block = plan_attention(tokens), net.blocks[-1]
    x = torch.randn(5, 48)
    torch.manual_seed(1)
    skipped = block.norm_2(block.norm_1(x))
    torch.testing.assert_close(block(x, None, plan, None, tokens.sequence), skipped)
    assert not torch.allclose(block.eval()(x, None, plan, None, tokens.sequence), skipped)


def test_optimizers_and_adapters_know_the_classic_block():
    net = Backbone(Config(**CLASSIC, norm_in=True))
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"backbone": net})})
    names = {weight: name.removeprefix("model.backbone.") for name, weight in model.named_parameters()}

    def groups(**settings):
        built = optim.build(optim.Config(weight_decay=0.1, **settings), model, net)
        found = [group for one in built for group in one.param_groups]
        return [({names[weight] for weight in group["params"]}, group) for group in found]

    matrices = {name for name in names.values() if name.startswith("blocks") and "project" in name and "weight" in name}
    decayed, others, muon = [own for own, _ in groups(name="muon")]
    assert muon == matrices and len(muon) == 8 and not decayed
    assert {"positions.time.weight", "positions.cell.weight", "blocks.0.attention.project_in.bias"} < others
    rates = {name: group["lr"] for own, group in groups(lr=1.0, layer_decay=0.5) for name in own}
    assert rates["positions.time.weight"] == rates["norm_in.bias"] == 0.5**2
    assert rates["blocks.0.norm_1.bias"] == 0.5 and rates["blocks.1.norm_1.bias"] == rates["norm_out.weight"] == 1.0

    tokens = make_sequence(torch.randn(5, 48), torch.zeros(5, 3))
    plan = plan_attention(tokens)
    adapted = Backbone(Config(**CLASSIC, norm_in=True))
    adapted.load_state_dict(net.state_dict())
    pytest.importorskip("peft")
    lora.inject(adapted, lora.Config(rank=2))
    torch.testing.assert_close(adapted(tokens, plan).content, net(tokens, plan).content)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    merged = Backbone(Config(**CLASSIC, norm_in=True))
    merged.load_state_dict(lora.merged_tensors(adapted))
    torch.testing.assert_close(merged(tokens, plan).content, adapted(tokens, plan).content, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(tokens, plan).content, net(tokens, plan).content, atol=1e-2)


def test_a_classic_run_learns_and_is_read_again(write_config):
    """All objectives over text, pictures and sounds, with a classic decoder too."""
    path = write_config(backbone={**CLASSIC, "norm_in": True, "norm": "post"}, steps=8)
    decoder = {**CLASSIC, "width": 32, "depth": 1}
    overrides = [f"tasks.looks.objectives.masked.decoder={decoder}"]
    with pytest.raises(UserError, match=r"tokenizers.image has up to 1 times, 12 rows and 12 columns, .* 30 x 6 x 6"):
        train_config.load(path, overrides)
    config = train_config.load(path, [*overrides, "model.tokenizers.image.square=true"])
    folder = loop.pretrain(config)
    found = losses(config.run_dir)
    assert found[8]["loss"] < found[1]["loss"]
    tensors = checkpoint.read_tensors(folder, "model")
    assert {"backbone.positions.time.weight", "backbone.positions.cell.weight", "backbone.norm_in.bias"} < set(tensors)
    model = load(folder, ema=False)
    assert model.config.backbone.grid == [6, 6] and model.embed(text=["a red square"])["text"].shape == (1, 32)
