"""What the importers of weights share: tensors that are each asked for once, and a model with `block: classic` of them.

D width, P pixels of a side of a patch, S pixels of a side of a picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..backbone import Config as BackboneConfig
from ..config import Plugin, build, to_data
from ..errors import UserError
from ..heads import retrieval
from ..model import HEADS, Model, ModelConfig, load_weights
from ..objectives.base import Objective
from ..run_dir import checkpoint
from ..tokenizers import image, prompt
from ..tokenizers.base import Tokenizer

LARGEST = 1 << 24  # of a number of a stranger's configuration that says how large something is


class Tensors:
    """The tensors of a checkpoint, by name, as float32. Whatever nobody asks for is an error, so that nothing is left
    out. `found` is what was made of them, by our names, `mapping` how: a row for each of ours."""

    def __init__(self, tensors: dict[str, Tensor], where: str):
        self.all, self.where = dict(tensors), where
        self.on_disk = {name: name for name in tensors}
        self.taken: set[str] = set()
        self.found: dict[str, Tensor] = {}
        self.mapping: list[dict[str, Any]] = []
        self.not_taken: list[dict[str, Any]] = []

    def __contains__(self, name: str) -> bool:
        return name in self.all

    def take(self, name: str) -> Tensor:
        """Raises UserError where there is no such tensor, or where it cannot be a weight."""
        if name not in self.all:
            raise UserError(f"{self.where}: has no tensor {name}")
        tensor = self.all[name]
        if not tensor.is_floating_point():
            raise UserError(f"{self.where}: {name} is {tensor.dtype}: quantized weights cannot be imported")
        if not torch.isfinite(tensor := tensor.float()).all():
            raise UserError(f"{self.where}: {name} holds NaN or infinity")
        self.taken.add(name)
        return tensor

    def put(self, ours: str, *theirs: str, make: Callable[..., Tensor] | None = None, how: str = "as it is") -> Tensor:
        """Make one of our tensors of some of theirs; how: what `make` does, in words. Raises UserError."""
        values = [self.take(name) for name in theirs]
        try:
            self.found[ours] = value = make(*values) if make else values[0]
        except (RuntimeError, IndexError) as error:  # shapes that do not go together
            shapes = ", ".join(f"{name} {tuple(one.shape)}" for name, one in zip(theirs, values, strict=True))
            raise UserError(f"{self.where}: {shapes} cannot be {ours}: {str(error).splitlines()[0]}") from None
        sources = {self.on_disk[name]: list(one.shape) for name, one in zip(theirs, values, strict=True)}
        self.mapping.append({"ours": ours, "shape": list(value.shape), "theirs": sources, "how": how})
        return value

    def linear(self, ours: str, *theirs: str, transposed: bool = False, scale: str = "") -> None:
        """A layer, or several of one input as one, as our attention has queries, keys and values; zeros for a bias that
        it has not. scale: a tensor that multiplies what the layer gives."""
        scales = (scale,) if scale and scale in self else ()
        notes = [*["transposed"] * transposed, *["stacked"] * (len(theirs) > 1), *["times the scale"] * len(scales)]

        def weights(*parts: Tensor) -> Tensor:
            whole = torch.cat([one.T if transposed else one for one in parts[: len(theirs)]])
            return whole * parts[-1][:, None] if scales else whole

        how = ", ".join(notes) or "as it is"
        size = len(self.put(f"{ours}.weight", *(f"{name}.weight" for name in theirs), *scales, make=weights, how=how))
        names = [f"{name}.bias" for name in theirs if f"{name}.bias" in self]

        def biases(*parts: Tensor) -> Tensor:
            given = dict(zip(names, parts, strict=False))
            rows = [given.get(f"{name}.bias", torch.zeros(size // len(theirs))) for name in theirs]
            return torch.cat(rows) * parts[-1] if scales else torch.cat(rows)

        if names:
            notes += ["zeros where there is none"] * (len(names) < len(theirs))
            how = ", ".join(one for one in notes if one != "transposed") or "as it is"
            self.put(f"{ours}.bias", *names, *scales, make=biases, how=how)
        else:
            self.zeros(f"{ours}.bias", size)

    def norm(self, ours: str, theirs: str) -> None:
        for name in ("weight", "bias"):
            self.put(f"{ours}.{name}", f"{theirs}.{name}")

    def zeros(self, ours: str, *shape: int) -> None:
        """One of our tensors that the original does not have."""
        self.found[ours] = torch.zeros(shape)
        self.mapping.append({"ours": ours, "shape": list(shape), "theirs": {}, "how": "zeros: the original has none"})

    def rename(self, pattern: str, to: str) -> None:
        """Replace what matches in the names. Raises UserError where two tensors would get one name."""
        names = {name: re.sub(pattern, to, name) for name in self.all}
        if len(set(names.values())) < len(names):
            raise UserError(f"{self.where}: holds two tensors of one name, with and without {pattern!r}")
        self.all = {names[name]: value for name, value in self.all.items()}
        self.on_disk = {new: self.on_disk[old] for old, new in names.items()}

    def drop(self, why: str, *patterns: str) -> None:
        """Leave out what matches, which is not imported and not needed for the hidden states."""
        for name in [n for n in self.all if n not in self.taken and any(re.fullmatch(p, n) for p in patterns)]:
            self.leave(name, why)
            del self.all[name]

    def leave(self, name: str, why: str) -> None:
        """Note a tensor, or a part of it, that is not taken."""
        self.not_taken.append({"theirs": self.on_disk[name], "shape": list(self.all[name].shape), "why": why})

    def finish(self) -> None:
        """Raises UserError where a tensor was not asked for."""
        if names := sorted(self.all.keys() - self.taken):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{self.where}: no place for {', '.join(names[:3])}{more}: its architecture is another one")


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
    scale_1: str = ""  # layer scale (Touvron et al. 2021) of each branch, which is worked into its last layer
    scale_2: str = ""
    transposed: bool = False  # matrices (in, out), as GPT-2's


def read_blocks(tensors: Tensors, names: Names, depth: int) -> None:
    for number in range(depth):
        theirs, ours = names.block.format(number), f"backbone.blocks.{number}"
        for name, layers, scale in (
            ("attention.project_in", names.project_in, ""),
            ("attention.project_out", (names.project_out,), names.scale_1),
            ("feed_forward.project_in", (names.feed_in,), ""),
            ("feed_forward.project_out", (names.feed_out,), names.scale_2),
        ):
            scale = theirs + scale if scale else ""
            layers = (theirs + one for one in layers)
            tensors.linear(f"{ours}.{name}", *layers, transposed=names.transposed, scale=scale)
        tensors.norm(f"{ours}.norm_1", theirs + names.norm_1)
        tensors.norm(f"{ours}.norm_2", theirs + names.norm_2)


def read_patches(tensors: Tensors, theirs: str, mean: list[float], std: list[float], scale: float = 1 / 255) -> None:
    """The convolution over patches, weight (D, 3, P, P), as our layer of flat patches (D, P * P * 3), in which pixels
    lie row by row and are (x - 127.5) / 64. The normalization that the original does before it, (scale * x - mean) /
    std by color, is worked into weight and bias, so that both read the same bytes."""
    shift = 127.5 * scale - torch.tensor(mean, dtype=torch.float64)

    def per_color(weight: Tensor) -> Tensor:
        return weight.double() / torch.tensor(std, dtype=torch.float64)[:, None, None]

    def weights(weight: Tensor) -> Tensor:
        return (per_color(weight) * (64 * scale)).permute(0, 2, 3, 1).flatten(1).float()

    def biases(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        moved = (per_color(weight).sum((2, 3)) * shift).sum(1)
        return (moved if bias is None else moved + bias.double()).float()

    how = f"flat, with the normalization of pixels (mean {mean}, std {std}, scale {scale:.6g}) worked in"
    bias = [f"{theirs}.bias"] if f"{theirs}.bias" in tensors else []
    tensors.put("embedders.image.project.weight", f"{theirs}.weight", make=weights, how=how)
    tensors.put("embedders.image.project.bias", f"{theirs}.weight", *bias, make=biases, how=how)


def picture_tokenizers(patch: int, side: int, num_prefix: int) -> dict[str, Tokenizer]:
    """The tokenizers of a model of pictures of side * side patches with so many learned tokens before them."""
    config = image.Config(patch=patch, max_tokens=side**2, enlarge=True, square=True)
    return with_prompt({"image": image.Tokenizer(config)}, num_prefix)


def with_prompt(tokenizers: dict[str, Tokenizer], num_prefix: int) -> dict[str, Tokenizer]:
    """With so many learned tokens before each sequence."""
    own = {"prompt": prompt.Tokenizer(prompt.Config(count=num_prefix))} if num_prefix else {}
    return {**tokenizers, **own}


def retrieval_head(tensors: Tensors, tokenizers: dict[str, Tokenizer], pool: str, width: int) -> dict[str, Plugin]:
    """The head of the projection (D, E) that `tensors.found` holds for one modality; the others have no use for it."""
    names = [f"heads.retrieval.projection.{modality}" for modality in tokenizers]
    size = next(tensors.found[name].shape[1] for name in names if name in tensors.found)
    for name in names:
        if name not in tensors.found:
            tensors.zeros(name, width, size)
    config = build(retrieval.Config, {"embed_dim": size, "pool": pool}, tensors.where)
    return {"retrieval": Plugin(HEADS, "retrieval", retrieval.Head, config)}


def make_model(
    backbone: BackboneConfig, tokenizers: dict[str, Tokenizer], tensors: Tensors, heads: dict[str, Plugin] | None = None
) -> Model:
    """The model of what was found; those of `modality_vectors` and `mask_tokens` that were not are zeros.

    Nothing is allocated before all shapes have been compared. Raises UserError where they do not fit.
    """
    for group in ("modality_vectors", "mask_tokens"):
        for modality in tokenizers:
            if f"{group}.{modality}" not in tensors.found:
                tensors.zeros(f"{group}.{modality}", backbone.width)
    config = ModelConfig(tokenizers, backbone, heads or {})
    try:
        with torch.device("meta"):
            model = Model(config)
    except (RuntimeError, OverflowError, ValueError) as error:  # numbers that no tensor can have
        raise UserError(f"{tensors.where}: {str(error).splitlines()[0]}") from None
    load_weights(model, tensors.found, Path(tensors.where), assign=True)
    return model.eval()


@dataclass
class Imported:
    """A model with where its weights come from."""

    model: Model
    tensors: Tensors
    library: str  # which has the original
    architecture: str
    differences: list[str] = field(default_factory=list)  # what the model does otherwise, in words
    tokenizer: dict[str, Any] = field(
        default_factory=dict
    )  # how ids of texts are numbered, or why strings are not read
    ids: list[int] | None = None  # the original's id of each of ours; None: the same
    objectives: dict[str, Objective] = field(default_factory=dict)
    reference: Callable[[], Callable[[Tensor], Tensor]] | None = None
    """Loads the original: from ids (1, L), pixels (1, S, S, 3) or log-mel (1, T, M) to hidden states (L, D). Raises
    ImportError where its library is not installed."""


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


def read_json(file: Path) -> dict[str, Any]:
    """Raises UserError where it holds no map of keys."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', '') or error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} holds no map of keys")
    return data


