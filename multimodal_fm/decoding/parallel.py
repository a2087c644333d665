"""All tokens at once, in a few readings: parallel decoding (MaskGIT, Chang et al. 2022), and holes in what is given.

R sequences, V ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..batch import count_targets
from ..model import Model, autocast
from ..objectives.base import Objective
from ..tokens import Tokens
from .logits import forbid, guide, penalize, truncate
from .settings import Settings


@dataclass
class Canvas:
    """A sequence of which some tokens are still hidden."""

    prefix: dict[str, Tokens]
    tokens: Tokens  # of the target
    hidden: Tensor  # (N,) True: to be filled in
    frozen: list[int] = field(default_factory=list)  # ids that are never filled in
    log_likelihood: float = 0.0
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self):
        self.total = int(self.hidden.sum())


def fill(
    model: Model, objective: Objective, target: str, canvases: list[Canvas], settings: Settings
) -> Iterator[float]:
    """Fill in what is hidden, in place, in `settings.steps` readings, or where that is 0 in as many as a canvas has
    holes; yields the share of the tokens that stands.

    Each reading predicts all hidden tokens; those that the model is surest of stay, by a cosine schedule: after the
    share t of the readings cos(t π / 2) of the tokens are hidden. Sureness has Gumbel noise, `temperature` times what
    is left of the readings. With one reading and temperature 0 each token is the likeliest.
    """
    total = sum(canvas.total for canvas in canvases)
    for step in range(1, max((settings.steps or canvas.total for canvas in canvases), default=0) + 1):
        open_ones = [canvas for canvas in canvases if canvas.hidden.any()]
        if not open_ones:
            break
        logits = _read(model, objective, target, open_ones)
        if settings.guidance_scale != 1:
            bare = [Canvas({}, canvas.tokens, canvas.hidden) for canvas in open_ones]
            alone = _read(model, objective, target, bare)
            logits = [guide(*pair, settings.guidance_scale) for pair in zip(logits, alone, strict=True)]
        for canvas, own in zip(open_ones, logits, strict=True):
            done = step / (settings.steps or canvas.total)
            share = math.cos(done * math.pi / 2) if done < 1 else 0.0
            left = min(math.floor(share * canvas.total), int(canvas.hidden.sum()) - 1)
            _fill_in(canvas, own, left, 1 - done, settings)
        yield 1 - sum(int(canvas.hidden.sum()) for canvas in canvases) / max(total, 1)


def _fill_in(canvas: Canvas, logits: Tensor, left: int, noise: float, settings: Settings) -> None:
    """Draw each hidden token from its logits (M, V) and keep all but the `left` that the model is least sure of."""
    ids = canvas.tokens.content
    if settings.repetition_penalty != 1:
        seen = torch.zeros(logits.shape[1], dtype=torch.bool)
        shown = ids[~canvas.hidden]
        seen[shown[shown < len(seen)]] = True
        logits = penalize(logits, seen.expand_as(logits), settings.repetition_penalty)
    logits = forbid(logits, canvas.frozen)
    log_softmax = logits.double().log_softmax(1)
    drawn = truncate(logits / settings.temperature, settings).double() if settings.temperature else log_softmax
    if settings.temperature:
        drawn = drawn + _gumbel(drawn.shape, canvas.generator)
    chosen = drawn.argmax(1)
    sure = log_softmax.gather(1, chosen[:, None])[:, 0]
    ranked = sure + settings.temperature * noise * _gumbel(sure.shape, canvas.generator)
    stay = ranked.argsort(descending=True, stable=True)[: len(ranked) - left]
    rows = canvas.hidden.nonzero()[:, 0][stay]
    content, hidden = ids.clone(), canvas.hidden.clone()
    content[rows], hidden[rows] = chosen[stay], False
    canvas.tokens, canvas.hidden = canvas.tokens.replace(content=content), hidden
    canvas.log_likelihood += float(sure[stay].sum())


def _gumbel(shape, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.double)
    return -(-uniform.clamp(min=1e-300).log()).log()


@torch.no_grad()
def _read(model: Model, objective: Objective, target: str, canvases: list[Canvas]) -> list[Tensor]:
    """The logits (M, V) of each canvas's hidden tokens, on the CPU."""
    examples = [objective.arrange_holes(c.prefix, target, c.tokens, c.hidden) for c in canvases]
    batch = model.collate({"fill": list(enumerate(examples))}, {"fill": count_targets(examples, model.modalities)})
    to_logits: Any = objective.predictors[target].logits
    with autocast(model.device, model.device.type == "cuda"):
        vectors = model(batch).tokens.content.index_select(0, batch.tasks["fill"].rows[target])
        logits = to_logits(vectors).float().cpu()
    return list(logits.split([int(canvas.hidden.sum()) for canvas in canvases]))
