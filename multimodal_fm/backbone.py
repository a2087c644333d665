"""The shared Transformer, all of it: pre-norm, RMSNorm, QK-norm, SwiGLU, rotary embedding in time, row and column.

N tokens, D width, H heads, E = D / H width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Plan, attend, plan
from .tokens import Tokens


@dataclass
class Config:
    width: int = 256
    depth: int = 6
    heads: int = 4
    expand: float = 8 / 3  # the hidden width of the feed-forward layers, in widths
    experts: bool = False  # a feed-forward layer a modality (multiway: BEiT-3, ONE-PEACE) in place of a shared one

    def __post_init__(self):
        if min(self.width, self.heads, self.depth) < 1 or not 0 < self.expand < 1000:
            raise ValueError("width, heads, depth are at least 1, expand is above 0")
        if self.width % self.heads or self.width // self.heads % 2 or self.width // self.heads < 6:
            raise ValueError(f"width ({self.width}) must be heads ({self.heads}) times an even number from 6 up")


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm (Zhang and Sennrich 2019); on a CPU, where torch takes it apart, a third of the time."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or x.dtype != self.weight.dtype:
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight)


class _RMSNorm(torch.autograd.Function):
    """x (..., D) over its root mean square, times weight (D,), with few passes over memory both ways."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        scale = size.clamp(min=torch.finfo(x.dtype).eps).reciprocal()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        unit, scale, weight = ctx.saved_tensors
        along = gradient * weight
        radial = torch.linalg.vecdot(along, unit).unsqueeze(-1) / unit.shape[-1]
        return torch.addcmul(along, unit, radial, value=-1).mul_(scale), (gradient * unit).flatten(0, -2).sum(0)


def rotation(position: Tensor, width: int) -> Tensor:
    """Cosines and sines (N, 1, E / 2, 2) of rotary embedding (Su et al. 2021) for position (N, 3).

    A third of the pairs turns with the row, a third with the column, the rest with the time; row and column never
    count far, so that their frequencies fall less.
    """
    pairs = width // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    angles = []
    for axis, (share, slowest) in enumerate(zip(shares, (10_000.0, 100.0, 100.0), strict=True)):
        frequency = slowest ** -(torch.arange(share, device=position.device, dtype=torch.float32) / share)
        angles.append(position[:, axis : axis + 1].float() * frequency)
    angle = torch.cat(angles, -1)[:, None]
    return torch.stack((angle.cos(), angle.sin()), -1)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the neighbouring pairs of x (N, H, E) by the cosines and sines of `rotation`.

    As complex numbers on a CPU, in one pass over memory; a GPU's compiler fuses the written-out form.
    """
    pairs = x.unflatten(-1, (-1, 2))
    if x.dtype == turn.dtype and not x.is_cuda:
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn)).flatten(-2)
    (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = RMSNorm(width // heads)
        self.norm_k = RMSNorm(width // heads)
        self.project_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotation) -> tuple[Tensor, Tensor, Tensor]:
        """What is asked, read and passed on: q, k, v (N, H, E)."""
        q, k, v = self.project_in(x).unflatten(-1, (-1, x.shape[-1] // self.heads)).split(self.heads, 1)
        q, k = rotate(self.norm_q(q), rotation), rotate(self.norm_k(k), rotation)
        return q.to(v.dtype), k.to(v.dtype), v


class FeedForward(nn.Module):
    def __init__(self, width: int, expand: float):
        super().__init__()
        hidden = max(8, round(width * expand / 8) * 8)
        self.project_in = nn.Linear(width, 2 * hidden, bias=False)
        self.project_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.project_in(x).chunk(2, -1)
        return self.project_out(F.silu(gate) * value)


class Experts(nn.ModuleList):
    """A feed-forward layer a modality; each token goes through its own modality's."""

    def __init__(self, width: int, expand: float, modalities: int):
        super().__init__(FeedForward(width, expand) for _ in range(modalities))

    def forward(self, x: Tensor, rows: list[Tensor], back: Tensor) -> Tensor:
        parts = [expert(x.index_select(0, own)) for expert, own in zip(self, rows, strict=True)]
        return torch.cat(parts).index_select(0, back)


class Block(nn.Module):
    def __init__(self, config: Config, modalities: int):
        super().__init__()
        self.norm_1 = RMSNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.norm_2 = RMSNorm(config.width)
        self.feed_forward = (
            Experts(config.width, config.expand, modalities)
            if config.experts
            else FeedForward(config.width, config.expand)
        )

    def forward(self, x: Tensor, rotation, plan: Plan, by_modality: tuple) -> Tensor:
        q, k, v = self.before(x, rotation)
        return self.after(x, attend(q, k, v, plan), by_modality)

    def before(self, x: Tensor, rotation) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention(self.norm_1(x), rotation)

    def after(self, x: Tensor, read: Tensor, by_modality: tuple) -> Tensor:
        x = x + self.attention.project_out(read.flatten(1))
        return x + self.feed_forward(self.norm_2(x), *by_modality)


class Backbone(nn.Module):
    """tokens of vectors -> tokens of vectors; `content` (N, D) is all that changes."""

    def __init__(self, config: Config, modalities: int = 1):
        super().__init__()
        self.config, self.modalities = config, modalities
        self.norm_in = RMSNorm(config.width)
        self.blocks = nn.ModuleList(Block(config, modalities) for _ in range(config.depth))
        self.norm_out = RMSNorm(config.width)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # unit variance in, unit variance out, whatever the width
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
                if name.endswith("project_out.weight"):  # 2 * depth branches add up to about unit variance
                    weight.data.mul_((2 * config.depth) ** -0.5)

    def compile(self, **how) -> None:
        """Compile what lies between the attentions: their plan differs from batch to batch, the rest does not."""
        for block in self.blocks:
            block.before, block.after = torch.compile(block.before, **how), torch.compile(block.after, **how)

    def forward(self, tokens: Tokens) -> Tokens:
        plan_ = plan(tokens)
        turn = rotation(tokens.position, self.config.width // self.config.heads)
        by_modality = ()
        if self.config.experts:
            rows = [(tokens.modality == modality).nonzero()[:, 0] for modality in range(self.modalities)]
            by_modality = (rows, torch.argsort(torch.cat(rows)))
        x = self.norm_in(tokens.content)
        for block in self.blocks:
            x = block(x, turn, plan_, by_modality)
        return tokens.replace(content=self.norm_out(x))
