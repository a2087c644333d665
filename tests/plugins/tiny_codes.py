"""Pictures as codes, for tests: 3 by 3 cells, each the nearest of eight colors; a plug-in from outside the package."""

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from multimodal_fm.tokenizers import base
from multimodal_fm.tokens import make_sequence

SIDE, COLORS = 3, 8
BEGIN = COLORS


@dataclass
class Config:
    pixels: int = 8  # the side of a cell of the decoded picture


class Tokenizer(base.Tokenizer):
    Config, extensions = Config, ("jpg",)

    def read(self, raw, generator=None):
        if isinstance(raw, dict):
            if "jpg" not in raw:
                return []
            raw = np.asarray(Image.open(io.BytesIO(raw["jpg"])).convert("RGB").resize((SIDE, SIDE)))
        bits = (np.asarray(raw)[:: len(raw) // SIDE, :: len(raw[0]) // SIDE] > 127).astype(np.int64)
        codes = torch.from_numpy(bits @ np.array([4, 2, 1])).flatten()
        return [make_sequence(F.pad(codes, (1, 0), value=BEGIN), self.generation().positions)]

    def generation(self):
        row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        positions = torch.stack((torch.ones(SIDE**2), row.flatten(), column.flatten()), 1)
        return base.Generation((BEGIN,), None, SIDE**2 + 1, F.pad(positions, (0, 0, 1, 0)))

    def decode(self, ids):
        codes = np.array(ids[1:]).reshape(SIDE, SIDE, 1)
        assert codes.max() < COLORS
        picture = (codes // np.array([4, 2, 1]) % 2 * 255).astype(np.uint8)
        return picture.repeat(self.config.pixels, 0).repeat(self.config.pixels, 1)

    def embedder(self, width):
        return nn.Embedding(COLORS + 1, width)

    def predictor(self, width):
        return Predict(width)


class Predict(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.logits = nn.Linear(width, COLORS)  # none of BEGIN, which is never predicted

    def forward(self, vectors, content):
        return F.cross_entropy(self.logits(vectors).float(), content, ignore_index=BEGIN, reduction="none")