def whole_number(settings: dict[str, Any], name: str, where: Path | str) -> int:
    """Raises UserError where it is none, or one that no model has."""
    value = settings.get(name)
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise UserError(f"{where}: {name} is a whole number from 1 to {LARGEST}, not {str(value)[:40]!r}")
    return value


def weight_files(folder: Path, name: str = "model") -> list[Path]:
    """The files of NAME.safetensors, or those that its index names. Raises UserError where there are only pickles."""
    index, file = folder / f"{name}.safetensors.index.json", folder / f"{name}.safetensors"
    if not file.exists() and index.exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise UserError(f"{index} holds no weight_map")
        return [folder / one for one in sorted({Path(str(one)).name for one in listed.values()})]
    if not file.exists():
        pickles = [p.name for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
        if pickles:
            raise refuse_pickle(folder / pickles[0])
        raise UserError(f"{file} is not there")
    return [file]


def refuse_pickle(file: Path) -> UserError:
    return UserError(
        f"{file} is a pickle, which can hold any program and is not opened; convert it where you trust it: "
        f'safetensors.torch.save_file(torch.load("{file.name}", weights_only=True), "model.safetensors")'
    )


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files, whose reader checks header and sizes before it maps anything. Raises
    UserError."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            found = load_file(file)
        except (OSError, SafetensorError, ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
        if twice := found.keys() & tensors.keys():
            raise UserError(f"{file}: {min(twice)} stands in another file too")
        tensors |= found
    return tensors
