"""The shared Transformer: pre-norm, RMSNorm, QK-norm, SwiGLU, rotary embedding of time, row and column.

With `block: classic` it is that of BERT, GPT-2, ViT and CLIP instead: LayerNorm before or after each branch, biases,
GELU, learned positions.

N tokens, D width, H heads, E = D / H width of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Cache, Plan, attend
from .errors import UserError
from .tokens import Tokens

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


@dataclass
class Config:
    width: int = 256  # of a token's vector: num_heads times an even number from 6 up
    depth: int = 6  # blocks
    num_heads: int = 4  # of attention, in each block
    mlp_ratio: float = 8 / 3  # the hidden width of the feed-forward layers over `width`
    drop_path: float = 0.0  # training: the share of sequences that skip a block's branch, rising to this with depth
    experts: bool = False  # a feed-forward layer for each modality (BEiT-3, ONE-PEACE) in place of a shared one
    block: Literal["modern", "classic"] = "modern"
    """modern: RMSNorm, QK-norm, SwiGLU and rotary embedding, no biases. classic: LayerNorm, a feed-forward layer of two
    matrices, biases and learned positions, as in BERT, GPT-2, ViT and CLIP; the settings below are for it alone."""
    norm: Literal["pre", "post"] = "pre"  # classic: LayerNorm before each branch (GPT-2, ViT) or after its sum (BERT)
    norm_in: bool = False  # classic: LayerNorm of the embeddings too (BERT, and CLIP's reader of pictures)
    norm_eps: float = 1e-5  # classic: of LayerNorm; BERT has 1e-12, timm's ViT 1e-6
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu"] = "gelu"
    """classic: gelu_tanh is GPT-2's approximation, quick_gelu CLIP's."""
    max_positions: int = 0  # classic: rows of the table of learned times (BERT 512, GPT-2 1024); 0: none
    grid: list[int] = field(default_factory=list)
    """classic: rows and columns of the table of learned positions in a picture (ViT-B/16: [14, 14]); empty: none."""

    def __post_init__(self):
        if min(self.width, self.num_heads, self.depth) < 1 or not 0 < self.mlp_ratio < 1000:
            raise ValueError("width, depth and num_heads are at least 1, mlp_ratio is above 0")
        if not 0 <= self.drop_path < 1:
            raise ValueError("drop_path is a share from 0 to below 1")
        (self._check_classic if self.block == "classic" else self._check_modern)()

    def _check_modern(self):
        if self.width % self.num_heads or self.width // self.num_heads % 2 or self.width // self.num_heads < 6:
            raise ValueError(
                f"width ({self.width}) must be num_heads ({self.num_heads}) times an even number from 6 up"
            )
        names = [one.name for one in fields(self)]
        for name in names[names.index("block") + 1 :]:
            if getattr(self, name) != ([] if name == "grid" else getattr(Config, name)):
                raise ValueError(f"{name} is a setting of block: classic")

    def _check_classic(self):
        if self.width % self.num_heads:
            raise ValueError(f"width ({self.width}) must be a multiple of num_heads ({self.num_heads})")
        if self.max_positions < 0 or len(self.grid) not in (0, 2) or min(self.grid, default=1) < 1:
            raise ValueError("max_positions is 0 or more, grid two whole numbers from 1 up: rows and columns")
        if not self.max_positions and not self.grid:
            raise ValueError("block: classic learns its positions: set max_positions for sequences, grid for pictures")
        if not 0 < self.norm_eps < 1:
            raise ValueError("norm_eps is a small number above 0")

    def extent(self) -> tuple[float, ...]:
        """For how many times, rows and columns there are positions; infinity where they are not counted."""
        return (self.max_positions or math.inf, *(self.grid or (math.inf, math.inf)))


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


def make_norm(config: Config) -> nn.Module:
    return RMSNorm(config.width) if config.block == "modern" else nn.LayerNorm(config.width, eps=config.norm_eps)


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
    def __init__(self, config: Config):
        super().__init__()
        width, self.num_heads = config.width, config.num_heads
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = RMSNorm(width // self.num_heads)
        self.norm_k = RMSNorm(width // self.num_heads)
        self.project_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (N, H, E) of x (N, D), for `attend`; its result goes through `project_out`."""
        q, k, v = self.project_in(x).unflatten(-1, (-1, x.shape[-1] // self.num_heads)).split(self.num_heads, 1)
        q, k = apply_rotary(self.norm_q(q), rotary), apply_rotary(self.norm_k(k), rotary)
        return q.to(v.dtype), k.to(v.dtype), v


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): x (N, D) -> (N, D)."""

    def __init__(self, config: Config):
        super().__init__()
        hidden = max(8, round(config.width * config.mlp_ratio / 8) * 8)
        self.project_in = nn.Linear(config.width, 2 * hidden, bias=False)
        self.project_out = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: Tensor, routing=None) -> Tensor:
        gate, value = self.project_in(x).chunk(2, -1)
        return self.project_out(F.silu(gate) * value)


class Experts(nn.ModuleDict):
    """A feed-forward layer for each modality; a token goes through that of its own modality."""

    def forward(self, x: Tensor, routing) -> Tensor:
        parts = x.index_select(0, routing.rows).split(routing.counts)
        outputs = [expert(part) for expert, part in zip(self.values(), parts, strict=True)]
        return torch.cat(outputs).index_select(0, routing.inverse)


class Block(nn.Module):
    make_attention, make_feed_forward = Attention, FeedForward

    def __init__(self, config: Config, modalities: Sequence[str], drop_path: float = 0.0):
        super().__init__()
        self.drop_path = drop_path
        self.norm_1 = make_norm(config)
        self.attention = self.make_attention(config)
        self.norm_2 = make_norm(config)
        self.feed_forward = (
            Experts({modality: self.make_feed_forward(config) for modality in modalities})
            if config.experts
            else self.make_feed_forward(config)
        )

    def forward(
        self, x: Tensor, rotary: Tensor | None, plan: Plan, routing, sequence: Tensor, append: Callable | None = None
    ) -> Tensor:
        """append: takes the tokens' keys and values and gives all that they read, those of a cache among them."""
        q, k, v = self.before(x, rotary)
        if append is not None:
            k, v = append(k, v)
        keep = None
        if self.training and self.drop_path:
            # stochastic depth (Huang et al. 2016) by sequence, as timm's by sample: numbers of sequences are below N
            draws = torch.rand(2, len(x), device=x.device).index_select(1, sequence.clamp(min=0))
            keep = (draws >= self.drop_path).to(x.dtype)[..., None] / (1 - self.drop_path)
        return self.after(x, attend(q, k, v, plan), routing, keep)

    def before(self, x: Tensor, rotary: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention(self.norm_1(x), rotary)

    def after(self, x: Tensor, attended: Tensor, routing, keep: Tensor | None = None) -> Tensor:
        """keep (2, N, 1): what the two branches are multiplied by."""
        branch = self.attention.project_out(attended.flatten(1))
        x = x + (branch if keep is None else branch * keep[0])
        branch = self.feed_forward(self.norm_2(x), routing)
        return x + (branch if keep is None else branch * keep[1])


class ClassicAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.project_in = nn.Linear(config.width, 3 * config.width)
        self.project_out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, rotary: None) -> tuple[Tensor, ...]:
        """Queries, keys and values (N, H, E) of x (N, D), as `Attention`."""
        return self.project_in(x).unflatten(-1, (-1, x.shape[-1] // self.num_heads)).split(self.num_heads, 1)


class ClassicFeedForward(nn.Module):
    """Two linear layers and an activation between them (Vaswani et al. 2017): x (N, D) -> (N, D)."""

    def __init__(self, config: Config):
        super().__init__()
        hidden = max(1, round(config.width * config.mlp_ratio))
        self.activation = ACTIVATIONS[config.activation]
        self.project_in = nn.Linear(config.width, hidden)
        self.project_out = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor, routing=None) -> Tensor:
        return self.project_out(self.activation(self.project_in(x)))


class ClassicBlock(Block):
    """The block of Vaswani et al. 2017: LayerNorm after each sum, as in BERT, or before each branch (GPT-2, ViT)."""

    make_attention, make_feed_forward = ClassicAttention, ClassicFeedForward

    def __init__(self, config: Config, modalities: Sequence[str], drop_path: float = 0.0):
        super().__init__(config, modalities, drop_path)
        self.post = config.norm == "post"

    def before(self, x: Tensor, rotary: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention(x, rotary) if self.post else super().before(x, rotary)

    def after(self, x: Tensor, attended: Tensor, routing, keep: Tensor | None = None) -> Tensor:
        if not self.post:
            return super().after(x, attended, routing, keep)
        branch = self.attention.project_out(attended.flatten(1))
        x = self.norm_1(x + (branch if keep is None else branch * keep[0]))
        branch = self.feed_forward(x, routing)
        return self.norm_2(x + (branch if keep is None else branch * keep[1]))


class Positions(nn.Module):
    """Learned vectors (N, D) of positions (N, 3): that of the time and that of the cell of a grid of rows and columns.

    A text lies in the grid's first cell and a picture at time 0, which are one vector more for all its tokens. Tokens
    before time 0 (a class token, a prompt) have no position: they are learned themselves.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.grid, self.extent = config.grid, config.extent()
        self.time = nn.Embedding(config.max_positions, config.width) if config.max_positions else None
        self.cell = nn.Embedding(config.grid[0] * config.grid[1], config.width) if config.grid else None
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, position: Tensor) -> Tensor:
        """Raises UserError for a position that has no vector; on a GPU the kernel that looks it up says so."""
        time, row, column = position.long().unbind(1)
        vectors = []
        try:
            if self.time is not None:
                vectors.append(self.time.weight.index_select(0, time.clamp(min=0)))
            if self.cell is not None:
                rows, columns = self.grid
                cell = torch.where(column < columns, row * columns + column, rows * columns)  # beside it: none
                vectors.append(self.cell.weight.index_select(0, cell))
        except IndexError:
            times, rows, columns = (int(axis.max()) + 1 for axis in (time, row, column))
            raise UserError(
                f"a sequence has {times} times, {rows} rows and {columns} columns, the backbone learns "
                f"{' x '.join(map(str, self.extent))}: set backbone.max_positions or grid higher, or max_tokens lower"
            ) from None
        return sum(vectors) * (time >= 0)[:, None]


BLOCKS = {"modern": Block, "classic": ClassicBlock}


class Backbone(nn.Module):
    """Tokens whose content are vectors (N, D) -> the same tokens with other vectors (N, D)."""

    def __init__(self, config: Config, modalities: Sequence[str] = ()):
        super().__init__()
        self.config = config
        classic = config.block == "classic"
        self.positions = Positions(config) if classic else None
        self.norm_in = nn.Identity() if classic and not config.norm_in else make_norm(config)
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(BLOCKS[config.block](config, modalities, rate) for rate in rates)
        self.norm_out = nn.Identity() if config.norm == "post" else make_norm(config)
        for name, weight in self.blocks.named_parameters():
            if weight.ndim == 2:  # keeps unit variance at any width
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
                if name.endswith("project_out.weight"):  # the 2 * depth branches add up to about unit variance
                    weight.data.mul_((2 * config.depth) ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def compile(self, **options) -> None:
        """Compile what lies between the attentions: only their plan differs from batch to batch."""
        block: Any
        for block in self.blocks:
            block.before, block.after = torch.compile(block.before, **options), torch.compile(block.after, **options)

    def forward(
        self,
        tokens: Tokens,
        plan: Plan,
        routing=None,
        *,
        states: list[Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Tokens:
        """plan: of the attention among the tokens. routing: the rows of each modality, where there are experts.

        states: a list to which each block's output (N, D) is added. cache: what was read before, to which the tokens
        are appended; the plan is the cache's.
        """
        x, rotary = tokens.content, None
        if self.positions is None:
            rotary = rotary_embedding(tokens.position, self.config.width // self.config.num_heads)
        else:
            x = x + self.positions(tokens.position)
        x = self.norm_in(x)
        for number, block in enumerate(self.blocks):
            append = functools.partial(cache.append, number) if cache is not None else None
            x = block(x, rotary, plan, routing, tokens.sequence, append)
            if states is not None:
                states.append(x)
        return tokens.replace(content=self.norm_out(x))
