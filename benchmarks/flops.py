"""The floating-point operations of a training step that its model asks for, whatever a program really computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from common import timed
from torch import nn

from multimodal_fm.attention import Plan
from multimodal_fm.backbone import Backbone
from multimodal_fm.tokenizers.base import PredictIds
from multimodal_fm.tokens import NOTHING, RISING


def of_attention(plan: Plan, width: int) -> float:
    """Forward and backward of one layer: 12 D for each pair of a query and a key, half of it for causal text."""
    pairs = 0.0
    for group in plan.groups:
        if group.pattern != NOTHING:
            own = group.count * group.num_queries * group.num_keys
            pairs += own / 2 if group.pattern == RISING else own
    return 12.0 * width * pairs


@contextmanager
def counted(model: nn.Module) -> Iterator[list[float]]:
    """Counts, in the list that is yielded, the operations of what runs inside: 2 for each weight of a matrix and row
    that passes it, as many for the weight's gradient and, where the input has one, for the input's; and attention's.

    Norms, activations, embeddings of ids and whatever runs without gradients count nothing.
    """
    total = [0.0]
    inside = {one.logits for one in model.modules() if isinstance(one, PredictIds)}

    def add(rows: torch.Tensor, weight: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            count = rows.numel() // rows.shape[-1] if rows.shape[-1] else 0
            total[0] += (6 if rows.requires_grad else 4) * count * weight.numel()

    def linear(module, inputs):
        add(inputs[0], module.weight)

    def predict(module, inputs):
        add(inputs[0], module.logits.weight)

    def backbone(module, inputs):
        if torch.is_grad_enabled():
            total[0] += module.config.depth * of_attention(inputs[1], module.config.width)

    hooks = []
    for one in model.modules():
        if isinstance(one, nn.Linear) and one not in inside:
            hooks.append(one.register_forward_pre_hook(linear))
        elif isinstance(one, PredictIds):
            hooks.append(one.register_forward_pre_hook(predict))
        elif isinstance(one, Backbone):
            hooks.append(one.register_forward_pre_hook(backbone))
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()


def product_rate(size: int = 2048, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """FLOP of a square matrix product on this machine, now, by second and by second of CPU time: the best of three."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    wall, cpu = (min(taken) for taken in zip(*(timed(lambda: torch.mm(a, b, out=out)) for _ in range(3)), strict=True))
    return 2 * size**3 / wall, 2 * size**3 / cpu
