"""In which numbers a device multiplies: TF32 for float32 on a GPU, and float8 by torchao."""

from __future__ import annotations

import torch
from torch import nn

from ..backbone import Backbone
from ..errors import UserError

FLOAT8_CAPABILITY = (8, 9)  # of the GPU: from Ada Lovelace and Hopper on
MULTIPLE = 16  # of the rows and columns that a float8 product takes


def set_precision(model: nn.Module, precision: str, device: torch.device) -> None:
    """Let a GPU multiply float32 as TF32 and, with `float8`, make the backbone's products of float8 numbers, in place.

    The weights stay float32 and keep their names. Raises UserError where torchao or the device is lacking.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if precision == "float8":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
            raise UserError(f"precision: float8 needs a GPU of the Ada or Hopper kind or newer, not {device}")
        convert_to_float8(model)


def convert_to_float8(model: nn.Module, emulate: bool = False) -> list[str]:
    """Replace the linear layers of `model.backbone.blocks` by torchao's, which scale each tensor as it comes
    (Micikevicius et al. 2022, "FP8 formats for deep learning"); returns their names.

    A layer whose sides are not multiples of 16 stays. emulate: in float32, where there is no such GPU. Raises
    UserError.
    """
    try:
        from torchao.float8 import (  # pyright: ignore[reportMissingImports]
            Float8LinearConfig,
            convert_to_float8_training,
        )
    except ImportError:
        raise UserError("precision: float8 needs torchao: pip install 'multimodal_fm[gpu]'") from None
    backbone, converted = model.backbone, []
    assert isinstance(backbone, Backbone)

    def wanted(layer: nn.Module, name: str) -> bool:
        fits = isinstance(layer, nn.Linear) and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)
        if fits:
            converted.append(name)
        return fits

    convert_to_float8_training(backbone.blocks, config=Float8LinearConfig(emulate=emulate), module_filter_fn=wanted)
    return converted
