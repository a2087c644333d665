"""The shared Transformer: pre-norm, RMSNorm, QK-norm, SwiGLU, rotary embedding of time, row and column.

N tokens, D width, H heads, E = D / H width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Plan, attend
from .tokens import Tokens


@dataclass
class Config:
    width: int = 256  # of a token's vector: num_heads times an even number from 6 up
    depth: int = 6  # blocks
    num_heads: int = 4  # of attention, in each block
    mlp_ratio: float = 8 / 3  # the hidden width of the feed-forward layers over `width`
    drop_path: float = 0.0  # training: the share of sequences that skip a block's branch, rising to this with depth
    experts: bool = False  # a feed-forward layer for each modality (BEiT-3, ONE-PEACE) in place of a shared one

    def __post_init__(self):
        if min(self.width, self.num_heads, self.depth) < 1 or not 0 < self.mlp_ratio < 1000:
            raise ValueError("width, depth and num_heads are at least 1, mlp_ratio is above 0")
        if not 0 <= self.drop_path < 1:
            raise ValueError("drop_path is a share from 0 to below 1")
        if self.width % self.num_heads or self.width // self.num_heads % 2 or self.width // self.num_heads < 6:
            raise ValueError(
                f"width ({self.width}) must be num_heads ({self.num_heads}) times an even number from 6 up"
            )


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019) of x (..., D): as torch's, with fewer passes over memory on a CPU.

    There torch runs and differentiates it operation by operation; a whole step gains 5 to 7 % (benchmarks/LOG.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or x.dtype != self.weight.dtype:
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight)


class _RMSNorm(torch.autograd.Function):
    """x (..., D) over its root mean square, times weight (D,)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        root_mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        scale = root_mean_square.clamp(min=torch.finfo(x.dtype).eps).reciprocal()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        unit, scale, weight = ctx.saved_tensors
        along = gradient * weight
        radial = torch.linalg.vecdot(along, unit).unsqueeze(-1) / unit.shape[-1]
        return torch.addcmul(along, unit, radial, value=-1).mul_(scale), (gradient * unit).flatten(0, -2).sum(0)


def rotary_embedding(position: Tensor, head_width: int) -> Tensor:
    """Cosines and sines (N, 1, E / 2, 2) of rotary embedding (Su et al. 2021) for position (N, 3) in time, row, column.

    A third of the pairs rotates with the row, a third with the column, the rest with the time. Rows and columns are
    few, so that their frequencies fall less.
    """
    pairs = head_width // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    angles = []
    for axis, (share, base) in enumerate(zip(shares, (10_000.0, 100.0, 100.0), strict=True)):
        frequency = base ** -(torch.arange(share, device=position.device, dtype=torch.float32) / share)
        angles.append(position[:, axis : axis + 1].float() * frequency)
    angle = torch.cat(angles, -1)[:, None]
    return torch.stack((angle.cos(), angle.sin()), -1)


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the neighboring pairs of x (N, H, E) by the angles of `rotary_embedding`."""
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), rotary.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = RMSNorm(width // num_heads)
        self.norm_k = RMSNorm(width // num_heads)
        self.project_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (N, H, E) of x (N, D), for `attend`; its result goes through `project_out`."""
        q, k, v = self.project_in(x).unflatten(-1, (-1, x.shape[-1] // self.num_heads)).split(self.num_heads, 1)
        q, k = apply_rotary(self.norm_q(q), rotary), apply_rotary(self.norm_k(k), rotary)
        return q.to(v.dtype), k.to(v.dtype), v


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): x (N, D) -> (N, D)."""

    def __init__(self, width: int, mlp_ratio: float):
        super().__init__()
        hidden = max(8, round(width * mlp_ratio / 8) * 8)
        self.project_in = nn.Linear(width, 2 * hidden, bias=False)
        self.project_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, routing=None) -> Tensor:
        gate, value = self.project_in(x).chunk(2, -1)
        return self.project_out(F.silu(gate) * value)


class Experts(nn.ModuleDict):
    """A feed-forward layer for each modality; a token goes through that of its own modality."""

    def __init__(self, width: int, mlp_ratio: float, modalities: Sequence[str]):
        super().__init__({modality: FeedForward(width, mlp_ratio) for modality in modalities})

    def forward(self, x: Tensor, routing) -> Tensor:
        parts = x.index_select(0, routing.rows).split(routing.counts)
        outputs = [expert(part) for expert, part in zip(self.values(), parts, strict=True)]
        return torch.cat(outputs).index_select(0, routing.inverse)


class Block(nn.Module):
    def __init__(self, config: Config, modalities: Sequence[str], drop_path: float = 0.0):
        super().__init__()
        self.drop_path = drop_path
        self.norm_1 = RMSNorm(config.width)
        self.attention = Attention(config.width, config.num_heads)
        self.norm_2 = RMSNorm(config.width)
        self.feed_forward = (
            Experts(config.width, config.mlp_ratio, modalities)
            if config.experts
            else FeedForward(config.width, config.mlp_ratio)
        )

    def forward(self, x: Tensor, rotary: Tensor, plan: Plan, routing, sequence: Tensor) -> Tensor:
        q, k, v = self.before(x, rotary)
        keep = None
        if self.training and self.drop_path:
            # stochastic depth (Huang et al. 2016) by sequence, as timm's by sample: numbers of sequences are below N
            draws = torch.rand(2, len(x), device=x.device).index_select(1, sequence.clamp(min=0))
            keep = (draws >= self.drop_path).to(x.dtype)[..., None] / (1 - self.drop_path)
        return self.after(x, attend(q, k, v, plan), routing, keep)

    def before(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention(self.norm_1(x), rotary)

    def after(self, x: Tensor, attended: Tensor, routing, keep: Tensor | None = None) -> Tensor:
        """keep (2, N, 1): what the two branches are multiplied by."""
        branch = self.attention.project_out(attended.flatten(1))
        x = x + (branch if keep is None else branch * keep[0])
        branch = self.feed_forward(self.norm_2(x), routing)
        return x + (branch if keep is None else branch * keep[1])


class Backbone(nn.Module):
    """Tokens whose content are vectors (N, D) -> the same tokens with other vectors (N, D)."""

    def __init__(self, config: Config, modalities: Sequence[str] = ()):
        super().__init__()
        self.config = config
        self.norm_in = RMSNorm(config.width)
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, modalities, rate) for rate in rates)
        self.norm_out = RMSNorm(config.width)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # keeps unit variance at any width
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
                if name.endswith("project_out.weight"):  # the 2 * depth branches add up to about unit variance
                    weight.data.mul_((2 * config.depth) ** -0.5)

    def compile(self, **options) -> None:
        """Compile what lies between the attentions: only their plan differs from batch to batch."""
        block: Any
        for block in self.blocks:
            block.before, block.after = torch.compile(block.before, **options), torch.compile(block.after, **options)

    def forward(self, tokens: Tokens, plan: Plan, routing=None) -> Tokens:
        """plan: of the attention among the tokens. routing: the rows of each modality, where there are experts."""
        rotary = rotary_embedding(tokens.position, self.config.width // self.config.num_heads)
        x = self.norm_in(tokens.content)
        for block in self.blocks:
            x = block(x, rotary, plan, routing, tokens.sequence)
        return tokens.replace(content=self.norm_out(x))
