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
from torch.compiler import is_compiling
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .attention import Cache, Plan, attend
from .errors import UserError
from .tokens import FILLER, Tokens

MAX_DEPTH = 4096
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
        if self.depth > MAX_DEPTH:
            raise ValueError(f"depth is at most {MAX_DEPTH}")
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
        weight = self.weight.to(x.dtype)  # torch has no fused kernel for two types
        if x.is_cuda or x.dtype == torch.bfloat16:
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        return _RMSNorm.apply(x, weight)


class _RMSNorm(torch.autograd.Function):
    """x (..., D) over its root mean square, times weight (D,)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        unit, scale = _unit(x)
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        unit, scale, weight = ctx.saved_tensors
        products = gradient * unit
        radial = (products @ weight).unsqueeze(-1) / unit.shape[-1]
        along = (gradient * weight).addcmul_(unit, radial, value=-1)
        return along.mul_(scale), products.flatten(0, -2).sum(0)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) over its root mean square, and what it was multiplied by (..., 1)."""
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    scale = (mean_square + torch.finfo(x.dtype).eps).rsqrt()
    return x * scale, scale


class LayerNorm(nn.LayerNorm):
    """torch's, whose weights may have come to this rank in another type than x; a CPU has no kernel for two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def make_norm(config: Config) -> nn.Module:
    return RMSNorm(config.width) if config.block == "modern" else LayerNorm(config.width, eps=config.norm_eps)


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
        heads = self.project_in(x).unflatten(-1, (-1, x.shape[-1] // self.num_heads))  # (N, 3 H, E)
        weights = self.norm_q.weight, self.norm_k.weight
        if x.device.type == "cpu" and heads.element_size() <= rotary.element_size() and not is_compiling():
            given = (one.to(rotary.dtype) for one in (heads, *weights))  # in float32, as attention is there
            return _NormRotate.apply(*given, rotary)  # pyright: ignore[reportReturnType]
        q, k, v = heads.split(self.num_heads, 1)
        q, k = apply_rotary(self.norm_q(q), rotary), apply_rotary(self.norm_k(k), rotary)
        return q.to(v.dtype), k.to(v.dtype), v


class _NormRotate(torch.autograd.Function):
    """Queries, keys and values (N, H, E) of heads (N, 3 H, E): the first two normalized, weighted by (E,) and rotated.

    As one operation after the other, in half the time on a CPU: queries and keys go together, pairs are complex numbers
    that are rotated in place, and the gradient is laid where it belongs.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, weight_q: Tensor, weight_k: Tensor, rotary: Tensor):
        count, both, width = len(heads), heads.shape[1] // 3 * 2, heads.shape[2]
        unit, scale = _unit(heads[:, :both])
        weight = torch.stack((weight_q, weight_k))[:, None]  # (2, 1, E)
        rotation = torch.view_as_complex(rotary)  # (N, 1, E / 2)
        rotated = unit.view(count, 2, -1, width) * weight
        _as_complex(rotated.view(count, both, width)).mul_(rotation)
        ctx.save_for_backward(unit, scale, weight, rotation)
        q, k = rotated.unbind(1)
        return q, k, heads[:, both:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        unit, scale, weight, rotation = ctx.saved_tensors
        count, both, width = unit.shape
        back = rotation.conj().resolve_conj()
        found = unit.new_empty(count, both // 2 * 3, width)
        along = torch.empty_like(unit)
        for goal, gradient in zip(_as_complex(along).split(both // 2, 1), gradients[:2], strict=True):
            torch.mul(_as_complex(gradient), back, out=goal)
        split = along.view(count, 2, -1, width)
        products = (split * unit.view_as(split)).view(count, -1)  # a product with ones adds rows up faster than `sum`
        of_weights = (unit.new_ones(1, count) @ products).view(2, -1, width).sum(1)
        split.mul_(weight)
        radial = torch.linalg.vecdot(along, unit).unsqueeze(-1) / width
        torch.mul(along.addcmul_(unit, radial, value=-1), scale, out=found[:, :both])
        found[:, both:] = gradients[2]
        return found, *of_weights.unbind(), None


def _as_complex(x: Tensor) -> Tensor:
    """The neighboring pairs of x (N, H, E) as complex numbers (N, H, E / 2): a view, else a copy."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.view_as_complex(pairs if _is_paired(pairs) else pairs.contiguous())


def _is_paired(pairs: Tensor) -> bool:
    """Whether memory holds each pair side by side, at an even place."""
    *others, last = pairs.stride()
    return last == 1 and all(int(place) % 2 == 0 for place in (*others, pairs.storage_offset()))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): x (N, D) -> (N, D)."""

    def __init__(self, config: Config):
        super().__init__()
        hidden = max(8, round(config.width * config.mlp_ratio / 8) * 8)
        self.project_in = nn.Linear(config.width, 2 * hidden, bias=False)
        self.project_out = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: Tensor, routing=None) -> Tensor:
        both = self.project_in(x)
        if both.device.type == "cpu" and not is_compiling():
            return self.project_out(_SwiGLU.apply(both))
        gate, value = both.chunk(2, -1)
        return self.project_out(F.silu(gate) * value)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * value (N, F) of both (N, 2 F), with the gradient laid where it belongs."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        gate, value = both.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(both, activated)
        return activated * value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        both, activated = ctx.saved_tensors
        gate, value = both.chunk(2, -1)
        found = torch.empty_like(both)
        of_gate, of_value = found.chunk(2, -1)
        torch.mul(gradient, activated, out=of_value)
        torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        return found


class Experts(nn.ModuleDict):
    """A feed-forward layer for each modality; a token goes through that of its own modality."""

    def forward(self, x: Tensor, routing) -> Tensor:
        parts = x.index_select(0, routing.rows).split(routing.counts)
        outputs = [expert(part) for expert, part in zip(self.values(), parts, strict=True)]
        return torch.cat(outputs).index_select(0, routing.inverse)


class Block(nn.Module):
    make_attention, make_feed_forward = Attention, FeedForward
    compiled: tuple[Callable, Callable] | None = None  # `before` and `after` as `Backbone.compile` has made them

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
        before, after = self.compiled if self.compiled and self.training else (self.before, self.after)
        q, k, v = before(x, rotary)
        if append is not None:
            k, v = append(k, v)
        keep = None
        if self.training and self.drop_path:
            # stochastic depth (Huang et al. 2016) by sequence, as timm's by sample: numbers of sequences are below N
            draws = torch.rand(2, len(x), device=x.device).index_select(1, sequence.clamp(min=0))
            keep = (draws >= self.drop_path).to(x.dtype)[..., None] / (1 - self.drop_path)
        return after(x, attend(q, k, v, plan), routing, keep)

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


Checkpointing = Literal["none", "selective", "full"]


def _keep_attention(context, operator, *args, **kwargs) -> CheckpointPolicy:
    """Attention's results are kept: they cost the most time to make again, a square of the length, and little room."""
    is_attention = "attention" in str(operator) or "attn" in str(operator)
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


class Backbone(nn.Module):
    """Tokens whose content are vectors (N, D) -> the same tokens with other vectors (N, D).

    `checkpointing` says what a block keeps for the backward (activation checkpointing, Chen et al. 2016): none of it is
    made again, or all but its input (full), or all but its input and what attention returned (selective). The training
    sets it; the results are the same, bit for bit.
    """

    def __init__(self, config: Config, modalities: Sequence[str] = ()):
        super().__init__()
        self.config = config
        self.checkpointing: Checkpointing = "none"
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
        """Compile, for training, what lies between the attentions: only their plan differs from batch to batch.

        Rows are filled up to a few sizes (`few_sizes`). options: of `torch.compile`. Experts, of whose rows there are
        others each time, are left to the caller.
        """
        block: Any
        for block in self.blocks:
            after = block.after if self.config.experts else torch.compile(block.after, **options)
            block.compiled = (torch.compile(block.before, **options), after)

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
        read, count = tokens, len(tokens)
        if self.training and cache is None and any(getattr(block, "compiled", None) for block in self.blocks):
            read, plan, routing = _fill(tokens, plan, routing)
        x, rotary = read.content, None
        if self.positions is None:
            rotary = rotary_embedding(read.position, self.config.width // self.config.num_heads)
        else:
            x = x + self.positions(read.position)
        x = self.norm_in(x)
        for number, block in enumerate(self.blocks):
            append = functools.partial(cache.append, number) if cache is not None else None
            x = self._read(block, x, rotary, plan, routing, read.sequence, append)
            if states is not None:
                states.append(x.narrow(0, 0, count))
        return tokens.replace(content=self.norm_out(x).narrow(0, 0, count))

    def _read(self, block: nn.Module, x: Tensor, *inputs) -> Tensor:
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return block(x, *inputs)
        make_contexts = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
        more: dict[str, Any] = {"context_fn": make_contexts} if self.checkpointing == "selective" else {}
        # what is random in a block draws the same numbers again
        kept: Any = checkpoint(block, x, *inputs, use_reentrant=False, preserve_rng_state=block.training, **more)
        return kept


def few_sizes(count: int) -> int:
    """The next of a few numbers of rows, at most a 32nd more from 2,048 up, so that few shapes are compiled."""
    step = max(64, 1 << max(0, (count - 1).bit_length() - 6))
    return -(-count // step) * step


def _fill(tokens: Tokens, plan: Plan, routing) -> tuple[Tokens, Plan, Any]:
    """The same with filler at the end, up to the next of a few sizes."""
    count = len(tokens)
    missing = few_sizes(count) - count
    if not missing:
        return tokens, plan, routing
    rows = {one.name: getattr(tokens, one.name) for one in fields(Tokens)}
    filled = {name: F.pad(row, (*(0, 0) * (row.ndim - 1), 0, missing)) for name, row in rows.items()}
    filled["sequence"] = F.pad(tokens.sequence, (0, missing), value=FILLER)
    return Tokens(**filled), plan.with_filler(missing), routing and routing.with_filler(missing)
