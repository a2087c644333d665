"""What the importers of weights share: tensors that are each asked for once, and a model with `block: classic` of them.

D width, P pixels of a side of a patch, S pixels of a side of a picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..backbone import Config as BackboneConfig
from ..config import Plugin, to_data
from ..errors import UserError
from ..model import Model, ModelConfig, load_weights
from ..objectives.base import Objective
from ..run_dir import checkpoint
from ..tokenizers import image, prompt
from ..tokenizers.base import Tokenizer

Linear = tuple[Tensor, Tensor]  # weight (out, in) and bias (out,)


class Tensors:
    """The tensors of a checkpoint, as float32. Whatever nobody asks for is an error, so that nothing is left out."""

    def __init__(self, tensors: dict[str, Tensor], where: str):
        self.left, self.where = dict(tensors), where

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> Tensor:
        """Raises UserError where there is no such tensor."""
        if name not in self.left:
            raise UserError(f"{self.where}: has no tensor {name}")
        return self.left.pop(name).float()

    def linear(self, name: str) -> Linear:
        """A layer's weight and bias; zeros where it has no bias."""
        weight = self.take(f"{name}.weight")
        return weight, self.take(f"{name}.bias") if f"{name}.bias" in self else weight.new_zeros(len(weight))

    def norm(self, name: str) -> dict[str, Tensor]:
        return {"weight": self.take(f"{name}.weight"), "bias": self.take(f"{name}.bias")}

    def strip(self, prefix: str) -> None:
        """Take a prefix off the names that have it."""
        self.left = {name.removeprefix(prefix): value for name, value in self.left.items()}

    def drop(self, *patterns: str) -> None:
        """Leave out what matches, which is not imported and not needed for the hidden states."""
        self.left = {n: v for n, v in self.left.items() if not any(re.fullmatch(p, n) for p in patterns)}

    def finish(self) -> None:
        """Raises UserError where a tensor was not asked for."""
        if self.left:
            names = sorted(self.left)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{self.where}: no place for {', '.join(names[:3])}{more}: its architecture is another one")


def stack(layers: Iterable[Linear]) -> Linear:
    """Several layers of one input as one, as our attention has queries, keys and values."""
    weights, biases = zip(*layers, strict=True)
    return torch.cat(weights), torch.cat(biases)


def named(prefix: str, layer: Linear | dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer as our state dict names them."""
    parts = layer if isinstance(layer, dict) else dict(zip(("weight", "bias"), layer, strict=True))
    return {f"{prefix}.{name}": value for name, value in parts.items()}


@dataclass(frozen=True)
class Names:
    """What the layers of a block are called in a checkpoint."""

    block: str  # what stands before them, with {} for the block's number
    project_in: tuple[str, ...]  # queries, keys and values, in one layer or in three
    project_out: str
    norm_1: str
    feed_in: str
    feed_out: str
    norm_2: str


def read_blocks(tensors: Tensors, names: Names, depth: int) -> dict[str, Tensor]:
    """The tensors of all blocks by our names."""
    found = {}
    for number in range(depth):
        theirs, ours = names.block.format(number), f"backbone.blocks.{number}"
        found |= named(f"{ours}.attention.project_in", stack(tensors.linear(theirs + n) for n in names.project_in))
        for name, linear in (
            ("attention.project_out", names.project_out),
            ("feed_forward.project_in", names.feed_in),
            ("feed_forward.project_out", names.feed_out),
        ):
            found |= named(f"{ours}.{name}", tensors.linear(theirs + linear))
        for name, norm in (("norm_1", names.norm_1), ("norm_2", names.norm_2)):
            found |= named(f"{ours}.{name}", tensors.norm(theirs + norm))
    return found


def patch_embedding(convolution: Linear, mean: list[float], std: list[float], scale: float = 1 / 255) -> Linear:
    """The convolution over patches, weight (D, 3, P, P), as our layer of flat patches (D, P * P * 3), in which pixels
    lie row by row and are (x - 127.5) / 64. The normalization that the original does before it, (scale * x - mean) /
    std by color, is worked into weight and bias, so that both read the same bytes."""
    weight, bias = (one.double() for one in convolution)
    per_color = weight / torch.tensor(std, dtype=torch.float64)[:, None, None]
    shift = 127.5 * scale - torch.tensor(mean, dtype=torch.float64)
    bias = bias + (per_color.sum((2, 3)) * shift).sum(1)
    return (per_color * (64 * scale)).permute(0, 2, 3, 1).flatten(1).float(), bias.float()


def picture_tokenizers(patch: int, side: int, num_prefix: int) -> dict[str, Tokenizer]:
    """The tokenizers of a model of pictures of side * side patches with so many learned tokens before them."""
    config = image.Config(patch=patch, max_tokens=side**2, enlarge=True, square=True)
    found: dict[str, Tokenizer] = {"image": image.Tokenizer(config)}
    if num_prefix:
        found["prompt"] = prompt.Tokenizer(prompt.Config(count=num_prefix))
    return found


def make_model(
    backbone: BackboneConfig, tokenizers: dict[str, Tokenizer], tensors: dict[str, Tensor], where: str, **heads: Plugin
) -> Model:
    """The model of these tensors; those of `modality_vectors` and `mask_tokens` that are not given are zeros.

    Raises UserError where they do not fit.
    """
    model = Model(ModelConfig(tokenizers, backbone, heads))
    for group in ("modality_vectors", "mask_tokens"):
        for modality in tokenizers:
            tensors.setdefault(f"{group}.{modality}", torch.zeros(backbone.width))
    load_weights(model, tensors, Path(where))
    return model.eval()


def save(model: Model, run_dir: str | Path, objectives: dict[str, Objective] | None = None) -> Path:
    """Write a model as a run with one checkpoint, which `mmfm.load`, `mmfm tune`, `mmfm evaluate` and `init:` read;
    returns the checkpoint's folder. objectives: what it was trained by, by name as in `task/objective`.

    Raises UserError where it cannot be written.
    """
    objectives, tasks, trained = objectives or {}, {}, {}
    for name, objective in objectives.items():
        task, _, own = name.partition("/")
        empty = {"objectives": {}, "modalities": objective.modalities, "batch_size": 1, "sources": {}}
        plugin = {"objective": type(objective).__module__.rpartition(".")[2], **to_data(objective.config)}
        tasks.setdefault(task, empty)["objectives"][own] = plugin
        trained |= {f"{name}.{key}": value for key, value in objective.state_dict().items()}
    tensors = {"model": model.state_dict(), "ema": model.state_dict()}
    tensors |= {"objectives": trained, "ema_objectives": trained, "optimizer": {}}
    settings = to_data(model.config)
    data = {"model": settings, "config": {"model": settings, "sources": {}, "tasks": tasks}}
    data["state"] = {"step": 0, "seed": 0, "data": {}, "origin": {"step": 0, "drawn": {}}, "drawn": {}}
    files = {modality: tokenizer.file for modality, tokenizer in model.tokenizers.items() if tokenizer.file}
    return checkpoint.save(checkpoint.folder_of(run_dir, 0), tensors, data, files)
