"""Cross-entropy of a linear layer's logits that never holds all of them.

Rows are taken some at a time. Where gradients are wanted they are made of each chunk's logits in the forward pass, as
for a loss that is summed up (Hsu et al. 2024, "Liger Kernel"; Wijmans et al. 2025, "Cut your losses"), so that no
product is worked out twice.

M rows, D width, V ids.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}  # of the logits that are there at a time


def linear_cross_entropy(vectors: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, ignored: int = -100) -> Tensor:
    """The cross-entropy (M,) in nats of `ids` (M,) under the logits vectors (M, D) @ weight.T (D, V) + bias (V,).

    ignored: an id that costs nothing; it may lie outside of the V. In at least float32, products in the type that
    autocast says. Equal to `F.cross_entropy(F.linear(vectors, weight, bias), ids, reduction="none")` to rounding.
    """
    device = vectors.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(vectors.dtype, weight.dtype)
    if len(ids) <= _most_rows(len(weight), vectors):  # few enough to be held, which takes fewer passes over the weight
        logits = F.linear(vectors, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, ids, ignore_index=ignored, reduction="none")
    return _LinearCrossEntropy.apply(vectors, weight, bias, ids, ignored, dtype)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors, weight, bias, ids, ignored: int, dtype: torch.dtype):
        ctx.settings = ids, ignored, dtype
        if not any(ctx.needs_input_grad):
            return _evaluate(vectors, weight, bias, *ctx.settings)[0]
        losses, *gradients = _evaluate(vectors, weight, bias, *ctx.settings, wanted=ctx.needs_input_grad)
        ctx.present = [gradient is not None for gradient in gradients]
        ctx.save_for_backward(vectors, weight, bias, *(one for one in gradients if one is not None))
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        vectors, weight, bias, *saved = ctx.saved_tensors
        if _is_uniform(gradient):  # as that of a sum or a mean, so that what is saved has to be scaled only
            scale = gradient[0]
            found = [one * scale.to(one.dtype) for one in saved]
        else:
            again = _evaluate(vectors, weight, bias, *ctx.settings, wanted=ctx.present, scale=gradient)
            found = [one for one in again[1:] if one is not None]
        remaining = iter(found)
        return *(next(remaining) if is_there else None for is_there in ctx.present), None, None, None


def _is_uniform(gradient: Tensor) -> bool:
    """Whether all rows have one number. On a GPU only where it is known without waiting for it."""
    if gradient.stride(0) == 0 or len(gradient) < 2:
        return True
    return gradient.device.type == "cpu" and bool((gradient == gradient[0]).all())


def _evaluate(vectors, weight, bias, ids, ignored: int, dtype, wanted=(False, False, False), scale=None):
    """The losses (M,) and the gradients by vectors, weight and bias of the sum of `scale` (M,) times them, those that
    are wanted."""
    of_vectors = torch.empty_like(vectors) if wanted[0] else None
    of_weight = torch.empty_like(weight) if wanted[1] else None
    of_bias = torch.zeros_like(bias) if wanted[2] else None
    kept = ids != ignored
    goals = torch.where(kept, ids, 0)
    factors = kept.to(torch.promote_types(dtype, torch.float32))
    factors = factors if scale is None else factors * scale
    losses = torch.empty(len(ids), dtype=factors.dtype, device=vectors.device)
    with torch.autocast(vectors.device.type, enabled=False) if _has_autocast(vectors) else torch.no_grad():
        matrix, offsets = weight.to(dtype), bias.to(dtype)
        chunks = _chunks(len(ids), _most_rows(len(weight), vectors))
        logits = _buffer(max((len(range(len(ids))[rows]) for rows in chunks), default=0), matrix)
        for rows in chunks:
            x = vectors[rows].to(dtype)
            goal = goals[rows, None]
            table = torch.addmm(offsets, x, matrix.T, out=logits[: len(x)]).to(losses.dtype)
            most = table.amax(1, keepdim=True)
            of_goal = table.gather(1, goal) - most
            total = table.sub_(most).exp_().sum(1, keepdim=True)
            losses[rows] = torch.where(kept[rows], (total.log() - of_goal)[:, 0], 0.0)
            if not any(wanted):
                continue
            factor = factors[rows, None]
            table.mul_(factor / total).scatter_add_(1, goal, -factor)
            if of_bias is not None:
                of_bias += table.sum(0)
            table = table.to(dtype)
            if of_vectors is not None:
                of_vectors[rows] = table @ matrix
            if of_weight is None:
                continue
            if of_weight.dtype == dtype:
                of_weight.addmm_(table.T, x, beta=min(rows.start, 1))  # 0 at first, when there is nothing in it yet
            elif rows.start == 0:
                of_weight.copy_(table.T @ x)
            else:
                of_weight += table.T @ x
    return losses, of_vectors, of_weight, of_bias


ALIGNED = 16  # columns: rows that begin in the same place of a cache line make the products up to 1.4 times as fast


def _buffer(rows: int, matrix: Tensor) -> Tensor:
    """Room for the logits (rows, V) of a matrix (V, D)."""
    return matrix.new_empty(rows, -(-len(matrix) // ALIGNED) * ALIGNED)[:, : len(matrix)]


def _has_autocast(vectors: Tensor) -> bool:
    return torch.amp.is_autocast_available(vectors.device.type)


def _most_rows(ids: int, vectors: Tensor) -> int:
    """How many rows have logits of at most `CHUNK_BYTES`, in float32."""
    return max(1, CHUNK_BYTES.get(vectors.device.type, CHUNK_BYTES["cuda"]) // (4 * ids))


def _chunks(rows: int, most: int) -> list[slice]:
    """range(rows) in chunks of about equal size, of at most so many each."""
    size = -(-rows // max(1, -(-rows // most)))
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)] if rows else []
