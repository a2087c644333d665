"""Optimizers against torch's own, their parameter groups and their state by name; schedules; averaged weights."""

import math

import pytest
import torch
from torch import nn

from multimodal_fm.backbone import Backbone
from multimodal_fm.backbone import Config as BackboneConfig
from multimodal_fm.errors import UserError
from multimodal_fm.train import ema, optim
from multimodal_fm.train.muon import Muon, orthogonalize

SHAPES = [(12, 6), (6, 6), (12, 6), (6, 20), (20, 6), (6, 20)]


def matrices(device="cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]


def set_gradients(weights, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.device)


def test_muon_is_torchs(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # so that torch's computes in float32 too
    ours, theirs = matrices(), matrices()
    settings = {"lr": 0.02, "weight_decay": 0.3}
    optimizers = [Muon(ours, **settings), torch.optim.Muon(theirs, **settings)]
    for step in range(4):
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(weights, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 9), (2, 9, 5)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    result = orthogonalize(torch.randn(shape))
    values = torch.linalg.svdvals(result)
    assert result.shape == shape and result.dtype == torch.float32
    assert values.min() > 0.3 and values.max() < 1.3
    assert torch.isfinite(orthogonalize(torch.zeros(shape))).all()


def test_muon_leaves_parameters_without_a_gradient_alone():
    first, second = matrices()[:2]
    before = second.detach().clone()
    first.grad = torch.ones_like(first)
    Muon([first, second], lr=0.1).step()
    assert torch.equal(second, before)


def test_muon_takes_matrices_only():
    with pytest.raises(ValueError, match="two dimensions"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_muon_reads_no_value_back_from_the_device():
    """The meta device has no values: whatever waits for one raises, as it would stall a GPU."""
    weights = matrices("meta")
    optimizer = Muon(weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 16))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.predict = nn.Linear(16, 5)
        self.decoder = Backbone(BackboneConfig(width=16, depth=1, num_heads=2))

    def no_weight_decay(self) -> set[str]:
        return {"table"}


def container(names=("first", "second"), seed=0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    model = nn.Module()
    model.embedders = nn.ModuleDict({name: nn.Embedding(5, 16) for name in names})
    model.backbone = Backbone(BackboneConfig(width=16, depth=2, num_heads=2))
    return nn.ModuleDict({"model": model, "objectives": nn.ModuleDict({name: Task() for name in names})})


def groups(name: str, model) -> list[set[str]]:
    names = {weight: name for name, weight in model.named_parameters()}
    optimizers = optim.build(optim.Config(name=name, weight_decay=0.1), model, model["model"].backbone)
    decays = [group["weight_decay"] for optimizer in optimizers for group in optimizer.param_groups]
    assert decays == [0.1, 0.0] + [0.1] * (len(optimizers) - 1)
    return [{names[weight] for weight in group["params"]} for o in optimizers for group in o.param_groups]


def test_what_is_decayed_and_what_muon_takes():
    decayed, others, muon = groups("muon", container(("first",)))
    blocks = {
        f"model.backbone.blocks.{block}.{part}.{layer}.weight"
        for block in (0, 1)
        for part in ("attention", "feed_forward")
        for layer in ("project_in", "project_out")
    }
    assert muon == blocks
    decoder = {name.replace("model.backbone", "objectives.first.decoder") for name in blocks if "blocks.0." in name}
    assert decayed == decoder | {"objectives.first.predict.weight"}
    assert {"model.embedders.first.weight", "model.backbone.norm_in.weight", "objectives.first.table"} < others
    assert {"objectives.first.temperature", "objectives.first.predict.bias"} < others
    assert groups("adamw", container(("first",))) == [decayed | muon, others]


def test_a_wrong_name_in_no_weight_decay_is_refused():
    model = container()
    model["objectives"]["first"].no_weight_decay = lambda: {"tabel"}
    with pytest.raises(ValueError, match="tabel"):
        groups("adamw", model)


def test_frozen_parameters_are_left_out():
    model = container()
    model["model"].requires_grad_(False)
    assert not any(name.startswith("model.") for group in groups("muon", model) for name in group)


def trained(names=("first", "second"), steps=2):
    model = container(names)
    optimizers = optim.build(optim.Config(name="muon"), model, model["model"].backbone)
    for step in range(steps):
        for place, (_, weight) in enumerate(sorted(model.named_parameters())):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * step + place))
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


def test_state_is_restored_by_name_whatever_the_order():
    model, optimizers = trained()
    state = {name: value.clone() for name, value in optim.optimizer_state(optimizers, model).items()}
    assert float(state["objectives.first.table/step"]) == 2
    other, others = trained(("second", "first"), steps=0)
    optim.load_optimizer_state(others, other, state)
    again = optim.optimizer_state(others, other)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    other.load_state_dict(model.state_dict())
    for net, opts in ((model, optimizers), (other, others)):  # and the next update is the same
        for place, (_, weight) in enumerate(sorted(net.named_parameters())):
            weight.grad = torch.full_like(weight, 0.01 * place)
        for optimizer in opts:
            optimizer.step()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name


def test_state_before_the_first_update_can_be_restored():
    model, optimizers = trained(steps=0)
    state = optim.optimizer_state(optimizers, model)
    optim.load_optimizer_state(optimizers, model, state)
    assert state and all(not value.any() and not value.requires_grad for value in state.values())


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s.pop("objectives.first.table/exp_avg"), "objectives.first.table/exp_avg missing"),
        (lambda s: s.update({"else/exp_avg": torch.zeros(2)}), "else/exp_avg unexpected"),
        (
            lambda s: s.update({"model.backbone.norm_in.weight/exp_avg": torch.zeros(3)}),
            "model.backbone.norm_in.weight/exp_avg of another shape",
        ),
    ],
)
def test_state_of_another_model_is_refused(change, said):
    model, optimizers = trained()
    state = optim.optimizer_state(optimizers, model)
    change(state)
    with pytest.raises(UserError, match=said):
        optim.load_optimizer_state(optimizers, model, state)


