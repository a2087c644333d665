"""The settings of generation, apart from what needs torch: the command line reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..errors import UserError


@dataclass
class Settings:
    """How tokens are chosen; names are those of Hugging Face's `generate` where it has them."""

    temperature: float = 1.0
    """Logits are divided by it; 0: the likeliest each time (greedy)."""
    top_k: int = 0
    """Draw from the k likeliest ids only; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest ids that together reach this probability."""
    min_p: float = 0.0
    """Draw from ids at least this times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: ids that the sequence has already are made less likely."""
    guidance_scale: float = 1.0
    """Above 1: away from what would be written without the prefix."""
    max_new_tokens: int = 0
    """0: until the end of the sequence that the model was trained on."""
    min_new_tokens: int = 0
    """Tokens before the sequence may end."""
    stop_strings: list[str] = field(default_factory=list)
    """The text ends before the first of them."""
    num_beams: int = 1
    """Above 1: beam search for the likeliest sequence, nothing is drawn."""
    length_penalty: float = 1.0
    """Beams: log-likelihoods are divided by the length to this power."""
    steps: int = 0
    """All at once (MaskGIT): readings in which all tokens are filled in; 0: as the objective does."""
    seed: int = 0
    """Equal seeds and prompts give equal results, whatever else is in the batch."""

    def __post_init__(self):
        for name in ("top_k", "max_new_tokens", "min_new_tokens", "steps"):
            if getattr(self, name) < 0:
                raise UserError(f"generate: {name} is 0 or more")
        for name in ("temperature", "guidance_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"generate: {name} is a number from 0 up")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise UserError("generate: top_p is above 0 and at most 1, min_p from 0 to 1")
        if not 0 < self.repetition_penalty < math.inf or not math.isfinite(self.length_penalty):
            raise UserError("generate: repetition_penalty is a number above 0, length_penalty a number")
        if self.num_beams < 1:
            raise UserError("generate: num_beams is at least 1")
        if isinstance(self.stop_strings, str) or not all(isinstance(s, str) and s for s in self.stop_strings):
            raise UserError("generate: stop_strings is a list of texts that are not empty")
