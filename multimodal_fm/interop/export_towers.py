"""What ONNX and torch.export share: one module a modality with tensors in and out, what goes in, and the check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..corpus.storage import write_atomic
from ..tokens import Tokens
from .export_base import Source, difference, examples, pad, read
from .exported.padded_multimodal_fm import IdsTower, PaddedModel, PatchesTower, Tower

INPUTS = {"ids": ("input_ids", "attention_mask"), "pixels": ("patches", "attention_mask", "position")}
INPUTS["values"] = INPUTS["pixels"]
MEANING = {
    "input_ids": "(batch, length) int64: BEGIN (0), the ids of the text plus 2, END (1); padding is any id",
    "attention_mask": "(batch, length) int64: 1 where there is a token, 0 where there is padding",
    "position": "(batch, length, 3) int64: time, row and column of each patch, counted in patches from 0",
}
PATCHES = {
    "pixels": "(batch, length, patch * patch * 3) uint8: the pixels of a patch row by row, red, green and blue of each",
    "values": "(batch, length, patch_mels * patch_frames) float32: log-mel of a patch, band by band",
}
OUTPUTS = {
    "embeddings": "(batch, E) float32: unit vectors, comparable across modalities",
    "features": "(batch, D) float32: the mean of the backbone's output over the tokens",
    "logits": "(batch, classes) float32",
}


def describe_tower(config: dict[str, Any], modality: str, file: str) -> dict[str, Any]:
    """What inputs.json says of a modality: how its inputs are made, and what comes out."""
    of = config["modalities"][modality]
    inputs = {name: MEANING.get(name, PATCHES.get(of["kind"], "")) for name in INPUTS[of["kind"]]}
    heads = {"retrieval": "embeddings", "": "features", "classify": "logits"}
    names = [name for head, name in heads.items() if not head or head in config["heads"]]
    classes = {"classes": config["heads"]["classify"]["classes"]} if "logits" in names else {}
    return {"file": file, "inputs": inputs, "outputs": {n: OUTPUTS[n] for n in names}, "tokenizer": of, **classes}


def write_towers(work: Path, about: dict[str, Any]) -> None:
    write_atomic(work / "inputs.json", json.dumps(about, indent=1, ensure_ascii=False).encode())


def inputs_of(kind: str, sequences: list[Tokens]) -> tuple[Tensor, ...]:
    """Sequences as the tower's arguments."""
    content, mask, position = pad(sequences)
    return (content, mask) if kind == "ids" else (content, mask, position)


def make_tower(model: PaddedModel, modality: str) -> Tower:
    return (IdsTower if model.config["modalities"][modality]["kind"] == "ids" else PatchesTower)(model, modality)


def trace(tower: Tower, kind: str, sequences: list[Tokens]) -> torch.export.ExportedProgram:
    """The program of a tower, with a batch and a length of any size."""
    given = inputs_of(kind, sequences)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    with torch.no_grad():
        return torch.export.export(tower, given, dynamic_shapes=tuple({0: batch, 1: length} for _ in given))


def check(run: Any, about: dict[str, Any], source: Source, modality: str) -> dict[str, float]:
    """What `run` makes of other sequences than those it was traced with, alone and together, against the original.

    run: takes the tower's arguments as tensors and gives its outputs.
    """
    worst: dict[str, float] = {"inputs": 0}
    kind = about["tokenizer"]["kind"]
    sequences = examples(source.model, modality, seed=1)
    for own in (sequences, sequences[:1], sequences[-1:]):
        outputs = dict(zip(about["outputs"], run(*inputs_of(kind, own)), strict=True))
        found = difference(outputs, read(source.model, modality, own))
        worst = {name: max(worst.get(name, 0), value) for name, value in found.items()}
    return worst