SCHEDULES = [  # settings; the factor at (step of 100: value)
    ({"schedule": "constant", "warmup_steps": 0}, {0: 1, 99: 1}),
    ({"schedule": "constant", "warmup_steps": 10}, {0: 0.1, 8: 0.9, 9: 1, 10: 1, 99: 1}),
    (
        {"schedule": "wsd", "warmup_steps": 10, "decay_fraction": 0.2},
        {0: 0.1, 9: 1, 80: 1, 81: 0.95, 90: 0.5, 99: 0.05},
    ),
    (
        {"schedule": "wsd", "warmup_steps": 0, "decay_fraction": 0.5, "final_lr_fraction": 0.2},
        {0: 1, 50: 1, 75: 0.6, 99: 0.2 + 0.8 / 50},
    ),
    ({"schedule": "wsd", "warmup_steps": 5, "decay_fraction": 0.0}, {0: 0.2, 4: 1, 98: 1, 99: 1}),
    ({"schedule": "wsd", "warmup_steps": 50, "decay_fraction": 1.0}, {0: 0.02, 24: 0.5 * 0.76, 49: 0.51, 99: 0.01}),
    (
        {"schedule": "cosine", "warmup_steps": 20},
        {0: 0.05, 19: 1, 20: 1, 40: 0.5 + 0.5 * math.cos(math.pi / 4), 60: 0.5, 99: 0.5 - 0.5 * math.cos(math.pi / 80)},
    ),
    (
        {"schedule": "cosine", "warmup_steps": 0, "final_lr_fraction": 0.1},
        {0: 1, 50: 0.55, 99: 0.1 + 0.9 * 0.000246720},
    ),
    ({"schedule": "cosine", "warmup_steps": 100}, {0: 0.01, 50: 0.51, 99: 1}),
    ({"schedule": "cosine", "warmup_steps": 200}, {0: 0.005, 99: 0.5}),
]


@pytest.mark.parametrize("settings, expected", SCHEDULES)
def test_schedules(settings, expected):
    config = optim.Config(**settings)
    found = {step: optim.lr_factor(config, step, 100) for step in expected}
    assert found == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        *({key: -0.1} for key in ("lr", "muon_lr", "weight_decay", "grad_clip", "decay_fraction", "final_lr_fraction")),
        *({key: math.nan} for key in ("lr", "decay_fraction")),
        {"decay_fraction": 1.5},
        {"final_lr_fraction": 1.5},
        {"warmup_steps": -1},
        {"betas": [0.9]},
        {"betas": [0.9, 1.0]},
    ],
)
@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_impossible_settings_are_refused(settings, schedule):
    with pytest.raises(ValueError):
        optim.Config(schedule=schedule, **settings)


def test_set_lr_starts_from_the_full_rate_every_time():
    model = container()
    optimizers = optim.build(optim.Config(name="muon", lr=0.1, muon_lr=0.3), model, model["model"].backbone)
    for factor in (0.5, 0.25):
        optim.set_lr(optimizers, factor)
    assert [g["lr"] for o in optimizers for g in o.param_groups] == pytest.approx([0.025, 0.025, 0.075])


@pytest.mark.parametrize("step, decay", [(0, 0.1), (10, 11 / 20), (10_000, 0.9)])
def test_the_average_keeps_no_graph(step, decay):
    average, model = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    model[1].running_mean += 7.0
    model[1].num_batches_tracked += 3
    before = average[0].weight.detach().clone()
    ema.update(average, model, step, 0.9)  # outside of no_grad, as in the loop
    expected = decay * before + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(average[0].weight.detach(), expected)
    assert all(weight.grad_fn is None and weight.is_leaf for weight in average.parameters())
    torch.testing.assert_close(average[1].running_mean, (1 - decay) * model[1].running_mean)  # from 0
    assert torch.equal(average[1].num_batches_tracked, model[1].num_batches_tracked)


def test_the_norm_of_many_numbers_is_exact_to_rounding():
    gradients = [torch.randn(4000, 2000), torch.randn(300), torch.tensor(5.0)]
    expected = sum(one.double().square().sum() for one in gradients).sqrt()
    assert float(optim.total_norm(gradients)) == pytest.approx(float(expected), rel=1e-6)
    assert float(optim.total_norm([])) == 0
