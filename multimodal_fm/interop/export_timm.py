"""A run as a Vision Transformer of timm, where it has that shape: `block: classic`, pictures alone.

    timm.create_model("local-dir:out", pretrained=True)

The folder is that of timm's models on the Hub: config.json and model.safetensors. A classifier that pools as timm does
becomes its classifier.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from .export_base import Source, Written, difference, examples, pad, read

ARCHITECTURES = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}  # timm's, by the eps of their norms
LAYERS = {
    "attention.project_in": "attn.qkv",
    "attention.project_out": "attn.proj",
    "norm_1": "norm1",
    "norm_2": "norm2",
    "feed_forward.project_in": "mlp.fc1",
    "feed_forward.project_out": "mlp.fc2",
}


def write(source: Source, work: Path) -> Written:
    """See the top of the file. Raises UserError where the model has another shape."""
    import timm

    _check(source)
    config, prefix = _config(source)
    tensors, mapping, notes = _tensors(source, prefix, config["num_classes"])
    save_file(
        {n: t.detach().clone().contiguous() for n, t in tensors.items()}, work / "model.safetensors", {"format": "pt"}
    )
    (work / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    vit: Any = timm.create_model(f"local-dir:{work}", pretrained=True).eval()
    sequences = examples(source.model, "image", seed=1, whole=True)
    patch, rows = source.model.tokenizers["image"].config.patch, source.model.config.backbone.grid[0]
    whole = pad(sequences)[0].unflatten(1, (rows, rows)).unflatten(3, (patch, patch, 3)).permute(0, 5, 1, 3, 2, 4)
    pixels = ((whole.flatten(4).flatten(2, 3).double() / 255 - 0.5) / (64 / 255)).float()
    with torch.no_grad():
        found = {"hidden": vit.forward_features(pixels).flatten(0, 1)}
        if config["num_classes"]:
            found["logits"] = vit(pixels)
    return Written({"image": difference(found, read(source.model, "image", sequences))}, mapping, notes)


def _check(source: Source) -> None:
    """Raises UserError that says what a Vision Transformer of timm has not."""
    model, backbone, wrong = source.model, source.model.config.backbone, []
    if set(model.tokenizers) - {"image", "prompt"} or "image" not in model.tokenizers:
        wrong.append(f"the model reads {', '.join(m for m in model.tokenizers if m != 'prompt')}, not pictures alone")
    elif not (model.tokenizers["image"].config.square and model.tokenizers["image"].config.enlarge):
        wrong.append("pictures keep their own grids (square and enlarge are off)")
    if backbone.block != "classic" or backbone.experts:
        wrong.append("its blocks are of this package (block: modern)" if not backbone.experts else "it has experts")
    elif backbone.norm != "pre" or backbone.max_positions:
        wrong.append("its norms or positions are those of a model of texts")
    elif backbone.norm_eps not in ARCHITECTURES:
        wrong.append(
            f"norm_eps is {backbone.norm_eps:g}, timm's are {' and '.join(f'{eps:g}' for eps in ARCHITECTURES)}"
        )
    if not wrong and backbone.grid != [int(model.tokenizers["image"].config.max_tokens ** 0.5)] * 2:
        wrong.append("its pictures do not fill the grid of positions")
    if wrong:
        raise UserError(f"timm: cannot be expressed: {'; '.join(wrong)}")


def _config(source: Source) -> tuple[dict[str, Any], int]:
    """What config.json says, and how many learned tokens stand before the patches."""
    model, backbone = source.model, source.model.config.backbone
    patch, rows = model.tokenizers["image"].config.patch, backbone.grid[0]
    prefix = model.tokenizers["prompt"].config.count if "prompt" in model.tokenizers else 0
    head = model.config.heads.get("classify")
    pool = "token" if prefix else "avg"
    classes = head.config.classes if head and head.config.pool == ("first" if prefix else "mean") else []
    source.left_out += [f"head {name}" for name in model.heads if name != "classify" or not classes]
    args = {
        "img_size": patch * rows,
        "patch_size": patch,
        "embed_dim": backbone.width,
        "depth": backbone.depth,
        "num_heads": backbone.num_heads,
        "mlp_ratio": backbone.mlp_ratio,
        "class_token": prefix > 0,
        "reg_tokens": max(prefix - 1, 0),
        "no_embed_class": prefix != 1,
        "pre_norm": backbone.norm_in,
        "act_layer": backbone.activation,
        "fc_norm": False,
        "global_pool": pool,
    }
    pixels = {"input_size": [3, patch * rows, patch * rows], "interpolation": "bilinear", "crop_pct": 1.0}
    pixels |= {"crop_mode": "squash", "mean": [0.5] * 3, "std": [64 / 255] * 3}
    pixels |= {"num_classes": len(classes), "first_conv": "patch_embed.proj", "classifier": "head"}
    pixels |= {"label_names": classes} if classes else {}
    config = {"architecture": ARCHITECTURES[backbone.norm_eps], "num_classes": len(classes)}
    config |= {"num_features": backbone.width, "global_pool": pool, "model_args": args, "pretrained_cfg": pixels}
    return config, prefix


def _tensors(source: Source, prefix: int, num_classes: int) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """The tensors by timm's names, which of ours became which, and notes."""
    state, model, notes = source.model.state_dict(), source.model, []
    patch = model.tokenizers["image"].config.patch
    pairs = {"backbone.norm_out": "norm"} | ({"backbone.norm_in": "norm_pre"} if model.config.backbone.norm_in else {})
    for block in range(model.config.backbone.depth):
        pairs |= {f"backbone.blocks.{block}.{ours}": f"blocks.{block}.{theirs}" for ours, theirs in LAYERS.items()}
    pairs |= {"heads.classify.logits": "head"} if num_classes else {}
    mapping = {f"{a}.{kind}": f"{b}.{kind}" for a, b in pairs.items() for kind in ("weight", "bias")}
    tensors = {theirs: state[ours] for ours, theirs in mapping.items()}
    convolution = state["embedders.image.project.weight"].unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
    bias, vector = state["embedders.image.project.bias"], state["modality_vectors.image"]
    cells = state["backbone.positions.cell.weight"]
    tensors["patch_embed.proj.weight"], mapping["embedders.image.project.weight"] = (
        convolution,
        "patch_embed.proj.weight",
    )
    if vector.any():
        bias = bias + vector
        notes.append("the modality's vector was added to the bias of the patches")
    if not model.config.backbone.norm_in:
        tensors["patch_embed.proj.bias"] = bias
        mapping["embedders.image.project.bias"] = "patch_embed.proj.bias"
    elif bias.any():  # timm's patches have none where a norm follows
        cells = cells + bias
        notes.append("the bias of the patches was added to the positions")
    if prefix == 1:
        cells = torch.cat([torch.zeros_like(cells[:1]), cells])
    tensors["pos_embed"], mapping["backbone.positions.cell.weight"] = cells[None], "pos_embed"
    if prefix:
        learned = state["embedders.prompt.weight"]
        if state["modality_vectors.prompt"].any():
            learned = learned + state["modality_vectors.prompt"]
            notes.append("the modality's vector of the class token was added to it")
        tensors["cls_token"], mapping["embedders.prompt.weight"] = learned[None, :1], "cls_token"
        if prefix > 1:
            tensors["reg_token"], mapping["embedders.prompt.weight"] = learned[None, 1:], "cls_token, reg_token"
    return tensors, mapping, notes
