"""A multimodal_fm model over padded batches of one modality: what other libraries and runtimes can load.

multimodal_fm itself reads all sequences of a batch laid end to end. Here they are the rows of a batch, padded on either
side, with a mask. Parameters have the names of the original's, and the outputs are the same.

B sequences, L tokens of the longest, P learned tokens before each (a class token), D width, E length of the vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps  # of RMSNorm


class Reading(NamedTuple):
    """What a model makes of a batch."""

    hidden: Tensor  # (B, P + L, D) the backbone's output; that of padding means nothing
    mask: Tensor  # (B, P + L) True where there is a token
    features: Tensor  # (B, D) its mean over the tokens
    embedding: Tensor  # (B, E) unit vectors, comparable across modalities; the features where there is no such head
    logits: Tensor | None  # (B, C) of the classes, where there is a classifier


class PaddedModel(nn.Module):
    """config: `backbone`, `modalities` (by name: `kind` and what belongs to it), `prompt`, `heads`, as plain data."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config, width = config, config["backbone"]["width"]
        self.prompt, self.count = config.get("prompt") or ("", 0)
        names = [*config["modalities"], *filter(None, [self.prompt])]
        self.embedders = nn.ModuleDict({m: make_embedder(of, width) for m, of in config["modalities"].items()})
        if self.prompt:
            self.embedders[self.prompt] = nn.Embedding(self.count, width)
        self.modality_vectors = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in names})
        self.backbone = Backbone(config["backbone"], names)
        self.heads = nn.ModuleDict()
        if "retrieval" in config["heads"]:
            self.heads["retrieval"] = Projection(width, modalities=names, **config["heads"]["retrieval"])
        if "classify" in config["heads"]:
            self.heads["classify"] = Classifier(width, **config["heads"]["classify"])

    def forward(
        self, modality: str, content: Tensor, mask: Tensor | None = None, position: Tensor | None = None
    ) -> Reading:
        """content: ids (B, L), pixels of patches (B, L, patch * patch * 3) from 0 to 255, or values of patches
        (B, L, V). mask (B, L): not zero where there is a token. position (B, L, 3): time, row, column; without it ids
        are counted.
        """
        mask = torch.ones(content.shape[:2], dtype=torch.bool, device=content.device) if mask is None else mask != 0
        if position is None:
            time = (mask.long().cumsum(1) - 1).clamp(min=0)
            position = torch.stack([time, torch.zeros_like(time), torch.zeros_like(time)], -1)
        x = self.embedders[modality](content) + self.modality_vectors[modality]
        if self.prompt:
            x, mask, position = self._with_prompt(x, mask, position)
        causal = self.config["modalities"][modality].get("causal", False)
        routes = [(self.prompt, self.count), (modality, -1)] if self.prompt else [(modality, -1)]
        hidden = self.backbone(x, position, who_reads_whom(mask, causal), routes)
        features = mean_pool(hidden, mask)
        embedding = self.heads["retrieval"](hidden, mask, modality) if "retrieval" in self.heads else features
        logits = self.heads["classify"](hidden, mask) if "classify" in self.heads else None
        return Reading(hidden, mask, features, embedding, logits)

    def _with_prompt(self, x: Tensor, mask: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The learned tokens stand before the sequence, at the times -P to -1."""
        learned = self.embedders[self.prompt].weight + self.modality_vectors[self.prompt]
        batch = x.shape[0]
        time = torch.arange(-self.count, 0, device=x.device, dtype=position.dtype)
        before = torch.stack([time, torch.zeros_like(time), torch.zeros_like(time)], -1)
        return (
            torch.cat([learned.to(x.dtype).expand(batch, -1, -1), x], 1),
            torch.cat([torch.ones(batch, self.count, dtype=torch.bool, device=x.device), mask], 1),
            torch.cat([before.expand(batch, -1, -1), position], 1),
        )


class Tower(nn.Module):
    """One modality of a model, with tensors in and tensors out: the embeddings where there is a head for them, the
    features and, with a classifier, the logits."""

    def __init__(self, model: PaddedModel, modality: str):
        super().__init__()
        self.model, self.modality = model, modality

    def read(self, content: Tensor, mask: Tensor, position: Tensor | None = None) -> tuple[Tensor, ...]:
        reading = self.model(self.modality, content, mask, position)
        embeddings = (reading.embedding,) if "retrieval" in self.model.heads else ()
        logits = () if reading.logits is None else (reading.logits,)
        return *embeddings, reading.features, *logits


class IdsTower(Tower):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return self.read(input_ids, attention_mask)


class PatchesTower(Tower):
    def forward(self, patches: Tensor, attention_mask: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        return self.read(patches, attention_mask, position)


def who_reads_whom(mask: Tensor, causal: bool) -> Tensor:
    """(B, 1, L, L), True where a row's token reads a column's. Padding reads itself, so that nothing is NaN."""
    length = mask.shape[1]
    row = torch.arange(length, device=mask.device)
    allowed = mask[:, None, None, :].expand(-1, 1, length, -1)
    if causal:
        allowed = allowed & (row <= row[:, None])
    return allowed | (row == row[:, None])


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    share = mask.to(torch.promote_types(hidden.dtype, torch.float32))[..., None]
    return (hidden * share).sum(1) / share.sum(1).clamp(min=1.0)


def make_embedder(of: dict[str, Any], width: int) -> nn.Module:
    if of["kind"] == "ids":
        return nn.Embedding(of["vocab_size"], width)
    return Patches(of["size"], width, pixels=of["kind"] == "pixels")


class Patches(nn.Module):
    """(B, L, V) -> (B, L, D). Pixels are from 0 to 255."""

    def __init__(self, size: int, width: int, pixels: bool):
        super().__init__()
        self.project, self.pixels = nn.Linear(size, width), pixels

    def forward(self, content: Tensor) -> Tensor:
        content = content.to(self.project.weight.dtype)
        return self.project((content - 127.5) / 64.0 if self.pixels else content)


class Projection(nn.Module):
    """Hidden states (B, L, D) -> unit vectors (B, E)."""

    def __init__(self, width: int, embed_dim: int, modalities: list[str], pool: str = "mean"):
        super().__init__()
        self.pool = pool
        self.projection = nn.ParameterDict({m: nn.Parameter(torch.zeros(width, embed_dim)) for m in modalities})

    def forward(self, hidden: Tensor, mask: Tensor, modality: str) -> Tensor:
        pooled = mean_pool(hidden, mask) if self.pool == "mean" else outer_token(hidden, mask, self.pool)
        return F.normalize(pooled @ self.projection[modality].to(pooled.dtype), dim=-1)


def outer_token(hidden: Tensor, mask: Tensor, which: str) -> Tensor:
    """The vectors (B, D) of each sequence's first or last token."""
    place = mask.int().argmax(1) if which == "first" else mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return hidden.gather(1, place[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]


class Classifier(nn.Module):
    """Hidden states (B, L, D) -> logits (B, C)."""

    def __init__(self, width: int, classes: list[str], pool: str = "mean", **other):
        super().__init__()
        self.pool = Pool(pool, width)
        self.logits = nn.Linear(width, len(classes))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.logits(self.pool(hidden, mask))


class Pool(nn.Module):
    def __init__(self, kind: str, width: int):
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.query = nn.Parameter(torch.zeros(width))
            self.value = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.kind == "mean":
            return mean_pool(hidden, mask)
        if self.kind == "first":
            return outer_token(hidden, mask, "first")
        score = (hidden @ self.query).float() * hidden.shape[2] ** -0.5
        weight = score.masked_fill(~mask, torch.finfo(torch.float32).min).softmax(1)
        return (self.value(hidden) * weight[..., None]).sum(1)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


class Backbone(nn.Module):
    def __init__(self, config: dict[str, Any], modalities: list[str]):
        super().__init__()
        self.config, classic = config, config["block"] == "classic"
        self.positions = Positions(config) if classic else None
        self.norm_in = nn.Identity() if classic and not config["norm_in"] else make_norm(config)
        self.blocks = nn.ModuleList(Block(config, modalities) for _ in range(config["depth"]))
        self.norm_out = nn.Identity() if config["norm"] == "post" else make_norm(config)

    def forward(self, x: Tensor, position: Tensor, allowed: Tensor, routes: list[tuple[str, int]]) -> Tensor:
        """routes: how many of a sequence's tokens, one after the other, belong to each modality; -1: the rest."""
        rotary = None
        if self.positions is None:
            rotary = rotary_embedding(position, self.config["width"] // self.config["num_heads"])
        else:
            x = x + self.positions(position)
        x = self.norm_in(x)
        for block in self.blocks:
            x = block(x, rotary, allowed, routes)
        return self.norm_out(x)


def make_norm(config: dict[str, Any]) -> nn.Module:
    if config["block"] == "classic":
        return nn.LayerNorm(config["width"], eps=config["norm_eps"])
    return RMSNorm(config["width"])


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        unit = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPS)
        return (unit * self.weight).to(x.dtype)


class Positions(nn.Module):
    """The sum of the learned vectors of the time and of the cell of a grid; none before time 0."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, self.grid = config["width"], list(config["grid"])
        self.time = nn.Embedding(config["max_positions"], width) if config["max_positions"] else None
        self.cell = nn.Embedding(self.grid[0] * self.grid[1], width) if self.grid else None

    def forward(self, position: Tensor) -> Tensor:
        time, row, column = position.long().unbind(-1)
        vectors = []
        if self.time is not None:
            vectors.append(self.time(time.clamp(min=0)))
        if self.cell is not None:
            rows, columns = self.grid  # a column beside the grid is no cell of the next row, but an error
            vectors.append(self.cell(torch.where(column < columns, row * columns + column, rows * columns)))
        return sum(vectors) * (time >= 0)[..., None]


def rotary_embedding(position: Tensor, head_width: int) -> Tensor:
    """Cosines and sines (B, L, 1, head_width / 2, 2) of positions (B, L, 3): a third of the pairs turns with the row,
    a third with the column, the rest with the time."""
    pairs = head_width // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    angles = []
    for axis, (share, base) in enumerate(zip(shares, (10_000.0, 100.0, 100.0))):
        frequency = base ** -(torch.arange(share, device=position.device, dtype=torch.float32) / share)
        angles.append(position[..., axis : axis + 1].float() * frequency)
    angle = torch.cat(angles, -1).unsqueeze(-2)
    return torch.stack((angle.cos(), angle.sin()), -1)


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """x (B, L, H, E)."""
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), rotary.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, self.num_heads, classic = config["width"], config["num_heads"], config["block"] == "classic"
        self.head_width = width // self.num_heads
        self.project_in = nn.Linear(width, 3 * width, bias=classic)
        self.norm_q = nn.Identity() if classic else RMSNorm(self.head_width)
        self.norm_k = nn.Identity() if classic else RMSNorm(self.head_width)
        self.project_out = nn.Linear(width, width, bias=classic)

    def forward(self, x: Tensor, rotary: Tensor | None, allowed: Tensor) -> Tensor:
        heads = self.project_in(x).unflatten(-1, (3 * self.num_heads, self.head_width))
        q, k, v = heads.split(self.num_heads, 2)
        if rotary is not None:
            q, k = apply_rotary(self.norm_q(q), rotary), apply_rotary(self.norm_k(k), rotary)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.project_out(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU in a modern block, two layers with an activation between them in a classic one."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, ratio, self.classic = config["width"], config["mlp_ratio"], config["block"] == "classic"
        hidden = max(1, round(width * ratio)) if self.classic else max(8, round(width * ratio / 8) * 8)
        self.activation = ACTIVATIONS[config["activation"]]
        self.project_in = nn.Linear(width, hidden if self.classic else 2 * hidden, bias=self.classic)
        self.project_out = nn.Linear(hidden, width, bias=self.classic)

    def forward(self, x: Tensor) -> Tensor:
        if self.classic:
            return self.project_out(self.activation(self.project_in(x)))
        gate, value = self.project_in(x).chunk(2, -1)
        return self.project_out(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, config: dict[str, Any], modalities: list[str]):
        super().__init__()
        self.feed_forward: Any
        self.post, self.experts = config["norm"] == "post", config["experts"]
        self.norm_1, self.norm_2 = make_norm(config), make_norm(config)
        self.attention = Attention(config)
        self.feed_forward = (
            nn.ModuleDict({name: FeedForward(config) for name in modalities}) if self.experts else FeedForward(config)
        )

    def forward(self, x: Tensor, rotary: Tensor | None, allowed: Tensor, routes: list[tuple[str, int]]) -> Tensor:
        if self.post:
            x = self.norm_1(x + self.attention(x, rotary, allowed))
            return self.norm_2(x + self._feed(x, routes))
        x = x + self.attention(self.norm_1(x), rotary, allowed)
        return x + self._feed(self.norm_2(x), routes)

    def _feed(self, x: Tensor, routes: list[tuple[str, int]]) -> Tensor:
        if not self.experts:
            return self.feed_forward(x)
        parts, first = [], 0
        for modality, count in routes:
            last = x.shape[1] if count < 0 else first + count
            parts.append(self.feed_forward[modality](x[:, first:last]))
            first = last
        return torch.cat(parts, 1)
