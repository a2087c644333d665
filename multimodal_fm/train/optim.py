"""Optimizers and learning-rate schedules: AdamW, and Muon for the matrices of the backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..errors import UserError
from .muon import Muon

STATE = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}
"""The state that each optimizer keeps of a parameter: of the parameter's shape, but for `step`, which is a scalar."""


@dataclass
class Config:
    name: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the backbone's blocks; AdamW for the rest
    lr: float = 1e-3  # the highest learning rate of AdamW
    muon_lr: float = 5e-3  # the highest learning rate of Muon
    layer_decay: float = 1.0
    """Each block learns at this share of the rate of the block after it, and the embedders slowest (Clark et al. 2020);
    below 1 with adamw alone."""
    weight_decay: float = 0.05  # of matrices; biases, gains, embeddings and temperatures are not decayed
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])  # of AdamW
    grad_clip: float = 1.0  # the largest norm of the whole gradient; 0 is no limit
    warmup_steps: int = 20  # the learning rate rises linearly over them
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"  # after the warm-up; wsd: constant, then a linear decay
    decay_fraction: float = 0.3  # wsd: the last fraction of the steps, over which the learning rate decays
    final_lr_fraction: float = 0.0  # of the full learning rate: where wsd and cosine end

    def __post_init__(self):
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas are two numbers from 0 to below 1")
        if not all(0 <= v < math.inf for v in (self.lr, self.muon_lr, self.weight_decay, self.grad_clip)):
            raise ValueError("lr, muon_lr, weight_decay and grad_clip are numbers from 0 up")
        if not 0 < self.layer_decay <= 1 or (self.layer_decay < 1 and self.name != "adamw"):
            raise ValueError("layer_decay is a share above 0, at most 1, and below 1 only with name: adamw")
        if self.warmup_steps < 0:
            raise ValueError("warmup_steps is a whole number from 0 up")
        if not (0 <= self.decay_fraction <= 1 and 0 <= self.final_lr_fraction <= 1):
            raise ValueError("decay_fraction and final_lr_fraction are numbers from 0 to 1")


@runtime_checkable
class WithoutDecay(Protocol):
    """A module with parameters of its own that must not be decayed (timm's convention)."""

    def no_weight_decay(self) -> set[str]:
        """Returns the names of such parameters, as the module's attributes are called."""
        ...


def build(
    config: Config,
    model: nn.Module,
    backbone: Backbone,
    held: dict[nn.Parameter, Tensor] | None = None,
    spread: Callable[[list[Tensor]], list[Tensor]] | None = None,
    fused: bool = True,
) -> list[torch.optim.Optimizer]:
    """Builds the optimizers of all parameters of `model` that need a gradient: AdamW and, if configured, Muon.

    Muon takes the matrices of `backbone.blocks`. Not decayed are biases, gains, temperatures and whatever else has less
    than two dimensions, `nn.Embedding`, and what a module names in its method `no_weight_decay`.

    held: what this rank updates of each sharded parameter, its rows; none where there are none. spread: as in `Muon`.
    fused: AdamW as one kernel, which rounds the last few numbers of a tensor in a way of their own, and which alone
    obeys `found_inf`.
    """
    no_decay = _no_weight_decay(model)
    held = {weight: weight for weight in model.parameters()} if held is None else held
    if config.layer_decay < 1:
        return _with_layer_decay(config, model, no_decay, held, fused)
    muon = set(backbone.blocks.parameters()) if config.name == "muon" else set()
    matrices, decayed, others = [], [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight in held:
            exempt = weight.ndim < 2 or name in no_decay
            (others if exempt else matrices if weight in muon else decayed).append(held[weight])
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = fused and not any(weight.is_meta for weight in (*decayed, *others))
    betas = (config.betas[0], config.betas[1])
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=fused)]
    if matrices or (spread and config.name == "muon"):  # who has no rows of any takes part in sharing them out
        shapes = {held[weight]: weight.shape for weight in muon if weight in held}
        groups = [{"params": matrices}]
        optimizers.append(Muon(groups, config.muon_lr, config.weight_decay, shapes=shapes, spread=spread))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


