"""From logits to a choice: guidance, penalties, truncation, sampling.

R sequences, V ids. All functions take logits (R, V) and return logits (R, V) unless they say otherwise.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from .settings import Settings


def guide(logits: Tensor, unguided: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): away from what is written without the prefix."""
    return unguided + scale * (logits - unguided)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of ids that were `seen` (R, V) (CTRL, Keskar et al. 2019)."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def forbid(logits: Tensor, ids: list[int]) -> Tensor:
    """-inf for these ids; a predictor need not have logits of all ids, such as those that begin sequences."""
    logits[:, [i for i in ids if i < logits.shape[1]]] = -torch.inf
    return logits


def truncate(logits: Tensor, settings: Settings) -> Tensor:
    """-inf for ids that must not be drawn; the likeliest always stays.

    Those outside of the k likeliest (Fan et al. 2018) or of the nucleus (Holtzman et al. 2020), and those less likely
    than a share of the likeliest (Nguyen et al. 2024).
    """
    if settings.top_k and settings.top_k < logits.shape[1]:
        least = logits.topk(settings.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if settings.top_p < 1:
        probability, ids = logits.softmax(1).sort(dim=1, descending=True, stable=True)
        outside = probability.cumsum(1) - probability >= settings.top_p
        logits = logits.masked_fill(outside.scatter(1, ids, outside), -torch.inf)
    if settings.min_p > 0:
        best = logits.amax(1, keepdim=True)
        logits = logits.masked_fill(logits < best + math.log(settings.min_p), -torch.inf)
    return logits


def make_generator(seed: int, *parts: Tensor | int | str) -> torch.Generator:
    """A generator whose state depends on the seed and on `parts`, such as the content of a prompt, alone."""
    digest = hashlib.sha256(str(seed).encode())
    for part in parts:
        digest.update(part.cpu().numpy().tobytes() if isinstance(part, Tensor) else f"/{part}".encode())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "big") >> 1)


def choose(logits: Tensor, settings: Settings, generators: list[torch.Generator]) -> Tensor:
    """An id for each sequence (R,), drawn with one uniform number of the sequence's own generator."""
    if settings.temperature == 0:
        return logits.argmax(1)
    logits = truncate(logits / settings.temperature, settings)
    uniform = torch.stack([torch.rand(1, generator=generator, dtype=torch.double) for generator in generators])
    cumulative = logits.double().softmax(1).cumsum(1)
    drawn = uniform.to(logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
