"""Low-rank adapters in the backbone (LoRA, Hu et al. 2021), by Hugging Face's `peft`, and their small files.

An adapter's folder holds adapter.safetensors (the low-rank matrices, and the heads and learned tokens that were trained
with them) and adapter.json, which names the base by a hash of its weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .corpus.storage import write_atomic
from .errors import UserError

NAME = "default"  # peft's name of the one adapter
PROJECTIONS = ("project_in", "project_out")


@dataclass
class Config:
    rank: int = 0  # of the matrices that are learned; 0: no adapters
    alpha: float = 16.0  # the matrices' product is multiplied by alpha over rank
    dropout: float = 0.0  # of what the adapters read, in training
    targets: list[str] = field(default_factory=lambda: list(PROJECTIONS))  # names of the linear layers that are adapted

    def __post_init__(self):
        if self.rank < 0 or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise ValueError("rank is 0 or more, alpha above 0, dropout a share from 0 to below 1")
        if unknown := [name for name in self.targets if name not in PROJECTIONS]:
            raise ValueError(f"targets are {' and '.join(PROJECTIONS)}, not {unknown[0]!r}")


def inject(backbone: nn.Module, config: Config) -> None:
    """Put adapters into the backbone; its output stays what it was until they have learned. Raises UserError."""
    if not config.rank:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("lora needs Hugging Face peft: pip install 'multimodal_fm[lora]'") from None
    alpha: Any = config.alpha  # peft divides it by the rank, whatever number it is
    settings = LoraConfig(r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=config.targets)
    inject_adapter_in_model(settings, backbone, adapter_name=NAME)
    backbone.requires_grad_(True)  # what learns is the run's to say


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by name."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model without adapters that computes the same: each product added to its weight."""
    layers = adapted_layers(model)
    tensors = {}
    for name, value in model.state_dict().items():
        if ".lora_" in name:
            continue
        owner = name.removesuffix(".base_layer.weight")
        delta = layers[owner].get_delta_weight(NAME) if owner in layers else 0.0
        tensors[plain_name(name)] = value + delta
    return tensors


def base_hash(tensors: dict[str, Tensor]) -> str:
    """A hash of the backbone's and the embedders' weights, whatever heads or adapters stand beside them."""
    digest = hashlib.sha256()
    for name in sorted(n for n in tensors if n.startswith(("backbone.", "embedders.")) and ".lora_" not in n):
        if name.startswith("embedders.prompt."):
            continue
        digest.update(plain_name(name).encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_adapter(model, folder: str | Path, names: list[str]) -> Path:
    """Write the parameters of these names, and what they are for, to `folder`. Raises UserError."""
    from safetensors.torch import save

    from .config import to_data

    folder = Path(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items() if name in names}
    about = {
        "base": base_hash(model.state_dict()),
        "lora": dataclasses.asdict(model.config.lora),
        "heads": {name: to_data(head) for name, head in model.config.heads.items()},
        "tokenizers": {m: _settings(to_data(t)) for m, t in model.tokenizers.items()},
        "parameters": sum(value.numel() for value in tensors.values()),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "adapter.safetensors", save(tensors))
        write_atomic(folder / "adapter.json", json.dumps(about, indent=1).encode())
    except OSError as error:
        raise UserError(f"{folder}: the adapter cannot be written: {error.strerror}") from None
    return folder


def _settings(tokenizer: dict) -> dict:
    """Without the file of what was learned, which is the base's."""
    return {name: value for name, value in tokenizer.items() if name != "file"}


def read_adapter(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """What adapter.json says, and the tensors. Nothing is unpickled. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        about = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
        if not isinstance(about, dict) or not isinstance(about.get("base"), str):
            raise ValueError("adapter.json names no base")
        tokenizers = about.setdefault("tokenizers", {})
        if not isinstance(tokenizers, dict) or not all(isinstance(one, dict) for one in tokenizers.values()):
            raise ValueError("adapter.json: tokenizers are no map of settings")
        return about, load_file(folder / "adapter.safetensors")
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{folder}: no adapter can be read: {said}") from None