class _Layers(nn.Module):
    """The modules of a run in the order in which layer-wise rates fall, as timm's functions ask for it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.all = model

    def group_matcher(self, coarse: bool = False) -> dict:
        return {
            "stem": r"all\.model\.(?:embedders|modality_vectors|mask_tokens|backbone\.norm_in|backbone\.positions)",
            "blocks": [(r"all\.model\.backbone\.blocks\.(\d+)", None), (r"all\.model\.backbone\.norm_out", (99999,))],
        }


def _with_layer_decay(
    config: Config, model: nn.Module, no_decay: set[str], held: dict[nn.Parameter, Tensor], fused: bool
) -> list[torch.optim.Optimizer]:
    from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]

    exempt = [f"all.{name}" for name in no_decay]
    groups = param_groups_layer_decay(_Layers(model), config.weight_decay, exempt, layer_decay=config.layer_decay)
    groups = [
        {
            "params": [held[weight] for weight in group["params"] if weight in held],
            "weight_decay": group["weight_decay"],
            "lr": config.lr * group["lr_scale"],
        }
        for group in groups
    ]
    fused = fused and not any(weight.is_meta for group in groups for weight in group["params"])
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=fused)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return [optimizer]


def _no_weight_decay(model: nn.Module) -> set[str]:
    names = set()
    for prefix, module in model.named_modules():
        parameters = {name for name, _ in module.named_parameters(recurse=False)}
        own = {"weight"} if isinstance(module, nn.Embedding) else set()
        if isinstance(module, WithoutDecay):
            own |= module.no_weight_decay()
        if unknown := own - parameters:
            raise ValueError(f"{type(module).__name__}.no_weight_decay names {unknown.pop()}, which is no parameter")
        names |= {f"{prefix}.{name}" if prefix else name for name in own}
    return names


def lr_factor(config: Config, step: int, steps: int) -> float:
    """Returns what the learning rates are multiplied by at `step`, from 0 to `steps` - 1."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return warmup
    if config.schedule == "cosine":
        progress = max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        height = min(1.0, (steps - step) / max(1.0, config.decay_fraction * steps))
    return warmup * (config.final_lr_fraction + (1 - config.final_lr_fraction) * height)


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Sets every learning rate to `factor` times its full value."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Returns the norm of all gradients together, a scalar.

    On a CPU row by row, which takes half the time that torch takes for the norm of a whole matrix, and is exact to
    rounding: torch adds all squares up in one go, of 38 million numbers to no more than three digits.
    """
    if gradients and gradients[0].device.type == "cpu":
        gradients = [torch.linalg.vector_norm(one, dim=-1) if one.ndim else one for one in gradients]
    return nn.utils.get_total_norm(gradients)


class Named(Protocol):
    """A model, or whatever else has parameters with names, such as a rank's rows of them."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...


def optimizer_state(optimizers: list[torch.optim.Optimizer], model: Named) -> dict[str, Tensor]:
    """Returns the state by name, `{parameter name}/{state name}`; zeros for a parameter that was never updated."""
    state = {}
    for optimizer, weight, name in _named(optimizers, model):
        for key in STATE[type(optimizer)]:
            own = optimizer.state.get(weight, {}).get(key)
            state[f"{name}/{key}"] = _zeros(weight, key) if own is None else own
    return state


def load_optimizer_state(optimizers: list[torch.optim.Optimizer], model: Named, tensors: dict[str, Tensor]) -> None:
    """Restores what `optimizer_state` returned, whatever the order of the parameters was then.

    Raises UserError where a parameter's state is missing, there is state of none, or a shape differs.
    """
    expected = {f"{name}/{key}": _shape(w, key) for o, w, name in _named(optimizers, model) for key in STATE[type(o)]}
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": [n for n in expected if n in tensors and tensors[n].shape != expected[n]],
    }
    if any(problems.values()):
        named = (f"{', '.join(n[:3])}{', ...' if n[3:] else ''} {what}" for what, n in problems.items() if n)
        raise UserError(f"the optimizer's state is not this model's: {'; '.join(named)}")
    names = {weight: name for _, weight, name in _named(optimizers, model)}
    for optimizer in optimizers:
        whole, weights = optimizer.state_dict(), [w for group in optimizer.param_groups for w in group["params"]]
        indices = [index for group in whole["param_groups"] for index in group["params"]]
        whole["state"] = {
            index: {key: tensors[f"{names[weight]}/{key}"] for key in STATE[type(optimizer)]}
            for index, weight in zip(indices, weights, strict=True)
        }
        optimizer.load_state_dict(whole)


def _named(optimizers: list[torch.optim.Optimizer], model: Named) -> list[tuple]:
    """Each optimizer with each of its parameters and that parameter's name."""
    names = {weight: name for name, weight in model.named_parameters()}
    return [(o, weight, names[weight]) for o in optimizers for group in o.param_groups for weight in group["params"]]


def _shape(weight: Tensor, key: str) -> torch.Size:
    return torch.Size() if key == "step" else weight.shape


def _zeros(weight: Tensor, key: str) -> Tensor:
    return weight.new_zeros((), dtype=torch.float32) if key == "step" else torch.zeros_like(weight, requires_grad=False)
