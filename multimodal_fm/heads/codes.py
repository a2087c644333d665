"""Learned discrete codes of one modality: a quantizer between the backbone, which encodes, and a light decoder.

The model is then a codec, which the objective `autoencode` trains: raw content -> backbone -> a code a token -> decoder
-> raw content. `fsq`: finite scalar quantization (Mentzer et al. 2023); `vq`: a codebook that follows moving averages
and revives dead codes (van den Oord et al. 2017, Razavi et al. 2019), with the rotation trick (Fifty et al. 2024). Both
are those of `vector-quantize-pytorch`.

N tokens, D width of the backbone, C length of a code's vector, V values of a token's raw content.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..attention import Plan
from ..backbone import Backbone
from ..backbone import Config as BackboneConfig
from ..errors import UserError
from ..model import full
from ..tokenizers.base import Reconstructor, Tokenizer
from ..tokens import Tokens
from . import base

if TYPE_CHECKING:
    from ..batch import Routing

MAX_CODES = 1 << 24


@dataclass
class Config:
    modality: str = ""  # whose raw content is coded; empty: the first of the model
    quantizer: Literal["fsq", "vq"] = "fsq"  # a fixed grid (FSQ), or a learned codebook
    levels: list[int] = field(default_factory=lambda: [8, 5, 5, 5])
    """fsq: how many values each dimension of a code has; their product is the size of the codebook."""
    codes: int = 1024  # vq: the size of the codebook
    code_dim: int = 8  # vq: the length of a code's vector
    decay: float = 0.95  # vq: of the moving averages that the codebook follows, a step
    threshold_ema_dead_code: float = 0.5
    """vq: a code that fewer vectors a step choose, in the moving average, is dead and is put onto one of the step's
    vectors; 0: dead codes stay dead."""
    decoder: BackboneConfig = field(default_factory=lambda: BackboneConfig(width=128, depth=2, num_heads=4))
    """The Transformer that makes raw content of codes."""

    def __post_init__(self):
        if not self.levels or min(self.levels) < 3 or math.prod(self.levels) > MAX_CODES:
            raise ValueError(f"levels are whole numbers from 3 up, whose product is at most {MAX_CODES}")
        if not 2 <= self.codes <= MAX_CODES or self.code_dim < 1:
            raise ValueError(f"codes is from 2 to {MAX_CODES}, code_dim at least 1")
        if not 0 <= self.decay < 1 or not 0 <= self.threshold_ema_dead_code < math.inf:
            raise ValueError("decay is from 0 to below 1, threshold_ema_dead_code a number from 0 up")

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels) if self.quantizer == "fsq" else self.codes

    @property
    def dim(self) -> int:
        """The length of a code's vector."""
        return len(self.levels) if self.quantizer == "fsq" else self.code_dim


class Head(base.Head):
    Config = Config
    reconstructor: Reconstructor

    def __init__(self, config: Config, width: int, modalities: list[str]):
        super().__init__(config, width, modalities)
        self.modality = config.modality or modalities[0]
        if self.modality not in modalities:
            raise ValueError(f"codes: the model has no modality {self.modality!r} (there are: {', '.join(modalities)})")
        self.project_in = nn.Linear(width, config.dim)
        self.quantizer = _fsq(config) if config.quantizer == "fsq" else _vq(config)
        self.project_out = nn.Linear(config.dim, config.decoder.width)
        self.decoder = Backbone(config.decoder, modalities)

    def bind(self, tokenizers: dict[str, Tokenizer]) -> None:
        reconstructor = tokenizers[self.modality].reconstructor(self.config.decoder.width)
        if reconstructor is None:
            raise ValueError(f"codes: the raw content of {self.modality} is no values that a decoder could give back")
        self.reconstructor = reconstructor

    def project(self, outputs: Tensor) -> Tensor:
        """The backbone's outputs (N, D) as the vectors (N, C) that are quantized."""
        return self.project_in(outputs).float()

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (N, C) -> the nearest codes' vectors (N, C), with gradients past the rounding, and numbers (N,).

        Nothing is learned here, so that it does not matter how a step is dealt into microbatches, but in
        `update_codebook`.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            if self.config.quantizer == "fsq":
                quantized, codes = self.quantizer(vectors[None])
            else:
                quantized, codes, _ = self.quantizer(vectors[None], freeze_codebook=True)
        return quantized[0], codes[0].long()

    def encode(self, outputs: Tensor) -> Tensor:
        """The codes (N,) of the backbone's outputs (N, D)."""
        return self.quantize(self.project(outputs))[1]

    def lookup(self, codes: Tensor) -> Tensor:
        """The vectors (N, C) of codes (N,)."""
        if self.config.quantizer == "fsq":
            return self.quantizer.indices_to_codes(codes[None])[0]
        return self.quantizer.get_codes_from_indices(codes)

    def decode(self, vectors: Tensor, tokens: Tokens, plan: Plan, routing: Routing) -> Tensor:
        """The values (N, V) that the codes' vectors (N, C) stand for.

        `tokens` says where they are, whatever its content, `plan` and `routing` how they are attended to; all in the
        order of `tokens.layout`.
        """
        content = full(self.project_out(vectors.to(self.project_out.weight.dtype)))
        return self.reconstructor(self.decoder(tokens.replace(content=content), plan, routing).content)

    @property
    def learns_codebook(self) -> bool:
        """Whether `update_codebook` has to be called with the vectors of each step."""
        return self.config.quantizer == "vq"

    @torch.no_grad()
    def update_codebook(self, vectors: Tensor, codes: Tensor) -> None:
        """Moves the codebook by a step's vectors (N, C) and the codes (N,) that they chose, and revives dead ones.

        Draws from PyTorch's own generator. On a GPU this waits for the device.
        """
        if len(vectors):
            self.quantizer.train()
            self.quantizer.update_indices(vectors[None], codes[None])


def _library() -> Any:
    try:
        import vector_quantize_pytorch
    except ImportError:
        raise UserError("the head `codes` needs vector-quantize-pytorch: pip install multimodal_fm[codes]") from None
    return vector_quantize_pytorch


def _fsq(config: Config) -> Any:
    return _library().FSQ(config.levels)


def _vq(config: Config) -> Any:
    return _library().VectorQuantize(
        config.code_dim,
        config.codes,
        decay=config.decay,
        threshold_ema_dead_code=config.threshold_ema_dead_code,
        commitment_weight=0.0,  # the objective's own is a sum over the step divided by a count over the step
        sync_codebook=False,  # `update_codebook` gets the vectors of all ranks
    )
